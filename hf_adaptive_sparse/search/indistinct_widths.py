"""Leaves out KV widths that are not measurably better than a narrower one, before a search."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from hf_adaptive_sparse.profiles import CompressionProfile
from hf_adaptive_sparse.search.increase import CONFIDENCE, increase_of
from hf_adaptive_sparse.search.losses import Loss
from hf_adaptive_sparse.search.space import SearchSpace

logger = logging.getLogger(__name__)


def without_indistinct(
    space: SearchSpace, losses: Callable[[CompressionProfile], Sequence[Loss]]
) -> tuple[SearchSpace, tuple[tuple[int, int], ...]]:
    """Leave KV widths out that a narrower one loses nothing measurable against.

    All are compared with the widest, so that small losses from width to width do not add up unseen.
    That the data merely cannot tell does no harm here: what is found is held to the bound after.
    All are left in where the widest's loss is not finite, as there is nothing to compare with.

    Args:
        space: What may be chosen.
        losses: Losses of the dense model's weights under a KV profile, window by window.

    Returns:
        The space with what is left, and the widths left out, each with the next narrower.
    """
    palette = space.kv_bits or ()
    if len(palette) < 2 or space.kv_mean_bits is not None:
        return space, ()
    found = {
        bits: losses(CompressionProfile(kv_cache=space.kv_config(bits, bits))) for bits in palette
    }
    widest, dropped = palette[-1], []
    if not all(math.isfinite(loss) for loss, _ in found[widest]):
        return space, ()
    for index in range(len(palette) - 1, 0, -1):
        wide, narrow = palette[index], palette[index - 1]
        increase = increase_of(found[widest], found[narrow], CONFIDENCE)
        if increase.low > 0.0:
            break
        logger.warning(
            "%d and %d KV bits make no measurable difference on %d windows (%+.4f %%, above "
            "%+.4f %%): %d is left out.",
            widest,
            narrow,
            len(found[widest]),
            100 * increase.mean,
            100 * increase.low,
            wide,
        )
        dropped.append((wide, narrow))
    kept = palette[: len(palette) - len(dropped)]
    return replace(space, kv_bits=kept), tuple(dropped)
