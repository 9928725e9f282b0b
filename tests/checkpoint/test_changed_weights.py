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
from hf_adaptive_sparse.checkpoint.loading import apply_config
from hf_adaptive_sparse.packing.stored_weight import ValueFormat, stored_tensors
from hf_adaptive_sparse.packing.weight_codes import SCALE_DTYPES
from hf_adaptive_sparse.runtime.conversion import quantise_

UP = "model.layers.0.mlp.up_proj"


def pruned_weight(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(96, 200, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight.masked_fill_(weight.abs() < 0.013, 0.0).to(dtype)


def still_held(weight: torch.Tensor, bits: int, group_size: int | None) -> bool:
    stored = stored_tensors("x.weight", weight, bits, group_size)
    return holds(stored, "x.weight", weight, ValueFormat(bits, group_size))


@pytest.mark.parametrize("cast", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 64, 96, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_weight_is_held_through_casts_and_no_longer_once_trained(
    bits: int, group_size: int | None, dtype: torch.dtype, cast: torch.dtype
) -> None:
    weight = pruned_weight(dtype)
    assert not still_held(weight, bits, group_size)
    quantise_(weight, bits, group_size)
    weight = weight.to(cast)
    assert still_held(weight, bits, group_size)
    assert still_held(weight.to(torch.float32), bits, group_size)
    assert not still_held(weight + 1e-5 * torch.ones_like(weight), bits, group_size)
    if cast == torch.float32:
        masked = torch.where(weight != 0, weight + 1e-7, weight)
        assert not still_held(masked, bits, group_size)


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
