"""Experts: routed statistics, exact counts, fallbacks, masks; against plain computations."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import dense_expert_weights, prunable_weights
from hf_adaptive_sparse.calibration.activations import collect_inputs
from hf_adaptive_sparse.calibration.expert_inputs import expert_name
from hf_adaptive_sparse.calibration.forward import run_decoder
from hf_adaptive_sparse.calibration.token_weights import token_weights
from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.pruning import experts as pruning_experts
from hf_adaptive_sparse.pruning.apply import prune_model, rank_model, resolve_ratios
from hf_adaptive_sparse.pruning.masking import masked
from hf_adaptive_sparse.pruning.metrics import get_metric
from hf_adaptive_sparse.pruning.quantising import quantised, through_codes
from hf_adaptive_sparse.pruning.ranking import mask_from_scores
from tests.families.tiny_models import tiny_model

GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
LAYOUTS = {
    "mixtral": {},
    "gpt_oss": {
        "layer_types": ["full_attention", "full_attention"]
    },  # interleaved, biases, (in, out)
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},  # (in, out)
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "layer_types": ["full_attention", "full_attention"],
        "no_rope_layers": [1, 1],
        "moe_layers": [0, 1],
    },
}


@pytest.fixture
def mixtral() -> PreTrainedModel:
    return tiny_model("mixtral")


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    """Two batches of two rows, of which one begins with padding."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(2):
        ids = torch.randint(100, 160, (2, 20), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def stacks(model: PreTrainedModel) -> dict[str, ExpertStack]:
    return {n: w for n, w in prunable_weights(model).items() if isinstance(w, ExpertStack)}


def brute_force_norms(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], dict[int, int]]:
    """Return, by expert of Mixtral's first layer, the norms of both inputs, and its tokens."""
    module = model.model.layers[0].mlp.experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    up: dict[int, torch.Tensor] = defaultdict(float)
    down: dict[int, torch.Tensor] = defaultdict(float)
    count: dict[int, int] = defaultdict(int)
    for batch, (hidden, chosen) in zip(batches, seen, strict=True):
        for token, keep in enumerate(batch["attention_mask"].reshape(-1).tolist()):
            for expert in chosen[token].tolist() if keep else ():
                gate_up = module.gate_up_proj[expert].double() @ hidden[token].double()
                middle = functional.silu(gate_up[:48]) * gate_up[48:]
                up[expert] = up[expert] + hidden[token].double().square()
                down[expert] = down[expert] + middle.square()
                count[expert] += 1
    return ({e: s.sqrt() for e, s in up.items()}, {e: s.sqrt() for e, s in down.items()}, count)


def test_statistics_are_those_of_the_tokens_sent_to_each_expert(mixtral, batches):
    with collect_inputs(stacks(mixtral)) as statistics:
        for batch in batches:
            statistics.token_weights = token_weights(batch, mixtral.config)
            run_decoder(mixtral, batch, stop_after=mixtral.model.layers)
    up, down, count = brute_force_norms(mixtral, batches)
    assert sum(count.values()) == 2 * 2 * (20 + 13)
    for expert, tokens in count.items():
        for name, norms in ((GATE_UP, up), (DOWN, down)):
            key = expert_name(name, expert)
            assert statistics.rows(key) == tokens
            found = statistics.input_norm(key)
            torch.testing.assert_close(found, norms[expert].float(), rtol=1e-5, atol=1e-6)


def test_each_expert_is_pruned_as_its_matrices_would_be_alone(mixtral, batches):
    before = {name: stack.weight.detach().clone() for name, stack in stacks(mixtral).items()}
    up, down, _ = brute_force_norms(mixtral, batches)
    ratios = resolve_ratios(mixtral, 0.5)
    report = prune_model(
        mixtral,
        ratios=ratios,
        batches=batches,
        min_expert_tokens=1,
        sequential=False,
        progress=False,
    )
    metric = get_metric("lognorm")
    for expert in range(4):
        gate, value = before[GATE_UP][expert].chunk(2)
        scores = torch.cat([metric.score(part, up[expert].float()) for part in (gate, value)])
        expected = mask_from_scores(scores, 0.5)
        assert torch.equal(stacks(mixtral)[GATE_UP].weight[expert] == 0, expected)
        scores = metric.score(before[DOWN][expert], down[expert].float())
        assert torch.equal(stacks(mixtral)[DOWN].weight[expert] == 0, mask_from_scores(scores, 0.5))
    assert report.experts_without_data == {}
    assert report.numel == sum(w.weight.numel() for w in prunable_weights(mixtral).values())


@pytest.mark.parametrize(
    ("model_type", "metric"),
    [*((name, "lognorm") for name in LAYOUTS), ("mixtral", "magnitude"), ("gpt_oss", "sparsegpt")],
)
def test_every_layout_loses_exactly_its_share(model_type, metric, batches):
    model = tiny_model(model_type, LAYOUTS[model_type])
    ratios = resolve_ratios(model, 0.37)
    report = prune_model(
        model, ratios=ratios, metric=metric, batches=batches, min_expert_tokens=1, progress=False
    )
    assert dense_expert_weights(model) == []
    assert len(stacks(model)) == 4
    removed = {entry.name: entry.removed for entry in report.modules}
    for name, stack in stacks(model).items():
        weight = stack.weight.detach()
        assert removed[name] == int((weight == 0).sum()) == round(0.37 * weight.numel())
        by_expert = (weight == 0).sum(dim=(1, 2))
        assert int(by_expert.max() - by_expert.min()) <= 1


def test_n_m_patterns_run_along_the_inputs_of_an_expert(batches):
    model = tiny_model("aria_text", LAYOUTS["aria_text"])
    ratios = resolve_ratios(model, 0.5, pattern="2:4")
    prune_model(model, ratios=ratios, pattern="2:4", batches=batches, progress=False)
    for stack in stacks(model).values():
        for expert in range(stack.count):
            groups = stack.read(stack.weight.detach(), expert).unflatten(1, (-1, 4))
            assert bool(((groups == 0).sum(dim=-1) == 2).all())


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_matrix_read_and_written_is_in_its_place(model_type):
    model = tiny_model(model_type, LAYOUTS[model_type])
    for stack in stacks(model).values():
        stored = stack.weight.detach().clone()
        matrix = stack.read(stored, 2)
        assert matrix.shape == (stack.out_features, stack.in_features)
        x = torch.randn(5, stack.in_features)
        if stack.key == "down_proj":
            bias = getattr(stack.experts.module, "down_proj_bias", torch.zeros(4, 1))[2]
            torch.testing.assert_close(stack.experts.output(2, x), x @ matrix.T + bias)
        changed = matrix + 1
        stack.write_(stored, 2, changed)
        assert torch.equal(stack.read(stored, 2), changed)
        others = [0, 1, 3]
        assert torch.equal(stored[others], stack.weight.detach()[others])


def test_experts_with_too_little_data_are_scored_without_any_and_named(mixtral, batches, caplog):
    _, _, count = brute_force_norms(mixtral, batches)
    fewest = min(count.values())
    without_data = sorted(expert for expert in range(4) if count[expert] == fewest)
    before = stacks(mixtral)[DOWN].weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        report = prune_model(
            mixtral,
            ratios={DOWN: 0.5},
            batches=batches,
            min_expert_tokens=fewest + 1,
            progress=False,
        )
    module = DOWN.rpartition(".")[0]
    assert report.experts_without_data == {module: without_data}
    assert report.to_dict()["experts_without_data"] == {module: without_data}
    assert f"{module}: {', '.join(map(str, without_data))}" in caplog.text
    scores = get_metric("lognorm").score(before[without_data[0]], torch.ones(48))
    after = stacks(mixtral)[DOWN].weight[without_data[0]]
    assert torch.equal(after == 0, mask_from_scores(scores, 0.5))


def test_a_ranking_names_the_experts_that_it_scores_without_data(mixtral, batches, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_adaptive_sparse"):
        rank_model(mixtral, batches, low=0.5, high=0.5, min_expert_tokens=10**6, progress=False)
    assert f"{DOWN.rpartition('.')[0]}: 0, 1, 2, 3" in caplog.text


def test_experts_that_compute_something_else_are_refused(mixtral, batches, monkeypatch):
    module = mixtral.model.layers[1].mlp.experts
    forward = module.forward
    monkeypatch.setattr(
        module, "forward", lambda hidden, chosen, weights: 2 * forward(hidden, chosen, weights)
    )
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*output differs from"):
        prune_model(mixtral, ratios=resolve_ratios(mixtral, 0.5), batches=batches, progress=False)


def test_a_token_may_choose_an_expert_twice(batches):
    """As in DeepSeek V4, whose table of choices is all zeros without a checkpoint."""
    model = tiny_model("deepseek_v4")
    experts = [name for name in resolve_ratios(model, 0.5) if ".experts." in name]
    ratios = dict.fromkeys(experts, 0.5)
    report = prune_model(model, ratios=ratios, batches=batches, progress=False)
    assert report.mean_sparsity == 0.5
    assert report.experts_without_data["model.layers.0.mlp.experts"] == [1, 2, 3]


def test_hessians_are_held_for_as_many_experts_as_fit(batches, monkeypatch):
    found = []
    for limit in (1 << 30, 30_000):  # one expert's take 4 * (32² + 48²) bytes
        monkeypatch.setattr(pruning_experts, "HESSIAN_BYTES", limit)
        model = tiny_model("mixtral")
        report = prune_model(
            model,
            ratios=resolve_ratios(model, 0.5),
            metric="sparsegpt",
            batches=batches,
            min_expert_tokens=33,
            progress=False,
        )
        found.append((report.removed, report.experts_without_data, model.state_dict()))
    first, second = found
    assert [len(each) for each in pruning_experts.expert_passes(stacks(model).values())] == [1] * 4
    assert first[:2] == second[:2]
    assert first[1] != {}
    assert all(torch.equal(tensor, second[2][name]) for name, tensor in first[2].items())
    with pytest.raises(ValueError, match="one-shot calibration holds the Hessians"):
        prune_model(
            tiny_model("mixtral"),
            ratios=resolve_ratios(model, 0.5),
            metric="sparsegpt",
            batches=batches,
            sequential=False,
            progress=False,
        )


def test_experts_that_accelerate_keeps_elsewhere_are_pruned_there(mixtral, batches):
    ratios = resolve_ratios(mixtral, 0.5)
    expected, settings = copy.deepcopy(mixtral), {"ratios": ratios, "batches": batches}
    reports = [prune_model(expected, **settings, min_expert_tokens=33, progress=False)]
    cpu_offload(mixtral, execution_device="cpu")
    reports.append(prune_model(mixtral, **settings, min_expert_tokens=33, progress=False))
    module = mixtral.model.layers[0].mlp.experts
    assert module.down_proj.is_meta
    found = module._hf_hook.weights_map["down_proj"]
    assert torch.equal(found, expected.model.layers[0].mlp.experts.down_proj)
    assert reports[0].experts_without_data == reports[1].experts_without_data != {}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_masks_are_those_of_a_prune_and_leave_no_trace(model_type, implementation, batches):
    model = tiny_model(model_type, LAYOUTS[model_type])
    model.set_experts_implementation(implementation)
    rankings = rank_model(model, batches, low=0.3, high=0.6, min_expert_tokens=1, progress=False)
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    types = [type(module) for module in model.modules()]
    with masked(model, rankings) as handle:
        for ratio in (0.3, 0.47, 0.6, 0.411):
            handle.apply(dict.fromkeys(rankings, ratio))
            pruned = copy.deepcopy(tiny_model(model_type, LAYOUTS[model_type]))
            pruned.set_experts_implementation(implementation)
            prune_model(
                pruned,
                ratios=dict.fromkeys(rankings, ratio),
                batches=batches,
                sequential=False,
                min_expert_tokens=1,
                progress=False,
            )
            with torch.no_grad():
                assert torch.equal(model(**batches[0]).logits, pruned(**batches[0]).logits)
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert [type(module) for module in model.modules()] == types


def test_codes_are_seen_expert_by_expert(mixtral):
    stack = stacks(mixtral)[DOWN]
    weight = stack.weight.detach().clone()
    with quantised(mixtral, [GATE_UP, DOWN]) as handle:
        handle.apply({DOWN: 8})
        seen = mixtral.model.layers[0].mlp.experts.down_proj
        assert torch.equal(seen[1], through_codes(weight[1], 8, None))
    assert torch.equal(stacks(mixtral)[DOWN].weight, weight)
    assert isinstance(stacks(mixtral)[DOWN].weight, nn.Parameter)
