from __future__ import annotations

import copy

import pytest
import torch

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.packing.sparse_weight import SparseWeight
from hf_adaptive_sparse.packing.stored_weight import ValueFormat
from hf_adaptive_sparse.packing.weight_codes import default_group_size
from hf_adaptive_sparse.pruning.apply import masked, prune_model, rank_model, resolve_ratios
from hf_adaptive_sparse.pruning.layer_quantiser import LayerQuantiser
from hf_adaptive_sparse.pruning.quantising import quantised, through_codes

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_seen_as_a_checkpoint_gives_it_back(bits, dtype):
    weight = torch.randn(24, 100).to(dtype)
    weight[torch.rand(24, 100) < 0.5] = 0
    stored = SparseWeight.from_dense(weight, bits, default_group_size(bits))
    assert torch.equal(through_codes(weight, bits, default_group_size(bits)), stored.to_dense())


def test_later_layers_are_calibrated_on_the_rounded_ones(tiny_llama, text_batches):
    by_hand = copy.deepcopy(tiny_llama)
    ratios, form = resolve_ratios(tiny_llama, 0.5), ValueFormat(4, 64)
    settings = {"metric": "wanda", "batches": text_batches, "progress": False}
    rounding = LayerQuantiser(tiny_llama, dict.fromkeys(ratios, form))
    prune_model(tiny_llama, ratios=ratios, on_layer=rounding.layer_, **settings)
    for layer in range(4):
        one = {name: ratio for name, ratio in ratios.items() if f".layers.{layer}." in name}
        prune_model(by_hand, ratios=one, **settings)
        LayerQuantiser(by_hand, dict.fromkeys(one, form)).rest_()
    for name, linear in prunable_weights(by_hand).items():
        assert torch.equal(tiny_llama.get_submodule(name).weight, linear.weight), name


def test_codes_lie_over_masks_and_both_come_off(tiny_llama):
    linear = tiny_llama.get_submodule(UP)
    parameter, order = linear.weight, list(linear._parameters)
    before = parameter.detach().clone()
    rankings = rank_model(tiny_llama, None, metric="magnitude", low=0.4, high=0.6, progress=False)
    with masked(tiny_llama, rankings) as mask, quantised(tiny_llama, rankings) as codes:
        mask.apply({UP: 0.5})
        plain = linear.weight.clone()
        codes.apply({UP: 4})
        assert torch.equal(linear.weight, through_codes(plain, 4, 64))
        assert int((linear.weight == 0).sum()) >= before.numel() // 2
        codes.apply({UP: 16})
        assert torch.equal(linear.weight, plain)
    assert linear.weight is parameter
    assert torch.equal(parameter, before)
    assert list(linear._parameters) == order


def test_codes_work_without_masks_and_come_off_after_an_exception(tiny_llama):
    linear = tiny_llama.get_submodule(UP)
    parameter = linear.weight
    with pytest.raises(KeyboardInterrupt), quantised(tiny_llama, [UP]) as codes:
        codes.apply({UP: 8})
        assert torch.equal(linear.weight, through_codes(parameter, 8, None))
        raise KeyboardInterrupt
    assert linear.weight is parameter


def test_unknown_names_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="'model' is none"), quantised(tiny_llama, ["model"]):
        pass
    with quantised(tiny_llama, [UP]) as codes, pytest.raises(ValueError, match="'lm_head' was not"):
        codes.apply({"lm_head": 8})
