"""Truncated and tampered checkpoints: one clear error, before anything is allocated."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaForConditionalGeneration,
)

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.decompression import DecompressWeight
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.profiles import check_format_version

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)
    tiny_llama.save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def flip_a_bit(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_bitmask"][0, 0] ^= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, rf"model.safetensors: tensor '{UP}.weight_bitmask' keeps \d+ weights, but "),
        (
            lambda t: t.update({f"{UP}.weight_values": t[f"{UP}.weight_values"][:-1]}),
            rf"keeps \d+ weights, but '{UP}.weight_values' in .*model.safetensors holds \d+",
        ),
        (
            lambda t: t.update({f"{UP}.weight_bitmask": t[f"{UP}.weight_bitmask"][:, 1:].clone()}),
            rf"'{UP}.weight_bitmask' must be U8 \[160, 8\] for a weight \[160, 64\], got U8 \[160",
        ),
        (
            lambda t: t.update({f"{UP}.weight_bitmask": t[f"{UP}.weight_bitmask"].int()}),
            rf"'{UP}.weight_bitmask' must be U8",
        ),
        (
            lambda t: t.update({f"{UP}.weight_values": t[f"{UP}.weight_values"].long()}),
            rf"'{UP}.weight_values' must be floating point",
        ),
        (
            lambda t: t.update({f"{UP}.weight_values": torch.zeros(160 * 64 + 1)}),
            rf"'{UP}.weight_values' must be floating point \[n\] with n <= 10240",
        ),
        (lambda t: t.pop(f"{UP}.weight_values"), rf"'{UP}.weight' .*weight_values is needed"),
        (lambda t: t.pop(f"{UP}.weight_bitmask"), r"weight_bitmask is needed, but .*not hold it"),
        (
            lambda t: t.update({f"{UP}.weight": torch.zeros(160, 64)}),
            rf"'{UP}.weight' is stored both dense and compressed",
        ),
        (
            lambda t: t.update({"model.norm.weight_bitmask": torch.zeros(1, 1).byte()}),
            r"'model.norm.weight_bitmask' is compressed, but the config's sparsity does not",
        ),
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 of the model's tensors: model.norm.weig"),
        (lambda t: t.update({"extra": torch.zeros(2)}), r"belong to no part of Llama.*: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(63)}),
            r"'model.norm.weight' has the shape \[63\], .* is \[64\]",
        ),
    ],
)
def test_tampered_tensors(folder: Path, change: Callable[[Tensors], object], message: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(folder)


DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def quantised(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    bits = {"*.mlp.*": 8, "*.down_proj": 4}
    config = has.SparsityConfig(metric="magnitude", weight_bits=bits, weight_group_size=32)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def spoil_a_scale(value: float) -> Callable[[Tensors], object]:
    return lambda t: t[f"{UP}.weight_scales"].__setitem__((0, 0), value)


@pytest.mark.parametrize("runtime", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, rf"model.safetensors: tensor '{UP}.weight_bitmask' keeps \d+ weights, but "),
        (
            lambda t: t.update({f"{DOWN}.weight_values": t[f"{DOWN}.weight_values"][:-1].clone()}),
            rf"'{DOWN}.weight_bitmask' keeps \d+ weights, but .* bytes of two",
        ),
        (
            lambda t: t.update({f"{UP}.weight_values": t[f"{UP}.weight_values"].float()}),
            rf"'{UP}.weight_values' must be I8 \(8 bits per value\) \[n\].* got F32",
        ),
        (
            lambda t: t.update({f"{DOWN}.weight_values": t[f"{DOWN}.weight_values"].char()}),
            rf"'{DOWN}.weight_values' must be U8 \(4 bits per value\).* got I8",
        ),
        (lambda t: t.pop(f"{UP}.weight_scales"), rf"{UP}.weight_scales is needed, but .*not hold"),
        (
            lambda t: t.update({f"{UP}.weight_scales": t[f"{UP}.weight_scales"][:, :1].clone()}),
            rf"'{UP}.weight_scales' must be floating point \[160, 2\], got F32 \[160, 1\]",
        ),
        (
            lambda t: t.update({f"{UP}.weight_scales": t[f"{UP}.weight_scales"].int()}),
            rf"'{UP}.weight_scales' must be floating point",
        ),
        (spoil_a_scale(float("nan")), rf"'{UP}.weight_scales' holds scales that are negative, inf"),
        (spoil_a_scale(float("inf")), rf"model.safetensors: tensor '{UP}.weight_scales' holds"),
        (spoil_a_scale(-1.0), rf"'{UP}.weight_scales' holds scales"),
        (
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.weight_scales": torch.ones(64, 1)}
            ),
            r"'model.layers.0.self_attn.q_proj.weight_scales' holds scales, but the config's",
        ),
    ],
)
def test_tampered_codes_and_scales(
    quantised: Path, change: Callable[[Tensors], object], message: str, runtime: str
) -> None:
    edit_tensors(quantised, change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(
            quantised, sparsity_config=has.SparsityConfig(runtime=runtime)
        )


BOOK = f"{UP}.weight_codebook"


@pytest.mark.parametrize("runtime", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, rf"'{UP}.weight_bitmask' keeps \d+ weights, but .* bytes, three for two"),
        (lambda t: t.pop(BOOK), rf"{BOOK} is needed, but .*not hold"),
        (lambda t: t.update({BOOK: t[BOOK].int()}), rf"'{BOOK}' must be I64 .* got I32"),
        (lambda t: t.update({BOOK: t[BOOK][:1].clone()}), rf"'{BOOK}' must be I64 \[n\] with 2"),
        (lambda t: t[BOOK].add_(1), rf"'{BOOK}': code 0 of a codebook must stand for"),
        (
            lambda t: t.update({BOOK: torch.cat([t[BOOK], torch.tensor([1 << 40])])}),
            rf"'{BOOK}': the exceptions of a codebook must be",
        ),
        (
            lambda t: t.update({f"{UP}.weight_scales": torch.ones(160, 1)}),
            rf"'{UP}.weight_scales' holds scales, but the config's weight_bits say 12",
        ),
        (
            lambda t: t.update({f"{UP}.weight_values": t[f"{UP}.weight_values"].char()}),
            rf"'{UP}.weight_values' must be U8 \(12 bits per value\).* got I8",
        ),
    ],
)
def test_tampered_codebooks(
    tiny_llama: LlamaForCausalLM,
    tmp_path: Path,
    change: Callable[[Tensors], object],
    message: str,
    runtime: str,
) -> None:
    config = has.SparsityConfig(metric="magnitude", weight_bits={"*.mlp.*": 12})
    apply_config(tiny_llama.bfloat16(), config, progress=False)
    tiny_llama.save_pretrained(tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(
            tmp_path, sparsity_config=has.SparsityConfig(runtime=runtime)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["weight_bits"].update({UP: 16}), rf"'{UP}.weight_scales' holds scales, but"),
        (lambda q: q["weight_bits"].update({UP: 4}), rf"'{UP}.weight_values' must be U8"),
        (lambda q: q["weight_bits"].update({"lm_head": 8}), r"weight_bits name 'lm_head', which"),
        (lambda q: q.pop("weight_bits"), r"weight_bits say 16 for its module"),
        (lambda q: q.update(weight_group_size=64), r"weight_scales' must be floating point"),
        (lambda q: q.update(format_version=1), r"below 16 need format_version 2, got 1"),
        (lambda q: q.update(checkpoint_format="dense"), r"need checkpoint_format='bitmask'"),
    ],
)
def test_tampered_weight_bits(
    quantised: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(quantised, lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(quantised)


def test_an_earlier_release_says_what_to_do(quantised: Path) -> None:
    # Its check, of the version before any key, is the one that newest=1 makes.
    version = json.loads((quantised / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match=r"format_version 2; .*reads up to 1\. Upgrade"):
        check_format_version(version["format_version"], "the checkpoint", newest=1)


def test_a_bit_after_the_last_column(tmp_path: Path) -> None:
    from tests.conftest import llama_config

    odd = LlamaForCausalLM(llama_config(intermediate_size=13))
    apply_config(odd, has.SparsityConfig(metric="magnitude"), progress=False)
    odd.save_pretrained(tmp_path)

    def move(tensors: Tensors) -> None:
        mask = tensors["model.layers.0.mlp.down_proj.weight_bitmask"]
        row = int((mask[:, 0] & 1).nonzero()[0])
        mask[row, 0] ^= 1
        mask[row, 1] |= 0b100000

    edit_tensors(tmp_path, move)
    message = r"model.safetensors: tensor '.*down_proj.weight_bitmask': .*after the last of its 13"
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 500, -1000, -1])
@pytest.mark.parametrize("checkpoint_format", ["bitmask", "dense"])
def test_truncated_files(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, kept: int, checkpoint_format: str
) -> None:
    config = has.SparsityConfig(metric="magnitude", checkpoint_format=checkpoint_format)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*truncated"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_shard_is_named(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    apply_config(tiny_llama, has.SparsityConfig(metric="magnitude"), progress=False)
    tiny_llama.save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: .*truncated"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=4), r"format_version 4.*Upgrade"),
        (lambda q: q.update(weight_bits=4), r"below 16 need format_version 2, got 1"),
        (lambda q: q.update(colour=4), r"knows the keys .*; got colour"),
        (lambda q: q.update(metric="mine"), r"mine"),
        (lambda q: q.update(sparsity=None), r"must name the pruned modules"),
        (lambda q: q["sparsity"].update({UP: 1.5}), rf"sparsity of '{UP}' must be"),
        (lambda q: q["sparsity"].update({"model.layers.7.mlp.up_proj": 0.5}), r"no linear of Lla"),
        (lambda q: q["sparsity"].update({"lm_head": 0.5}), r"'lm_head', which is no linear"),
        (lambda q: q["sparsity"].pop(UP), rf"'{UP}.weight_(values|bitmask)' is compressed, but"),
        (lambda q: q["sparsity"].update({UP: 0.0}), r"the config's sparsity does not name"),
        (lambda q: q.update(checkpoint_format="dense"), r"lacks 28 of the model's tensors"),
        (lambda q: q.update(kv_cache={"key_bits": [8]}), r"4 layers, the list has 1"),
        (lambda q: q.update(kv_cache={"key_bits": 5}), r"got 5"),
    ],
)
def test_tampered_configs(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(folder, lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("method", [None, "another"])
def test_packed_weights_that_the_config_says_nothing_of_are_not_pruned_anew(
    folder: Path, method: str | None
) -> None:
    edit_config(folder, lambda config: config.pop("quantization_config"))
    if method is not None:
        edit_config(folder, lambda c: c.update(quantization_config={"quant_method": method}))
    by_size, loads = has.SparsityConfig(metric="magnitude"), has.SparsityConfig(runtime="sparse")
    with pytest.raises(CheckpointError, match=r"such as 'model.layers.*Restore config.json"):
        LlamaForCausalLM.from_pretrained(folder, sparsity_config=by_size)
    with pytest.raises(ValueError, match="this model has no quantization_config of quant_method"):
        LlamaForCausalLM.from_pretrained(folder, sparsity_config=loads)


def test_a_config_cannot_ask_for_more_than_the_files_hold(folder: Path) -> None:
    def inflate(config: dict[str, Any]) -> None:
        config["intermediate_size"] = 1 << 24
        config["vocab_size"] = 1 << 24

    edit_config(folder, inflate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"has the shape|must be U8"):
        LlamaForCausalLM.from_pretrained(folder)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In KiB. A single one of those weights would take 4 GiB.
    assert after - before < 256 << 10


def test_a_config_cannot_add_layers_that_are_not_stored(folder: Path) -> None:
    edit_config(folder, lambda c: c.update(num_hidden_layers=5))
    with pytest.raises(CheckpointError, match=r"lacks 9 of the model's tensors: model.layers.4"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("missing", lambda t: t.pop("model.norm.weight")),
        ("unexpected", lambda t: t.update({"model.norm.old": torch.zeros(2)})),
    ],
)
def test_a_model_class_says_which_tensors_do_not_matter(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    change: Callable[[Tensors], object],
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        LlamaForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(LlamaForCausalLM, f"_keys_to_ignore_on_load_{kind}", [r"model\.norm\."])
    assert LlamaForCausalLM.from_pretrained(folder).hf_quantizer is not None


def test_another_head_is_new_but_only_within_what_is_stored(folder: Path) -> None:
    classifier = LlamaForSequenceClassification.from_pretrained(folder)
    assert classifier.score.weight.shape == (2, 64)
    edit_config(folder, lambda c: c.update(id2label={str(i): str(i) for i in range(40_000)}))
    with pytest.raises(CheckpointError, match=r"more than all it stores: score.weight"):
        LlamaForSequenceClassification.from_pretrained(folder)


def test_weights_of_a_part_saved_on_its_own_are_told_from_its_config(
    tiny_llama: LlamaForCausalLM, folder: Path
) -> None:
    tiny_llama.model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"stores it dense|no linear"):
        type(tiny_llama.model).from_pretrained(folder)


def test_a_model_made_of_a_config_alone_is_told_how_to_load(folder: Path, tmp_path: Path) -> None:
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    fresh.save_pretrained(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match=r"stores it dense\. .*remove 'quantization_config'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fresh")
    edit_config(tmp_path / "fresh", lambda config: config.pop("quantization_config"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh")
    assert torch.equal(loaded.get_submodule(UP).weight, fresh.get_submodule(UP).weight)


def test_a_model_of_which_a_part_was_pruned_is_told_how_to_load(
    tiny_llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    apply_config(
        tiny_llava.model.language_model, has.SparsityConfig(metric="magnitude"), progress=False
    )
    tiny_llava.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"remove 'quantization_config' from the part's conf"):
        type(tiny_llava).from_pretrained(tmp_path / "whole")
    edit_config(tmp_path / "whole", lambda c: c["text_config"].pop("quantization_config"))
    loaded = type(tiny_llava).from_pretrained(tmp_path / "whole")
    name = "model.language_model.layers.0.mlp.up_proj"
    assert torch.equal(loaded.get_submodule(name).weight, tiny_llava.get_submodule(name).weight)


def test_code_in_the_repo_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('code was run')")
    edit_config(folder, lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM


def test_a_state_dict_in_memory_is_checked_as_well(
    tiny_llama: LlamaForCausalLM, folder: Path
) -> None:
    op = DecompressWeight(tiny_llama.hf_quantizer)
    tensors = load_file(folder / "model.safetensors")
    name = f"{UP}.weight"

    def run(**tensors: torch.Tensor) -> Tensors:
        given = {key: [tensor] for key, tensor in tensors.items()}
        return op.convert(given, [], [], full_layer_name=name, model=tiny_llama)

    values, mask = tensors[f"{name}_values"], tensors[f"{name}_bitmask"]
    whole = run(weight_values=values, weight_bitmask=mask)[name]
    assert torch.equal(whole, tiny_llama.get_parameter(name))
    with pytest.raises(CheckpointError, match=rf"{name}: .*must be \[160, 8\], got \[159, 8\]"):
        run(weight_values=values, weight_bitmask=mask[:-1])
    with pytest.raises(CheckpointError, match=rf"{name}: .*the two must agree"):
        run(weight_values=values[:-1], weight_bitmask=mask)
    with pytest.raises(CheckpointError, match=rf"{name}: 'weight_bitmask' is missing"):
        run(weight_values=values)
    config = tiny_llama.config
    loaded = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors))
    assert torch.equal(loaded.get_parameter(name), whole)
