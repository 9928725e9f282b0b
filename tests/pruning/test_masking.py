"""Masks on a model: equal to a real prune, and gone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.packing.bitmask import pack_mask
from hf_adaptive_sparse.pruning.apply import prune_model, rank_model
from hf_adaptive_sparse.pruning.masking import mask_table, masked, zeroed
from hf_adaptive_sparse.pruning.ranking import Ranking


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def fingerprint(model: nn.Module) -> list[object]:
    state = [(key, id(p), p.requires_grad, p.sum().item()) for key, p in model.named_parameters()]
    modules = [(key, type(m), id(m), sorted(vars(m))) for key, m in model.named_modules()]
    return [state, modules, list(model.state_dict())]


@pytest.mark.parametrize("metric", ["lognorm", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_that_of_a_pruned_copy(tiny_llama, text_batches, metric, dtype):
    tiny_llama.to(dtype)
    rankings = rank_model(
        tiny_llama, text_batches, low=0.4, high=0.6, metric=metric, progress=False
    )
    trials = []
    for low, high in ((0.5, 0.5), (0.4, 0.6), (0.6, 0.4)):
        ratios = {name: low if i % 2 else high for i, name in enumerate(rankings)}
        pruned = copy.deepcopy(tiny_llama)
        prune_model(
            pruned,
            ratios=ratios,
            metric=metric,
            batches=text_batches,
            sequential=False,
            progress=False,
        )
        trials.append((ratios, logits(pruned, text_batches[0])))
    dense = logits(tiny_llama, text_batches[0])
    with masked(tiny_llama, rankings) as handle:
        assert torch.equal(logits(tiny_llama, text_batches[0]), dense)
        for ratios, expected in trials:
            handle.apply(ratios)
            assert handle.ratios == ratios
            assert torch.equal(logits(tiny_llama, text_batches[0]), expected)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeroed_equals_masked_fill_bit_for_bit(dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(5, columns, generator=generator).to(dtype)
    weight[0, 0] = -0.0
    weight[1, 0] = torch.inf
    mask = torch.rand(5, columns, generator=generator) < 0.5
    mask[0, 0] = False
    found = zeroed(weight, pack_mask(mask), mask_table(dtype))
    expected = weight.masked_fill(mask, 0.0)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


def test_masked_weights_are_kept_within_the_bound_until_the_mask_changes(tiny_llama, text_batches):
    rankings = rank_model(tiny_llama, None, low=0.4, high=0.6, metric="magnitude", progress=False)
    sizes = [module.weight.nbytes for module in prunable_weights(tiny_llama).values()]
    expected = []
    with masked(tiny_llama, rankings) as handle:
        for ratio in (0.5, 0.45, 0.5):
            handle.apply(dict.fromkeys(rankings, ratio))
            expected.append(logits(tiny_llama, text_batches[0]))
            assert handle.kept_bytes == 0
    for bound in (sum(sizes[:3]), sum(sizes), 10 * sum(sizes)):
        with masked(tiny_llama, rankings, bound) as handle:
            for ratio, wanted in zip((0.5, 0.45, 0.5), expected, strict=True):
                handle.apply(dict.fromkeys(rankings, ratio))
                assert handle.kept_bytes == 0
                for _ in range(2):
                    assert torch.equal(logits(tiny_llama, text_batches[0]), wanted)
                assert 0 < handle.kept_bytes <= bound
            one = next(iter(rankings))
            before = handle.kept_bytes
            handle.apply({one: 0.55})
            assert handle.kept_bytes == before - sizes[0]


def test_it_leaves_no_trace(tiny_llama, text_batches):
    for module in prunable_weights(tiny_llama).values():
        module.bias = nn.Parameter(torch.randn(module.out_features))
    tiny_llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    rankings = rank_model(tiny_llama, None, low=0.4, high=0.6, metric="magnitude", progress=False)
    before = fingerprint(tiny_llama)
    dense = logits(tiny_llama, text_batches[0])
    with masked(tiny_llama, rankings) as handle:
        handle.apply(dict.fromkeys(rankings, 0.5))
        assert not torch.equal(logits(tiny_llama, text_batches[0]), dense)
    assert fingerprint(tiny_llama) == before
    assert torch.equal(logits(tiny_llama, text_batches[0]), dense)
    with pytest.raises(RuntimeError, match="trial"), masked(tiny_llama, rankings) as handle:
        handle.apply(dict.fromkeys(rankings, 0.6))
        raise RuntimeError("trial")
    assert fingerprint(tiny_llama) == before


def test_nesting_is_refused_and_changes_nothing(tiny_llama, text_batches):
    rankings = rank_model(tiny_llama, None, low=0.4, high=0.6, metric="magnitude", progress=False)
    before = fingerprint(tiny_llama)
    with masked(tiny_llama, rankings) as handle:
        handle.apply(dict.fromkeys(rankings, 0.5))
        outer = logits(tiny_llama, text_batches[0])
        with pytest.raises(ValueError, match="does not nest"), masked(tiny_llama, rankings):
            pass
        assert torch.equal(logits(tiny_llama, text_batches[0]), outer)
    assert fingerprint(tiny_llama) == before


def test_with_accelerate_hooks(tiny_llama, text_batches):
    rankings = rank_model(tiny_llama, None, low=0.4, high=0.6, metric="magnitude", progress=False)
    with masked(tiny_llama, rankings) as handle:
        handle.apply(dict.fromkeys(rankings, 0.5))
        expected = logits(tiny_llama, text_batches[0])
    model = dispatch_model(tiny_llama, {"": "cpu"}, force_hooks=True)
    before = fingerprint(model)
    with masked(model, rankings) as handle:
        handle.apply(dict.fromkeys(rankings, 0.5))
        assert torch.equal(logits(model, text_batches[0]), expected)
    assert fingerprint(model) == before


def test_unnamed_linears_keep_what_they_have(tiny_llama):
    rankings = rank_model(tiny_llama, None, low=0.4, high=0.6, metric="magnitude", progress=False)
    first, second, *_ = rankings
    with masked(tiny_llama, rankings) as handle:
        handle.apply({first: 0.5})
        handle.apply({second: 0.4})
        assert handle.ratios == {first: 0.5, second: 0.4}
        weight = tiny_llama.get_submodule(first).weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert (tiny_llama.get_submodule(list(rankings)[2]).weight != 0).all()


def test_apply_changes_nothing_when_one_ratio_is_refused(tiny_llama):
    rankings = rank_model(tiny_llama, None, low=0.4, high=0.6, metric="magnitude", progress=False)
    first, second, *_ = rankings
    with masked(tiny_llama, rankings) as handle:
        with pytest.raises(ValueError, match="must lie in"):
            handle.apply({first: 0.5, second: 0.9})
        with pytest.raises(ValueError, match="'lm_head' was not"):
            handle.apply({first: 0.5, "lm_head": 0.5})
        assert handle.ratios == {}


def test_bytes_held(tiny_llama):
    tiny_llama.bfloat16()
    rankings = rank_model(tiny_llama, None, low=0.45, high=0.55, metric="magnitude", progress=False)
    numel = sum(r.numel for r in rankings.values())
    inside = sum(r.order.numel() for r in rankings.values())
    with masked(tiny_llama, rankings) as handle:
        handle.apply(dict.fromkeys(rankings, 0.5))
        assert handle.nbytes <= 2 * inside + numel


def test_rankings_that_do_not_fit_are_refused(tiny_llama):
    ranking = Ranking(torch.rand(4, 4), 0.4, 0.6)
    with (
        pytest.raises(ValueError, match=r"'model\.norm' is none"),
        masked(tiny_llama, {"model.norm": ranking}),
    ):
        pass
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"), masked(tiny_llama, {name: ranking}):
        pass
