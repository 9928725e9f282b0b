"""The affine map between elements and codes, and how its steps and minima are rounded."""

from __future__ import annotations

import torch

from hf_adaptive_sparse.errors import NonFiniteError


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32, or the elements' own where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def metadata_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the 16-bit dtype of steps and minima: the model's own, float16 for wider models."""
    return dtype if dtype.itemsize == 2 else torch.float16


def round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the smallest values of the 16-bit ``dtype`` that are not below ``values``.

    A zero has no sign: which one ``amin`` finds among both depends on the processor.
    """
    rounded = values.to(dtype)
    below = (rounded.to(values.dtype) < values).to(torch.int16)
    # One bit pattern further is the next float away from zero, and towards it for negative ones.
    towards = torch.where(rounded < 0, -below, below)
    return (rounded.view(torch.int16) + towards).view(dtype) + 0.0


def round_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest values of the 16-bit ``dtype`` that are not above ``values``."""
    return 0.0 - round_up(-values, dtype)


def divide(values: torch.Tensor, divisor: int) -> torch.Tensor:
    """Return ``values / divisor``, the same on every device.

    On a GPU torch multiplies by the reciprocal of what is no tensor, which is off by one unit in
    the last place now and then; rounded up to 16 bits, a step would be the next one.
    """
    return values / values.new_full((), divisor)


def check_finite(extent: torch.Tensor, states: torch.Tensor, what: str) -> None:
    """Refuse states that cannot be quantised.

    NaN or Inf anywhere makes an extent NaN or Inf: no pass over the elements is needed.

    Args:
        extent: Maximum minus minimum of the groups, or their steps, as they are to be stored.
        states: The states themselves.
        what: Their name, for the error message.

    Raises:
        NonFiniteError: Naming the states, and what is wrong with them.
    """
    if bool(torch.isfinite(extent).all()):
        return
    finite = bool(torch.isfinite(states).all())
    got = f"elements of up to {float(states.abs().max()):.6g}" if finite else "NaN or Inf"
    raise NonFiniteError(refusal(what, states.dtype, got))


def refusal(what: str, dtype: torch.dtype, got: str) -> str:
    """Return why states of a dtype cannot be quantised, and what to do.

    Args:
        what: Their name.
        dtype: Theirs.
        got: What is known of them.
    """
    kind = metadata_dtype(dtype)
    return (
        f"The {what} must be finite to be quantised, with steps and minima that "
        f"{str(kind).removeprefix('torch.')} can hold (up to {torch.finfo(kind).max:.6g}); got "
        f"{got}. The model produced them (float16 overflow is a common cause: try bfloat16); at "
        "16 bits they are kept as is."
    )


def to_codes(
    elements: torch.Tensor, step: torch.Tensor, minimum: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return ``round((x - min) / step)`` as uint8; a step of 0 gives code 0.

    Args:
        elements: Floating, any shape, in the dtype to compute in.
        step: Broadcasts against ``elements``, any floating dtype.
        minimum: The same.
        bits: Bits per code.
    """
    step, minimum = step.to(elements.dtype), minimum.to(elements.dtype)
    codes = (elements - minimum).mul_(inverse_step(step))
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def inverse_step(step: torch.Tensor) -> torch.Tensor:
    """Return ``1 / step``, 1 for a step of 0, and finite for the smallest ones as well."""
    inverse = torch.where(step > 0, step, torch.ones_like(step)).reciprocal_()
    return inverse.clamp_(max=torch.finfo(step.dtype).max)


def from_codes(
    codes: torch.Tensor, step: torch.Tensor, minimum: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``min + step * q`` as ``dtype``; ``step`` and ``minimum`` broadcast against codes."""
    compute = compute_dtype(dtype)
    elements = codes.to(compute).mul_(step.to(compute)).add_(minimum.to(compute))
    # A step that was rounded up may carry the highest code past the dtype's largest value.
    if dtype == torch.float16:
        elements.clamp_(max=torch.finfo(dtype).max)
    return elements.to(dtype)


def stored_scale(
    lowest: torch.Tensor, highest: torch.Tensor, bits: int, states: torch.Tensor, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step and minimum as they are stored: rounded so that the scale covers its ends.

    Args:
        lowest: Lower ends of the scales, in the dtype that is computed in.
        highest: Their upper ends.
        bits: Bits per code.
        states: The states they belong to.
        what: Their name, for the error message.

    Raises:
        ValueError: As ``check_finite``.
    """
    minimum = round_down(lowest, metadata_dtype(states.dtype))
    wanted = divide(highest - minimum.to(lowest.dtype), 2**bits - 1)
    step = round_up(wanted, minimum.dtype)
    check_finite(step, states, what)
    return step, minimum
