"""What a search tries first: the uniform profile, then what the sensitivities suggest."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_adaptive_sparse.profiles import KVCacheConfig
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.evaluator import Evaluator
from hf_adaptive_sparse.search.kv_sensitivity import KVSensitivity, measure_kv_sensitivity
from hf_adaptive_sparse.search.sensitivity import (
    Sensitivity,
    mean_loss,
    measure_sensitivity,
    probe_losses,
    probed_batches,
)
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.suggesting import params_for, uniform_params

if TYPE_CHECKING:
    from optuna.study import Study

logger = logging.getLogger(__name__)

SENSITIVITY = "sensitivity"
"""Study attribute: what was measured of the groups of linears."""

REACH = 0.05
"""How far from the target groups are probed at most, and what is tried first may lie.

Farther out the damage grows otherwise than `sensitivity` takes it to: on the benchmarks' model a
start from probes at 0.05 gained most on held-out text, one at 0.1 less, one at 0.2 least, and the
last two lost on the very windows that they were measured on."""

FREE_REACH = 0.1
"""The same from the uniform ratio, where the range is that of a free mean."""

KV_SENSITIVITY = "kv_sensitivity"
"""Study attribute: what was measured of the layers' keys and values."""


def suggest_start(
    study: Study, evaluator: Evaluator, space: SearchSpace, shape: ModelShape
) -> None:
    """Measure the sensitivities once per study, and enqueue the profile that they suggest.

    The profile runs after the uniform one. Workers that start meanwhile measure, too, and find the
    same. Sparsity and a free split of KV bits are measured; an equal split starts as in the uniform
    profile.
    """
    done = {SENSITIVITY, KV_SENSITIVITY} & set(study.user_attrs)
    if done or len(study.directions) > 1:
        return
    ratios, kv_bits = _ratios(evaluator, space, shape), _kv(evaluator, space, shape)
    measured: dict[str, Any] = {}
    if ratios is not None:
        measured[SENSITIVITY] = ratios.to_dict()
    if kv_bits is not None:
        measured[KV_SENSITIVITY] = kv_bits.to_dict()
    if not measured:
        return
    weights = [sum(shape.numel[name] for name in names) for names in shape.blocks]
    uniform = uniform_params(space, shape)
    start = params_for(
        space,
        shape,
        None if ratios is None else ratios.best_ratios(weights),
        None if kv_bits is None else kv_bits.best_bits(),
    )
    if start != uniform:
        study.enqueue_trial(start)
    for name, value in measured.items():
        study.set_user_attr(name, value)


def _ratios(evaluator: Evaluator, space: SearchSpace, shape: ModelShape) -> Sensitivity | None:
    if not space.searches_sparsity or len(shape.groups) < 2:
        return None
    groups = {group.label: group.names for group in shape.groups}
    target, (low, high) = space.target, space.grid
    reach = max(REACH, space.step)
    if space.is_free:
        # The mean is what the uniform profile takes to meet the budget.
        target, low, high = evaluator.uniform.mean_sparsity or 0.0, space.low, space.high
        reach = FREE_REACH
    low, high = max(low, target - reach), min(high, target + reach)
    if not low < target < high:  # then all groups take the target
        return None
    if space.is_free and not low < target - space.step < target + space.step < high:
        return None
    return measure_sensitivity(evaluator, groups, low=low, high=high, target=target)


def _kv(evaluator: Evaluator, space: SearchSpace, shape: ModelShape) -> KVSensitivity | None:
    plan = None if shape.kv is None else shape.kv.measurable
    if plan is None:
        return None
    batches = probed_batches(evaluator)

    def loss(kv_cache: KVCacheConfig) -> float:
        candidate = replace(evaluator.uniform, kv_cache=kv_cache)
        return mean_loss(evaluator, probe_losses(evaluator, candidate, batches), batches)

    try:
        return measure_kv_sensitivity(loss, plan, space)
    except TrialFailure as error:
        logger.warning("The sensitivity of the KV cache cannot be measured: %s", error)
        return None
