"""The rules that a search space must meet: single values first, then their combinations."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_adaptive_sparse.search.space import SearchSpace

GRANULARITIES = ("block", "layer", "block-projection", "layer-projection")
"""What shares a ratio: a block or a layer, or the linears of one role in it (q, k, v, up, ...)."""

KV_SPLITS = ("equal", "free")
"""How KV bits are shared out: every width to as many units, or any width to any unit."""

NUMBERS_END = 1_000_000
"""Numbers of a space are below this; none that means anything comes near."""


def check_number(value: Any, what: str) -> float:
    """Return a number in [0, ``NUMBERS_END``) as a float.

    Raises:
        ValueError: If it is not one.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # Compared before it is converted: a whole number of any size is a Real, and no float.
    if not (is_number and 0 <= value < NUMBERS_END):
        raise ValueError(f"{what} must be a number >= 0 and < {NUMBERS_END:,}, got {value!r}.")
    return float(value)


def check_choice(value: object, choices: Sequence[str], what: str) -> None:
    """Refuse what is not one of the choices.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}.")


def check_palette(widths: object, known: Sequence[int], what: str) -> tuple[int, ...] | None:
    """Return distinct widths in ascending order; a single number is a palette of one.

    Raises:
        ValueError: If there are none, or one is unknown or named twice.
    """
    if widths is None:
        return None
    rule = f"{what} must be None or widths from {', '.join(map(str, known))}, got {widths!r}."
    named = [widths] if isinstance(widths, Integral) else widths
    if not isinstance(named, Sequence) or isinstance(named, str) or not named:
        raise ValueError(rule)
    for width in named:
        if not isinstance(width, Integral) or isinstance(width, bool) or width not in known:
            raise ValueError(rule)
    if len(set(named)) != len(named):
        raise ValueError(f"{what} must name each width once, got {widths!r}.")
    return tuple(sorted(int(width) for width in named))


def check_sparsity(space: SearchSpace) -> None:
    """Check the range of ratios against target, step and pattern."""
    explicit = space.sparsity_low is not None or space.sparsity_high is not None
    if not space.prunes:
        if explicit:
            raise ValueError(
                "sparsity_low and sparsity_high need weights to be pruned, got target_sparsity="
                f"{space.target_sparsity!r}. Set the mean ratio, or 'free' under a budget in bytes."
            )
        return
    if space.pattern != "unstructured":
        raise ValueError(
            f"pattern must be 'unstructured' in a sparsity search, got {space.pattern!r}: n:m "
            "fixes every ratio. Prune with it first (hf_adaptive_sparse.prune), then search the KV "
            "bits alone (target_sparsity=None)."
        )
    if not space.is_free and not explicit and 0.0 < space.sparsity_range < space.step:
        raise ValueError(
            f"sparsity_range must be 0 or at least step, got sparsity_range="
            f"{space.sparsity_range} and step={space.step}: no ratio but the target would be "
            "tried."
        )
    if not space.is_free and space.sparsity_high is None and space.high >= 1.0:
        raise ValueError(
            f"target_sparsity + sparsity_range must be below 1, got {space.target} + "
            f"{space.sparsity_range}. Lower one of them."
        )
    if space.low > space.high or not (space.is_free or space.low <= space.target <= space.high):
        wanted = "" if space.is_free else f" <= target_sparsity ({space.target})"
        raise ValueError(
            f"The ratios must be ordered as sparsity_low{wanted} <= sparsity_high, got "
            f"{space.low} and {space.high}: no mean outside the range can be reached."
        )
    low, high = space.grid
    if space.low < space.high and low == high:
        raise ValueError(
            f"step must fit into the range of ratios, got step={space.step} and ratios from "
            f"{space.low} to {space.high}: only {low} would be tried."
        )


def check_kv(space: SearchSpace) -> None:
    """Check the split of the KV bits against its mean and the budget."""
    if space.kv_bits is None:
        for name in ("kv_mean_bits", "kv_apart"):
            if getattr(space, name):
                raise ValueError(f"{name} needs kv_bits, got kv_bits=None.")
        return
    if space.kv_split == "equal" and space.kv_mean_bits is not None:
        raise ValueError(
            f"kv_mean_bits={space.kv_mean_bits} needs kv_split='free': an equal split of "
            f"{space.kv_bits} bits has the palette's mean, "
            f"{sum(space.kv_bits) / len(space.kv_bits):g}."
        )
    mean = space.kv_mean_bits
    if mean is not None and not space.kv_bits[0] <= mean <= space.kv_bits[-1]:
        raise ValueError(
            f"kv_mean_bits must lie between the narrowest and the widest of kv_bits="
            f"{space.kv_bits}, got {mean}."
        )


def check_weight_palette(space: SearchSpace) -> None:
    """Check the weights' widths against their mean."""
    palette, mean = space.weight_bits, space.weight_mean_bits
    if palette is None:
        if mean is not None:
            raise ValueError(f"weight_mean_bits={mean} needs weight_bits, got weight_bits=None.")
        return
    if space.pattern != "unstructured":
        raise ValueError(
            f"weight_bits must be None with a pattern, got {palette} and {space.pattern!r}: weight "
            "bits are searched over unstructured sparsity."
        )
    if mean is not None and not palette[0] <= mean <= palette[-1]:
        raise ValueError(
            f"weight_mean_bits must lie between the narrowest and the widest of weight_bits="
            f"{palette}, got {mean}."
        )


def check_fit(space: SearchSpace) -> None:
    """Check that the KV cache of a budget in bytes has a length."""
    if space.fit_bytes is not None and space.context_length is None:
        raise ValueError(
            "fit_bytes needs context_length: how long a KV cache has to fit beside the weights, in "
            "tokens."
        )
    if space.fit_bytes is None and (space.context_length is not None or space.batch_size != 1):
        raise ValueError(
            "context_length and batch_size say how large a KV cache has to fit, and need "
            f"fit_bytes; got context_length={space.context_length}, batch_size={space.batch_size} "
            "and no fit_bytes."
        )


def check_has_budget(space: SearchSpace) -> None:
    """Refuse a space that leaves a mean to a budget in bytes but has no such budget.

    Raises:
        ValueError: If the space needs a budget in bytes and has none.
    """
    if space.in_bytes:
        return
    if space.is_free:
        raise ValueError(
            "target_sparsity='free' leaves the mean ratio to a budget in bytes. Set size_bytes, or "
            "fit_bytes with context_length, or give the mean ratio as a number."
        )
    if space.searches_weight_bits and space.weight_mean_bits is None:
        raise ValueError(
            f"weight_bits={space.weight_bits} leaves the mean open. Set weight_mean_bits, or a "
            "budget in bytes (size_bytes, or fit_bytes with context_length)."
        )
