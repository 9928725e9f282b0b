"""The OBS solver: exact counts, and better outputs than the mask alone."""

from __future__ import annotations

import pytest
import torch

from hf_adaptive_sparse.pruning.patterns import UNSTRUCTURED, parse_pattern
from hf_adaptive_sparse.pruning.ranking import removal_count
from hf_adaptive_sparse.pruning.sparsegpt import inverse_factor, solve


def problem(rows: int, columns: int, tokens: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def test_factor_of_the_inverse():
    _, inputs = problem(1, 24)
    hessian = inputs.t() @ inputs
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24)
    upper, dead = inverse_factor(hessian.clone())
    assert not dead.any()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        (upper.t() @ upper).double() @ damped, torch.eye(24).double(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("rows", "columns"), [(5, 12), (16, 128), (7, 300), (3, 1)])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.713])
def test_counts_are_exact_in_total_and_by_row(rows, columns, ratio):
    weight, inputs = problem(rows, columns)
    factor, dead = inverse_factor(inputs.t() @ inputs)
    count = removal_count(weight.numel(), ratio)
    updated, removed = solve(weight, factor, dead, count)
    assert int(removed.sum()) == count
    assert int(removed.sum(1).max() - removed.sum(1).min()) <= 1
    assert (updated[removed] == 0).all()
    assert not torch.signbit(updated[removed]).any()
    assert (updated[~removed] != 0).all()


@pytest.mark.parametrize("columns", [4, 5, 8, 9, 15])
def test_every_count_is_met(columns):
    weight, inputs = problem(3, columns)
    factor, dead = inverse_factor(inputs.t() @ inputs)
    for count in range(weight.numel() + 1):
        _, removed = solve(weight, factor, dead, count, block_size=4)
        assert int(removed.sum()) == count
        assert int(removed.sum(1).max() - removed.sum(1).min()) <= 1


@pytest.mark.parametrize(("columns", "ratio"), [(256, 0.998), (129, 0.5)])
def test_a_full_last_block_leaves_room_for_the_remainder(columns, ratio):
    weight, inputs = problem(5, columns)
    factor, dead = inverse_factor(inputs.t() @ inputs)
    count = removal_count(weight.numel(), ratio)
    assert int(solve(weight, factor, dead, count)[1].sum()) == count


def test_the_update_lowers_the_output_error():
    weight, inputs = problem(32, 256)
    factor, dead = inverse_factor(inputs.t() @ inputs)
    updated, removed = solve(weight, factor, dead, weight.numel() // 2)
    exact = inputs @ weight.t()
    with_update = (inputs @ updated.t() - exact).square().sum()
    mask_alone = (inputs @ weight.masked_fill(removed, 0).t() - exact).square().sum()
    assert with_update < 0.7 * mask_alone


def least_squares(weight: torch.Tensor, mask: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    best = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        kept = (~mask[row]).nonzero().view(-1)
        target = (inputs @ weight[row])[:, None]
        best[row, kept] = torch.linalg.lstsq(inputs[:, kept], target).solution[:, 0]
    return best


@pytest.mark.parametrize("block_size", [4, 128])
def test_update_on_a_given_mask_equals_column_by_column_least_squares(block_size):
    weight, inputs = (t.double() for t in problem(8, 16))
    factor, dead = inverse_factor((inputs.t() @ inputs).float(), damping=1e-7)
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    updated, removed = solve(weight, factor, dead, 0, mask=mask, block_size=block_size)
    assert torch.equal(removed, mask)
    expected = weight.clone()
    for j in range(15):
        # What column j gives up, the columns to its right take over as well as they can.
        share = torch.linalg.lstsq(inputs[:, j + 1 :], inputs[:, j : j + 1]).solution[:, 0]
        expected[:, j + 1 :] += torch.outer(expected[:, j] * mask[:, j], share)
    expected.masked_fill_(mask, 0)
    torch.testing.assert_close(updated.double(), expected, rtol=1e-2, atol=1e-2)


def test_one_column_removed_is_the_least_squares_solution():
    weight, inputs = (t.double() for t in problem(8, 200, tokens=4000))
    factor, dead = inverse_factor((inputs.t() @ inputs).float(), damping=1e-7)
    mask = torch.zeros(8, 200, dtype=torch.bool)
    mask[:, 0] = True  # all others lie to its right, some beyond its block
    updated, _ = solve(weight, factor, dead, 0, mask=mask)
    best = least_squares(weight, mask, inputs)
    torch.testing.assert_close(updated.double(), best, rtol=5e-2, atol=5e-3)
    assert (best - weight)[:, 150:].abs().max() > 0.02


def test_diagonal_hessian_needs_no_update_and_prunes_by_saliency():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    factor, dead = inverse_factor(torch.diag(scale), damping=1e-9)
    updated, removed = solve(weight, factor, dead, 6 * 20)
    saliency = weight.square() * scale
    expected = torch.zeros_like(removed).scatter_(1, saliency.argsort(1)[:, :20], True)
    assert torch.equal(removed, expected)
    torch.testing.assert_close(updated, weight.masked_fill(expected, 0))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3"])
def test_n_of_m(pattern):
    parsed = parse_pattern(pattern)
    weight, inputs = problem(5, 134)
    factor, dead = inverse_factor(inputs.t() @ inputs)
    _, removed = solve(weight, factor, dead, 0, parsed)
    assert int(removed.sum()) == parsed.removal_count(5, 134)
    full = 134 // parsed.group * parsed.group
    groups = removed[:, :full].reshape(-1, parsed.group)
    assert (groups.sum(1) == parsed.group - parsed.kept).all()


def test_dead_features_go_first_and_the_rest_of_them_stay_as_they_are():
    weight, inputs = problem(4, 32)
    inputs[:, :8] = 0
    factor, dead = inverse_factor(inputs.t() @ inputs)
    assert dead.tolist() == [True] * 8 + [False] * 24
    updated, removed = solve(weight, factor, dead, 4 * 6)
    assert (removed[:, :8].sum(1) == 6).all()
    assert not removed[:, 8:].any()
    torch.testing.assert_close(updated[~removed], weight[~removed])


def test_singular_hessians_are_damped():
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))  # rank 3 of 64
    factor, dead = inverse_factor(inputs.t() @ inputs)
    updated, _ = solve(torch.ones(2, 64), factor, dead, 64)
    assert updated.isfinite().all()
    factor, dead = inverse_factor(torch.zeros(4, 4))
    assert dead.all()
    assert solve(torch.ones(2, 4), factor, dead, 4)[0].sum() == 4
    # Not positive semi-definite by a little, as rounding makes them: escalates.
    factor, _ = inverse_factor(torch.tensor([[1.0, 1.05], [1.05, 1.0]]))
    assert factor.isfinite().all()


def test_hopeless_hessians_are_refused():
    with pytest.raises(ValueError, match=r"could not be factorised.*more calibration"):
        inverse_factor(torch.full((3, 3), torch.nan))


def test_inputs_are_not_modified():
    weight, inputs = problem(4, 20)
    before = weight.clone()
    factor, dead = inverse_factor(inputs.t() @ inputs)
    kept = factor.clone()
    solve(weight, factor, dead, 40, UNSTRUCTURED)
    assert torch.equal(weight, before)
    assert torch.equal(factor, kept)
