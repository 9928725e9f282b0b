"""Weights that were rounded to 8 or 4 bits and changed afterwards: saved without a loss."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.changed_weights import holds
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.packing import bitmask
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.packing.weight_codes import SCALE_DTYPES
from hf_adaptive_sparse.runtime.conversion import quantise_

UP = "model.layers.0.mlp.up_proj"


def pruned_weight(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(96, 200, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight.masked_fill_(weight.abs() < 0.013, 0.0).to(dtype)


@pytest.mark.parametrize("cast", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 64, 96, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_weight_is_held_through_casts_and_no_longer_once_trained(
    bits: int, group_size: int | None, dtype: torch.dtype, cast: torch.dtype
) -> None:
    weight, form = pruned_weight(dtype), ValueFormat(bits, group_size)
    assert not holds(form, weight, dtype)
    quantise_(weight, form)
    assert holds(form, weight, dtype)
    weight = weight.to(cast)
    assert holds(form, weight, dtype)
    assert not holds(form, weight + 1e-5 * torch.ones_like(weight), dtype)
    if cast == torch.float32:
        masked = torch.where(weight != 0, weight + 1e-7, weight)
        assert not holds(form, masked, dtype)


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_one_unit_in_one_kept_weight_is_training(bits: int, dtype: torch.dtype) -> None:
    weight = pruned_weight(dtype)
    quantise_(weight, ValueFormat(bits))
    pattern = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    largest = int(weight[50].abs().argmax())
    column = next(int(c) for c in weight[50].nonzero() if int(c) != largest)
    pattern[50, column] -= 1
    assert not holds(ValueFormat(bits), weight, dtype)


def test_a_stack_of_experts_is_held_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "_CHUNK_ELEMENTS", 1 << 10)
    stack = torch.stack([pruned_weight(torch.bfloat16, seed) for seed in (0, 1)])
    for expert in stack:
        quantise_(expert, ValueFormat(4, 64))
    assert holds(ValueFormat(4, 64), stack, torch.bfloat16)
    stack[1, -1] *= 1.5
    stack[1, -1, :64] += 1e-3
    assert not holds(ValueFormat(4, 64), stack, torch.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
def test_small_masked_training_in_bfloat16_is_saved(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, bits: int
) -> None:
    tiny_llama.to(torch.bfloat16)
    config = has.SparsityConfig(metric="magnitude", weight_bits=bits)
    apply_config(tiny_llama, config, progress=False)
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.view(torch.int16)[parameter != 0] += 1
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_a_cast_model_keeps_its_codes(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = has.SparsityConfig(metric="magnitude", weight_bits=8)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.save_pretrained(tmp_path / "float32")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    for number, model in enumerate((tiny_llama.half(), loaded, loaded.float())):
        model.save_pretrained(tmp_path / str(number))
    assert not caplog.records


@pytest.mark.parametrize("bits", [8, 4])
def test_training_is_saved_and_the_config_says_how(
    tiny_llama: LlamaForCausalLM,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    bits: int,
) -> None:
    config = has.SparsityConfig(metric="magnitude", sparsity={"*": 0.5, UP: 0.0}, weight_bits=bits)
    apply_config(tiny_llama, config, progress=False)
    dense = tiny_llama.model.layers[0].mlp
    with torch.no_grad():
        for linear in (dense.up_proj, dense.down_proj):
            linear.weight += 1e-4 * torch.randn_like(linear.weight)
    with caplog.at_level(logging.WARNING, "hf_adaptive_sparse"):
        tiny_llama.save_pretrained(tmp_path / "first")
        tiny_llama.save_pretrained(tmp_path / "second")
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith(f"2 weights, such as that of {UP!r}, are no")
    for folder in ("first", "second"):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / folder)
        for name, weight in tiny_llama.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name
        stored = loaded.config.quantization_config
        changed = {UP, UP.replace("up", "down")}
        assert {name for name in stored.sparsity if stored.value_bits(name) == 16} == changed


def test_a_step_with_codes_is_restored_after_one_without(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = has.SparsityConfig(metric="magnitude", weight_bits=4, weight_group_size=96)
    apply_config(tiny_llama, config, progress=False)
    first = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    tiny_llama.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter += 1e-3
    tiny_llama.save_pretrained(tmp_path / "second")
    assert not tiny_llama.config.quantization_config.quantises_weights
    stored = load_file(tmp_path / "first" / "model.safetensors")
    tiny_llama.load_state_dict(stored, strict=False)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, first[name]), name
    later = LlamaForCausalLM.from_pretrained(tmp_path / "second")
    assert later.config.quantization_config.weight_group_size == 96
    later.load_state_dict(stored, strict=False)
    for name, weight in later.state_dict().items():
        assert torch.equal(weight, first[name]), name


def test_training_is_saved_where_the_config_is_a_dict(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = has.SparsityConfig(metric="magnitude", weight_bits=8)
    apply_config(tiny_llama, config, progress=False)
    tiny_llama.config = type(tiny_llama.config).from_dict(tiny_llama.config.to_dict())
    with torch.no_grad():
        tiny_llama.get_parameter(f"{UP}.weight").add_(1e-3)
    tiny_llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
