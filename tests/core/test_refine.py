"""A round of refinement against a loop over dense matrices, and against exhaustive search."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, loss, problem, refined, values

from nearplane.core.grid import Certificate, Grid, Quantized, dequantize, fit_groups
from nearplane.core.refine import refine

BITS = [2, 3, 4, "ternary"]
# Widths around the 32 columns of a leaf and the 256 of a panel; groups with and without a tail, wider than a panel, and
# one per row.
SHAPES = [(1, -1), (31, 8), (12, 1), (33, 32), (64, 16), (100, 48), (257, 64), (300, -1), (530, 128), (560, 270)]


def levels_of(grid):
    return [1, 2, 3] if grid.bits == "ternary" else list(range(2**grid.bits))


def per_column(per_group, n, grid):
    """A value per group, (out, groups), to a value per column."""
    width = n if grid.group_size == -1 else grid.group_size
    return per_group.to(torch.float64)[:, torch.arange(n) // width]


def objective(target, A, solved, grid):
    scales = solved.scale.double(), solved.zero.double()
    return loss(target.double(), values(solved.codes, scales, grid), A.double())


def rounded(target, grid, scale, zero):
    """Every weight to its nearest code."""
    n, levels = target.shape[1], levels_of(grid)
    codes = (target / per_column(scale, n, grid)).round() + per_column(zero, n, grid)
    return Quantized(codes.clamp(levels[0], levels[-1]).to(torch.uint8), scale, zero.to(torch.uint8))


def start(grid, n, out=4, *, seed=0, noise=0.0, size=1.0):
    """A target, its metric, and rounded codes, ``noise`` of them replaced by random ones."""
    p = problem(out, n, seed=seed)
    target = p.W * size
    solved = rounded(
        target, grid, *fit_groups(target, replace(grid, fit="mse"))
    )  # no least squares: there is a way to go
    g = torch.Generator().manual_seed(seed)
    other = torch.randint(levels_of(grid)[0], levels_of(grid)[-1] + 1, (out, n), generator=g, dtype=torch.uint8)
    codes = torch.where(torch.rand(out, n, generator=g) < noise, other, solved.codes)
    return target, damped(p.H), solved._replace(codes=codes)


def differing(a, b):
    return int((a != b).sum())


def agree(got, expected, stored="float32"):
    """Codes to the last one; scales up to a rounding of the best one that falls the other way."""
    assert differing(got.codes, expected.codes) == 0
    torch.testing.assert_close(got.scale, expected.scale, rtol=torch.finfo(getattr(torch, stored)).eps, atol=1e-300)


def check_rounds(target, A, solved, grid, rounds=2):
    """Nothing rises, nothing given is touched, and what comes out is what a checkpoint can hold."""
    stored, before = getattr(torch, grid.scale_dtype), objective(target, A, solved, grid)
    for _ in range(rounds):
        given = (target, A, *solved[:3])
        copies = [t.clone() for t in given]
        new = refine(target, A, solved, grid)
        assert all(map(torch.equal, given, copies))
        assert torch.equal(new.zero, solved.zero) and new.certificate is solved.certificate
        for got, old in zip(new[:3], solved[:3], strict=True):
            assert got.dtype == old.dtype and got.shape == old.shape and got.is_contiguous()
        assert set(new.codes.flatten().tolist()) <= set(levels_of(grid))
        assert torch.equal(new.scale.sign(), solved.scale.sign()) and bool(new.scale.isfinite().all())
        assert bool((new.scale != 0).all()) and (grid.scales.either_sign or bool((new.scale > 0).all()))
        assert torch.equal(new.scale.to(stored).to(new.scale.dtype), new.scale)
        after = objective(target, A, new, grid)
        assert bool((after <= before * (1 + 1e-11) + 1e-13 * float(target.square().max())).all())
        solved, before = new, after


# --- a round ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n, size", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_round_is_the_naive_round(bits, n, size, noise):
    grid = Grid(bits=bits, group_size=size, sym=bits != 3)
    target, A, solved = start(grid, n, seed=n, noise=noise)
    got = refine(target, A, solved, grid)
    agree(got, refined(target, A, solved, grid))
    # A weight with a scale of its own is met exactly, there is nowhere to go.
    assert 1 in (n, size) or (differing(got.codes, solved.codes) > 0 and differing(got.scale, solved.scale) > 0)
    agree(refine(target, A, got, grid), refined(target, A, got, grid))
    check_rounds(target, A, solved, grid)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits, n, size", [(2, 31, 8), ("ternary", 100, 48), (3, 290, 32), (4, 300, -1)])
def test_a_round_on_coarse_scales_is_the_naive_round(stored, bits, n, size):
    grid = Grid(bits=bits, group_size=size, sym=bits != 3, scale_dtype=stored)
    target, A, solved = start(grid, n, seed=n, noise=0.2)
    agree(refine(target, A, solved, grid), refined(target, A, solved, grid), stored)


@given(
    n=st.integers(1, 70),
    out=st.integers(1, 5),
    size=st.sampled_from([-1, 1, 4, 13, 32, 64]),
    bits=st.sampled_from([*BITS, 8]),
    sym=st.booleans(),
    stored=st.sampled_from(["float32", "float16", "bfloat16"]),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 999),
)
def test_no_round_raises_the_objective(*, n, out, size, bits, sym, stored, noise, seed):
    grid = Grid(bits=bits, group_size=size, sym=sym or bits == "ternary", scale_dtype=stored)
    check_rounds(*start(grid, n, out, seed=seed, noise=noise), grid)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("size", [32, 64, 270])
def test_float32_never_raises_it_by_more_than_rounding(bits, size):
    grid = Grid(bits=bits, group_size=size)
    target, A, solved = start(grid, 300, 8, seed=1)
    solved = solved._replace(scale=solved.scale.float())
    before = first = objective(target, A, solved, grid)
    for _ in range(3):
        solved = refine(target.float(), A.float(), solved, grid)
        assert solved.scale.dtype == torch.float32
        after = objective(target, A, solved, grid)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert float(before.sum()) < 0.7 * float(first.sum())


def test_the_certificate_is_the_sweeps():
    grid = Grid(bits=3, group_size=8)
    target, A, solved = start(grid, 20)
    certificate = Certificate(torch.ones(4), torch.ones(4), torch.zeros(4, dtype=torch.int64))
    assert refine(target, A, solved._replace(certificate=certificate), grid).certificate is certificate


def test_the_last_row_alone_is_what_it_is_among_others():
    grid = Grid(bits=3, group_size=16, sym=False)
    target, A, solved = start(grid, 50, 6)
    among, alone = refine(target, A, solved, grid), refine(target[5:], A, solved.rows(slice(5, 6)), grid)
    agree(alone, among.rows(slice(5, 6)))


# --- scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
def test_scales_are_what_the_checkpoint_holds(stored, size):
    grid = Grid(bits=3, group_size=16, scale_dtype=stored)
    target, A, solved = start(grid, 40, 40, seed=3, size=size)
    check_rounds(target, A, solved, grid)
    # At 1e-6 the scales are coarse subnormals of float16, and there may be nothing better to round to.
    changed = differing(refine(target, A, solved, grid).scale, solved.scale)
    assert changed > 20 or (stored, size) == ("float16", 1e-6)


def test_a_group_that_asks_for_the_other_sign_keeps_its_scale():
    grid = Grid(bits=3, group_size=16)
    target, _, solved = start(grid, 40)
    flipped = target.clone()
    flipped[0, :16] *= -1
    flipped[2, 32:] *= -1
    got = refine(flipped, torch.eye(40, dtype=torch.float64), solved, grid)  # groups do not hear each other
    kept = (got.scale == solved.scale).tolist()
    assert kept == [[True, False, False], [False] * 3, [False, False, True], [False] * 3]


def test_a_scale_beyond_the_dtype_is_not_taken():
    grid = Grid(bits=3, group_size=-1, scale_dtype="float16")
    target = torch.tensor([[3e6, -2e6, 1e6], [3e4, -2e4, 1e4]], dtype=torch.float64)
    codes = torch.tensor([[7, 2, 5]] * 2, dtype=torch.uint8)
    solved = Quantized(codes, torch.full((2, 1), 2e4, dtype=torch.float64), torch.full((2, 1), 4, dtype=torch.uint8))
    got = refine(target, torch.eye(3, dtype=torch.float64), solved, grid)
    assert got.scale.tolist() == [[2e4], [1e4]]


def test_a_scale_that_only_rounding_would_move_stays():
    """The best one lies between two values of the dtype: either is worse."""
    grid = Grid(bits=3, group_size=-1, scale_dtype="bfloat16")
    target = torch.tensor([[3.0, -2.0, 1.0]], dtype=torch.float64) * 1.001
    best, zero = torch.tensor([[1.001]], dtype=torch.float64), torch.tensor([[4]], dtype=torch.uint8)
    solved = Quantized(torch.tensor([[7, 2, 5]], dtype=torch.uint8), best, zero)
    assert refine(target, damped(problem(1, 3).H), solved, grid).scale.item() == 1.001
    worse = solved._replace(scale=best * 1.01)
    assert refine(target, damped(problem(1, 3).H), worse, grid).scale.item() == 1.0


@pytest.mark.parametrize("where", [slice(0, 8), slice(24, 27), slice(0, 27)])
@pytest.mark.parametrize("sym", [True, False])
def test_a_group_of_zeros_keeps_its_scale(where, sym):
    grid = Grid(bits=2, group_size=8, sym=sym)
    target, A, solved = start(grid, 27)
    codes = solved.codes.clone()
    codes[:, where] = per_column(solved.zero, 27, grid)[:, where].to(torch.uint8)
    solved = solved._replace(codes=codes)
    empty = sorted({j // 8 for j in range(27)[where]})
    got = refine(target, A, solved, grid)
    assert torch.equal(got.scale[:, empty], solved.scale[:, empty])
    assert differing(got.codes[:, where], codes[:, where]) > 0
    agree(got, refined(target, A, solved, grid))


# --- where rounds end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, sym", [(2, True), (3, False), ("ternary", True)])
@pytest.mark.parametrize("n", [20, 70, 290])
def test_where_rounds_end_no_code_and_no_scale_can_improve(bits, sym, n):
    grid = Grid(bits=bits, group_size=16, sym=sym, scale_dtype="float16")
    target, A, solved = start(grid, n, seed=n, noise=0.5)
    for _ in range(200):
        new = refine(target, A, solved, grid)
        if torch.equal(new.codes, solved.codes) and torch.equal(new.scale, solved.scale):
            break
        solved = new
    else:
        pytest.fail("rounds do not end")
    scale = per_column(solved.scale, n, grid)
    error = target - values(solved.codes, solved[1:3], grid)
    levels = torch.tensor(levels_of(grid), dtype=torch.float64)
    move = (levels - solved.codes.double()[:, :, None]) * scale[:, :, None]  # q grows, the error falls
    gains = A.diagonal()[None, :, None] * move.square() - 2 * move * (error @ A)[:, :, None]
    least = objective(target, A, solved, grid)
    assert float(gains.min()) >= -1e-12 * float(least.max())
    for direction in (-1, 1):  # the neighbours of every scale in float16
        beside = (solved.scale.half().view(torch.int16) + direction).view(torch.float16).double()
        for g in range(solved.scale.shape[1]):
            moved = solved.scale.clone()
            moved[:, g] = beside[:, g]
            assert bool((objective(target, A, solved._replace(scale=moved), grid) >= least * (1 - 1e-12)).all())


def test_an_identity_metric_rounds_to_the_final_scale():
    grid = Grid(bits=3, group_size=16)
    target, _, noisy = start(grid, 40, noise=0.3)
    got = refine(target, torch.eye(40, dtype=torch.float64), noisy, grid)
    assert torch.equal(got.codes, rounded(target, grid, got.scale, got.zero).codes)
    steps = noisy.codes.double() - 4
    for g, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        best = (steps * target)[:, part].sum(1) / steps[:, part].square().sum(1)
        expected = torch.where(best * noisy.scale[:, g] > 0, best, noisy.scale[:, g])
        torch.testing.assert_close(got.scale[:, g], expected, rtol=1e-7, atol=0)
    assert differing(got.codes, noisy.codes) > 20


@pytest.mark.parametrize("n, size", [(1, -1), (2, -1), (3, -1), (4, -1), (4, 2)])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_exhaustive_optimum_stays(n, size, zero):
    """All codes, each at its own best scales (by least squares): the best of them is where rounds end."""
    grid = Grid(bits=2, group_size=size, sym=zero == 2)
    every = torch.tensor(list(itertools.product(range(4), repeat=n)), dtype=torch.float64)
    width = n if size == -1 else size
    groups = n // width
    member = torch.nn.functional.one_hot(torch.arange(n) // width, groups).double()
    stayed, moved = 0, 0
    for seed in range(6):
        p = problem(1, n, seed=seed)
        target, A = p.W, damped(p.H)
        root = torch.linalg.cholesky(A).T
        design = root @ ((every - zero)[:, :, None] * member)
        wanted = (root @ target[0])[:, None].expand(len(every), n, 1)
        scale = torch.linalg.lstsq(design, wanted, driver="gelsd").solution[:, :, 0]
        empty = ((every - zero).abs() @ member) == 0
        scale = torch.where(empty, 0.5, scale).float().double()
        losses = (wanted - design @ scale[:, :, None]).square().sum((1, 2))

        def of(k, times=1.0, scale=scale):
            zeros = torch.full((1, groups), zero, dtype=torch.uint8)
            return Quantized(every[k][None].to(torch.uint8), (scale[k] * times)[None], zeros)

        losses[~((scale != 0) if grid.scales.either_sign else (scale > 0)).all(1)] = torch.inf
        k = int(losses.argmin())
        if losses[k] < 0.99 * float(target @ A @ target.T):
            stayed += 1
            agree(refine(target, A, of(k), grid), of(k))
            if groups == 1:
                agree(refine(target, A, of(k, 1.3), grid), of(k))
        worst = int(losses.where(losses.isfinite(), losses.new_tensor(-1)).argmax())
        moved += differing(refine(target, A, of(worst), grid).codes, of(worst).codes) > 0
    assert stayed >= 2 and (moved >= 2 or n == 1)


def test_dequantized_it_is_what_was_measured():
    grid = Grid(bits=3, group_size=16, sym=False, scale_dtype="float16")
    target, A, solved = start(grid, 40)
    got = refine(target, A, solved, grid)
    torch.testing.assert_close(dequantize(got, grid), values(got.codes, got[1:3], grid), rtol=1e-15, atol=0)
