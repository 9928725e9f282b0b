"""A search over a mixture of experts: masks over 3-D parameters, ratios of their own."""

from __future__ import annotations

import torch

import hf_adaptive_sparse as has
from hf_adaptive_sparse.architecture import prunable_weights
from tests.families.tiny_models import tiny_model

DOWN = "model.layers.1.mlp.experts.down_proj"


def test_experts_have_ratios_of_their_own_and_are_left_untouched() -> None:
    model = tiny_model("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(100, 160, (2, 24), generator=generator)} for _ in range(2)
    ]
    result = has.search(
        model,
        batches,
        batches,
        space=has.SearchSpace(
            target_sparsity=0.5,
            granularity="layer-projection",
            kv_bits=None,
            weight_bits=(16, 8),
            weight_mean_bits=12,
        ),
        n_trials=3,
        progress=False,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    config = result.best_config
    weights = prunable_weights(model)
    assert list(config.sparsity) == list(weights)
    groups = {label for label in result.study.best_trial.params if "experts" in label}
    assert any("layer_1_mlp.experts.down_proj" in label for label in groups)
    report = has.prune(model, config, batches, progress=False)
    assert abs(report.removed - 0.5 * report.numel) <= 1
    entry = next(entry for entry in report.modules if entry.name == DOWN)
    assert entry.removed == round(config.sparsity[DOWN] * entry.numel)
