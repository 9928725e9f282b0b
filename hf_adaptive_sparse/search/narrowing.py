"""The comparison of the best profile with narrower ones, made when a search ends.

The best profile is scored window by window as it is, then with its widest KV bits (and weight bits,
where those are searched) cut down to the next narrower width of the palette, and so on. While the
perplexity rises by less than `MARGIN` at 95 % confidence, the widths count as equally good. Each
profile is compared with the one that was found, so that small losses cannot add up unnoticed. A
margin is needed because on too few windows any interval contains 0.

Under a budget in bytes, which is an upper limit, the narrower profile replaces the best one. A mean
that was asked for is kept, and the log says what the narrower profile would save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.comparison import windows_of
from hf_adaptive_sparse.search.data import short_windows
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.evaluator import Batches, Evaluator
from hf_adaptive_sparse.search.increase import CONFIDENCE, increase_of
from hf_adaptive_sparse.search.narrowing_result import (
    KV,
    NARROWER,
    WEIGHTS,
    Narrowing,
    WidthStep,
    narrowing_of,
)
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace
from hf_adaptive_sparse.search.trials import tally

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import BaseTrial

logger = logging.getLogger(__name__)

FEWEST_TO_COMPARE = 8
"""Windows below which nothing is compared."""

OBJECTIVES = ("perplexity", "answers")
"""Objectives for which widths are compared: both are losses of the evaluation data's tokens."""


def is_due(study: Study, space: SearchSpace, goal: Goal, evaluation: Batches) -> bool:
    """Return whether widths are to be compared, and are not yet, for a study's best trial."""
    seen = space.searches_kv and short_windows(evaluation, space) is None
    chosen = seen or space.searches_weight_bits
    if not chosen or goal.to_json() not in OBJECTIVES:
        return False
    if len(windows_of(evaluation)) < FEWEST_TO_COMPARE:
        return False
    stored = narrowing_of(study.user_attrs, tally(study).best_number)
    return stored is None or not stored.repeatable


def narrow_on(
    study: Study,
    evaluator: Evaluator,
    space: SearchSpace,
    shape: ModelShape,
    draw: Callable[[BaseTrial, SearchSpace, ModelShape], Candidate],
) -> None:
    """Compare the best profile with narrower ones, and store the outcome with the study.

    A comparison that fails is stored, too; the best profile then stays as it is.

    Args:
        study: The study, with a complete trial.
        evaluator: Evaluates profiles on the masked model; its evaluation data are taken.
        space: The search space.
        shape: The space applied to the model.
        draw: What makes a profile of a trial's parameters.
    """
    from optuna.trial import FixedTrial

    best = tally(study).best
    if best is None:
        return
    found = draw(FixedTrial(best.params), space, shape)
    windows = windows_of(evaluator.evaluation)
    narrowest, steps = found, []
    kept_back = found
    failure, repeatable = "", True
    try:
        before = evaluator.losses(found, windows)
        # KV bits make no difference on windows that fill no block of the cache.
        for part in (KV, WEIGHTS) if short_windows(windows, space) is None else (WEIGHTS,):
            if _kept(found, narrowest, space) and not _has_mean(part, space):
                # KV bits that a mean keeps wide must not keep the weight bits wide, too.
                narrowest, kept_back = found, narrowest
            for wide, narrow in _caps(found, part, space, shape):
                candidate = _capped(narrowest, part, narrow, shape)
                after = evaluator.losses(candidate, windows)
                step = WidthStep(part, wide, narrow, increase_of(before, after, CONFIDENCE))
                steps.append(step)
                if not step.is_same:
                    break
                narrowest = candidate
    except (TrialFailure, ValueError) as error:
        narrowest, kept_back, failure = found, found, str(error)
        repeatable = not isinstance(error, TrialFailure) or error.repeatable
    narrowest = kept_back if narrowest is found else narrowest
    same = narrowest is not found
    kept = _kept(found, narrowest, space) if same else ""
    narrowing = Narrowing(
        trial=best.number,
        windows=len(windows),
        steps=tuple(steps),
        profile=narrowest.profile if same else None,
        taken=same and not kept,
        kv_bytes_per_token=_kv_bytes(found, shape) - _kv_bytes(narrowest, shape),
        weight_bytes=evaluator.weight_bytes(found) - evaluator.weight_bytes(narrowest),
        kept=kept,
        failure=failure,
        repeatable=repeatable,
    )
    for line in narrowing.lines:
        logger.log(logging.WARNING if failure else logging.INFO, line)
    study.set_user_attr(NARROWER, narrowing.to_dict())


def _caps(
    found: Candidate, part: str, space: SearchSpace, shape: ModelShape
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield the widths of the best profile beyond each narrower one, and that one, widest first."""
    palette = (space.kv_bits if part == KV else space.weight_bits) or ()
    used = set(_kv_widths(found, shape) if part == KV else found.weight_bits.values())
    for narrow in reversed(palette[:-1]):
        wide = tuple(sorted(width for width in used if width > narrow))
        if wide:
            yield wide, narrow


def _kv_widths(candidate: Candidate, shape: ModelShape) -> Iterator[int]:
    """Yield the widths of all keys and values that are cached."""
    if candidate.kv_cache is None:
        return
    pairs = candidate.kv_cache.layer_bits(shape.num_layers)
    for bits, sizes in zip(pairs, shape.kv_widths, strict=True):
        yield from (width for width, size in zip(bits, sizes, strict=True) if size)


def _capped(candidate: Candidate, part: str, most: int, shape: ModelShape) -> Candidate:
    if part == WEIGHTS:
        bits = {name: min(width, most) for name, width in candidate.weight_bits.items()}
        return replace(candidate, weight_bits=bits, spent=None)
    cache = candidate.kv_cache
    if cache is None:
        raise TypeError("A profile without KV bits has none to cut down.")
    pairs = [
        tuple(min(w, most) if size else w for w, size in zip(bits, sizes, strict=True))
        for bits, sizes in zip(cache.layer_bits(shape.num_layers), shape.kv_widths, strict=True)
    ]
    keys, values = zip(*pairs, strict=True)
    narrower = replace(cache, key_bits=keys, value_bits=values)
    return replace(
        candidate,
        kv_cache=narrower,
        mean_kv_bits=narrower.mean_bits(shape.kv_widths),
        spent=None,
    )


def _kv_bytes(candidate: Candidate, shape: ModelShape) -> float:
    if candidate.kv_cache is None:
        return 0.0
    return candidate.kv_cache.mean_bits(shape.kv_widths) * sum(map(sum, shape.kv_widths)) / 8


def _kept(found: Candidate, narrowest: Candidate, space: SearchSpace) -> str:
    """Return which exact means, that the caller asked for, the narrower profile would not have."""
    means = []
    if _has_mean(KV, space) and found.kv_cache != narrowest.kv_cache:
        means.append(f"{space.held_kv_mean:g} KV bits")
    if _has_mean(WEIGHTS, space) and found.weight_bits != narrowest.weight_bits:
        means.append(f"{space.weight_mean_bits:g} weight bits")
    return " and ".join(means)


def _has_mean(part: str, space: SearchSpace) -> bool:
    """Return whether bits have an exact mean, also one that comes of an equal split."""
    return (space.held_kv_mean if part == KV else space.weight_mean_bits) is not None
