"""The budgets that are tried for a bound on the loss, and what rules such a bound out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

from transformers import PreTrainedModel

from hf_adaptive_sparse.search.byte_budget import ByteBudget
from hf_adaptive_sparse.search.byte_sizes import exact_bytes
from hf_adaptive_sparse.search.data import short_windows
from hf_adaptive_sparse.search.increase import Batches
from hf_adaptive_sparse.search.objectives import Goal, ObjectiveSpec
from hf_adaptive_sparse.search.shape import ModelShape
from hf_adaptive_sparse.search.space import OWN_DTYPE, SearchSpace
from hf_adaptive_sparse.search.suggesting import uniform_params

SIZES = 16
"""Number of steps between the smallest and the largest reachable size."""

BITS_STEP = 0.5
"""Distance between the mean KV bits that are tried."""

BITS, BYTES = "mean KV bits", "bytes on disk"


def check_bound(
    max_loss: object,
    space: SearchSpace,
    objective: ObjectiveSpec = "perplexity",
    timeout_seconds: float | None = None,
) -> None:
    """Check the bound, and that no other setting fixes the size.

    Raises:
        ValueError: If either check fails.
    """
    number = isinstance(max_loss, Real) and not isinstance(max_loss, bool)
    if not number or not 0.0 < float(max_loss) < 1.0:  # type: ignore[arg-type]
        raise ValueError(
            "max_loss must be a fraction between 0 and 1, such as 0.005 for 0.5 %, got "
            f"{max_loss!r}."
        )
    if Goal.of(objective).to_json() != "perplexity":
        raise ValueError(
            f"max_loss bounds the perplexity, got objective={objective!r} (--objective): leave one "
            "out."
        )
    if timeout_seconds is not None:
        raise ValueError(
            "max_loss needs its searches complete, so it takes no timeout_seconds (--timeout), got "
            f"{timeout_seconds!r}: give fewer trials."
        )
    decided = {
        "fit_bytes (--fit)": space.fit_bytes is not None,
        "size_bytes (--size)": space.size_bytes is not None,
        "target_sparsity (--target-sparsity)": space.prunes and not space.is_free,
        "weight_mean_bits (--search-weight-mean)": space.weight_mean_bits is not None,
        "kv_mean_bits (--kv-mean-bits)": kv_alone(space) and space.kv_mean_bits is not None,
    }
    given = [setting for setting, is_given in decided.items() if is_given]
    if given:
        raise ValueError(
            f"max_loss searches for the size, which is already fixed by {' and '.join(given)}: "
            "leave one of them out. (A target_sparsity of 'free', or 0 to leave the weights alone, "
            "is fine.)"
        )


def check_lengths(windows: Batches, space: SearchSpace, what: str) -> None:
    """Refuse data on which KV bits make no difference, so that any width would hold.

    Raises:
        ValueError: If no window fills a block of the cache.
    """
    remark = None if space.kv_bits is None else short_windows(windows, space)
    if remark is not None:
        raise ValueError(f"{what} data: {remark} Or leave the KV bits out.")


def kv_alone(space: SearchSpace) -> bool:
    """Return whether only the KV cache is compressed: its mean bits are then what is bounded."""
    return not space.prunes and space.weight_bits is None


def chooses(model: PreTrainedModel, space: SearchSpace, excluded: Sequence[str]) -> bool:
    """Return whether a space leaves anything to choose on a model."""
    if kv_alone(space) and space.kv_bits is not None:
        # At either end of the palette every layer has the same width.
        return space.kv_mean_bits not in (space.kv_bits[0], space.kv_bits[-1])
    return bool(uniform_params(space, ModelShape.of(model, space, excluded)))


def spaces_by_budget(
    model: PreTrainedModel, space: SearchSpace, excluded: Sequence[str]
) -> tuple[dict[float, SearchSpace], str]:
    """Return budget -> space, the smallest budget first, and the unit of the budgets.

    Args:
        model: The dense model.
        space: What may be chosen.
        excluded: Names or globs of linears that stay dense.

    Raises:
        ValueError: If the space does not fit the model.
    """
    if kv_alone(space):
        return _by_bits(model, space), BITS
    budget = ByteBudget.of(model, space, excluded)
    widths = space.weight_bits or (OWN_DTYPE,)
    smallest = _size(budget, space.high if space.prunes else 0.0, widths[0])
    largest = _size(budget, space.low if space.prunes else 0.0, widths[-1])
    # A little above the smallest size, since ratios are rounded to whole weights.
    start = smallest + smallest // 500
    if start >= largest:
        return {float(start): replace(space, size_bytes=start)}, BYTES
    # The largest is of interest unless it is the dense model's.
    steps = SIZES + (largest < _size(budget, 0.0, OWN_DTYPE))
    sizes = [start + (largest - start) * step // SIZES for step in range(steps)]
    return {float(size): replace(space, size_bytes=size) for size in sizes}, BYTES


def _size(budget: ByteBudget, ratio: float, bits: int) -> int:
    removed = {name: int(ratio * linear.numel) for name, linear in budget.linears.items()}
    return budget.on_disk(removed, dict.fromkeys(budget.linears, bits))


def _by_bits(model: PreTrainedModel, space: SearchSpace) -> dict[float, SearchSpace]:
    palette = space.kv_bits or ()
    steps = int((palette[-1] - palette[0]) / BITS_STEP)
    means = [palette[0] + BITS_STEP * step for step in range(steps + 1)]
    spaces = {mean: replace(space, kv_split="free", kv_mean_bits=mean) for mean in means}
    # One width for all can be reached: what is refused here concerns the model.
    ModelShape.of(model, spaces[means[0]])
    reachable = {}
    for mean, one in spaces.items():
        with contextlib.suppress(ValueError):  # no assignment has this mean
            ModelShape.of(model, one)
            reachable[mean] = one
    return reachable


def budget_text(budget: float, unit: str) -> str:
    """Return a budget for a person to read."""
    return f"{exact_bytes(int(budget))} on disk" if unit == BYTES else f"{budget:g} {unit}"
