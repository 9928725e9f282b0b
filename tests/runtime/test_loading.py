"""The sparse runtime through transformers: loading, saving, generating, and what it refuses."""

from __future__ import annotations

import copy
import hashlib
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.applying import check_before_loading
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.packing.stored_names import KINDS
from hf_adaptive_sparse.runtime.conversion import sparse_linears
from hf_adaptive_sparse.runtime.parameters import FrozenParameter
from hf_adaptive_sparse.runtime.sparse_linear import SparseLinear
from hf_adaptive_sparse.runtime.weight_view import FrozenWeightError
from tests.families.tiny_models import tiny_model

SPARSE = has.SparsityConfig(runtime="sparse")
DENSE = has.SparsityConfig(runtime="dense")
MIXED = {"*.mlp.*": 8, "*.q_proj": 4, "*.k_proj": 16, "*.v_proj": 8, "*.o_proj": 4}


@pytest.fixture(params=["llama", "llava"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made: PreTrainedModel = request.getfixturevalue(f"tiny_{request.param}")
    return made


def save(model: PreTrainedModel, folder: Path, **fields: object) -> Path:
    config = has.SparsityConfig(metric="magnitude", **fields)
    apply_config(model, config, progress=False)
    model.save_pretrained(folder)
    return folder


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 128, (2, 12), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "llava":
        ids[:, 1:5] = 4
        given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator).to(model.dtype)
    return given


def generate(model: PreTrainedModel) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**inputs(model), max_new_tokens=20, do_sample=False)
    return tokens


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All parameters by name, sparse ones decompressed."""
    found = dict(model.state_dict())
    for name, module in sparse_linears(model).items():
        for kind in KINDS:
            found.pop(f"{name}.weight_{kind}", None)
        found[f"{name}.weight"] = module.sparse_weight.to_dense()
    return found


def assert_same_weights(a: PreTrainedModel, b: PreTrainedModel) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    different = [
        name
        for name in left
        if not torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
    ]
    assert different == []


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*safetens*")}


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        *itertools.product((16, 8, 4, MIXED), (torch.float32, torch.bfloat16, torch.float16)),
        (12, torch.bfloat16),
        (MIXED | {"*.mlp.up_proj": 12}, torch.bfloat16),
    ],
    ids=str,
)
def test_both_runtimes_hold_the_same_values_and_save_the_same_files(
    model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype, bits: int | dict[str, int]
) -> None:
    save(model.to(dtype), tmp_path / "a", weight_bits=bits, kv_cache=8)
    sparse = type(model).from_pretrained(tmp_path / "a", sparsity_config=SPARSE)
    dense = type(model).from_pretrained(tmp_path / "a", sparsity_config=DENSE)
    assert len(sparse_linears(sparse)) == 28
    assert not sparse_linears(dense)
    assert sparse.dtype == dense.dtype == dtype
    assert_same_weights(sparse, dense)
    assert_same_weights(dense, model)
    sparse.save_pretrained(tmp_path / "b")
    dense.save_pretrained(tmp_path / "c")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")
    logits = [m(**inputs(m)).logits.float() for m in (sparse, dense)]
    assert torch.allclose(*logits, atol=0.05 if dtype != torch.float32 else 1e-4)
    assert generate(sparse).shape == generate(dense).shape


def test_generate_gives_the_tokens_of_the_dense_runtime(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    save(model, tmp_path, kv_cache=8)
    sparse = type(model).from_pretrained(tmp_path, sparsity_config=SPARSE)
    assert torch.equal(generate(sparse), generate(model))


def test_every_linear_with_a_ratio_is_sparse_and_no_other(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    save(tiny_llama, tmp_path, sparsity={"*.mlp.*": 0.5}, weight_bits={"*.layers.0.*": 8})
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE)
    bits = {name: module.bits for name, module in sparse_linears(loaded).items()}
    assert len(bits) == 4 * 3 + 4
    assert bits["model.layers.0.self_attn.q_proj"] == bits["model.layers.0.mlp.up_proj"] == 8
    assert bits["model.layers.1.mlp.up_proj"] == 16
    assert_same_weights(loaded, tiny_llama)
    assert loaded.config.quantization_config.format_version == 2


def test_memory_shows_the_saving(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tiny_llama.to(torch.bfloat16), tmp_path)
    sparse = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=DENSE)
    report, dense = has.sparsity_report(sparse), has.sparsity_report(plain)
    assert report.total.memory_bytes == sum(m.memory_bytes for m in sparse_linears(sparse).values())
    assert report.total.stored_bytes == dense.total.stored_bytes
    assert report.total.zeros == dense.total.zeros
    assert [m.name for m in report.modules] == [m.name for m in dense.modules]
    assert report.other_bytes == dense.other_bytes
    saved = plain.get_memory_footprint() - sparse.get_memory_footprint()
    assert saved == dense.total.memory_bytes - report.total.memory_bytes
    assert saved > 0.35 * dense.total.memory_bytes


def test_a_dense_checkpoint_is_pruned_and_then_compressed(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path / "dense")
    config = has.SparsityConfig(metric="magnitude", weight_bits=8, runtime="sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=config)
    assert len(sparse_linears(loaded)) == 28
    loaded.save_pretrained(tmp_path / "a")
    save(tiny_llama, tmp_path / "b", weight_bits=8)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_model_in_memory_is_compressed_where_it_is_asked_for(
    tiny_llama: LlamaForCausalLM, text_batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    config = has.SparsityConfig(runtime="sparse", weight_bits=4)
    has.prune(tiny_llama, config, text_batches, progress=False)
    assert len(sparse_linears(tiny_llama)) == 28
    tiny_llama.save_pretrained(tmp_path)
    assert_same_weights(tiny_llama, LlamaForCausalLM.from_pretrained(tmp_path))


def test_another_class_reads_it_too(
    tiny_llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    save(tiny_llava, tmp_path, weight_bits=8)
    bare = AutoModel.from_pretrained(tmp_path, sparsity_config=SPARSE)
    assert len(sparse_linears(bare)) == 28


@pytest.mark.parametrize(
    ("family", "encoder"), [("llava", "vision_tower"), ("qwen3_vl_moe", "visual")]
)
def test_a_part_is_saved_as_in_the_dense_runtime(tmp_path: Path, family: str, encoder: str) -> None:
    model = tiny_model(family)
    whole = save(model, tmp_path / "whole", weight_bits={"*layers.1.*": 8})
    saved = {}
    for config in (SPARSE, DENSE):
        loaded = type(model).from_pretrained(whole, sparsity_config=config)
        for part in ("language_model", encoder):
            folder = tmp_path / f"{config.runtime}-{part}"
            getattr(loaded.model, part).save_pretrained(folder)
            assert "quantization_config" not in (folder / "config.json").read_text()
            saved[config.runtime, part] = load_file(folder / "model.safetensors")
        loaded.save_pretrained(tmp_path / config.runtime)
        assert hashes(tmp_path / config.runtime) == hashes(whole)
    for part in ("language_model", encoder):
        sparse, dense = saved["sparse", part], saved["dense", part]
        assert sparse.keys() == dense.keys()
        assert all(torch.equal(sparse[name], tensor) for name, tensor in dense.items())


def test_the_dtype_may_be_chosen(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tiny_llama, tmp_path, weight_bits={"*.mlp.*": 8})
    for dtype in (torch.bfloat16, torch.float16):
        pair = [
            LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=config, dtype=dtype)
            for config in (SPARSE, DENSE)
        ]
        assert {m.dtype for m in sparse_linears(pair[0]).values()} == {dtype}
        assert_same_weights(*pair)
    with pytest.raises(ValueError, match=r"runtime='sparse' multiplies in .* got torch.float64"):
        LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE, dtype=torch.float64)


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_12_bits_in_another_dtype_are_plain_and_saved_so(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, config: has.SparsityConfig
) -> None:
    model = tiny_llama.bfloat16()
    save(model, tmp_path / "a", weight_bits={"*.mlp.*": 12, "*.q_proj": 8})
    for dtype in (torch.float32, torch.float16):
        loaded = LlamaForCausalLM.from_pretrained(
            tmp_path / "a", sparsity_config=config, dtype=dtype
        )
        assert {m.dtype for m in sparse_linears(loaded).values()} <= {dtype}
        up = loaded.model.layers[0].mlp.up_proj.weight + 0
        assert torch.equal(up, model.model.layers[0].mlp.up_proj.weight.to(dtype))
        loaded.save_pretrained(tmp_path / "b")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "b", sparsity_config=config)
        assert again.dtype == dtype
        assert_same_weights(loaded, again)
        bits = again.config.quantization_config.weight_bits
        assert sorted(set(bits.values())) == [8, 16]


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_12_bits_of_whole_weights_in_another_dtype_are_saved_dense(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, config: has.SparsityConfig
) -> None:
    profile = {"*.mlp.*": 0.5, "*.self_attn.*": 0.0}
    save(tiny_llama.bfloat16(), tmp_path / "a", sparsity=profile, weight_bits=12)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "a", sparsity_config=config, dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path / "b")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "b", sparsity_config=config)
    assert_same_weights(loaded, again)
    saved = again.config.quantization_config
    assert (saved.weight_bits, saved.format_version) == (16, 1)
    assert "weight_bits" not in saved.to_dict()


def test_12_bits_that_are_offloaded_in_another_dtype_stay_what_they_are(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    save(tiny_llama.bfloat16(), tmp_path / "a", weight_bits=12)
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.rotary_emb": "cpu"}
    devices |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "a",
        sparsity_config=SPARSE,
        dtype=torch.float32,
        device_map=devices,
        offload_folder=tmp_path / "offload",
    )
    ids = inputs(loaded)["input_ids"]
    expected = LlamaForCausalLM.from_pretrained(
        tmp_path / "a", sparsity_config=DENSE, dtype=torch.float32
    )
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "b")
    again = LlamaForCausalLM.from_pretrained(
        tmp_path / "b", sparsity_config=DENSE, dtype=torch.float32
    )
    assert_same_weights(again, expected)


def test_a_model_that_is_not_bfloat16_is_not_stored_in_12_bits(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    message = r"weight_bits=12 stores bfloat16 .*'model.layers.0.*' is torch.float32"
    with pytest.raises(ValueError, match=message):
        save(tiny_llama, tmp_path, weight_bits=12)
    tiny_llama.save_pretrained(tmp_path / "dense")
    config = has.SparsityConfig(metric="magnitude", weight_bits=12)
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=config)
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", sparsity_config=config, dtype=torch.bfloat16
    )
    assert set(loaded.config.quantization_config.widths) == {12}


@pytest.mark.parametrize("runtime", ["dense", "sparse"])
def test_12_bits_that_are_cast_after_loading_are_saved_as_those_cast_while_loading(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, runtime: str
) -> None:
    profile = {"model.layers.1": 0.0, "model.layers.2": 0.0}
    save(tiny_llama.bfloat16(), tmp_path / "a", sparsity=profile, weight_bits=12)
    config = has.SparsityConfig(runtime=runtime)
    after = LlamaForCausalLM.from_pretrained(tmp_path / "a", sparsity_config=config)
    after.to(torch.float32)
    while_loading = LlamaForCausalLM.from_pretrained(
        tmp_path / "a", sparsity_config=config, dtype=torch.float32
    )
    after.save_pretrained(tmp_path / "after")
    while_loading.save_pretrained(tmp_path / "while")
    assert hashes(tmp_path / "after") == hashes(tmp_path / "while")


def test_training_in_float32_of_a_model_of_12_bits_is_saved(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    save(tiny_llama.bfloat16(), tmp_path / "a", weight_bits=12)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "a", sparsity_config=DENSE).float()
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(1.0001)
    model.save_pretrained(tmp_path / "b")
    assert_same_weights(
        LlamaForCausalLM.from_pretrained(tmp_path / "b", sparsity_config=DENSE), model
    )


QUANTISES = r"weight_bits={} quantises .*'model.layers.{}.*' is torch.float64. Load the model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runtime": "sparse"}, r"runtime='sparse' multiplies in .* got torch.float64"),
        ({"weight_bits": 8}, QUANTISES.format(8, 0)),
        ({"weight_bits": {"model.layers.1.*": 4}}, QUANTISES.format(4, 1)),
    ],
    ids=["sparse", "8", "4"],
)
def test_a_dtype_that_weights_cannot_have_is_refused_before_they_are_pruned(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    model = tiny_llama.double()
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    config = has.SparsityConfig(metric="magnitude", **fields)
    with pytest.raises(ValueError, match=message):
        apply_config(model, config, progress=False)
    assert all(torch.equal(model.state_dict()[name], kept) for name, kept in before.items())
    with pytest.raises(ValueError, match=message):
        check_before_loading(model.to("meta"), config)
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=config, dtype=torch.float64)


def test_float64_is_pruned_where_nothing_computes_with_it_compressed(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = tiny_llama.double()
    profile = {"model.layers.1": 0.0, "model.layers.2": 0.0}
    config = has.SparsityConfig(sparsity=profile, metric="magnitude", runtime="sparse")
    apply_config(model, config, progress=False)  # nothing is compressed
    save(model, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float64
    assert_same_weights(loaded, model)


def test_values_that_became_plain_are_saved_in_12_bits_again(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As they do on a GPU, which has no kernel for them."""
    save(tiny_llama.bfloat16(), tmp_path / "a", weight_bits=12)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "a", sparsity_config=SPARSE)
    as_loaded = list(loaded.hf_quantizer.get_state_dict_and_metadata(loaded)[0])
    for module in sparse_linears(loaded).values():
        module.set_weight(module.sparse_weight.plain())
        assert module.bits == 16
    # Shards are cut in this order.
    assert list(loaded.hf_quantizer.get_state_dict_and_metadata(loaded)[0]) == as_loaded
    loaded.save_pretrained(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_casts_and_copies_of_the_model(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(
        save(tiny_llama, tmp_path, weight_bits=8), sparsity_config=SPARSE
    )
    tokens = generate(loaded)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(generate(twin), tokens)
        assert len(sparse_linears(twin)) == 28
        twin.save_pretrained(tmp_path / "twin")
        assert hashes(tmp_path / "twin") == hashes(tmp_path)
    assert generate(loaded.to(torch.bfloat16)).shape == tokens.shape
    assert loaded.dtype == torch.bfloat16


def test_a_state_dict_is_loaded_into_it(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tiny_llama, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE)
    state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    values = loaded.model.layers[0].mlp.up_proj.weight_values
    values.data.zero_()
    loaded.load_state_dict(state)
    assert_same_weights(loaded, tiny_llama)


@pytest.mark.parametrize("saves_first", [False, True])
def test_dequantize_makes_it_plain(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, saves_first: bool
) -> None:
    save(tiny_llama, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE)
    if saves_first:  # which makes config.dtype a string
        loaded.save_pretrained(tmp_path / "again")
    loaded.dequantize()
    assert not hasattr(loaded.config, "quantization_config")
    assert not sparse_linears(loaded)
    assert_same_weights(loaded, tiny_llama)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_maps_may_offload_layers(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, place: str
) -> None:
    save(tiny_llama, tmp_path / "model")
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys([*parts, "model.layers.0", "model.layers.1"], "cpu")
    device_map |= {f"model.layers.{index}": place for index in (2, 3)}
    loaded = LlamaForCausalLM.from_pretrained(
        tmp_path / "model",
        sparsity_config=SPARSE,
        device_map=device_map,
        offload_folder=str(tmp_path / "offloaded"),
    )
    if place == "disk":
        with pytest.raises(ValueError, match=r"'model.layers.2.*' is offloaded, .*runtime='dense'"):
            loaded.dequantize()
        written = {file.stem.rpartition(".")[2] for file in (tmp_path / "offloaded").iterdir()}
        assert "weight_values" not in written, "what the checkpoint has is read from there"
    assert len(sparse_linears(loaded)) == 28
    assert torch.equal(generate(loaded), generate(tiny_llama))


def test_perplexity_sees_the_same_model(
    tiny_llama: LlamaForCausalLM, text_batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    save(tiny_llama, tmp_path, kv_cache=8)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE)
    expected = has.perplexity(tiny_llama, text_batches)
    assert has.perplexity(loaded, text_batches) == pytest.approx(expected, rel=1e-5)


def test_what_needs_plain_weights_says_so(
    tiny_llama: LlamaForCausalLM, text_batches: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    save(tiny_llama, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, sparsity_config=SPARSE)
    with pytest.raises(ValueError, match=r"compressed in memory .*runtime='dense'"):
        has.prune(loaded, has.SparsityConfig(), text_batches)
    with pytest.raises(ValueError, match=r"runtime='dense'"):
        has.search(loaded, text_batches, text_batches, n_trials=1, progress=False)
    with pytest.raises(FrozenWeightError, match=r"runtime='dense'"):
        loaded.requires_grad_(True)
    with pytest.raises(ValueError, match="adapters"):
        Trainer(loaded, TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[]))
    save(tiny_llama, tmp_path / "dense", checkpoint_format="dense")
    with pytest.raises(ValueError, match=r"reads the format 'bitmask'"):
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", sparsity_config=SPARSE)


@pytest.mark.slow
def test_torch_compile(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(save(tiny_llama, tmp_path), sparsity_config=SPARSE)
    expected = loaded(**inputs(loaded)).logits
    compiled = torch.compile(loaded.model, fullgraph=True)
    hidden = compiled(**inputs(loaded), use_cache=False).last_hidden_state
    torch.testing.assert_close(loaded.lm_head(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_generate_compiles_sparse_weights_with_a_static_cache(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    """On a GPU transformers does so by itself, and records CUDA graphs: no break may be in them."""
    loaded = LlamaForCausalLM.from_pretrained(
        save(tiny_llama, tmp_path, kv_cache=has.KVCacheConfig(bits=8)), sparsity_config=SPARSE
    )
    settings = {**inputs(loaded), "max_new_tokens": 6, "do_sample": False}
    expected = loaded.generate(**settings, cache_implementation="dynamic")
    everywhere = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    everywhere._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    found = loaded.generate(**settings, cache_implementation="static", compile_config=everywhere)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


def test_parameters_are_frozen_after_loading(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(save(tiny_llama, tmp_path), sparsity_config=SPARSE)
    module = loaded.model.layers[0].mlp.up_proj
    assert isinstance(module, SparseLinear)
    assert all(isinstance(p, FrozenParameter) for p in module.parameters())
    assert not any(p.requires_grad for p in module.parameters())
    assert module.row_offsets is not None
