"""Evaluates profiles by changing masks and KV bits, never the weights.

The weights are scored once, from dense activations. A trial flips the masks of those linears whose
count differs from the trial before, and is scored batch by batch through the KV cache of its
profile, so that it can be stopped after a few batches. Nothing is written into the weights, and
the model is exactly as before when the search ends.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from hf_adaptive_sparse.architecture import decoder_layers, weight_place
from hf_adaptive_sparse.errors import NonFiniteError
from hf_adaptive_sparse.evaluation.perplexity import negative_log_likelihood
from hf_adaptive_sparse.evaluation.reuse import DEFAULT_BYTES, ReusingModel
from hf_adaptive_sparse.evaluation.scoring import predict
from hf_adaptive_sparse.memory import release_freed
from hf_adaptive_sparse.pruning.apply import MaskedModel, masked, rank_model
from hf_adaptive_sparse.pruning.quantising import QuantisedModel, quantised
from hf_adaptive_sparse.search.candidate import Candidate
from hf_adaptive_sparse.search.description import candidate_bytes, layer_settings
from hf_adaptive_sparse.search.errors import TrialFailure
from hf_adaptive_sparse.search.evaluation_result import Evaluation, Reporter
from hf_adaptive_sparse.search.failures import failures
from hf_adaptive_sparse.search.linear_bytes import LinearBytes
from hf_adaptive_sparse.search.losses import Losses
from hf_adaptive_sparse.search.objectives import Goal
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import SearchSpace

Batches = Sequence[Mapping[str, torch.Tensor]]

ORDER_SEED = 0
"""Seed of the order that every trial takes the batches in; the same for all workers."""


KEPT_WEIGHT_BYTES = 1 << 28
"""Bytes of masked weights that are kept from batch to batch; beyond, a forward masks them anew."""


class Evaluator:
    """Evaluates profiles on the masked model, one after the other.

    Each batch's report is the value that the profile would have if it differed from the uniform
    profile on all batches as it does on this one: batches differ far more from each other than
    profiles do, and only the paired differences tell profiles apart.

    Args:
        model: The model, under its masks; dense until a profile is evaluated.
        mask: The masks; ``None`` if nothing is pruned.
        codes: The weights' codes; ``None`` if the weights keep their dtype.
        evaluation: Batches to score.
        uniform: The profile that reports are relative to.
        goal: What is minimised.
        reuse_bytes: Bytes of hidden states kept for profiles that begin alike; 0: none.

    Raises:
        ValueError: If an objective does not suit the batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask: MaskedModel | None,
        codes: QuantisedModel | None,
        evaluation: Batches,
        uniform: Candidate,
        goal: Goal,
        reuse_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self.model, self.mask, self.codes = model, mask, codes
        self.evaluation, self.uniform = evaluation, uniform
        self.goal, self.objectives = goal, goal.objectives()
        self.layers_name, layers = decoder_layers(model)
        self.num_layers = len(layers)
        self.reusing = ReusingModel(model, reuse_bytes)
        self.order = list(range(len(evaluation)))
        random.Random(ORDER_SEED).shuffle(self.order)
        self._reference: Losses | None = None
        places = {name: weight_place(model, name) for name in uniform.numel}
        self._linears = {
            name: LinearBytes.of(getattr(*place)) for name, place in places.items() if place
        }
        for objective in self.objectives.values():
            objective.check(evaluation)
        observers = [o for o in self.objectives.values() if o.needs_dense]
        for index in self.order if observers else ():
            dense = predict(model, evaluation[index], False)
            if dense is not None:
                for objective in observers:
                    objective.observe(index, dense)

    def __call__(self, candidate: Candidate, reporter: Reporter | None = None) -> Evaluation:
        """Evaluate a profile.

        Args:
            candidate: The profile.
            reporter: Told of each batch; it may stop the evaluation. ``None``: all batches.

        Raises:
            TrialFailure: If the loss is not finite, or memory does not suffice.
        """
        with failures():
            evaluation = self.measure(candidate, reporter)
        for label, value in zip(self.goal.labels, evaluation.values, strict=True):
            if not math.isfinite(value):
                raise TrialFailure(f"The {label} is {value}.", repeatable=True)
        return evaluation

    def measure(self, candidate: Candidate, reporter: Reporter | None) -> Evaluation:
        """Do what `__call__` does, but let errors through as they come."""
        is_uniform = candidate.digest == self.uniform.digest
        reference = None
        if reporter is not None and not is_uniform:
            reference = self._reference_losses()
        self.apply(candidate)
        settings = layer_settings(candidate, self.layers_name, self.num_layers)
        before = self.reusing.layers_run, self.reusing.layers_skipped
        losses = Losses()
        for step, index in enumerate(self.order):
            losses.add(index, self.score(index, candidate, settings))
            if reporter is None or reference is None or not losses.scored(index):
                continue
            reporter.report(self._values(candidate, losses, [index], reference)[0], step)
            seen = self.order[: step + 1]
            if len(seen) < len(self.order) and reporter.should_prune():
                values = self._values(candidate, losses, seen, reference)
                return self._evaluation(values, len(seen), before)
        if not any(losses.scored(index) for index in self.order):
            raise ValueError("No token of the evaluation data is scored: are all labels -100?")
        values = self._values(candidate, losses, self.order)
        if is_uniform:
            self._reference = losses
            for step, index in enumerate(self.order):
                if reporter is not None and losses.scored(index):
                    reporter.report(values[0], step)
        return self._evaluation(values, len(self.order), before)

    def losses(self, candidate: Candidate, batches: Batches) -> list[tuple[float, int]]:
        """Return summed loss in nats and tokens of each of any batches, under a profile."""
        with failures():
            self.apply(candidate)
            return [
                negative_log_likelihood(self.model, batch, candidate.kv_cache) for batch in batches
            ]

    def weight_bytes(self, candidate: Candidate) -> int:
        """Return the bytes of the prunable weights as a checkpoint stores them."""
        return candidate_bytes(candidate, self._linears)

    def apply(self, candidate: Candidate) -> None:
        """Apply the masks and the weight bits of a profile to the model."""
        if self.mask is not None:
            self.mask.apply(candidate.ratios)
            release_freed()  # the allocator cannot reuse the gaps between small masks
        if self.codes is not None:
            self.codes.apply(candidate.weight_bits)

    def score(
        self, index: int, candidate: Candidate, settings: Sequence[Hashable]
    ) -> dict[str, tuple[float, int]]:
        """Return the summed loss and count of the batch ``index``, per objective.

        Args:
            index: The batch.
            candidate: The profile, which was applied.
            settings: Its `layer_settings`.

        Raises:
            NonFiniteError: If keys, values or a loss are not finite.
        """
        kv_cache = candidate.kv_cache
        found = self.reusing.predict(index, self.evaluation[index], kv_cache, settings)
        scores = {}
        for name, objective in self.objectives.items():
            scores[name] = (0.0, 0) if found is None else objective.score(index, found)
            if not math.isfinite(scores[name][0]):
                raise NonFiniteError(
                    f"The loss must be finite; batch {index} gives {scores[name][0]}: with this "
                    "profile the model computes NaN or infinite logits."
                )
        return scores

    def _reference_losses(self) -> Losses:
        """Return the uniform profile's losses, from its trial or, in a resumed search, from here.

        A uniform profile that cannot be evaluated leaves every batch's loss as it is.
        """
        if self._reference is None:
            self.apply(self.uniform)
            settings = layer_settings(self.uniform, self.layers_name, self.num_layers)
            losses = Losses()
            try:
                for index in self.order:
                    losses.add(index, self.score(index, self.uniform, settings))
            except NonFiniteError:
                losses = Losses()
            self._reference = losses
        return self._reference

    def _values(
        self,
        candidate: Candidate,
        losses: Losses,
        seen: Sequence[int],
        reference: Losses | None = None,
    ) -> tuple[float, ...]:
        """Return the goal's figures; relative to a reference, where not all batches are seen."""
        means = {}
        for name in self.objectives:
            means[name] = losses.mean(name, seen)
            if reference is not None:
                means[name] += reference.mean(name, self.order) - reference.mean(name, seen)
        return tuple(
            float(self.weight_bytes(candidate))
            if isinstance(part, str)
            else part.value(means, self.objectives)
            for part in self.goal.parts
        )

    def _evaluation(
        self, values: tuple[float, ...], batches: int, before: tuple[int, int]
    ) -> Evaluation:
        run = self.reusing.layers_run - before[0]
        skipped = self.reusing.layers_skipped - before[1]
        return Evaluation(values, batches, len(self.order), skipped / max(1, run + skipped))


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
    goal: Goal | None = None,
    reuse_bytes: int = DEFAULT_BYTES,
    modules_to_not_convert: Sequence[str] = (),
    image_weight: float = 1.0,
    progress: bool = True,
) -> Iterator[Evaluator]:
    """Rank the weights once, and yield what evaluates profiles on the masked model.

    Besides the model this holds, per weight whose fate the space leaves open (ranked between the
    lowest and the highest ratio), its place in the ranking in 4 bytes, and two bits per weight:
    always removed, and removed in the current trial; hidden states of ``reuse_bytes`` at most,
    and masked weights of `KEPT_WEIGHT_BYTES` at most.

    Args:
        model: The model; restored on exit, also after an exception.
        space: The search space.
        shape: The space applied to the model.
        uniform: The profile that others are compared with batch by batch.
        calibration: Batches for the activation statistics; ``None`` for metrics without.
        evaluation: Batches that profiles are scored on.
        metric: Name of the metric that scores the weights.
        goal: What is minimised; ``None``: the perplexity.
        reuse_bytes: Bytes of hidden states kept for profiles that begin alike.
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
            mask = stack.enter_context(masked(model, rankings, KEPT_WEIGHT_BYTES))
        codes = None
        if shape.weight_groups:
            codes = stack.enter_context(quantised(model, shape.numel))
        goal = Goal.of("perplexity") if goal is None else goal
        yield Evaluator(model, mask, codes, evaluation, uniform, goal, reuse_bytes)
