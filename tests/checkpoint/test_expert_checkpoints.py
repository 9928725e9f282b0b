"""Experts in checkpoints: compressed, bit for bit, whatever transformers does with their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.packing.bitmask import compressed_size_bytes
from hf_adaptive_sparse.packing.stored_names import KINDS, parse_tensor_name, tensor_name
from tests.families.tiny_models import tiny_model

UP = "model.layers.{}.mlp.experts.gate_up_proj"
ARIA = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}


def pruned(model_type: str = "mixtral", **fields: object) -> PreTrainedModel:
    model = tiny_model(model_type, ARIA if model_type == "aria_text" else {})
    apply_config(model, has.SparsityConfig(metric="magnitude", **fields), progress=False)
    return model


def assert_same(first: PreTrainedModel, second: PreTrainedModel) -> None:
    expected, found = first.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "qwen3_vl_moe", "aria_text"])
def test_saved_and_loaded_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    model = pruned(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    assert_same(model, loaded)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, weight in prunable_weights(model).items():
        if isinstance(weight, ExpertStack):
            layer = next(part for part in name.split(".") if part.isdecimal())
            ending = f"experts.sparse_{weight.key}_bitmask"
            (key,) = (k for k in first if f"layers.{layer}." in k and k.endswith(ending))
            shape = weight.weight.shape
            assert first[key].shape == (*shape[:2], -(-shape[2] // 8))
            size = first[key].nbytes + first[key.replace("bitmask", "values")].nbytes
            kept = int(weight.weight.count_nonzero())
            assert size == compressed_size_bytes(shape[0] * shape[1], shape[2], kept, 2)


def test_dense_and_compressed_experts_side_by_side(tmp_path: Path) -> None:
    model = pruned(sparsity={"*.layers.1.*": 0.5}, weight_bits={UP.format(0): 8})
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    # What is not compressed goes by the names that the model has on the Hub.
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    assert not [name for name in names if "layers.0" in name and ".w1." in name]
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert loaded.config.quantization_config.weight_bits == {UP.format(0): 8}
    report = has.sparsity_report(loaded)
    assert [w.name for w in report.modules] == list(prunable_weights(model))
    by_name = {w.name: w for w in report.modules}
    weight = by_name[UP.format(0)]
    assert weight.stored_bytes < 0.3 * weight.memory_bytes + 4 * 4 * 96
    found = {m.name: m.ratio for m in has.inspect(tmp_path).modules}
    assert found[UP.format(1)] == (0.5, 0.5)


def test_damaged_experts_are_named(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.block_sparse_moe.experts.sparse_down_proj_bitmask"
    assert tensors[key].shape == (4, 32, 6)
    save_file({**tensors, key: tensors[key].flatten(0, 1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"sparse_down_proj_bitmask.*must be U8 \[4, 32, 6\]"):
        type(model).from_pretrained(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != key}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.sparse_down_proj_bitmask is needed"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("parameter", ["lm_head.weight", "a.0.experts.down_proj", "weight"])
def test_names_are_read_as_they_are_written(parameter: str) -> None:
    for kind in KINDS:
        assert parse_tensor_name(tensor_name(parameter, kind)) == (parameter, kind)
    assert parse_tensor_name(parameter) is None
    assert parse_tensor_name(parameter + "_norms") is None
