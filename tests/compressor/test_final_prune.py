"""Trying the final prune on a model that shall stay as it is."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules

from hf_adaptive_sparse.checkpoint.config import SparsityConfig
from hf_adaptive_sparse.compressor.final_prune import pruned_for_now
from hf_adaptive_sparse.evaluation.resources import sparsity_report
from hf_adaptive_sparse.profiles import KVCacheConfig


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_pruned_in_the_body_and_as_before_after_it(tiny_llama, text_batches, fails):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    # ALPS moves the weights that stay, too, and 8 bits round them.
    config = SparsityConfig(metric="alps", weight_bits=8, kv_cache=KVCacheConfig(bits=6))
    with (
        pytest.raises(KeyboardInterrupt) if fails else torch.no_grad(),
        pruned_for_now(tiny_llama, config, text_batches, None) as kv_cache,
    ):
        assert kv_cache.layer_bits(4) == ((6, 6),) * 4
        assert sparsity_report(tiny_llama).mean_sparsity == pytest.approx(0.5, abs=0.02)
        if fails:
            raise KeyboardInterrupt
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert getattr(tiny_llama.config, "quantization_config", None) is None


def test_a_model_without_kv_profile_is_measured_without(tiny_llama, text_batches):
    config = SparsityConfig(metric="magnitude")
    with pruned_for_now(tiny_llama, config, text_batches, None) as kv_cache:
        assert kv_cache is False


def test_weights_that_accelerate_keeps_out_of_the_model_come_back_too(tiny_llama):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    cpu_offload(tiny_llama, execution_device=torch.device("cpu"))
    linear = tiny_llama.model.layers[0].mlp.up_proj
    assert linear.weight.is_meta
    with pruned_for_now(tiny_llama, SparsityConfig(metric="magnitude"), None, None):
        assert (linear._hf_hook.weights_map["weight"] == 0).float().mean() > 0.3
    remove_hook_from_submodules(tiny_llama)
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(tensor, before[name]), name
