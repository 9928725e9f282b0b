"""The exact rule, and rankings that give the same masks for any ratio."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.pruning import ranking as ranking_module
from hf_adaptive_sparse.pruning.patterns import parse_pattern
from hf_adaptive_sparse.pruning.ranking import Ranking, mask_from_scores, removal_count


def rule(scores: torch.Tensor, ratio: float, grouping: str) -> torch.Tensor:
    """The rule, weight by weight in plain Python."""
    rows, columns = scores.shape
    values = scores.tolist()
    total = round(ratio * rows * columns)
    removed = torch.zeros(rows, columns, dtype=torch.bool)
    if grouping == "tensor":
        flat = sorted((values[i][j], i * columns + j) for i in range(rows) for j in range(columns))
        removed.view(-1)[[place for _, place in flat[:total]]] = True
        return removed
    base = total // rows
    following = []
    for i in range(rows):
        order = sorted((values[i][j], j) for j in range(columns))
        removed[i, [j for _, j in order[:base]]] = True
        if base < columns:
            following.append((*order[base], i))
    for _, j, i in sorted(following)[: total - base * rows]:
        removed[i, j] = True
    return removed


@st.composite
def tied_scores(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 23))
    levels = draw(st.sampled_from([1, 2, 3, 7, 1000]))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (rows, columns), generator=generator).float() / levels


RATIOS = st.floats(0, 1, exclude_max=True)
GROUPINGS = st.sampled_from(["row", "tensor"])


@settings(max_examples=300, deadline=None)
@given(tied_scores(), RATIOS, GROUPINGS)
def test_mask_equals_the_rule(scores, ratio, grouping):
    mask = mask_from_scores(scores, ratio, grouping)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, rule(scores, ratio, grouping))
    assert int(mask.sum()) == removal_count(scores.numel(), ratio)


@settings(max_examples=300, deadline=None)
@given(tied_scores(), RATIOS, RATIOS, st.lists(st.floats(0, 1), max_size=5), GROUPINGS)
def test_ranking_gives_the_mask_of_every_ratio_in_its_range(scores, a, b, between, grouping):
    low, high = sorted((a, b))
    ranked = Ranking(scores, low, high, grouping)
    ratios = [low, high, *(low + t * (high - low) for t in between)]
    current = ranked.mask(ratios[0])
    before = ratios[0]
    for ratio in ratios:
        expected = mask_from_scores(scores, ratio, grouping)
        assert torch.equal(ranked.mask(ratio), expected)
        assert torch.equal(ranked.flip_(current, before, ratio), expected)
        before = ratio


def test_deterministic_algorithms_need_no_kthvalue(monkeypatch):
    """On CUDA torch refuses it then."""
    scores = torch.randint(5, (7, 40), generator=torch.Generator().manual_seed(0)).float()
    ratios = (0.0, 0.3, 0.5, 0.99)
    expected = [mask_from_scores(scores, ratio) for ratio in ratios]

    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")

    monkeypatch.setattr(torch, "kthvalue", refused)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for ratio, mask in zip(ratios, expected, strict=True):
        assert torch.equal(mask_from_scores(scores, ratio), mask)


@pytest.mark.parametrize("grouping", ["row", "tensor"])
def test_chunks_do_not_change_masks(monkeypatch, grouping):
    scores = torch.randint(50, (37, 101), generator=torch.Generator().manual_seed(0)).float()
    whole = mask_from_scores(scores, 0.437, grouping)
    order = Ranking(scores, 0.3, 0.6, grouping).order
    monkeypatch.setattr(ranking_module, "_CHUNK_ELEMENTS", 128)
    assert torch.equal(mask_from_scores(scores, 0.437, grouping), whole)
    assert torch.equal(Ranking(scores, 0.3, 0.6, grouping).order, order)


@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.3, 0.45, 0.55, 0.575, 0.7])
@pytest.mark.parametrize("columns", [320, 864, 1000])
def test_whole_numbers_per_row_survive_float_error(ratio, columns):
    # 0.55 * 320 is 176.00000000000003 and 0.7 * 320 is 224.0 only by luck
    scores = torch.rand(7, columns, generator=torch.Generator().manual_seed(0))
    per_row = mask_from_scores(scores, ratio).sum(1)
    assert int(per_row.sum()) == round(ratio * scores.numel())
    if abs(ratio * columns - round(ratio * columns)) < 1e-6:
        assert per_row.tolist() == [round(ratio * columns)] * 7
    assert int(per_row.max() - per_row.min()) <= 1


def test_leftover_goes_to_the_lowest_candidates():
    scores = torch.tensor([[1.0, 5.0, 9.0], [1.0, 2.0, 9.0], [1.0, 4.0, 9.0], [0.0, 8.0, 9.0]])
    mask = mask_from_scores(scores, 6 / 12)  # one each, and two more
    assert mask.sum(1).tolist() == [1, 2, 2, 1]


def test_ties_in_the_leftover_go_by_column_then_row():
    scores = torch.tensor([[0.0, 9.0, 1.0], [0.0, 1.0, 9.0], [0.0, 1.0, 9.0]])
    assert mask_from_scores(scores, 4 / 9)[:, 1:].nonzero().tolist() == [[1, 0]]
    assert mask_from_scores(scores, 5 / 9)[:, 1:].nonzero().tolist() == [[1, 0], [2, 0]]


def test_infinite_scores_and_extremes():
    scores = torch.tensor([[torch.inf, 1.0, 0.0, 1e-45], [torch.inf, torch.inf, 2.0, 3e38]])
    for grouping in ("row", "tensor"):
        for ratio in (0.0, 0.25, 0.5, 0.75, 0.99):
            assert torch.equal(
                mask_from_scores(scores, ratio, grouping), rule(scores, ratio, grouping)
            )


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 16), ("4:8", 19), ("1:3", 7), ("3:4", 5)])
def test_n_of_m(pattern, columns):
    parsed = parse_pattern(pattern)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (6, columns), generator=generator).float()
    mask = mask_from_scores(scores, parsed.ratio, pattern=parsed)
    assert int(mask.sum()) == parsed.removal_count(6, columns)
    assert not mask_from_scores(scores, 0.0, pattern=parsed).any()
    for row, gone in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, columns, parsed.group):
            group = row[start : start + parsed.group]
            lose = len(group) - -(-len(group) * parsed.kept // parsed.group)
            expected = sorted(range(len(group)), key=lambda j: (group[j], j))[:lose]
            found = [j for j in range(len(group)) if gone[start + j]]
            assert found == sorted(expected)


def test_rows_narrower_than_a_group():
    scores = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    for pattern in map(parse_pattern, ("1:3", "64:128")):
        removed = mask_from_scores(scores, pattern.ratio, pattern=pattern)
        assert removed.tolist() == [[False, True], [True, False]]


def test_memory_of_a_ranking():
    scores = torch.rand(256, 1024, generator=torch.Generator().manual_seed(0))
    ranked = Ranking(scores, 0.45, 0.55)
    assert ranked.order.dtype == torch.int32
    inside = removal_count(scores.numel(), 0.55) - removal_count(scores.numel(), 0.45)
    assert ranked.nbytes == 4 * inside + scores.numel() // 8
    assert ranked.order.untyped_storage().nbytes() == ranked.order.nbytes  # no view of a larger one
    # In bf16: the weights in range, and one byte per weight.
    assert ranked.nbytes + scores.numel() // 8 <= 2 * inside + scores.numel()


def test_errors():
    scores = torch.rand(4, 8)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        mask_from_scores(scores, 1.0)
    with pytest.raises(ValueError, match=r"fixes the ratio at 0\.5"):
        mask_from_scores(scores, 0.4, pattern=parse_pattern("2:4"))
    with pytest.raises(ValueError, match="low must be at most high"):
        Ranking(scores, 0.6, 0.5)
    with pytest.raises(ValueError, match=r"must lie in \[0\.25, 0\.5\].*got 0\.75"):
        Ranking(scores, 0.25, 0.5).mask(0.75)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("grouping", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(shape, grouping, pattern):
    empty = torch.empty(shape)
    assert mask_from_scores(empty, 0.5, grouping, parse_pattern(pattern)).shape == shape
