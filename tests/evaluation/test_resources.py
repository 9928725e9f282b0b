from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.checkpoint.headers import CheckpointError
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.evaluation.resources import (
    kv_bytes_per_token,
    sparsity_report,
    weight_bytes_on_disk,
)
from hf_adaptive_sparse.packing.bitmask import compress
from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.runtime.conversion import compress_
from tests.conftest import llama_config
from tests.families.tiny_models import tiny_model


def prune_half_(model) -> str:
    """Zero half of one weight; return its module's name."""
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.data
    weight[:, ::2] = 0
    return name


def test_dense_model(tiny_llama) -> None:
    report = sparsity_report(tiny_llama)
    assert len(report.modules) == 4 * 7
    assert report.mean_sparsity == 0.0
    assert report.checkpoint_format == "dense"
    numel = sum(p.numel() for p in tiny_llama.parameters())
    assert report.total.memory_bytes + report.other_bytes == 4 * numel
    assert report.total.stored_bytes == report.total.memory_bytes


def test_ratios_are_weighted_by_parameters(tiny_llama) -> None:
    name = prune_half_(tiny_llama)
    report = sparsity_report(tiny_llama)
    pruned = {m.name: m for m in report.modules}[name]
    assert (pruned.numel, pruned.zeros, pruned.ratio) == (160 * 64, 160 * 32, 0.5)
    assert report.mean_sparsity == 160 * 32 / sum(m.numel for m in report.modules)


@pytest.mark.parametrize("as_dict", [False, True])
def test_stored_bytes_are_those_of_the_compressed_tensors(tiny_llama, as_dict: bool) -> None:
    model = tiny_llama.bfloat16()
    name = prune_half_(model)
    weight = model.get_submodule(name).weight.data
    weight[0, 0] = -0.0  # a zero whose bits are stored
    config = {
        "quant_method": "adaptive_sparse",
        "checkpoint_format": "bitmask",
        "sparsity": {name: 0.5},
    }
    model.config.quantization_config = config if as_dict else SparsityConfig.from_dict(config)
    report = sparsity_report(model)
    modules = {m.name: m for m in report.modules}
    assert modules[name].stored_bytes == sum(part.nbytes for part in compress(weight))
    assert modules[name].zeros == 160 * 32
    other = modules["model.layers.0.mlp.up_proj"]
    assert other.stored_bytes == other.memory_bytes == 160 * 64 * 2
    assert report.checkpoint_format == "bitmask"


def test_stored_bytes_of_12_bits_are_those_in_memory_without_the_offsets(tiny_llama) -> None:
    config = SparsityConfig(metric="magnitude", weight_bits={"*.mlp.*": 12})
    apply_config(tiny_llama.bfloat16(), config, progress=False)
    dense = sparsity_report(tiny_llama)
    compress_(tiny_llama, tiny_llama.config.quantization_config.value_formats)
    sparse = sparsity_report(tiny_llama)
    assert [m.stored_bytes for m in dense.modules] == [m.stored_bytes for m in sparse.modules]
    up = tiny_llama.model.layers[0].mlp.up_proj
    by_name = {m.name: m for m in sparse.modules}
    kept = by_name["model.layers.0.mlp.up_proj"].stored_bytes
    assert up.bits == 12
    assert kept == up.memory_bytes - up.offset_bytes


def test_experts_take_the_same_stored_bytes_in_both_runtimes(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    config = has.SparsityConfig(metric="magnitude", kv_cache=False)
    has.prune(model, config, None, progress=False)
    model.save_pretrained(tmp_path)
    sparse = type(model).from_pretrained(
        tmp_path, sparsity_config=has.SparsityConfig(runtime="sparse")
    )
    expected, found = has.sparsity_report(model), has.sparsity_report(sparse)
    assert found.total.stored_bytes == expected.total.stored_bytes
    assert found.total.memory_bytes < expected.total.memory_bytes


def test_excluded_modules_leave_the_denominator(tiny_llama) -> None:
    tiny_llama.config.quantization_config = {
        "quant_method": "adaptive_sparse",
        "modules_to_not_convert": ["*.down_proj"],
    }
    report = sparsity_report(tiny_llama)
    assert len(report.modules) == 4 * 6
    numel = sum(p.numel() for p in tiny_llama.parameters())
    assert report.total.memory_bytes + report.other_bytes == 4 * numel


def test_table_and_dict(tiny_llama) -> None:
    name = prune_half_(tiny_llama)
    report = sparsity_report(tiny_llama)
    lines = str(report).splitlines()
    assert len(lines) == 28 + 5
    assert any(name in line and "0.5000" in line for line in lines)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["total"]["ratio"] == report.mean_sparsity
    assert data["modules"][0]["name"] == "model.layers.0.self_attn.q_proj"


def test_offloaded_weights_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config())
    with pytest.raises(ValueError, match="offloaded"):
        sparsity_report(model)


def test_weight_bytes_on_disk(tiny_llama, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path / "one")
    single = tmp_path / "one/model.safetensors"
    assert weight_bytes_on_disk(tmp_path / "one") == single.stat().st_size
    assert weight_bytes_on_disk(tmp_path / "one") > sum(
        t.nbytes for t in load_file(single).values()
    )
    tiny_llama.save_pretrained(tmp_path / "many", max_shard_size="300KB")
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "many/adapter.safetensors").write_bytes(b"not part of the model")
    assert weight_bytes_on_disk(str(tmp_path / "many")) == sum(s.stat().st_size for s in shards)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shards[0].name}"):
        weight_bytes_on_disk(tmp_path / "many")
    with pytest.raises(FileNotFoundError, match="lacks any"):
        weight_bytes_on_disk(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "not a valid index of shards"),
        ("[", "not a valid index of shards"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "not the name of a file beside the index"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        weight_bytes_on_disk(tmp_path)


class TestKVBytes:
    config = llama_config(head_dim=64)  # 4 layers x 2 heads x 64

    def test_dense(self) -> None:
        elements = 4 * 2 * 2 * 64
        assert kv_bytes_per_token(self.config, dtype=torch.bfloat16) == elements * 2
        assert kv_bytes_per_token(self.config, False, dtype=torch.float32) == elements * 4
        assert (
            kv_bytes_per_token(self.config, False, length=3, dtype=torch.bfloat16) == 2 * elements
        )

    def test_mean_of_seven_bits(self) -> None:
        dense = kv_bytes_per_token(self.config, False, dtype=torch.bfloat16)
        mixed = KVCacheConfig(bits=(8, 6, 8, 6))
        assert kv_bytes_per_token(self.config, mixed, dtype=torch.bfloat16) <= 0.49 * dense

    def test_fewer_bits_fewer_bytes(self) -> None:
        sizes = [
            kv_bytes_per_token(self.config, KVCacheConfig(bits=b), dtype=torch.bfloat16)
            for b in (2, 3, 4, 6, 8, 16)
        ]
        assert sizes == sorted(set(sizes))

    def test_own_profile(self, tiny_llava) -> None:
        config = tiny_llava.config
        dense = kv_bytes_per_token(config, dtype=torch.bfloat16)
        assert dense == 4 * 2 * 2 * 16 * 2
        config.quantization_config = {
            "quant_method": "adaptive_sparse",
            "kv_cache": KVCacheConfig(bits=8).to_dict(),
        }
        own = kv_bytes_per_token(config, dtype=torch.bfloat16)
        assert own == kv_bytes_per_token(config, KVCacheConfig(bits=8), dtype=torch.bfloat16)
        assert own < dense
        assert kv_bytes_per_token(config, False, dtype=torch.bfloat16) == dense

    def test_dtype_of_the_config(self) -> None:
        half, single = llama_config(dtype="bfloat16"), llama_config(dtype="float32")
        assert kv_bytes_per_token(single) == 2 * kv_bytes_per_token(half)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="length must be"):
            kv_bytes_per_token(self.config, length=0)
        with pytest.raises(ValueError, match="4 layers"):
            kv_bytes_per_token(self.config, KVCacheConfig(bits=(8, 8)))
        with pytest.raises(TypeError, match="kv_cache must be"):
            kv_bytes_per_token(self.config, True)
