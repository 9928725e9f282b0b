"""Timing several things in turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 2
"""Rounds that are not counted."""


@torch.no_grad()
def in_turns(
    steps: Mapping[str, Callable[[], object]], rounds: int, *, rest_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Call every step once per round; return the seconds of each call, by the step's name.

    Args:
        steps: What is timed.
        rounds: Rounds that count.
        rest_seconds: Pause before each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name, step in steps.items():
            time.sleep(rest_seconds)
            started = time.perf_counter()
            step()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds
