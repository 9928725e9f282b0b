"""What ``runtime="auto"`` takes, and why; times and memory are given, not measured, but once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.packing.offsets import count_block_offsets
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.runtime import choice
from hf_adaptive_sparse.runtime.choice import (
    CompressedWeights,
    choose_runtime,
    main_device,
    may_offload_to_disk,
    time_layer,
)
from hf_adaptive_sparse.runtime.conversion import sparse_linears

CPU = torch.device("cpu")
GIB = 1 << 30


def weights(rows: int = 4096, count: int = 16, **changes: object) -> CompressedWeights:
    """So many bf16 weights of 4,096 columns, half of each gone."""
    names = [f"layers.{index}" for index in range(count)]
    fields: dict[str, object] = {
        "shapes": dict.fromkeys(names, (rows, 4096)),
        "formats": dict.fromkeys(names, ValueFormat(16)),
        "ratios": dict.fromkeys(names, 0.5),
        "dtype": torch.bfloat16,
    }
    return CompressedWeights(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A machine with 64 GiB free on which a token takes as long as the test says."""
    figures: dict[str, object] = {"free": 64 * GIB, "seconds": (1e-3, 5e-4), "timed": []}

    def timed(*layer: object) -> object:
        figures["timed"].append(layer)  # type: ignore[attr-defined]
        return figures["seconds"]

    monkeypatch.setattr(choice, "available_bytes", lambda device: figures["free"])
    monkeypatch.setattr(choice, "time_layer", timed)
    return figures


def test_the_faster_one_is_taken(machine: dict[str, object]) -> None:
    chosen = choose_runtime("auto", weights(), CPU)
    assert chosen.runtime == "sparse"
    assert "500 µs in a layer of 4096 x 4096 on cpu, 1000 µs with dense" in chosen.reason
    assert "instead of 512 MiB" in chosen.reason
    assert machine["timed"] == [((4096, 4096), 16, None, 0.5, torch.bfloat16, CPU)]
    machine["seconds"] = (1e-3, 1.1e-3)
    assert choose_runtime("auto", weights(), CPU).runtime == "dense"
    machine["seconds"] = (1e-3, 1e-3)
    assert choose_runtime("auto", weights(), None).runtime == "sparse"


def test_what_alone_fits_is_taken(machine: dict[str, object]) -> None:
    machine |= {"free": weights().dense_bytes - 1, "seconds": (1e-3, 9.0)}
    chosen = choose_runtime("auto", weights(), CPU)
    assert chosen.runtime == "sparse"
    assert chosen.reason.startswith("the dense weights take 512 MiB")
    machine["free"] = 1  # neither fits: memory says nothing
    assert choose_runtime("auto", weights(), CPU).runtime == "dense"
    machine["free"] = None
    assert choose_runtime("auto", weights(), CPU).runtime == "dense"


def test_small_models_and_what_cannot_multiply_stay_dense(machine: dict[str, object]) -> None:
    small = choose_runtime("auto", weights(count=2), CPU)
    assert (small.runtime, "small (64 MiB" in small.reason) == ("dense", True)
    double = choose_runtime("auto", weights(dtype=torch.float64), CPU)
    assert (double.runtime, "float64" in double.reason) == ("dense", True)
    for asked in ("auto", "sparse"):
        nothing = choose_runtime(asked, weights(count=0), CPU)
        assert (nothing.runtime, nothing.reason) == ("dense", "no weight is stored compressed")
    assert not machine["timed"]


def test_what_was_asked_for_is_taken(machine: dict[str, object]) -> None:
    for asked in ("dense", "sparse"):
        assert choose_runtime(asked, weights(), CPU).runtime == asked
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch.float64"):
        choose_runtime("sparse", weights(dtype=torch.float64), CPU)
    assert not machine["timed"]


@pytest.mark.parametrize(("bits", "group"), [(16, None), (8, None), (8, 64), (4, 64)])
def test_the_bytes_that_are_foretold_are_those_that_it_takes(bits: int, group: int | None) -> None:
    torch.manual_seed(0)
    dense = torch.randn(64, 256)
    for row in dense:
        row[torch.randperm(256)[:128]] = 0.0
    made = SparseWeight.from_dense(dense.bfloat16(), bits, group)
    one = weights(
        shapes={"a": (64, 256)}, formats={"a": ValueFormat(bits, group)}, ratios={"a": 0.5}
    )
    assert one.sparse_bytes(torch.device("cpu")) == made.nbytes
    blocks = count_block_offsets(made.bitmask, 256)
    assert one.sparse_bytes(torch.device("cuda")) == made.nbytes + blocks.nbytes
    assert one.dense_bytes == 2 * dense.numel()


def test_a_model_that_changes_its_own_weights_stays_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    model = RwkvForCausalLM(RwkvConfig(**sizes, attention_hidden_size=32, rescale_every=2)).eval()
    refusal = r"runtime='sparse'.*rescales its own .*runtime='dense'"
    sparse = has.SparsityConfig(metric="magnitude", runtime="sparse")
    with pytest.raises(ValueError, match=refusal):
        has.prune(model, sparse)
    has.prune(model, has.SparsityConfig(metric="magnitude"))
    assert model.rwkv.blocks[3].attention.output.weight.count_nonzero() == 32 * 32 / 2
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        type(model).from_pretrained(tmp_path, sparsity_config=has.SparsityConfig(runtime="sparse"))
    again = type(model).from_pretrained(tmp_path).eval()
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    # It takes the sparse runtime where it leaves them as they are.
    kept, plain = (
        type(model).from_pretrained(
            tmp_path, sparsity_config=has.SparsityConfig(runtime=runtime), rescale_every=0
        )
        for runtime in ("sparse", "dense")
    )
    assert sparse_linears(kept)
    torch.testing.assert_close(kept.eval()(ids).logits, plain.eval()(ids).logits)


def test_such_a_model_is_dense_whatever_is_faster(machine: dict[str, object]) -> None:
    chosen = choose_runtime("auto", weights(rewritten=True), CPU)
    assert chosen.runtime == "dense"
    assert "changes its weights" in chosen.reason
    assert machine["timed"] == []


@pytest.mark.parametrize(
    ("device_map", "device"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"a": "disk", "b": "cpu"}, "cpu"),
        ({"a": "cpu", "b": 1}, "cuda:1"),
        ("cuda:0", "cuda:0"),
        ({"": torch.device("meta")}, "meta"),
        ("auto", "cuda" if torch.cuda.is_available() else "cpu"),
    ],
)
def test_the_device_is_read_from_the_map(device_map: object, device: str) -> None:
    assert main_device(device_map) == torch.device(device)


@pytest.mark.parametrize(
    ("device_map", "may"),
    [
        (None, False),
        ({"a": "cpu", "b": 1, "c": torch.device("cpu")}, False),
        ({"a": "disk", "b": "cpu"}, True),
        ("disk", True),
        ("auto", True),
        ("sequential", True),
    ],
)
def test_whether_a_map_may_offload_to_disk(device_map: object, may: bool) -> None:
    assert may_offload_to_disk(device_map) is may


def test_a_layer_is_timed_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert min(time_layer((40, 72), 8, None, 0.5, torch.bfloat16, CPU)) > 0


def test_a_layer_is_timed_once() -> None:
    layer = ((32, 64), 8, None, 0.5, torch.float32, CPU)
    seconds = time_layer(*layer)
    assert all(value > 0 for value in seconds)
    assert time_layer(*layer) is seconds


def test_auto_is_decided_and_told_while_loading(
    tiny_llama: LlamaForCausalLM,
    tmp_path: Path,
    machine: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not sparse_linears(loaded)
    assert "small" in loaded.hf_quantizer.runtime_choice.reason
    monkeypatch.setattr(choice, "SMALL_BYTES", 0)
    with caplog.at_level(logging.INFO, "hf_adaptive_sparse"):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert len(sparse_linears(loaded)) == 28
    assert "Runtime: sparse, because a token takes 500 µs" in caplog.text
    assert loaded.config.quantization_config.runtime == "auto"
