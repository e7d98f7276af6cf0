"""Descent over codes and the refit of scales, against loops, dense least squares and exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, problem

from nearplane.core.grid import Grid, Quantized, dequantize, fit_groups
from nearplane.core.refine import descend, refit

BITS = [2, 3, 4, "ternary"]
# Widths around the 32 columns of a leaf and the 256 of a panel; groups with and without a tail, and one per row.
SHAPES = [(1, -1), (31, 8), (33, 32), (64, 16), (100, 48), (257, 64), (300, -1), (530, 128)]


def levels_of(grid):
    return [1, 2, 3] if grid.bits == "ternary" else list(range(2**grid.bits))


def spread(per_group, n, grid):
    """A value per group, (out, groups), to a value per column."""
    width = n if grid.group_size == -1 else grid.group_size
    return torch.stack([per_group[:, j // width] for j in range(n)], 1).to(torch.float64)


def weight_of(solved, grid):
    """The weight that codes and scales stand for, by its definition."""
    n = solved.codes.shape[1]
    return (solved.codes.to(torch.float64) - spread(solved.zero, n, grid)) * spread(solved.scale, n, grid)


def objective(target, A, Q):
    return torch.stack([e @ A @ e for e in target - Q])


def start(grid, n, out=4, *, seed=0, noise=0.0, scales=None):
    """A target, its metric, and rounded codes, ``noise`` of them replaced by random ones."""
    p = problem(out, n, seed=seed)
    scale, zero = fit_groups(p.W, grid) if scales is None else scales
    least, greatest = levels_of(grid)[0], levels_of(grid)[-1]
    codes = (p.W / spread(scale, n, grid)).round() + spread(zero, n, grid)
    g = torch.Generator().manual_seed(seed)
    other = torch.randint(least, greatest + 1, codes.shape, generator=g).double()
    codes = torch.where(torch.rand(codes.shape, generator=g) < noise, other, codes).clamp(least, greatest)
    return p.W, damped(p.H), Quantized(codes.to(torch.uint8), scale, zero.to(torch.uint8))


def gains(target, A, solved, grid):
    """What each code change adds to the objective: (rows, columns, levels)."""
    n = target.shape[1]
    scale = spread(solved.scale, n, grid)
    error = target - weight_of(solved, grid)
    levels = torch.tensor(levels_of(grid), dtype=torch.float64)
    move = (levels - solved.codes.double()[:, :, None]) * scale[:, :, None]  # q grows, the error falls
    return A.diagonal()[None, :, None] * move.square() - 2 * move * (error @ A)[:, :, None]


def naive_descent(target, A, solved, grid):
    """Column by column: every level tried, the whole gradient formed anew each time."""
    n = target.shape[1]
    scale, zero = spread(solved.scale, n, grid), spread(solved.zero, n, grid)
    codes = solved.codes.double()
    levels = torch.tensor(levels_of(grid), dtype=torch.float64)
    for j in range(n):
        error = target - (codes - zero) * scale
        move = (levels - codes[:, j, None]) * scale[:, j, None]
        cost = A[j, j] * move.square() - 2 * move * (error @ A[:, j])[:, None]
        codes[:, j] = levels[cost.argmin(1)]
    return codes


def best_scales(target, A, solved, grid):
    """Scales of least objective for the codes as they are, by least squares on each row."""
    out, n = target.shape
    count = solved.scale.shape[1]
    width = n if grid.group_size == -1 else grid.group_size
    root = torch.linalg.cholesky(A).T
    result = torch.zeros(out, count, dtype=torch.float64)
    for r in range(out):
        design = torch.zeros(n, count, dtype=torch.float64)
        for j in range(n):
            design[j, j // width] = float(solved.codes[r, j]) - float(solved.zero[r, j // width])
        result[r] = torch.linalg.lstsq(root @ design, (root @ target[r])[:, None], driver="gelsd").solution[:, 0]
    return result


def differing(a, b):
    return int((a.double() != b.double()).sum())


# --- both ---------------------------------------------------------------------------------------------------------


def check_round(target, A, solved, grid):
    """Descent and refit, twice: nothing rises, and each touches only what is its own."""
    before = objective(target, A, weight_of(solved, grid))
    for step in (refit, descend, refit, descend):
        given = [t.clone() for t in (target, A, *solved[:3])]
        new = step(target, A, solved, grid)
        assert all(map(torch.equal, given, (target, A, *solved[:3])))
        assert torch.equal(new.zero, solved.zero)
        assert torch.equal(new.codes, solved.codes) if step is refit else torch.equal(new.scale, solved.scale)
        assert new.codes.dtype == torch.uint8 and new.codes.is_contiguous()
        assert set(new.codes.flatten().tolist()) <= set(levels_of(grid))
        assert bool((new.scale > 0).all())
        after = objective(target, A, weight_of(new, grid))
        assert bool((after <= before * (1 + 1e-11) + 1e-13).all())
        solved, before = new, after
    torch.testing.assert_close(dequantize(solved, grid), weight_of(solved, grid), rtol=1e-15, atol=0)


@given(
    n=st.integers(1, 45),
    out=st.integers(1, 5),
    size=st.sampled_from([-1, 1, 4, 13, 32]),
    bits=st.sampled_from(BITS),
    sym=st.booleans(),
    stored=st.sampled_from(["float32", "float16", "bfloat16"]),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
def test_no_step_raises_the_objective(*, n, out, size, bits, sym, stored, noise, seed):
    grid = Grid(bits=bits, group_size=size, sym=sym or bits == "ternary", scale_dtype=stored)
    check_round(*start(grid, n, out, seed=seed, noise=noise), grid)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, size", SHAPES)
def test_no_step_raises_the_objective_at_any_width(bits, n, size):
    grid = Grid(bits=bits, group_size=size, sym=bits != 3)
    check_round(*start(grid, n, seed=n, noise=0.2), grid)


@pytest.mark.parametrize("bits", [2, 4])
def test_float32_never_raises_it_by_more_than_rounding(bits):
    grid = Grid(bits=bits, group_size=64)
    target, A, solved = start(grid, 300, 8, seed=1)
    solved = solved._replace(scale=solved.scale.float())
    before = first = objective(target, A, weight_of(solved, grid))
    for step in (refit, descend, refit, descend):
        solved = step(target.float(), A.float(), solved, grid)
        assert solved.scale.dtype == torch.float32
        after = objective(target, A, weight_of(solved, grid))
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert float(before.sum()) < 0.7 * float(first.sum())


# --- descent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, size", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_descent_is_the_naive_descent(bits, n, size, noise):
    grid = Grid(bits=bits, group_size=size, sym=bits != 3)
    target, A, solved = start(grid, n, seed=n, noise=noise)
    got = descend(target, A, solved, grid)
    assert differing(got.codes, naive_descent(target, A, solved, grid)) == 0
    assert n == 1 or differing(got.codes, solved.codes) > 0


@pytest.mark.parametrize("bits, sym", [(2, True), (3, False), ("ternary", True)])
@pytest.mark.parametrize("n", [20, 70, 290])
def test_where_descent_ends_no_single_code_can_improve(bits, sym, n):
    grid = Grid(bits=bits, group_size=16, sym=sym)
    target, A, solved = start(grid, n, seed=n, noise=0.5)
    assert float(gains(target, A, solved, grid).min()) < -1e-3
    for _ in range(200):
        new = descend(target, A, solved, grid)
        if torch.equal(new.codes, solved.codes):
            break
        solved = new
    else:
        pytest.fail("descent does not end")
    size = float(objective(target, A, weight_of(solved, grid)).max())
    assert float(gains(target, A, solved, grid).min()) >= -1e-12 * size


def test_descent_of_identity_metric_is_rounding():
    grid = Grid(bits=3, group_size=16)
    target, _, rounded = start(grid, 40)
    _, _, noisy = start(grid, 40, noise=1.0)
    got = descend(target, torch.eye(40, dtype=torch.float64), noisy, grid)
    assert differing(got.codes, rounded.codes) == 0 < differing(noisy.codes, rounded.codes)


# --- refit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, size", [(1, -1), (30, 8), (64, 16), (100, 48), (70, -1), (300, 64), (12, 1)])
def test_refit_is_least_squares(bits, n, size):
    grid = Grid(bits=bits, group_size=size, sym=bits != 3)
    target, A, solved = start(grid, n, 6, seed=n)
    scale = solved.scale * (0.9 + 0.2 * torch.rand(solved.scale.shape, generator=torch.Generator().manual_seed(0)))
    solved = solved._replace(scale=scale.float().double())
    best = best_scales(target, A, solved, grid)
    # A group in which every code is zero has no best scale; lstsq calls it 0.
    solvable = (best > 1e-3).all(1)
    assert int(solvable.sum()) >= 3 or size == 1
    got = refit(target, A, solved, grid)
    # The system is made regular with a millionth of its mean diagonal, which a scale of a few hundredths can feel.
    torch.testing.assert_close(got.scale[solvable], best[solvable], rtol=1e-4, atol=3e-5)
    least = objective(target, A, weight_of(solved._replace(scale=best), grid))
    mine = objective(target, A, weight_of(got, grid))
    assert bool((mine[solvable] <= least[solvable] * (1 + 1e-6) + 1e-9).all())


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 1e-4, 1e-6])
def test_refitted_scales_are_what_the_checkpoint_holds(stored, factor):
    grid = Grid(bits=3, group_size=16, scale_dtype=stored)
    p = problem(40, 40, seed=3)
    target, A = p.W * factor, damped(p.H)
    scale, zero = fit_groups(target, grid)
    codes = (target / spread(scale, 40, grid)).round() + spread(zero, 40, grid)
    solved = Quantized(codes.clamp(0, 7).to(torch.uint8), scale, zero.to(torch.uint8))
    got = refit(target, A, solved, grid)
    assert torch.equal(got.scale.to(getattr(torch, stored)).double(), got.scale) and bool((got.scale > 0).all())
    before, after = (objective(target, A, weight_of(s, grid)) for s in (solved, got))
    assert bool((after <= before * (1 + 1e-11)).all())
    changed = (got.scale != solved.scale).any(1)
    assert bool((after[changed] < before[changed]).all())
    # At 1e-6 the scales are coarse subnormals of float16, and there may be nothing better to round to.
    assert bool(changed.any()) or (stored, factor) == ("float16", 1e-6)


def test_a_row_that_asks_for_a_negative_scale_keeps_its_own():
    grid = Grid(bits=3, group_size=-1)
    target, A, solved = start(grid, 20)
    flipped = torch.cat([-target[:1], target[1:]])
    assert bool(((best_scales(flipped, A, solved, grid) > 0) == torch.tensor([[False], [True], [True], [True]])).all())
    got = refit(flipped, A, solved, grid)
    assert torch.equal(got.scale[0], solved.scale[0])
    assert bool((got.scale[1:] != solved.scale[1:]).all())


def test_a_row_is_taken_exactly_when_it_gains():
    """Where a group asks for a negative scale, the other groups' best scales may be worse than none at all."""
    grid = Grid(bits=3, group_size=10)
    verdicts = set()
    for seed in range(20):
        target, A, solved = start(grid, 30, seed=seed)
        target = torch.cat([-target[:, :10], target[:, 10:]], 1)
        best = best_scales(target, A, solved, grid)
        mixed = torch.where(best > 0, best, solved.scale)
        before, after = (objective(target, A, weight_of(solved._replace(scale=s), grid)) for s in (solved.scale, mixed))
        got = refit(target, A, solved, grid)
        expected = torch.where((after < before)[:, None], mixed, solved.scale)
        torch.testing.assert_close(got.scale, expected, rtol=1e-4, atol=3e-5)
        verdicts |= set((after < before).tolist())
    assert verdicts == {True, False}


def test_groups_that_lean_on_each_other_are_solved_together():
    """Two scales wrong in opposite ways: a metric that mostly sees their sum finds next to nothing to gain."""
    target = torch.tensor([[1.5] * 4 + [0.5] * 4] * 2, dtype=torch.float64)
    A = torch.eye(8, dtype=torch.float64) + 10
    codes, zero = torch.full((2, 8), 5, dtype=torch.uint8), torch.full((2, 2), 4, dtype=torch.uint8)
    got = refit(target, A, Quantized(codes, torch.ones(2, 2, dtype=torch.float64), zero), Grid(bits=3, group_size=4))
    torch.testing.assert_close(got.scale, target[:, [0, 4]], rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", [slice(0, 8), slice(24, 27), slice(0, 27)])
def test_a_group_of_zeros_keeps_its_scale(where):
    grid = Grid(bits=2, group_size=8)
    target, A, solved = start(grid, 27)
    codes = solved.codes.clone()
    codes[:, where] = 2
    solved = solved._replace(codes=codes)
    empty = sorted({j // 8 for j in range(27)[where]})
    got = refit(target, A, solved, grid)
    assert torch.equal(got.scale[:, empty], solved.scale[:, empty])
    others = [g for g in range(4) if g not in empty]
    best = best_scales(target, A, solved, grid)[:, others]
    solvable = (best > 0).all(1)
    assert int(solvable.sum()) >= 3
    torch.testing.assert_close(got.scale[solvable][:, others], best[solvable], rtol=1e-4, atol=1e-6)


# --- exhaustive optimum -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_both_stay_at_the_exhaustive_optimum(n, zero):
    grid = Grid(bits=2, group_size=-1, sym=zero == 2)
    every = torch.tensor(list(itertools.product(range(4), repeat=n)), dtype=torch.float64)
    moved = 0
    for seed in range(6):
        p = problem(1, n, seed=seed)
        target, A = p.W, damped(p.H)
        steps = every - zero

        def of(codes, scale, zero=zero):
            return Quantized(
                codes[None].to(torch.uint8),
                torch.tensor([[scale]], dtype=torch.float64),
                torch.tensor([[zero]], dtype=torch.uint8),
            )

        # All codes at a given scale.
        scale = 0.4
        error = target - scale * steps
        losses = ((error @ A) * error).sum(1)
        best = of(every[losses.argmin()], scale)
        assert torch.equal(descend(target, A, best, grid).codes, best.codes)
        worst = descend(target, A, of(every[losses.argmax()], scale), grid)
        moved += differing(worst.codes, every[losses.argmax()][None]) > 0

        # All codes, each at its own best scale.
        inner, length = (steps @ A @ target.T)[:, 0], ((steps @ A) * steps).sum(1)
        losses = torch.where(inner > 0, -inner.square() / length, torch.zeros_like(inner)).nan_to_num(0)
        k = int(losses.argmin())
        if losses[k] < 0:
            best = of(every[k], float(inner[k] / length[k]))
            again = refit(target, A, descend(target, A, best, grid), grid)
            assert torch.equal(again.codes, best.codes)
            torch.testing.assert_close(again.scale, best.scale, rtol=1e-6, atol=0)
            other = refit(target, A, best._replace(scale=1.3 * best.scale), grid)
            torch.testing.assert_close(other.scale, best.scale, rtol=1e-5, atol=0)
    assert moved >= 5
