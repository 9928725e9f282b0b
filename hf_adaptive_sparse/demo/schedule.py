"""The learning rate over a training stage."""

import math

_WARM_UP_STEPS = 100


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up linearly, then fall along a cosine to a fiftieth of the peak."""
    warm_up = max(1, min(_WARM_UP_STEPS, steps // 5))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
