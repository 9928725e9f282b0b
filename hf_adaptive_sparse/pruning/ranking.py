"""Which weights a ratio removes: the exact rule, and a ranking made once for a range of ratios.

The rule: a linear of ``numel`` weights loses exactly ``round(ratio * numel)`` of them. Compared by
row, each row loses ``floor(ratio * columns)`` and the few still owed are spread one per row over
the rows whose next candidate scores lowest. Ties go by column, then by row; compared over the
tensor they go by flat index.
"""

from __future__ import annotations

import torch

from hf_adaptive_sparse.packing.bitmask import pack_mask, unpack_mask
from hf_adaptive_sparse.packing.offsets import offset_dtype
from hf_adaptive_sparse.profiles import check_ratio
from hf_adaptive_sparse.pruning.metrics import Grouping
from hf_adaptive_sparse.pruning.patterns import UNSTRUCTURED, Pattern

_CHUNK_ELEMENTS = 1 << 20


def removal_count(numel: int, ratio: float) -> int:
    """Return how many of ``numel`` weights a ratio removes: ``round(ratio * numel)``.

    Raises:
        ValueError: If ``ratio`` lies outside [0, 1).
    """
    return round(check_ratio(ratio, "ratio") * numel)


def mask_from_scores(
    scores: torch.Tensor,
    ratio: float,
    grouping: Grouping = "row",
    pattern: Pattern = UNSTRUCTURED,
) -> torch.Tensor:
    """Choose the weights that go.

    Args:
        scores: ``(out, in)``, float32, >= 0, no NaN.
        ratio: Fraction to remove. With an n:m pattern it must be the pattern's own, or 0.
        grouping: Compare within each output ``"row"`` or over the ``"tensor"``. An n:m pattern
            compares within its groups instead.
        pattern: The pattern.

    Returns:
        ``(out, in)``, bool: True where the weight is removed.

    Raises:
        ValueError: If the ratio is invalid, or the pattern fixes another.
    """
    ratio = pattern.check(ratio, "ratio")
    if pattern.group is not None and ratio > 0.0:
        return _group_mask(scores, pattern)
    return count_mask(scores, removal_count(scores.numel(), ratio), grouping)


def count_mask(scores: torch.Tensor, count: int, grouping: Grouping = "row") -> torch.Tensor:
    """Choose exactly ``count`` weights by the rule; arguments as for `mask_from_scores`."""
    if count <= 0 or count >= scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if grouping == "tensor":
        # One row, each weight a column: ties by flat index.
        threshold = _kth_smallest(scores, count)
        return _take_ties_(scores.reshape(1, -1), threshold.reshape(1, 1), count).view_as(scores)
    return _row_mask(scores, count)


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _row_mask(scores: torch.Tensor, count: int) -> torch.Tensor:
    rows, columns = scores.shape
    # count // rows, not floor(ratio * columns): the same rule without the float's error.
    base, owed = divmod(count, rows)
    chunks = _row_chunks(rows, columns)
    candidates = torch.cat([_kth_of_rows(scores[part], base + 1) for part in chunks])
    quota = torch.full((rows, 1), base, dtype=torch.int32, device=scores.device)
    if owed:
        places = [_candidate_column(scores[part], candidates[part], base) for part in chunks]
        first = _lexsort(candidates.view(1, -1), torch.cat(places).view(1, -1))[0, :owed]
        quota[first] += 1
    removed = torch.empty_like(scores, dtype=torch.bool)
    for part in chunks:
        removed[part] = _take_ties_(scores[part], candidates[part], quota[part])
    return removed


def _take_ties_(
    scores: torch.Tensor, threshold: torch.Tensor, quota: torch.Tensor | int
) -> torch.Tensor:
    """Remove all below ``threshold`` (rows, 1), then the first that equal it up to ``quota``."""
    removed = scores < threshold
    still = quota - removed.sum(dim=1, keepdim=True)
    tied_rows = (still > 0).view(-1).nonzero().view(-1)
    if tied_rows.numel() == scores.shape[0]:
        equal = scores == threshold
        if scores.shape[0] == 1:  # a whole tensor as one row: index lists beat a running count
            places = equal.view(-1).nonzero().view(-1)[: int(still)]
            removed.view(-1)[places] = True
            return removed
        return removed.logical_or_(equal & (equal.cumsum(1, dtype=torch.int32) <= still))
    if tied_rows.numel():
        equal = scores[tied_rows] == threshold[tied_rows]
        within = equal.cumsum(1, dtype=torch.int32) <= still[tied_rows]
        removed[tied_rows] |= equal & within
    return removed


def _candidate_column(scores: torch.Tensor, candidate: torch.Tensor, base: int) -> torch.Tensor:
    """Return the column (rows,) of each row's next candidate after ``base`` removals."""
    skip = base - (scores < candidate).sum(dim=1, keepdim=True)
    equal = scores == candidate
    place = equal & (equal.cumsum(1, dtype=torch.int32) == skip + 1)
    return place.to(torch.uint8).argmax(dim=1)


def _lexsort(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Order each line of (lines, n) by score, then column, then position; returns positions."""
    by_column = columns.argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_column).argsort(dim=1, stable=True)
    return by_column.gather(1, by_score)


def _kth_of_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th smallest (from 1) of each row, (rows, 1)."""
    if torch.are_deterministic_algorithms_enabled():
        # Some versions of torch refuse kthvalue on CUDA then: of ties, any may be the k-th.
        return scores.sort(dim=1).values[:, k - 1 : k]
    return torch.kthvalue(scores, k, dim=1, keepdim=True).values


def _kth_smallest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th smallest (from 1) of float32 scores >= 0, in two counting passes.

    Floats >= 0 sort like their bit patterns; counting the upper, then the lower half of the bits
    needs no sorted copy.
    """
    bits = scores.contiguous().view(-1).view(torch.int32)
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=scores.device)
    parts = bits.split(_CHUNK_ELEMENTS)
    for part in parts:
        counts += torch.bincount(part >> 16, minlength=1 << 16)
    upper, k = _bin_of(counts, k)
    counts.zero_()
    for part in parts:
        low = part[(part >> 16) == upper] & 0xFFFF
        counts += torch.bincount(low, minlength=1 << 16)
    lower, _ = _bin_of(counts, k)
    pattern = torch.tensor((upper << 16) | lower, dtype=torch.int32, device=scores.device)
    return pattern.view(torch.float32)


def _bin_of(counts: torch.Tensor, k: int) -> tuple[int, int]:
    total = counts.cumsum(0)
    index = int(torch.searchsorted(total, k))
    return index, k - (int(total[index - 1]) if index else 0)


def _group_mask(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    rows, columns = scores.shape
    width = pattern.group or 1
    full = columns // width * width
    removed = torch.zeros_like(scores, dtype=torch.bool)
    for part in _row_chunks(rows, columns):
        if full:
            groups = scores[part, :full].reshape(-1, width)
            removed[part, :full] = _lowest(groups, pattern).view(-1, full)
        removed[part, full:] = _lowest(scores[part, full:], pattern)
    return removed


def _lowest(groups: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    count = pattern.removed_per_group(groups.shape[1])
    order = groups.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)


def removal_order(
    scores: torch.Tensor, first: int, last: int, grouping: Grouping
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what goes at first, and in which order the others go.

    Args:
        scores: ``(out, in)``, float32, >= 0, no NaN; contiguous.
        first: Weights that go anyway.
        last: Weights that go at most.
        grouping: As for `mask_from_scores`.

    Returns:
        ``(out, in)``, bool: the first that go; and ``(last - first,)``, int32 or int64: flat
        indices of the others, next to go first.
    """
    below = count_mask(scores, first, grouping)
    dtype = offset_dtype(scores.numel())
    if first == last:
        return below, torch.empty(0, dtype=dtype, device=scores.device)
    if grouping == "row":
        return below, _order_by_rows(scores, first, last, dtype)
    inside = count_mask(scores, last, grouping).logical_and_(~below)
    places = inside.view(-1).nonzero().view(-1)
    by_score = scores.reshape(-1)[places].argsort(stable=True)
    return below, places[by_score].to(dtype)


def _order_by_rows(scores: torch.Tensor, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    # The order is by (rank within the row, score, column, row): rank by rank, because a row
    # loses its k-th weight only after every row has lost its (k-1)-th.
    rows, columns = scores.shape
    start, stop = first // rows, -(-last // rows)
    sorted_columns = torch.cat(
        [
            scores[part].argsort(dim=1, stable=True)[:, start:stop].to(torch.int32)
            for part in _row_chunks(rows, columns)
        ]
    )
    order = torch.empty((stop - start) * rows, dtype=dtype, device=scores.device)
    for ranks in _row_chunks(stop - start, rows):
        place = sorted_columns[:, ranks].long()
        values = scores.gather(1, place).t().contiguous()
        place = place.t().contiguous()
        row = _lexsort(values, place)
        flat = row * columns + place.gather(1, row)
        order[ranks.start * rows : ranks.stop * rows] = flat.reshape(-1).to(dtype)
    offset = start * rows
    return order[first - offset : last - offset].clone()


class Ranking:
    """The weights of one linear in order of removal, for ratios in ``[low, high]``.

    Made once; then `mask` gives what `mask_from_scores` would, for any ratio in the range, without
    scores or weights. Holds 4 bytes per weight ranked inside the range (8 above 2³¹ weights) and
    1 bit per weight.

    Attributes:
        shape: ``(out, in)`` of the linear.
        low: Lowest ratio.
        high: Highest ratio.
        order: ``(ranked,)``, int32 or int64: flat indices, next to go first.
        always_removed: ``(out, ceil(in / 8))``, uint8: bitmask of what ``low`` removes.
    """

    def __init__(
        self, scores: torch.Tensor, low: float, high: float, grouping: Grouping = "row"
    ) -> None:
        """Rank by ``scores`` (``(out, in)``, float32, >= 0, no NaN).

        Raises:
            ValueError: If not ``0 <= low <= high < 1``.
        """
        rows, columns = scores.shape
        self._set_range((rows, columns), low, high)
        below, self.order = removal_order(scores, self._first, self._last, grouping)
        self.always_removed = pack_mask(below)

    def _set_range(self, shape: tuple[int, int], low: float, high: float) -> None:
        self.low, self.high = check_ratio(low, "low"), check_ratio(high, "high")
        if low > high:
            raise ValueError(f"low must be at most high, got low={low!r} and high={high!r}.")
        self.shape = shape
        self._first, self._last = (removal_count(self.numel, ratio) for ratio in (low, high))

    @property
    def nbytes(self) -> int:
        """Bytes held by the order and the bitmask."""
        return self.order.nbytes + self.always_removed.nbytes

    @property
    def numel(self) -> int:
        """Number of weights of the linear."""
        return self.shape[0] * self.shape[1]

    def position(self, ratio: float) -> int:
        """Return how many entries of ``order`` a ratio removes.

        Raises:
            ValueError: If the ratio lies outside the range the ranking was made for.
        """
        count = removal_count(self.numel, ratio)
        if not self._first <= count <= self._last:
            raise ValueError(
                f"ratio must lie in [{self.low:.6g}, {self.high:.6g}], the range this ranking was "
                f"made for; got {ratio!r}. Rank again with a wider range."
            )
        return count - self._first

    def mask(self, ratio: float) -> torch.Tensor:
        """Return what a ratio removes: ``(out, in)``, bool, True = removed.

        Raises:
            ValueError: If the ratio lies outside the range.
        """
        position = self.position(ratio)
        removed = unpack_mask(self.always_removed, self.shape[1]).contiguous()
        removed.view(-1)[self.order[:position].long()] = True
        return removed

    def flip_(self, removed: torch.Tensor, before: float, after: float) -> torch.Tensor:
        """Change the mask of one ratio into that of another, touching only what differs.

        Args:
            removed: ``(out, in)``, bool, contiguous: the mask of ``before``; modified in place.
            before: Ratio that ``removed`` belongs to.
            after: Ratio wanted.

        Returns:
            ``removed``.
        """
        old, new = self.position(before), self.position(after)
        changed = self.order[min(old, new) : max(old, new)].long()
        removed.view(-1)[changed] = new > old
        return removed
