"""Pruning a whole model: one contract for all metrics, and what sequential calibration means."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_adaptive_sparse.architecture import prunable_weights
from hf_adaptive_sparse.calibration.activations import collect_inputs
from hf_adaptive_sparse.calibration.token_weights import token_weights
from hf_adaptive_sparse.pruning.apply import prune_model, rank_model, resolve_ratios
from hf_adaptive_sparse.pruning.method import PruningMethod
from hf_adaptive_sparse.pruning.metrics import METRICS, get_metric
from hf_adaptive_sparse.pruning.output_loss import OutputLoss
from hf_adaptive_sparse.pruning.patterns import parse_pattern
from hf_adaptive_sparse.pruning.ranking import mask_from_scores, removal_count
from hf_adaptive_sparse.pruning.solvers import WEIGHT_UPDATES
from hf_adaptive_sparse.pruning.sparsegpt import inverse_factor, solve
from tests.conftest import llama_config
from tests.families.tiny_models import tiny_model

ALL_METRICS = sorted(METRICS)
METHODS = [(name, None) for name in ALL_METRICS]
METHODS += [("lognorm", "obs"), ("wanda", "least_squares"), ("magnitude", "least_squares")]
SCORED = [name for name in ALL_METRICS if not METRICS[name].updates_weights]


def prune(model, ratios, batches, **options):
    return prune_model(model, ratios=ratios, batches=batches, progress=False, **options)


sequential_and_one_shot = pytest.mark.parametrize("sequential", [True, False])


@pytest.mark.parametrize(("metric", "update"), METHODS)
class TestContract:
    """Holds for every metric and weight update."""

    @pytest.fixture
    def tiny_llama(self):
        """Of two layers, so that the second sees what was pruned of the first."""
        torch.manual_seed(0)
        return LlamaForCausalLM(llama_config(num_hidden_layers=2)).eval()

    @sequential_and_one_shot
    def test_counts_are_exact_and_nothing_else_changes(
        self, tiny_llava, image_batches, metric, update, sequential
    ):
        before = copy.deepcopy(tiny_llava.state_dict())
        objects = {name: id(p) for name, p in tiny_llava.named_parameters()}
        tiny_llava.model.language_model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        grads = {name: p.requires_grad for name, p in tiny_llava.named_parameters()}
        tiny_llava.train()
        ratios = resolve_ratios(tiny_llava, 0.5, {"*.mlp.*": 0.437, "*.layers.2.*": 0.6})
        report = prune(
            tiny_llava,
            ratios,
            image_batches,
            metric=metric,
            weight_update=update,
            sequential=sequential,
        )
        assert tiny_llava.training
        assert {name: id(p) for name, p in tiny_llava.named_parameters()} == objects
        assert {name: p.requires_grad for name, p in tiny_llava.named_parameters()} == grads
        linears = prunable_weights(tiny_llava)
        assert [m.name for m in report.modules] == list(linears)
        for entry in report.modules:
            weight = linears[entry.name].weight
            expected = removal_count(weight.numel(), ratios[entry.name])
            assert int((weight == 0).sum()) == entry.removed == expected
            assert entry.numel == weight.numel()
            assert not torch.signbit(weight[weight == 0]).any()
            kept = weight != 0
            if not PruningMethod.of(metric, update).needs_hessian:
                assert torch.equal(weight[kept], before[entry.name + ".weight"][kept])
        pruned = {name + ".weight" for name, ratio in ratios.items() if ratio > 0}
        for name, tensor in tiny_llava.state_dict().items():
            if name not in pruned:
                assert torch.equal(tensor, before[name]), name

    def test_deterministic(self, tiny_llama, text_batches, metric, update):
        ratios = resolve_ratios(tiny_llama, 0.55)
        models = [copy.deepcopy(tiny_llama) for _ in range(2)]
        for model in models:
            prune(
                model,
                ratios,
                text_batches,
                metric=metric,
                weight_update=update,
            )
        first, second = (model.state_dict() for model in models)
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_zero_rows_and_columns(self, tiny_llama, text_batches, metric, update):
        with torch.no_grad():
            for module in prunable_weights(tiny_llama).values():
                module.weight[3] = 0
                module.weight[:, 5] = 0
        ratios = resolve_ratios(tiny_llama, 0.5)
        report = prune(
            tiny_llama,
            ratios,
            text_batches,
            metric=metric,
            weight_update=update,
        )
        assert report.mean_sparsity == pytest.approx(0.5, abs=1e-4)
        for module in prunable_weights(tiny_llama).values():
            assert module.weight.isfinite().all()

    def test_n_of_m(self, tiny_llama, text_batches, metric, update):
        ratios = resolve_ratios(tiny_llama, 0.5, pattern="2:4")
        report = prune(
            tiny_llama,
            ratios,
            text_batches,
            metric=metric,
            weight_update=update,
            pattern="2:4",
        )
        assert report.mean_sparsity == 0.5
        assert report.pattern == "2:4"
        for module in prunable_weights(tiny_llama).values():
            groups = (module.weight == 0).view(-1, 4).sum(1)
            assert (groups == 2).all()

    @sequential_and_one_shot
    def test_padding_changes_nothing(self, tiny_llama, text_batches, metric, update, sequential):
        bare = [{"input_ids": batch["input_ids"][1:]} for batch in text_batches]
        padded = []
        for batch in bare:
            ids = nn.functional.pad(batch["input_ids"], (0, 7), value=9)
            mask = torch.ones_like(ids)
            mask[:, -7:] = 0
            padded.append({"input_ids": ids, "attention_mask": mask})
        tiny_llama.double()  # attention over other lengths rounds differently
        ratios = resolve_ratios(tiny_llama, 0.5)
        masks = []
        for batches in (bare, padded):
            model = copy.deepcopy(tiny_llama)
            prune(
                model, ratios, batches, metric=metric, weight_update=update, sequential=sequential
            )
            masks.append([m.weight == 0 for m in prunable_weights(model).values()])
        differing = sum(int((a != b).sum()) for a, b in zip(*masks, strict=True))
        # sparsegpt works in float32, where near-ties may fall either way
        assert differing <= (
            0.002 if PruningMethod.of(metric, update).needs_hessian else 0
        ) * report_size(model)

    def test_bf16(self, tiny_llama, text_batches, metric, update):
        tiny_llama.bfloat16()
        ratios = resolve_ratios(tiny_llama, 0.5)
        report = prune(
            tiny_llama,
            ratios,
            text_batches,
            metric=metric,
            weight_update=update,
        )
        assert report.mean_sparsity == 0.5
        assert {m.weight.dtype for m in prunable_weights(tiny_llama).values()} == {torch.bfloat16}

    def test_weights_that_are_not_finite_are_named_before_anything_changes(
        self, tiny_llama, text_batches, metric, update
    ):
        name = "model.layers.1.mlp.down_proj"
        tiny_llama.get_submodule(name).weight.data[1, 2] = torch.nan
        before = copy.deepcopy(tiny_llama.state_dict())
        ratios = resolve_ratios(tiny_llama, 0.5)
        with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' holds"):
            prune(
                tiny_llama,
                ratios,
                text_batches,
                metric=metric,
                weight_update=update,
            )
        after = tiny_llama.state_dict()
        assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def report_size(model):
    return sum(m.weight.numel() for m in prunable_weights(model).values())


@sequential_and_one_shot
@pytest.mark.parametrize(
    ("metric", "update"),
    [("lognorm", None), ("wanda", None), ("sparsegpt", None), ("lognorm", "obs")],
)
def test_against_a_loop_by_hand(tiny_llama, text_batches, metric, update, sequential):
    """Forward the whole model again for every layer: slow, and plainly right."""
    ratios = resolve_ratios(tiny_llama, 0.5, {"*": 0.5, "*.o_proj": 0.3})
    ours, theirs = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    prune(ours, ratios, text_batches, metric=metric, weight_update=update, sequential=sequential)
    chosen = get_metric(metric)
    hessian = chosen.updates_weights or update is not None
    linears = prunable_weights(theirs)
    for index in range(4):
        mine = {n: m for n, m in linears.items() if n.startswith(f"model.layers.{index}.")}
        source = theirs if sequential else tiny_llama
        seen = {n: source.get_submodule(n) for n in mine}
        with collect_inputs(seen, hessian=hessian) as statistics:
            for batch in text_batches:
                statistics.token_weights = token_weights(batch, theirs.config)
                with torch.no_grad():
                    source(**batch)
        for name, module in mine.items():
            weight, norm = module.weight.data, statistics.input_norm(name)
            count = removal_count(weight.numel(), ratios[name])
            mask = None
            if not chosen.updates_weights:
                mask = mask_from_scores(chosen.score(weight, norm), ratios[name])
            if update is not None:
                loss = OutputLoss(statistics.statistic(name).hessian.clone())
                weight.copy_(WEIGHT_UPDATES[update](weight, mask, loss))
            elif hessian:
                factor, dead = inverse_factor(statistics.statistic(name).hessian.clone())
                weight.copy_(solve(weight, factor, dead, count)[0])
            else:
                weight.masked_fill_(mask, 0)
    first, second = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_sequential_and_one_shot_differ_after_the_first_layer(tiny_llama, text_batches):
    ratios = resolve_ratios(tiny_llama, 0.6)
    sequential, one_shot = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    prune(sequential, ratios, text_batches)
    prune(one_shot, ratios, text_batches, sequential=False)
    same = [
        torch.equal(sequential.get_submodule(name).weight, one_shot.get_submodule(name).weight)
        for name in ratios
    ]
    assert all(same[:7])
    assert not all(same[7:])


@pytest.mark.parametrize("metric", SCORED)
@pytest.mark.parametrize("update", ["obs", "least_squares"])
def test_an_update_follows_the_mask_of_its_metric(tiny_llama, text_batches, metric, update):
    """One-shot, so that no earlier update moves the statistics of a later layer."""
    ratios = resolve_ratios(tiny_llama, 0.5, {"*": 0.5, "*.o_proj": 0.3})
    bare, updated = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    prune(bare, ratios, text_batches, metric=metric, sequential=False)
    report = prune(
        updated, ratios, text_batches, metric=metric, weight_update=update, sequential=False
    )
    assert report.weight_update == report.to_dict()["weight_update"] == update
    for name in ratios:
        mask = bare.get_submodule(name).weight == 0
        weight = updated.get_submodule(name).weight
        assert torch.equal(weight == 0, mask)
        assert not torch.equal(weight, bare.get_submodule(name).weight)


def test_sequential_updates_bring_the_hidden_states_nearer_to_the_dense(tiny_llama, text_batches):
    ratios = resolve_ratios(tiny_llama, 0.5)
    batch = text_batches[0]
    mask = batch["attention_mask"].bool()

    def hidden(model):
        with torch.no_grad():
            return model.model(**batch).last_hidden_state[mask]

    errors = {}
    for metric, update in [("wanda", None), ("wanda", "obs"), ("wanda", "least_squares")]:
        model = copy.deepcopy(tiny_llama)
        prune(model, ratios, text_batches, metric=metric, weight_update=update)
        errors[update] = float((hidden(model) - hidden(tiny_llama)).norm())
    assert errors["obs"] < errors[None]
    assert errors["least_squares"] < errors[None]


def test_image_weight(tiny_llava, image_batches):
    ratios = resolve_ratios(tiny_llava, 0.5)
    models = {}
    for weight in (0.0, 1.0, 5.0):
        models[weight] = copy.deepcopy(tiny_llava)
        prune(models[weight], ratios, image_batches, image_weight=weight)
    states = [model.state_dict() for model in models.values()]
    for i, j in ((0, 1), (1, 2)):
        assert any(not torch.equal(states[i][k], states[j][k]) for k in states[0])


@pytest.mark.parametrize("metric", SCORED)
def test_rankings_give_the_one_shot_masks(tiny_llava, image_batches, metric):
    rankings = rank_model(
        tiny_llava, image_batches, low=0.4, high=0.6, metric=metric, progress=False
    )
    ratios = resolve_ratios(tiny_llava, 0.475)
    assert list(rankings) == list(ratios)
    prune(tiny_llava, ratios, image_batches, metric=metric, sequential=False)
    for name, module in prunable_weights(tiny_llava).items():
        assert torch.equal(rankings[name].mask(0.475), module.weight == 0)


def test_ranking_changes_nothing(tiny_llama, text_batches):
    before = copy.deepcopy(tiny_llama.state_dict())
    rankings = rank_model(
        tiny_llama,
        text_batches,
        low=0.4,
        high=0.6,
        modules_to_not_convert=["model.layers.0"],
        progress=False,
    )
    assert len(rankings) == 21
    after = tiny_llama.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_layers_left_dense_are_passed_through(tiny_llama, text_batches):
    only_last = resolve_ratios(tiny_llama, 0.5, {"model.layers.3": 0.5})
    report = prune(tiny_llama, only_last, text_batches)
    assert report.numel == report_size(tiny_llama)  # the dense ones count
    assert report.mean_sparsity == pytest.approx(0.125, abs=1e-4)
    assert (tiny_llama.model.layers[2].mlp.up_proj.weight != 0).all()
    nothing = prune(tiny_llama, resolve_ratios(tiny_llama, 0.0), text_batches)
    assert nothing.removed == 0


@pytest.mark.parametrize("metric", ["lognorm", "magnitude", "sparsegpt"])
def test_accelerate_dispatch_and_offload(tiny_llama, text_batches, metric):
    ratios = resolve_ratios(tiny_llama, 0.5)
    expected = copy.deepcopy(tiny_llama)
    prune(expected, ratios, text_batches, metric=metric)
    split = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    split |= {"lm_head": "cpu", **{f"model.layers.{i}": "cpu" for i in range(4)}}
    for device_map in ({"": "cpu"}, split):
        model = dispatch_model(copy.deepcopy(tiny_llama), device_map, force_hooks=True)
        prune(model, ratios, text_batches, metric=metric)
        for name, module in prunable_weights(model).items():
            assert torch.equal(module.weight, expected.get_submodule(name).weight)
    state = {key: tensor.clone() for key, tensor in tiny_llama.state_dict().items()}
    model = cpu_offload(copy.deepcopy(tiny_llama), torch.device("cpu"), state_dict=state)
    assert next(iter(prunable_weights(model).values())).weight.is_meta
    prune(model, ratios, text_batches, metric=metric)
    for name in ratios:
        assert torch.equal(state[name + ".weight"], expected.get_submodule(name).weight)


def test_weights_on_disk_are_refused_where_pruning_them_would_be_lost(tiny_llama, tmp_path):
    ratios = resolve_ratios(tiny_llama, 0.5)
    disk_offload(tiny_llama, tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"q_proj' is not in memory .* without disk offload"):
        prune(tiny_llama, ratios, None, metric="magnitude")


def test_report(tiny_llama, text_batches):
    ratios = resolve_ratios(tiny_llama, 0.5, {"*.up_proj": 0.25, "*.q_proj": 0.75})
    report = prune(tiny_llama, ratios, text_batches, metric="wanda", weight_update="obs")
    data = report.to_dict()
    assert (data["metric"], data["weight_update"]) == ("wanda", "obs")
    assert data["mean_sparsity"] == pytest.approx(report.target_sparsity, abs=1e-4)
    assert report.ratios == ratios
    assert data["modules"][0]["ratio"] == pytest.approx(0.75, abs=1e-4)
    assert data["removed"] == sum(m["removed"] for m in data["modules"])
    assert report.seconds > 0


@pytest.mark.parametrize("metric", [m for m in ALL_METRICS if METRICS[m].needs_calibration])
def test_missing_calibration(tiny_llama, metric):
    ratios = resolve_ratios(tiny_llama, 0.5)
    with pytest.raises(ValueError, match="needs calibration data, got none"):
        prune(tiny_llama, ratios, None, metric=metric)
    with pytest.raises(ValueError, match="at least one calibration batch"):
        prune(tiny_llama, ratios, [], metric=metric)
    ids = torch.ones(1, 4, dtype=torch.long)
    empty = [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}]
    with pytest.raises(ValueError, match="at least one token that is not padding"):
        prune(tiny_llama, ratios, empty, metric=metric)


def test_an_update_needs_calibration_also_after_a_metric_that_needs_none(tiny_llama):
    ratios = resolve_ratios(tiny_llama, 0.5)
    with pytest.raises(ValueError, match="weight_update='obs' needs calibration data, got none"):
        prune(tiny_llama, ratios, None, metric="magnitude", weight_update="obs")


def test_magnitude_needs_no_data(tiny_llama):
    report = prune(tiny_llama, resolve_ratios(tiny_llama, 0.3), None, metric="magnitude")
    assert report.mean_sparsity == pytest.approx(0.3, abs=1e-4)


def test_activations_that_are_not_finite_name_the_linear(tiny_llama, text_batches):
    tiny_llama.model.layers[1].post_attention_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"inputs of 'model\.layers\.1\.mlp\.gate_proj' must be"):
        prune(tiny_llama, resolve_ratios(tiny_llama, 0.5), text_batches)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny_llama.modules())


def test_other_errors(tiny_llama, text_batches):
    ratios = resolve_ratios(tiny_llama, 0.5)
    with pytest.raises(ValueError, match="metric must be one of"):
        prune(tiny_llama, ratios, text_batches, metric="best")
    with pytest.raises(ValueError, match="weight_update must be None or one of"):
        prune(tiny_llama, ratios, text_batches, weight_update="admm")
    with pytest.raises(ValueError, match="'alps' updates the weights by itself"):
        prune(tiny_llama, ratios, text_batches, metric="alps", weight_update="obs")
    with pytest.raises(ValueError, match="pattern must be"):
        prune(tiny_llama, ratios, text_batches, pattern="2/4")
    with pytest.raises(ValueError, match="'lm_head' is none"):
        prune(tiny_llama, {"lm_head": 0.5}, text_batches)
    with pytest.raises(ValueError, match=r"fixes the ratio at 0\.5"):
        prune(tiny_llama, dict.fromkeys(ratios, 0.4), text_batches, pattern="2:4")
    with pytest.raises(ValueError, match="cannot rank"):
        rank_model(tiny_llama, text_batches, low=0.4, high=0.6, metric="sparsegpt")
    with pytest.raises(ValueError, match="needs calibration"):
        rank_model(tiny_llama, None, low=0.4, high=0.6)
    assert parse_pattern("2:4").ratio == 0.5


def test_weights_out_of_memory_are_refused(tiny_llama):
    tiny_llama.to("meta")
    with pytest.raises(ValueError, match="is not in memory"):
        prune(tiny_llama, resolve_ratios(tiny_llama, 0.5), None, metric="magnitude")


def test_experts_of_an_unknown_layout_stay_dense_with_one_warning(caplog):
    model = tiny_model("jetmoe")
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        report = prune(model, resolve_ratios(model, 0.5), None, metric="magnitude")
    assert report.mean_sparsity == 0.5
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "mlp.input_linear.weight" in messages[0]


def test_progress_bar(tiny_llama, text_batches, capsys):
    prune_model(tiny_llama, ratios=resolve_ratios(tiny_llama, 0.5), batches=text_batches)
    shown = capsys.readouterr().err
    assert "Pruning (lognorm)" in shown
    assert "sparsity=0.5000" in shown


def test_a_fused_projection_is_pruned_as_its_matrices_would_be(text_batches) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "phi3",
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )
    fused = model.model.layers[0].self_attn.qkv_proj
    with torch.no_grad():
        fused.weight[:32] *= 30
    weight = fused.weight.detach().clone()
    with collect_inputs({"qkv": fused}) as statistics:
        for batch in text_batches:
            statistics.token_weights = token_weights(batch, model.config)
            model(**batch)
            statistics.forget_inputs()
    metric, norm = get_metric("lognorm"), statistics.input_norm("qkv")
    scores = torch.cat([metric.score(part, norm) for part in weight.split([32, 16, 16])])
    prune(model, {"model.layers.0.self_attn.qkv_proj": 0.5}, text_batches)
    assert torch.equal(fused.weight == 0, mask_from_scores(scores, 0.5))
