"""Linears that too few tokens reached: weights used without a call, experts as linears."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, PreTrainedModel

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import expert_linears
from hf_adaptive_sparse.pruning.apply import prune_model, rank_model, resolve_ratios
from hf_adaptive_sparse.pruning.metrics import get_metric
from hf_adaptive_sparse.pruning.ranking import mask_from_scores
from tests.families.tiny_models import tiny_model

IDS = torch.arange(40).view(2, 20) % 60 + 3
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
METRICS = ["lognorm", "wanda", "ria", "sparsegpt", "alps", "magnitude"]


def mamba() -> PreTrainedModel:
    return tiny_model("mamba").eval()


def nllb_moe() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": 160, "num_experts": 8, "max_position_embeddings": 64}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
        sizes |= {f"{part}_sparse_step": 2}
    return NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes, pad_token_id=0)).eval()


@pytest.mark.parametrize("metric", METRICS)
def test_weights_that_a_model_uses_without_a_call_are_scored_without_data(metric, caplog):
    model = mamba()
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        report = has.prune(model, has.SparsityConfig(metric=metric), BATCHES)
    names = [f"backbone.layers.{index}.mixer.dt_proj" for index in range(2)]
    assert report.mean_sparsity == pytest.approx(0.5, abs=1e-3)
    assert {m.ratio for m in report.modules} == {0.5}
    found = [] if metric == "magnitude" else names
    assert report.linears_without_data == found
    assert report.to_dict()["linears_without_data"] == found
    provenance = model.config.quantization_config.provenance
    assert provenance.get("linears_without_data", []) == found
    warned = [r.message for r in caplog.records if "scored without data" in r.message]
    assert len(warned) == bool(found)
    for message in warned:
        assert message.startswith("2 linears")
        assert names[0] in message
        assert "modules_to_not_convert=['*.mixer.dt_proj']" in message


def test_such_a_weight_is_scored_as_if_all_inputs_were_alike():
    model = mamba()
    linear = model.backbone.layers[1].mixer.dt_proj
    before = linear.weight.detach().clone()
    prune_model(model, ratios=resolve_ratios(model, 0.5), batches=BATCHES, progress=False)
    scores = get_metric("lognorm").score(before, torch.ones(before.shape[1]))
    assert torch.equal(linear.weight == 0, mask_from_scores(scores, 0.5))


def test_the_glob_that_the_warning_names_leaves_them_dense(caplog):
    config = has.SparsityConfig(modules_to_not_convert=["*.mixer.dt_proj"])
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        report = has.prune(mamba(), config, BATCHES)
    assert report.linears_without_data == []
    assert "without data" not in caplog.text


def test_a_ranking_scores_them_so_too(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        rankings = rank_model(mamba(), BATCHES, low=0.5, high=0.5, progress=False)
    assert "backbone.layers.1.mixer.dt_proj" in rankings
    assert "2 linears saw no calibration token" in caplog.text


def test_a_hybrid_model_is_pruned_saved_and_loaded(tmp_path):
    model = tiny_model("jamba", JAMBA).eval()
    report = has.prune(model, has.SparsityConfig(), BATCHES)
    assert report.linears_without_data == ["model.layers.0.mamba.dt_proj"]
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    for runtime in ("dense", "sparse"):
        config = has.SparsityConfig(runtime=runtime)
        again = type(model).from_pretrained(tmp_path, sparsity_config=config).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_experts_that_are_linears_are_scored_without_data_where_no_token_came(caplog):
    model = nllb_moe()
    # Two tokens, each sent to two of eight experts.
    batches = [{**BATCHES[0], "decoder_input_ids": IDS[:, :1], "labels": IDS[:, 1:2]}]
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        report = has.prune(model, has.SparsityConfig(), batches)
    assert report.linears_without_data
    assert all(".ffn.experts.expert_" in name for name in report.linears_without_data)
    assert "modules_to_not_convert=['*.ffn.experts.expert_" in caplog.text
    assert report.mean_sparsity == pytest.approx(0.5, abs=1e-3)


class ListedExperts(nn.Module):
    """Mixtral's experts as a list, each with linears of its own."""

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        self.act_fn = stacked.act_fn
        self.experts = nn.ModuleList()
        matrices = zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True)
        for gate_up, down in matrices:
            expert = nn.Module()
            for name, matrix in zip(("gate", "up", "down"), (*gate_up.chunk(2), down), strict=True):
                linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
                linear.weight.data = matrix.clone()
                expert.add_module(name, linear)
            self.experts.append(expert)

    def forward(self, hidden, chosen, weights):
        output = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            tokens, place = (chosen == index).nonzero(as_tuple=True)
            if tokens.numel():
                inputs = hidden[tokens]
                found = expert.down(self.act_fn(expert.gate(inputs)) * expert.up(inputs))
                output.index_add_(0, tokens, found * weights[tokens, place, None])
        return output


@pytest.mark.parametrize("metric", ["lognorm", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("min_tokens", "starved"), [(1, 0), (20, 2), (10**6, 4)])
def test_experts_that_are_linears_are_pruned_as_stacked_ones(metric, min_tokens, starved):
    stacked, listed = tiny_model("mixtral"), tiny_model("mixtral")
    for layer in listed.model.layers:
        layer.mlp.experts = ListedExperts(layer.mlp.experts)
    reports = []
    for model in (stacked, listed):
        ratios = {n: 0.5 for n in resolve_ratios(model, 0.5) if ".layers.0.mlp.experts" in n}
        settings = {"metric": metric, "min_expert_tokens": min_tokens, "progress": False}
        reports.append(prune_model(model, ratios=ratios, batches=BATCHES, **settings))
    expected = ListedExperts(stacked.model.layers[0].mlp.experts)
    found = listed.model.layers[0].mlp.experts
    for (name, weight), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(weight == 0, other == 0), name
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6)
    without = reports[0].experts_without_data.get("model.layers.0.mlp.experts", [])
    names = [f"{expert}.{kind}" for expert in without for kind in ("gate", "up", "down")]
    assert reports[1].linears_without_data == [
        f"model.layers.0.mlp.experts.experts.{n}" for n in names
    ]
    assert len(without) == starved


def test_a_ranking_scores_experts_that_are_linears_so_too():
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts = ListedExperts(model.model.layers[0].mlp.experts)
    settings = {"low": 0.5, "high": 0.5, "progress": False}
    ranked = rank_model(model, BATCHES, min_expert_tokens=10**6, **settings)
    linear = model.model.layers[0].mlp.experts.experts[1].up
    scores = get_metric("lognorm").score(linear.weight, torch.ones(linear.in_features))
    mask = ranked["model.layers.0.mlp.experts.experts.1.up"].mask(0.5)
    assert torch.equal(mask, mask_from_scores(scores, 0.5))


def test_only_modules_of_one_class_in_a_list_are_experts():
    assert expert_linears(tiny_model("mixtral")) == frozenset()
    found = expert_linears(nllb_moe())
    assert found
    assert all(".ffn.experts.expert_" in name for name in found)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_layer_in_which_nothing_was_reached_is_refused(sequential):
    model = mamba()
    ratios = {name: 0.5 for name in resolve_ratios(model, 0.5) if name.endswith("dt_proj")}
    with pytest.raises(ValueError, match=r"No calibration token reached .*dt_proj"):
        prune_model(model, ratios=ratios, batches=BATCHES, sequential=sequential, progress=False)
