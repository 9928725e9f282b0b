"""Linears that no calibration token reached: weights used without a call, experts as linears."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, PreTrainedModel

import hf_adaptive_sparse as has
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
    assert "2 linears were reached by no calibration token" in caplog.text


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


@pytest.mark.parametrize("sequential", [True, False])
def test_a_layer_in_which_nothing_was_reached_is_refused(sequential):
    model = mamba()
    ratios = {name: 0.5 for name in resolve_ratios(model, 0.5) if name.endswith("dt_proj")}
    with pytest.raises(ValueError, match=r"No calibration token reached .*dt_proj"):
        prune_model(model, ratios=ratios, batches=BATCHES, sequential=sequential, progress=False)
