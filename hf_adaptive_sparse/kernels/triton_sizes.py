"""Sizes and places that the plans of Triton's kernels have in common."""

from __future__ import annotations

import functools

import torch

ALIGNMENT = 16
"""In bytes, or elements of a stride: what Triton compiles for."""


def power_of_two(number: int) -> int:
    """Return the lowest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def pattern_codes(bits: int, word: int) -> int:
    """Return the codes that fill the words, of so many bits, which repeat the pattern."""
    return (3 if bits % 3 == 0 else 1) * word // bits


@functools.lru_cache(maxsize=8)
def token_starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the first token of each block and the end, int32: the same for all layers."""
    with torch.inference_mode(False):
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(device)
