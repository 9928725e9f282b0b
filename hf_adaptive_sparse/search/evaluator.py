"""Evaluating a profile: masks and cache are changed, the model and its rankings stay.

The weights are scored once, from dense activations. A trial flips the masks of the linears whose
count changed since the trial before, and is scored batch by batch through the KV cache of its
profile, so that it can be given up after a few batches. Nothing is written into the weights, and
the model is exactly as before when the search ends.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.checkpoint.fields import FOUR_BIT_GROUP_SIZE
from hf_adaptive_sparse.evaluation.forward import NonFiniteError
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood
from hf_adaptive_sparse.pruning.apply import MaskedModel, masked, rank_model
from hf_adaptive_sparse.pruning.quantising import QuantisedModel, quantised
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace

Batches = Sequence[Mapping[str, torch.Tensor]]

GROUP_SIZES = {8: None, 4: FOUR_BIT_GROUP_SIZE}
"""Columns that share a scale in a checkpoint, by bits; ``None``: one scale per row."""

ORDER_SEED = 0
"""Seed of the order that every trial takes the batches in; the same for all workers."""


class Reporter(Protocol):
    """What a trial is told while it is evaluated; Optuna's ``Trial`` is one."""

    def report(self, value: float, step: int) -> None:
        """Take the value that one batch gives, as the ``step``-th of the fixed order."""

    def should_prune(self) -> bool:
        """Return whether the trial is hopeless and may stop."""


@dataclass(frozen=True)
class Evaluation:
    """What became of one profile.

    Attributes:
        value: The value to minimise; where the evaluation was stopped, an estimate of it from the
            batches seen, corrected by what the uniform profile lost on the same batches.
        batches: Batches that were evaluated.
        of_batches: Batches that there are.
    """

    value: float
    batches: int
    of_batches: int

    @property
    def stopped(self) -> bool:
        """Whether it was given up before the last batch."""
        return self.batches < self.of_batches

    def to_attributes(self) -> dict[str, Any]:
        """Return what is stored with a trial: plain JSON types."""
        return {"batches": self.batches, "of_batches": self.of_batches}


@dataclass
class _Losses:
    """Summed losses and tokens per batch, by the batch's index."""

    total: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, loss: float, tokens: int) -> None:
        self.total[index], self.tokens[index] = loss, tokens

    @classmethod
    def zero(cls, batches: int) -> _Losses:
        """Return losses of 0."""
        return cls(dict.fromkeys(range(batches), 0.0), dict.fromkeys(range(batches), 1))

    def mean(self, indices: Sequence[int]) -> float:
        """Return the loss per token over some batches, summed in the order of the data."""
        indices = sorted(indices)
        count = sum(self.tokens[index] for index in indices)
        return sum(self.total[index] for index in indices) / count if count else 0.0


class Evaluator:
    """Evaluates profiles on the masked model, one after the other.

    Each batch's report is the value that the profile would have if it differed from the uniform
    profile on all batches as it does on this one: batches differ far more from each other than
    profiles do, and only the paired differences tell profiles apart.

    Args:
        model: The model, under its masks.
        mask: The masks; ``None`` if nothing is pruned.
        codes: The weights' codes; ``None`` if the weights keep their dtype.
        evaluation: Batches to score.
        uniform: The profile that reports are relative to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask: MaskedModel | None,
        codes: QuantisedModel | None,
        evaluation: Batches,
        uniform: Candidate,
    ) -> None:
        self.model, self.mask, self.codes = model, mask, codes
        self.evaluation, self.uniform = evaluation, uniform
        self.order = list(range(len(evaluation)))
        random.Random(ORDER_SEED).shuffle(self.order)
        self._reference: _Losses | None = None

    def __call__(self, candidate: Candidate, reporter: Reporter | None = None) -> Evaluation:
        """Evaluate a profile.

        Args:
            candidate: The profile.
            reporter: Told of each batch; it may stop the evaluation. ``None``: all batches.

        Raises:
            TrialFailure: If the loss is not finite, or memory does not suffice.
        """
        with _failures():
            evaluation = self.measure(candidate, reporter)
        if not math.isfinite(evaluation.value):
            raise TrialFailure(f"The perplexity is {evaluation.value}.", repeatable=True)
        return evaluation

    def measure(self, candidate: Candidate, reporter: Reporter | None) -> Evaluation:
        """Do what `__call__` does, but let errors through as they come."""
        is_uniform = candidate.digest == self.uniform.digest
        reference = None
        if reporter is not None and not is_uniform:
            reference = self._reference_losses()
        self._put_in_force(candidate)
        losses = _Losses()
        for step, index in enumerate(self.order):
            losses.add(index, *self._score(index, candidate))
            if reporter is None or reference is None or not losses.tokens[index]:
                continue
            reporter.report(self._estimate(losses, reference, [index]), step)
            seen = self.order[: step + 1]
            if len(seen) < len(self.order) and reporter.should_prune():
                value = self._estimate(losses, reference, seen)
                return Evaluation(value, len(seen), len(self.order))
        value = _perplexity(losses.mean(self.order))
        if is_uniform:
            self._reference = losses
            for step, index in enumerate(self.order):
                if reporter is not None and losses.tokens[index]:
                    reporter.report(value, step)
        return Evaluation(value, len(self.order), len(self.order))

    def losses(self, candidate: Candidate, batches: Batches) -> list[tuple[float, int]]:
        """Return summed loss in nats and tokens of each of any batches, under a profile."""
        with _failures():
            self._put_in_force(candidate)
            return [
                negative_log_likelihood(self.model, batch, candidate.kv_cache) for batch in batches
            ]

    def _put_in_force(self, candidate: Candidate) -> None:
        if self.mask is not None:
            self.mask.apply(candidate.ratios)
        if self.codes is not None:
            self.codes.apply(candidate.weight_bits, GROUP_SIZES)

    def _reference_losses(self) -> _Losses:
        """Return the uniform profile's losses, from its trial or, in a resumed search, from here.

        A uniform profile that cannot be evaluated leaves every batch's loss as it is.
        """
        if self._reference is None:
            self._put_in_force(self.uniform)
            losses = _Losses()
            try:
                for index in self.order:
                    losses.add(index, *self._score(index, self.uniform))
            except NonFiniteError:
                losses = _Losses.zero(len(self.order))
            self._reference = losses
        return self._reference

    def _estimate(self, losses: _Losses, reference: _Losses, seen: Sequence[int]) -> float:
        return _perplexity(reference.mean(self.order) + losses.mean(seen) - reference.mean(seen))

    def _score(self, index: int, candidate: Candidate) -> tuple[float, int]:
        loss, tokens = negative_log_likelihood(
            self.model, self.evaluation[index], candidate.kv_cache
        )
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss must be finite; batch {index} gives {loss}: the profile makes the model "
                "compute NaN or infinite logits."
            )
        return loss, tokens


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@contextlib.contextmanager
def open_evaluator(
    model: PreTrainedModel,
    space: SearchSpace,
    shape: ModelShape,
    uniform: Candidate,
    *,
    calibration: Batches | None,
    evaluation: Batches,
    metric: str,
    modules_to_not_convert: Sequence[str] = (),
    image_weight: float = 1.0,
    progress: bool = True,
) -> Iterator[Evaluator]:
    """Rank the weights once, and yield what evaluates profiles on the masked model.

    Besides the model this holds, per weight whose fate the space leaves open (ranked between the
    lowest and the highest ratio), its place in the ranking in 4 bytes, and two bits per weight:
    always removed, and removed in the current trial.

    Args:
        model: The model; restored on exit, also after an exception.
        space: The search space.
        shape: The space laid over the model.
        uniform: The profile that others are compared with batch by batch.
        calibration: Batches for the activation statistics; ``None`` for metrics without.
        evaluation: Batches that profiles are scored on.
        metric: Name of the metric that scores the weights.
        modules_to_not_convert: Names or globs of linears that stay dense.
        image_weight: Weight of an image token in the statistics.
        progress: Show a progress bar while ranking.
    """
    with contextlib.ExitStack() as stack:
        mask: MaskedModel | None = None
        if shape.groups:
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
        codes = None
        if shape.weight_groups:
            codes = stack.enter_context(quantised(model, shape.numel))
        yield Evaluator(model, mask, codes, evaluation, uniform)


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
