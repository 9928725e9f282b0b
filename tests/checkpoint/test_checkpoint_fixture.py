"""Checkpoints written by each version of the format, which every later one must read.

``fixtures/v1`` was made once, by ``write_fixture`` below under version 0.1.0, ``fixtures/v2`` by
``write_quantised_fixture``, and ``fixtures/v3`` by ``write_lossless_fixture``; none is ever
rewritten. When the format changes, a ``v4`` joins.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from hf_adaptive_sparse.runtime.conversion import decompress_
from tests.conftest import llama_config

FIXTURES = Path(__file__).parent / "fixtures"


def write_fixture(folder: Path) -> None:
    """Two layers in bf16, columns that are no multiple of eight, and bits that == would lose."""
    torch.manual_seed(0)
    config = llama_config(hidden_size=44, intermediate_size=77, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    profile = {"*layers.0.*": 0.4, "*layers.1.*": 0.6, "model.layers.1.mlp.up_proj": 0.0}
    kv_cache = has.KVCacheConfig(key_bits=(8, 6), value_bits=(6, 8))
    settings = has.SparsityConfig(metric="magnitude", sparsity=profile, kv_cache=kv_cache)
    apply_config(model, settings, progress=False)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.view(torch.int16)[0, :4] = torch.tensor([-32768, 0x7FC1, 1, 0], dtype=torch.int16)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "weights.sha256").write_text(digest(model) + "\n")


def write_quantised_fixture(folder: Path) -> None:
    """The same two layers, with values of 16, 8 and 4 bits, in rows and in groups."""
    torch.manual_seed(0)
    config = llama_config(hidden_size=44, intermediate_size=77, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    settings = has.SparsityConfig(
        metric="magnitude",
        sparsity={"*layers.0.*": 0.4, "*layers.1.*": 0.6, "model.layers.1.mlp.up_proj": 0.0},
        weight_bits={"*self_attn*": 8, "*mlp*": 4, "model.layers.0.mlp.down_proj": 16},
        weight_group_size=None,
    )
    apply_config(model, settings, progress=False)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "weights.sha256").write_text(digest(model) + "\n")


def write_lossless_fixture(folder: Path) -> None:
    """The same two layers, with values of 16, 12 and 8 bits, and exceptions."""
    torch.manual_seed(0)
    config = llama_config(hidden_size=44, intermediate_size=77, num_hidden_layers=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    settings = has.SparsityConfig(
        metric="magnitude",
        sparsity={"*layers.0.*": 0.4, "*layers.1.*": 0.6, "model.layers.1.mlp.up_proj": 0.0},
        weight_bits={"*self_attn*": 12, "*mlp*": 12, "*.v_proj": 8, "*.o_proj": 16},
    )
    apply_config(model, settings, progress=False)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[:, :44] *= 2.0 ** -torch.arange(44)  # more upper bytes than there are codes
        weight.view(torch.int16)[0, :4] = torch.tensor([-32768, 0x7FC1, 1, 0], dtype=torch.int16)
    model.save_pretrained(folder)
    (folder / "weights.sha256").write_text(digest(model) + "\n")


def digest(model: PreTrainedModel) -> str:
    """SHA-256 of the bytes of all tensors, by name."""
    made = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        made.update(name.encode())
        made.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


@pytest.mark.parametrize("version", ["v1"])
def test_old_checkpoints_load_bit_exactly(version: str) -> None:
    folder = FIXTURES / version
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert digest(model) == (folder / "weights.sha256").read_text().strip()
    config = model.config.quantization_config
    assert config.format_version == 1
    assert config.kv_cache.layer_bits(2) == ((8, 6), (6, 8))
    assert config.kv_cache.key_mode == "token"
    assert config.sparsity["model.layers.0.mlp.up_proj"] == 0.4
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 1


def test_a_quantised_checkpoint_loads_bit_exactly_into_both_runtimes(tmp_path: Path) -> None:
    folder = FIXTURES / "v2"
    for runtime in ("dense", "sparse"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, sparsity_config=has.SparsityConfig(runtime=runtime)
        )
        config = model.config.quantization_config
        assert config.format_version == 2
        assert config.value_bits("model.layers.1.self_attn.q_proj") == 8
        assert config.value_format("model.layers.1.mlp.up_proj").group_size == 64
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        assert tokens.shape[0] == 1
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        for file in folder.glob("*.safetensors"):
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
        decompress_(model)
        assert digest(model) == (folder / "weights.sha256").read_text().strip()


def test_12_bits_load_bit_exactly_into_both_runtimes(tmp_path: Path) -> None:
    folder = FIXTURES / "v3"
    for runtime in ("dense", "sparse"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, sparsity_config=has.SparsityConfig(runtime=runtime)
        )
        config = model.config.quantization_config
        assert config.format_version == 3
        assert config.value_bits("model.layers.1.self_attn.q_proj") == 12
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        assert tokens.shape[0] == 1
        if runtime == "sparse":
            assert model.model.layers[0].mlp.down_proj.weight_codebook.numel() > 10
        model.save_pretrained(tmp_path)
        for file in folder.glob("*.safetensors"):
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
        decompress_(model)
        assert digest(model) == (folder / "weights.sha256").read_text().strip()


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_fixtures_are_small(version: str) -> None:
    assert sum(file.stat().st_size for file in (FIXTURES / version).iterdir()) < 300_000
