"""Offsets that are numbers of their own, and scales of either sign: what is stored, fitted and refined."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, loss, problem

from nearplane.core.certificate import verify
from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.factor import factorize
from nearplane.core.grid import PRESETS, Grid, Quantized, dequantize, fit, fit_groups, round_to_nearest
from nearplane.core.levels import NF4, Shifted, Uniform
from nearplane.core.refine import refine
from nearplane.core.scales import MOST_ZERO, Affine, Signed, Stored
from nearplane.core.sweep import sweep
from nearplane.methods import RTN

DTYPES = ["float16", "bfloat16", "float32"]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(value, dtype):
    return value.to(getattr(torch, dtype)).to(value.dtype)


def affine(solved, grid):
    """The weight as an engine forms it: scale times code, plus an offset, both as stored."""
    offset = grid.scales.offset(solved.scale, solved.zero).double()
    group = torch.arange(solved.codes.shape[1]) // grid.group_width(solved.codes.shape[1])
    return solved.scale.double()[:, group] * solved.codes.double() - offset[:, group]


# --- what is stored -----------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_checkpoint_gives_the_weights_that_were_solved(dtype, bits):
    grid = Grid.of(scales=Affine(dtype), bits=bits, group_size=5)
    for W in (
        weights(6, 23),
        weights(6, 23) + 3,
        weights(6, 23) / 1e4 - 1,
    ):  # the last: an offset larger than its range
        p = problem(6, 23, seed=1)
        solved = sweep(W, factorize(p.H), grid, fit_groups(W, grid))
        for each in (solved, refine(W, damped(p.H), solved, grid), RTN().solve(W, None, grid)):
            assert each.zero.dtype == torch.float32 and float(each.zero.abs().max()) <= MOST_ZERO * 1.01
            assert torch.equal(stored(each.scale, dtype), each.scale) and bool((each.scale > 0).all())
            offset = grid.scales.offset(each.scale, each.zero)
            assert torch.equal(stored(offset, dtype), offset)
            torch.testing.assert_close(
                affine(each, grid), dequantize(each, grid), rtol=0, atol=1e-6 * float(W.abs().max())
            )
        verify(solved.certificate)


def test_few_digits_do_not_spoil_a_real_zero():
    """A weight read in float16 is the exact one, rounded once."""
    grid = Grid.of(scales=Affine("float16"), bits=4, group_size=16)
    W = weights(4, 32).float() + 2
    solved = round_to_nearest(W, *fit_groups(W, grid), grid)
    half = dequantize(solved._replace(scale=solved.scale.half()), grid)
    assert half.dtype == torch.float16 and torch.equal(half, dequantize(solved, grid).half())


def test_a_grid_with_free_offsets_is_asymmetric_and_of_integers():
    grid = Grid.of(scales=Affine("float16"), bits=4, group_size=64)
    assert (grid.sym, grid.levels, grid.held_in) == (False, Shifted(4, 0, 15), "float16")
    assert replace(grid, bits=3).levels == Shifted(3, 0, 7)
    for bad in ({"levels": NF4}, {"sym": True}, {"bits": "ternary"}):
        with pytest.raises(SettingError, match="sym"):
            Grid.of(**{"scales": Affine(), **bad})
    assert Grid.of(scales=Signed()).levels == Uniform(4, 0, 15)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("q")])
def test_presets_are_those_of_llama(name):
    grid, symmetric = Grid.named(name), name in ("q4_0", "q5_0", "q8_0", "q2_0", "q3_k", "q6_k")
    assert grid.bits == int(name[1]) and grid.sym == symmetric and grid.scales.free != symmetric
    assert grid.scales.joint == name.endswith("k") and grid.scales.either_sign == symmetric
    size = 64 if name == "q2_0" else 16 if name in ("q2_k", "q3_k", "q6_k") else 32
    assert grid.group_size == size and (not grid.scales.joint or grid.scales.groups * size == 256)


# --- fitting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
def test_a_range_need_not_hold_zero(how):
    """All weights lie between 0.9 and 1.1: the levels lie there, too."""
    W, importance = 1 + weights(8, 32).clamp(-2, 2) / 20, torch.ones(32, dtype=torch.float64)
    grid = Grid.of(scales=Affine("float16"), bits=3, group_size=32, fit=how)
    scale, zero = fit(W, grid, importance if how == "hessian" else None)
    error = dequantize(round_to_nearest(W, scale[:, None], zero[:, None], grid), grid) - W
    assert float(error.abs().max()) < 0.04  # 7 steps over 0.2; with a level at 0 a step alone is 0.16


@each_dtype
def test_constant_groups_and_groups_of_zeros_are_exact(dtype):
    grid = Grid.of(scales=Affine(dtype), bits=2, group_size=4)
    W = torch.tensor([[0.5] * 4 + [0.0] * 4 + [-3.0] * 4], dtype=torch.float64)
    assert torch.equal(dequantize(RTN().solve(W, None, grid), grid), W)


@pytest.mark.parametrize("fit", ["mse", "hessian"])
def test_a_free_offset_is_fitted_better_than_a_zero_on_the_grid(fit):
    W, importance = weights(40, 64), weights(64, seed=1).exp()
    grid = Grid.of(scales=Affine("float16"), bits=2, group_size=16, fit=fit)
    errors = {}
    for name, some in {"free": grid, "code": Grid(2, 16, False, fit, "float16")}.items():
        scales = fit_groups(W, some, importance if fit == "hessian" else None)
        errors[name] = dequantize(round_to_nearest(W, *scales, some), some) - W
    cost = (lambda e: (e.square() * importance).sum()) if fit == "hessian" else (lambda e: e.abs().pow(2.4).sum())
    assert cost(errors["free"]) < 0.85 * cost(errors["code"])


def test_too_large_an_offset_is_named():
    with pytest.raises(NumericalError, match="Affine scales in float16"):
        fit(torch.full((1, 4), 1e6, dtype=torch.float64) * weights(1, 4), Grid.of(scales=Affine("float16")))


def test_a_signed_scale_puts_the_longer_half_on_the_longer_side():
    """Levels are -2 to 1: of a group whose largest weight is positive the scale is negative."""
    grid = Grid.of(scales=Signed("float16"), bits=2, group_size=4, fit="mse")
    W = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, -1.0, 0.0, 1.0]], dtype=torch.float64)
    solved = RTN().solve(W, None, grid)
    assert solved.scale.sign().tolist() == [[-1.0, 1.0]]
    torch.testing.assert_close(dequantize(solved, grid), W, rtol=0, atol=0.02)
    plain = RTN().solve(W, None, Grid(2, 4, True, "mse", negative_scales=False))
    assert float((dequantize(plain, Grid(2, 4)) - W).abs().max()) > 0.3


@each_dtype
def test_signed_scales_keep_their_sign(dtype):
    given = torch.tensor([1.0, -1.0, 1e-30, -1e-30, 0.3, -0.3], dtype=torch.float64)
    got, plain = Signed(dtype).nearest(given), Stored(dtype).nearest(given.abs())
    assert torch.equal(got, torch.where(given < 0, -plain, plain)) and bool((got != 0).all())


# --- refinement ---------------------------------------------------------------------------------------------------


def naive(target, A, solved, grid):
    """A round by its meaning: each group's scale and offset by dense least squares, then each code, all formed anew."""
    n, width = target.shape[1], grid.group_width(target.shape[1])
    scale, codes = solved.scale.clone(), solved.codes.double()
    offset = grid.scales.offset(solved.scale, solved.zero).double()
    root, group = torch.linalg.cholesky(A).T, torch.arange(n) // width
    f = lambda r: float(((e := target[r] - scale[r, group] * codes[r] + offset[r, group]) @ A) @ e)  # noqa: E731
    for g, r in itertools.product(range(int(group.max()) + 1), range(len(target))):
        inside = (group == g).double()
        rest = target[r] - (scale[r, group] * codes[r] - offset[r, group]) * (1 - inside)
        design = root @ torch.stack([codes[r] * inside, -inside], 1)
        s = torch.linalg.lstsq(design, (root @ rest)[:, None], driver="gelsd").solution[0, 0]
        tries = [float(scale[r, g])] + ([float(stored(s, grid.scales.dtype))] if s > 0 else [])
        before = f(r), float(scale[r, g]), float(offset[r, g])
        found = [before]
        for scale[r, g] in tries:
            column, wanted = design[:, 1:], root @ (rest - scale[r, g] * codes[r] * inside)
            o = torch.linalg.lstsq(column, wanted[:, None], driver="gelsd").solution[0, 0]
            offset[r, g] = stored(o, grid.scales.dtype)
            found.append((f(r), float(scale[r, g]), float(offset[r, g])))
        _, scale[r, g], offset[r, g] = min(found)
        for j in inside.nonzero()[:, 0].tolist():
            losses = []
            for code in range(2**grid.bits):
                codes[r, j] = code
                losses.append(f(r))
            codes[r, j] = losses.index(min(losses))
    return codes, scale, offset


@each_dtype
@pytest.mark.parametrize("n, size", [(9, 3), (12, 5), (8, -1)])
def test_a_round_is_the_naive_round(dtype, n, size):
    grid = Grid.of(scales=Affine(dtype), bits=2, group_size=size)
    p = problem(4, n, seed=n)
    A, (scale, zero) = damped(p.H), fit_groups(p.W, grid)
    scale = grid.scales.nearest(scale * 1.4)
    start = round_to_nearest(p.W, scale, (zero / 1.4).float(), grid)
    offset = grid.scales.offset(start.scale, start.zero)
    start = start._replace(zero=(offset / start.scale.float()))
    got, (codes, scale, offset) = refine(p.W, A, start, grid), naive(p.W, A, start, grid)
    assert torch.equal(got.codes.double(), codes)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5}[dtype]  # a rounding that falls the other way
    torch.testing.assert_close(got.scale, scale, rtol=tolerance, atol=0)
    torch.testing.assert_close(grid.scales.offset(got.scale, got.zero).double(), offset, rtol=tolerance, atol=tolerance)
    assert not torch.equal(got.scale, start.scale) and not torch.equal(got.zero, start.zero)


@given(
    n=st.integers(1, 60),
    size=st.sampled_from([-1, 1, 4, 13, 32]),
    bits=st.sampled_from([2, 3, 8]),
    scales=st.sampled_from([Affine("float16"), Affine("bfloat16"), Affine("float32"), Signed("float16")]),
    shift=st.sampled_from([0.0, 2.0, -50.0]),
    noise=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 999),
)
def test_no_round_raises_the_objective(*, n, size, bits, scales, shift, noise, seed):
    grid = Grid.of(scales=scales, bits=bits, group_size=size)
    p = problem(4, n, seed=seed)
    W, A = p.W + shift, damped(p.H)
    solved = round_to_nearest(W, *fit_groups(W, grid), grid)
    g = torch.Generator().manual_seed(seed)
    other = torch.randint(0, 2**bits, W.shape, generator=g, dtype=torch.uint8)
    solved = solved._replace(codes=torch.where(torch.rand(W.shape, generator=g) < noise, other, solved.codes))
    before = loss(W, dequantize(solved, grid), A)
    slack = 1e-9 * float(((W.abs().max() + 1) ** 2) * A.abs().sum())  # zeros are float32
    for _ in range(2):
        new = refine(W, A, solved, grid)
        after = loss(W, dequantize(new, grid), A)
        assert bool((after <= before + slack).all())
        assert torch.equal(scales.nearest(new.scale), new.scale)
        assert scales.free or torch.equal(new.scale.sign(), solved.scale.sign())
        solved, before = new, after


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_exhaustive_optimum_stays_and_is_never_beaten(n):
    """All codes of a group, each at its best scale and offset by least squares."""
    grid = Grid.of(scales=Affine("float32"), bits=2, group_size=-1)
    every = torch.tensor(list(itertools.product(range(4), repeat=n)), dtype=torch.float64)
    stayed = 0
    for seed in range(6):
        p = problem(1, n, seed=seed)
        W, A = p.W, damped(p.H)
        root = torch.linalg.cholesky(A).T
        design = root @ torch.stack([every, -torch.ones_like(every)], 2)
        wanted = (root @ W[0])[:, None].expand(len(every), n, 1)
        line = torch.linalg.lstsq(design, wanted, driver="gelsd").solution
        losses = (wanted - design @ line).square().sum((1, 2))
        losses[line[:, 0, 0] < 1e-3] = torch.inf  # equal codes tell no scale, and a negative one is never taken
        k = int(losses.argmin())
        scale = line[k, :1].T.float().double()
        best = Quantized(every[k][None].to(torch.uint8), scale, (line[k, 1:].T / scale).float())
        got = refine(W, A, best, grid)
        assert float(loss(W, dequantize(got, grid), A)) == pytest.approx(float(losses[k]), rel=1e-5, abs=1e-9)
        stayed += torch.equal(got.codes, best.codes)
        start = round_to_nearest(W, *fit_groups(W, grid), grid)
        for _ in range(5):
            start = refine(W, A, start, grid)
        assert float(loss(W, dequantize(start, grid), A)) >= float(losses[k]) * (1 - 1e-5) - 1e-9
    assert stayed >= 5


def test_offsets_are_refined():
    """With scales that are right and offsets that are not, a round finds the offsets."""
    grid = Grid.of(scales=Affine("float32"), bits=3, group_size=8)
    codes = torch.randint(0, 8, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    right = Quantized(codes, torch.full((5, 3), 0.5).double(), torch.full((5, 3), 2.7))
    metric = torch.eye(24, dtype=torch.float64)  # groups do not hear each other
    got = refine(dequantize(right, grid), metric, right._replace(zero=right.zero + 0.2), grid)
    torch.testing.assert_close(dequantize(got, grid), dequantize(right, grid), rtol=0, atol=1e-4)
