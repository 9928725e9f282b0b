"""The weights of a stack of experts in order of removal."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_adaptive_sparse.experts import ExpertStack
from hf_adaptive_sparse.packing.bitmask import pack_mask
from hf_adaptive_sparse.packing.offsets import offset_dtype
from hf_adaptive_sparse.pruning.metrics import Grouping
from hf_adaptive_sparse.pruning.ranking import Ranking, removal_order


class ExpertRanking(Ranking):
    """The ranking of a stack of experts, for ratios in ``[low, high]``.

    Within an expert the order is that of a linear; an expert loses its k-th weight once every
    expert has lost its (k-1)-th, the first expert first. So the mask of any ratio is what
    `prune_experts_` removes, and scores of different experts, which saw different numbers of
    tokens, are never compared.

    Attributes:
        shape: Of the parameter ``(experts, a, b)``: ``(experts * a, b)``, as it is stored.
    """

    def __init__(
        self,
        stack: ExpertStack,
        score: Callable[[int], torch.Tensor],
        low: float,
        high: float,
        grouping: Grouping = "row",
    ) -> None:
        """Rank the weights of a stack.

        Args:
            stack: The stack.
            score: Returns the scores of one expert's matrix, ``(out, in)``, float32, >= 0, no NaN.
            low: Lowest ratio.
            high: Highest ratio.
            grouping: Compare within each output ``"row"`` or over one expert's ``"tensor"``.

        Raises:
            ValueError: If not ``0 <= low <= high < 1``.
        """
        count, rows, columns = stack.weight.shape
        self._set_range((count * rows, columns), low, high)
        first, last = self._first // count, -(-self._last // count)
        removed = self._first - first * count  # experts that have lost one more than ``first``
        dtype = offset_dtype(self.numel)
        matrix = torch.arange(rows * columns, device=stack.weight.device).view(1, rows, columns)
        places = stack.read(matrix, 0).view(-1)
        orders, masks = [], []
        for expert in range(count):
            below, order = removal_order(score(expert).contiguous(), first, last, grouping)
            if expert < removed:
                below.view(-1)[order[:1].long()] = True
            mask = torch.empty(1, rows, columns, dtype=torch.bool, device=below.device)
            stack.write_(mask, 0, below)
            masks.append(pack_mask(mask[0]))
            offset = expert * rows * columns
            orders.append(places[order.long()].add_(offset).to(dtype))
        together = torch.stack(orders, dim=1).view(-1)
        self.order = together[removed : self._last - first * count].clone()
        self.always_removed = torch.cat(masks)
