"""Models whose linears are fused in transformers' own checkpoints: compressed ones are not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import hf_adaptive_sparse as has
from hf_adaptive_sparse.checkpoint.headers import read_headers
from hf_adaptive_sparse.checkpoint.plugin import apply_config
from tests.families.tiny_models import tiny_model

LAYERS = {"vision_feature_layer": [1, 0], "vision_feature_layers": [1, 0]}
CHANGES = {"molmo2": {f"adapter_config.{key}": value for key, value in LAYERS.items()}}
# Query, key and value are one tensor; of Molmo 2 gate and up are, too.
LOADERS = {"sarvam_moe": AutoModelForCausalLM, "molmo2": AutoModelForImageTextToText}
needs_sarvam = pytest.mark.skipif(
    find_spec("transformers.models.sarvam_moe") is None,
    reason="Sarvam came with transformers 5.24",
)
FAMILIES = [pytest.param("sarvam_moe", marks=needs_sarvam), "molmo2"]
FUSED = ("query_key_value.weight", "att_proj.weight")


@pytest.mark.parametrize("weight_bits", [16, 8])
@pytest.mark.parametrize("runtime", ["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_is_saved_and_loaded(family, runtime, weight_bits, tmp_path: Path):
    model = tiny_model(family, CHANGES.get(family, {}))
    config = has.SparsityConfig(metric="magnitude", weight_bits=weight_bits)
    apply_config(model, config, progress=False)
    expected = model.state_dict()
    for save in range(2):  # one that was loaded is saved as well as one that was pruned
        folder = tmp_path / str(save)
        model.save_pretrained(folder)
        override = has.SparsityConfig(runtime=runtime)
        model = LOADERS[family].from_pretrained(folder, sparsity_config=override)
    model.dequantize()
    assert_equal(model.state_dict(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused_on_disk_is_pruned_while_it_is_loaded(family, tmp_path: Path):
    dense = tiny_model(family, CHANGES.get(family, {}))
    dense.save_pretrained(tmp_path / "dense")
    assert any(name.endswith(FUSED) for name in read_headers(tmp_path / "dense"))
    config = has.SparsityConfig(metric="magnitude", modules_to_not_convert=["*.layers.1.*"])
    pruned = LOADERS[family].from_pretrained(tmp_path / "dense", sparsity_config=config)
    pruned.save_pretrained(tmp_path / "pruned")
    again = LOADERS[family].from_pretrained(tmp_path / "pruned")
    assert_equal(again.state_dict(), pruned.state_dict())


@needs_sarvam
def test_a_pruned_model_in_the_dense_format_is_fused_as_ever(tmp_path: Path):
    model = tiny_model("sarvam_moe")
    config = has.SparsityConfig(metric="magnitude", checkpoint_format="dense")
    apply_config(model, config, progress=False)
    model.save_pretrained(tmp_path)
    assert any(name.endswith(FUSED) for name in read_headers(tmp_path))
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
