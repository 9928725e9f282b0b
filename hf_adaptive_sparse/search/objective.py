"""Evaluating a profile: masks and cache are changed, the model and its rankings stay.

The weights are scored once, from dense activations. A trial flips the masks of the linears whose
count changed since the trial before, and reads perplexity through the KV cache of its profile.
Nothing is written into the weights, and the model is exactly as before when the search ends.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.evaluation.forward import NonFiniteError
from hf_adaptive_sparse.evaluation.perplexity import perplexity
from hf_adaptive_sparse.pruning.apply import MaskedModel, masked, rank_model
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace

Batches = Sequence[Mapping[str, torch.Tensor]]

Objective = Callable[[Candidate], float]
"""Takes a profile, returns the value to minimise, raises `TrialFailure`."""


@contextlib.contextmanager
def perplexity_objective(
    model: PreTrainedModel,
    space: SearchSpace,
    shape: ModelShape,
    *,
    calibration: Batches | None,
    evaluation: Batches,
    metric: str,
    modules_to_not_convert: Sequence[str] = (),
    image_weight: float = 1.0,
    progress: bool = True,
) -> Iterator[Objective]:
    """Rank the weights once, and yield what evaluates profiles on the masked model.

    Besides the model this holds, per weight whose fate the space leaves open (ranked between the
    lowest and the highest ratio), its place in the ranking in 4 bytes, and two bits per weight:
    always removed, and removed in the current trial.

    Args:
        model: The model; restored on exit, also after an exception.
        space: The search space.
        shape: The space laid over the model.
        calibration: Batches for the activation statistics; ``None`` for metrics without.
        evaluation: Batches whose perplexity is the objective.
        metric: Name of the metric that scores the weights.
        modules_to_not_convert: Names or globs of linears that stay dense.
        image_weight: Weight of an image token in the statistics.
        progress: Show a progress bar while ranking.
    """
    with contextlib.ExitStack() as stack:
        mask: MaskedModel | None = None
        if shape.numel:
            # Distributing whole weights can take a linear one weight past the clipped ratio.
            margin = 1 / min(shape.numel.values())
            rankings = rank_model(
                model,
                calibration,
                metric=metric,
                low=max(0.0, space.low - margin),
                high=min(space.high + margin, math.nextafter(1.0, 0.0)),
                modules_to_not_convert=modules_to_not_convert,
                image_weight=image_weight,
                progress=progress,
            )
            mask = stack.enter_context(masked(model, rankings))

        def evaluate(candidate: Candidate) -> float:
            if mask is not None:
                mask.apply(candidate.ratios)
            with _failures():
                value = perplexity(model, evaluation, candidate.kv_cache)
            if not math.isfinite(value):
                raise TrialFailure(f"The perplexity is {value}.", repeatable=True)
            return value

        yield evaluate


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Turn what concerns a single profile into `TrialFailure`."""
    try:
        yield
    except NonFiniteError as error:
        raise TrialFailure(str(error), repeatable=True) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = f"Out of memory: {error}"
    else:
        return
    # Outside the handler, so that the traceback no longer keeps the tensors alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise TrialFailure(reason, repeatable=False)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a bare RuntimeError, told by its text alone.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "not enough memory" in str(error) or "out of memory" in str(error)
    )
