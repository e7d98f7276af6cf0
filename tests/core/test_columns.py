"""Columns in C++ against the same in plain float64, and sweeps and refinements by them against those by torch."""

import ctypes

import pytest
import torch

from nearplane.core import columns, compiled
from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, fit_groups
from nearplane.core.levels import NF4, Shifted, Uniform
from nearplane.core.refine import refine
from nearplane.core.scales import Affine
from nearplane.core.sweep import Push, sweep, sweep_with_slope

there = [isa for isa in compiled.ISAS if compiled.library(isa) is not None]
pytestmark = pytest.mark.skipif(not there, reason="no C++ kernel was built (no compiler)")
UNIFORM, SHIFTED = Uniform(3, 0, 7, sym=False), Shifted(3, 0, 7)
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(params=there)
def isa(request, monkeypatch):
    monkeypatch.setattr(compiled, "best", lambda: request.param)
    return request.param


def problem(n, out, dtype, levels, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    value, target = draw(n, out), draw(n, out)
    scale = draw(n, out).abs() / 2 + 0.1
    scale[:, ::3] *= -1  # a grid may turn its groups round
    zero = draw(n, out) + 3 if levels is SHIFTED else torch.randint(0, 8, (n, out), generator=g).double()
    feedback = (draw(n, n) / n**0.5).triu(1)
    low, high = levels.reach(zero)
    return [part.to(dtype) for part in (value, target, scale, low, high, feedback)]


def rounded(levels, wanted, low, high):
    """To the nearest step within reach, written for this test."""
    if levels is SHIFTED:
        return low + (wanted - low).round().clamp(min=0).minimum((high - low).round())
    return torch.maximum(torch.minimum(wanted.round(), high), low)


def away_from_ties(levels, wanted, low):
    inside = wanted - low if levels is SHIFTED else wanted
    return ((inside - inside.floor()) - 0.5).abs() > 1e-3


def close(levels, got, expected, wanted, low, tolerance):
    """Compare column by column, up to the first near a tie: behind it an output may go another way."""
    safe = away_from_ties(levels, wanted, low).long().cumprod(0).bool()
    assert safe[0].any()
    assert ((got.double() - expected).abs()[safe] < tolerance * (1 + expected.abs()[safe])).all()
    return float(safe.double().mean())


@pytest.mark.parametrize("levels", [UNIFORM, SHIFTED], ids=["uniform", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, out", [(1, 1), (3, 7), (4, 32), (17, 33), (64, 100), (256, 40)])
@pytest.mark.parametrize("descent", [False, True])
def test_columns_are_those_of_the_plain_loop(isa, levels, dtype, n, out, descent):
    value, target, scale, low, high, feedback = problem(n, out, dtype, levels)
    if descent:
        scale, low, high = None, low[0].clone(), high[0].clone()
    steps = torch.full_like(value, torch.nan)
    before = target.clone()
    expected = [part.double().clone() for part in (value, torch.zeros_like(value), target)]
    wanted = torch.empty_like(expected[0])
    F, L, H = feedback.double(), low.double(), high.double()
    for j in range(n):
        v = expected[0][j] + F[:j, j] @ expected[2][:j]
        wanted[j] = v if descent else v / scale[j].double()
        step = rounded(levels, wanted[j], L if descent else L[j], H if descent else H[j])
        passed = before[j].double() - step * (1 if descent else scale[j].double())
        expected[0][j], expected[1][j], expected[2][j] = step if descent else v, step, passed
    if descent:
        moved = torch.full_like(value, torch.nan)
        columns.descend_columns(levels, value, moved, target, feedback, low, high)
        assert torch.equal(target, before)
        pairs = [(value, expected[1]), (moved, expected[2])]
    else:
        columns.sweep_columns(levels, value, steps, target, scale, low, high, feedback)
        pairs = list(zip((value, steps, target), expected, strict=True))
    share = min(close(levels, got, want, wanted, L, CLOSE[dtype] * n) for got, want in pairs)
    assert share > 0.2


@pytest.mark.parametrize("out", [5, 1000])
def test_threads_change_nothing(isa, out):
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            value, target, *rest = problem(200, out, torch.float32, UNIFORM)
            steps = torch.empty_like(value)
            columns.sweep_columns(UNIFORM, value, steps, target, *rest)
        finally:
            torch.set_num_threads(before)
        found.append((value, steps, target))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_no_number_stays_none(isa):
    value, target, *rest = problem(9, 40, torch.float32, UNIFORM)
    value[4, 3] = torch.nan
    steps = torch.empty_like(value)
    columns.sweep_columns(UNIFORM, value, steps, target, *rest)
    wrong = steps.isnan()
    assert wrong[4:, 3].all() and not wrong[:4, 3].any() and int(wrong.sum()) == 5
    assert torch.equal(target.isnan(), wrong)


def test_what_cannot_be_done_is_refused(isa):
    value, target, scale, low, high, feedback = problem(257, 8, torch.float32, UNIFORM)
    steps = torch.empty_like(value)
    with pytest.raises(ValueError, match="at most 256 columns"):
        columns.sweep_columns(UNIFORM, value, steps, target, scale, low, high, feedback)
    with pytest.raises(ValueError, match="one behind the other"):
        columns.sweep_columns(
            UNIFORM, value[:9, ::2], *(p[:9, ::2] for p in (steps, target, scale, low, high)), feedback
        )


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_tensors_that_do_not_belong_together_are_refused(isa, wrong):
    """C++ sees addresses only."""
    value, target, scale, low, high, feedback = problem(9, 8, torch.float32, UNIFORM)
    given = [torch.empty_like(value), target, scale, low, high, feedback]
    for i in range(len(given)):
        other = [part.double() if wrong == "dtype" else part[:, :-1].contiguous() for part in given[i : i + 1]]
        with pytest.raises(ValueError, match=r"a tensor must be \[9, \d\] in torch.float32"):
            columns.sweep_columns(UNIFORM, value, *given[:i], *other, *given[i + 1 :])
    rows = [value, scale[:, 0], low[:, 0], target.abs()]  # scale, zero, importance
    assert columns.weighted_errors(UNIFORM, *rows).shape == (9,)
    for i in (1, 2, 3):
        other = rows[i].double() if wrong == "dtype" else rows[i][:1]
        with pytest.raises(ValueError, match="a tensor must be"):
            columns.weighted_errors(UNIFORM, *rows[:i], other, *rows[i + 1 :])


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_scales_and_importance_of_another_dtype_are_taken(isa, dtypes):
    own, other = dtypes
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(80, 48, generator=g, dtype=own), torch.randn(12, 48, generator=g, dtype=own)
    H, importance = x.T @ x, torch.rand(48, generator=g).to(other)
    grid = Grid(bits=3, group_size=16, sym=False, fit="hessian")
    scale, zero = fit_groups(W, grid, importance)
    same = fit_groups(W, grid, importance.to(own))
    assert scale.dtype == own and torch.equal(scale, same[0]) and torch.equal(zero, same[1])
    factor = factorize(H, damp_percent=0.1)
    narrow = scale.float(), zero.float()  # float32 holds the scales of a float64 weight, but for their last digits
    found, same = sweep(W, factor, grid, narrow), sweep(W, factor, grid, tuple(part.to(own) for part in narrow))
    assert torch.equal(found.codes, same.codes) and torch.equal(found.scale, same.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_steps_are_rounded_to_even(isa, dtype):
    """Also where the instruction set has no rounding of its own."""
    wide = 2.0**23 if dtype == torch.float32 else 2.0**52
    wanted = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        0.49999997,
        wide / 2 + 0.5,
        wide / 2 + 1.5,
        -wide / 2 - 0.5,
        wide,
        wide + 1,
        -3 * wide,
    ]
    value = torch.tensor([wanted], dtype=dtype)
    low, high = torch.full_like(value, -4 * wide), torch.full_like(value, 4 * wide)
    expected, steps, target = value.round(), torch.empty_like(value), torch.zeros_like(value)
    columns.sweep_columns(
        UNIFORM, value, steps, target, torch.ones_like(value), low, high, torch.zeros(1, 1, dtype=dtype)
    )
    assert torch.equal(steps, expected)


def test_which_levels_fit(monkeypatch):
    class Other(Uniform):
        """Rounds in its own way, perhaps."""

    x = torch.zeros(2)
    assert columns.fits(UNIFORM, x) and columns.fits(SHIFTED, x.double())
    assert not columns.fits(Other(), x) and not columns.fits(NF4, x) and not columns.fits(UNIFORM, x.half())
    assert not columns.fits(UNIFORM, x.to("meta"))
    monkeypatch.setattr(compiled, "best", lambda: None)
    assert not columns.fits(UNIFORM, x)


@pytest.mark.parametrize("levels", [UNIFORM, SHIFTED], ids=["uniform", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count, n", [(1, 1), (3, 15), (70, 64), (200, 37), (5000, 130)])  # the last wakes threads
def test_weighted_errors_are_the_plain_sums(isa, levels, dtype, count, n):
    g = torch.Generator().manual_seed(1)
    rows, importance = torch.randn(count, n, generator=g).double(), torch.rand(count, n, generator=g).double()
    scale = torch.rand(count, generator=g).double() + 0.2
    scale[::4] *= -1
    zero = torch.randn(count, generator=g).double() + 3
    zero = zero if levels is SHIFTED else zero.round()
    level = rows / scale[:, None]
    level = ((level + zero[:, None]).round() if levels is SHIFTED else level.round() + zero[:, None]).clamp(0, 7)
    expected = (((level - zero[:, None]) * scale[:, None] - rows).square() * importance).sum(1)
    given = [part.to(dtype) for part in (rows, scale, zero, importance)]
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(columns.weighted_errors(levels, *given))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)
    # at a tie either code loses as much
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("fit", ["hessian", "mse", "auto"])
def test_a_fit_by_compiled_errors_is_the_one_by_torch(fit, sign, monkeypatch):
    g = torch.Generator().manual_seed(2)
    W = torch.randn(40, 96, generator=g, dtype=torch.float64)
    importance = torch.rand(96, generator=g, dtype=torch.float64) if fit != "mse" else None
    grids = [
        Grid(bits=3, group_size=32, sym=sign, fit=fit),
        Grid.of(scales=Affine("float32"), bits=2, group_size=32, fit=fit),
    ]
    for grid in grids[: 1 if sign else 2]:
        found = []
        for best in (compiled.best(), None):
            monkeypatch.setattr(compiled, "best", lambda best=best: best)
            found.append(fit_groups(W, grid, importance))
        monkeypatch.undo()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_struct_is_the_librarys():
    assert ctypes.sizeof(columns._Columns) == 7 * 8 + 2 * 8 + 3 * 4 + 4


GRIDS = [
    Grid(bits=3, group_size=40, sym=False),
    Grid(bits=4, group_size=-1, sym=True),
    Grid.of(scales=Affine("float32"), bits=2, group_size=40),
    Grid.of(NF4, group_size=40),
]


@pytest.mark.parametrize("grid", GRIDS, ids=["asymmetric", "per row", "offsets", "nf4"])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("how", ["static", "dynamic", "pushed", "slope"])
def test_a_solve_by_columns_is_the_one_by_torch(grid, order, how, monkeypatch):
    if how == "dynamic" and order != "natural":
        pytest.skip("groups in mid-sweep are for the natural order")
    g = torch.Generator().manual_seed(0)
    n, out = 600, 37
    x = torch.randn(900, n, generator=g, dtype=torch.float64)
    x[:, 1:] += 0.7 * x[:, :-1]
    H, W = x.T @ x / len(x), torch.randn(out, n, generator=g, dtype=torch.float64)
    factor = factorize(H, order=order, damp_percent=0.01)
    scales = None if how == "dynamic" else fit_groups(W, grid)
    push = Push(torch.randn(n, n, generator=g, dtype=torch.float64).triu(1) * 1e-3) if how == "pushed" else None
    found, calls = [], []
    library = columns._library
    monkeypatch.setattr(columns, "_library", lambda: (calls.append(1), library())[1])
    for best in (compiled.best(), None):
        monkeypatch.setattr(compiled, "best", lambda best=best: best)
        calls.clear()
        if how == "slope":
            solved, slope = sweep_with_slope(W, factor, grid, scales)
            found.append((*solved[:3], *solved.certificate, slope))
        else:
            solved = sweep(W, factor, grid, scales, push=push)
            found.append((*solved[:3], *solved.certificate))
        better = refine(W, H, solved, grid)
        found[-1] += better[:3]
        assert bool(calls) == (best is not None and grid.levels is not NF4)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
