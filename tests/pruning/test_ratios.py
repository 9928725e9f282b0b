"""Names, globs and targets become one ratio per linear."""

from __future__ import annotations

import pytest

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.pruning.ratios import resolve_ratios


def test_uniform(tiny_llama):
    ratios = resolve_ratios(tiny_llama, 0.5)
    assert list(ratios) == list(prunable_weights(tiny_llama))
    assert set(ratios.values()) == {0.5}


def test_exact_names_beat_globs_and_later_globs_beat_earlier(tiny_llama):
    name = "model.layers.1.mlp.up_proj"
    ratios = resolve_ratios(
        tiny_llama, 0.5, {name: 0.1, "*.up_proj": 0.2, "*.layers.1.*": 0.3, "model.layers.2": 0.4}
    )
    assert ratios[name] == 0.1
    assert ratios["model.layers.0.mlp.up_proj"] == 0.2
    assert ratios["model.layers.1.mlp.down_proj"] == 0.3
    assert ratios["model.layers.2.mlp.up_proj"] == 0.4
    assert ratios["model.layers.3.mlp.down_proj"] == 0.0  # nothing names it


def test_left_out_modules_are_not_counted(tiny_llama):
    ratios = resolve_ratios(tiny_llama, 0.5, None, ["model.layers.0", "*.down_proj"])
    assert len(ratios) == 28 - 7 - 3


def test_errors(tiny_llama):
    with pytest.raises(ValueError, match=r"'\*\.nothing' matches none.*model\.layers\.0"):
        resolve_ratios(tiny_llama, 0.5, {"*.nothing": 0.5})
    with pytest.raises(ValueError, match=r"sparsity of '\*\.up_proj' must be a number in \[0, 1\)"):
        resolve_ratios(tiny_llama, 0.5, {"*.up_proj": 1.5})
    with pytest.raises(ValueError, match="target_sparsity must be a number"):
        resolve_ratios(tiny_llama, -0.1)
    with pytest.raises(ValueError, match=r"Pattern 2:4 .* target_sparsity is 0\.6"):
        resolve_ratios(tiny_llama, 0.6, pattern="2:4")
    ratios = resolve_ratios(tiny_llama, 0.5, {"*.up_proj": 0.5}, pattern="2:4")
    assert sorted(set(ratios.values())) == [0.0, 0.5]
