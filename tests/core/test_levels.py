"""Levels and scales: rounding against brute force, and grids that no integer grid is, through every solver."""

import itertools
import json
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, problem

from nearplane.core.beam import beam_sweep
from nearplane.core.certificate import verify
from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, Quantized, decode, dequantize, encode, fit, fit_groups, round_to_nearest
from nearplane.core.levels import FP4, NF4, Codebook, Shifted, Uniform
from nearplane.core.refine import _descend_leaf, refine
from nearplane.core.scales import Affine, PowerOfTwo, Scales, Signed, Stored
from nearplane.core.sweep import Push, _round_leaf, sweep
from nearplane.methods import GPTAQ, GPTQ, OBQ, RTN, NearPlane, ResComp

CROOKED = Codebook(
    "crooked", (0.0, -3.0, 0.5, 4.0, 0.5)
)  # not in order, one level twice, an end further than the other
LEVELS = [Uniform(2, 0, 3), Uniform(3, 0, 7, False), Uniform(2, 1, 3), NF4, FP4, CROOKED, Shifted(3, 0, 7)]
NAMES = ["int2", "int3", "ternary", "nf4", "fp4", "crooked", "shifted"]
each_levels = pytest.mark.parametrize("levels", LEVELS, ids=NAMES)
GRIDS = [
    Grid.of(NF4, group_size=2),
    Grid.of(CROOKED, group_size=3),
    Grid.of(None, PowerOfTwo(), bits=2, group_size=2),
    Grid.of(None, PowerOfTwo(), bits=2, sym=False, group_size=3),
    Grid.of(FP4, PowerOfTwo(), group_size=2),
    Grid.of(NF4, group_size=-1, scale_dtype="float16"),
    Grid.of(scales=Affine("float16"), bits=2, group_size=3),
    Grid.of(scales=Signed("float16"), bits=2, group_size=2),
]
NAMED = ["nf4", "crooked", "pow2", "pow2-asym", "mxfp4", "nf4-half", "affine", "signed"]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=NAMED)
ORDERS = ["natural", "activation", "pivot"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_level(levels):
    """Level of every code, in Python."""
    if isinstance(levels, Uniform):
        return {code: float(code) for code in range(levels.least, levels.greatest + 1)}
    return dict(enumerate(levels.values))


def columns(part, grid, n):
    width = n if grid.group_size == -1 else grid.group_size
    return part.double()[:, torch.arange(n) // width]


def values(codes, scale, zero, grid):
    """What codes stand for, looked up one by one."""
    table = every_level(grid.levels)
    level = torch.tensor([[table[code] for code in row] for row in codes.tolist()], dtype=torch.float64)
    return (level - columns(zero, grid, codes.shape[1])) * columns(scale, grid, codes.shape[1])


def choices(scale, zero, grid, n):
    """Values that one row may take in each column."""
    s, z = columns(scale, grid, n)[0], columns(zero, grid, n)[0]
    return [sorted({(v - z[j].item()) * s[j].item() for v in every_level(grid.levels).values()}) for j in range(n)]


# --- levels -------------------------------------------------------------------------------------------------------


@each_levels
@given(seed=st.integers(0, 50), zero=st.integers(0, 3), size=st.sampled_from([0.3, 3.0, 30.0]))
def test_rounding_is_to_the_nearest_level(levels, seed, zero, size):
    zero = zero + 0.37 if isinstance(levels, Shifted) else zero
    zero = torch.tensor([[float(zero)]] if isinstance(levels, Uniform) else [[0.0]], dtype=torch.float64)
    steps, table = draw(4, 30, seed=seed) * size, every_level(levels)
    allowed = torch.tensor(sorted(set(table.values())), dtype=torch.float64) - zero[0]
    expected = allowed[(steps[:, :, None] - allowed).abs().argmin(2)]
    low, high = levels.reach(zero)
    torch.testing.assert_close(levels.round_(steps.clone(), low, high), expected, rtol=0, atol=1e-12)
    codes = levels.encode_(steps.clone(), zero)
    torch.testing.assert_close(levels.decode(codes.to(torch.uint8), torch.float64) - zero, expected, rtol=0, atol=1e-12)
    assert set(codes.int().flatten().tolist()) <= set(table)
    far = (steps - expected).abs()
    inside = ~levels.clipped(steps, low, high)
    assert bool((far[inside] <= levels.half_gap * (1 + 1e-12)).all())
    assert torch.equal(~inside, (steps < low - levels.half_gap) | (steps > high + levels.half_gap))


@each_levels
def test_the_k_nearest_are_those_of_a_sorted_list(levels):
    zero = torch.full((1, 1), 2.0 if isinstance(levels, Uniform) else 0.0, dtype=torch.float64)
    zero += 0.25 if isinstance(levels, Shifted) else 0.0  # a fraction that sums hold exactly
    allowed = sorted({v - zero.item() for v in every_level(levels).values()})
    steps = draw(60, seed=3) * 4
    assert levels.count == len(allowed)
    for k in range(1, levels.count + 1):
        got = levels.nearest(steps[:, None], *levels.reach(zero), k)
        for v, found in zip(steps.tolist(), got.tolist(), strict=True):
            assert found == sorted(sorted(allowed, key=lambda level: abs(level - v))[:k])


@each_levels
def test_facts_of_levels(levels):
    table = sorted(set(every_level(levels).values()))
    assert levels.ends == (table[0], table[-1]) and all(isinstance(end, float) for end in levels.ends)
    assert levels.half_gap == max(b - a for a, b in itertools.pairwise(table)) / 2
    assert levels.code_range == (min(every_level(levels)), max(every_level(levels)))
    assert 2**levels.bits > levels.code_range[1] >= 2 ** (levels.bits - 1) - 1


@each_levels
def test_a_scale_covers_its_range(levels):
    low, high = -draw(50, seed=1).abs(), draw(50, seed=2).abs()
    scale = levels.scale(low, high)
    zero = levels.zero(-low, scale)
    least, greatest = ((end - zero) * scale for end in levels.ends)
    slack = scale / 2 * (1 + 1e-9) if isinstance(levels, Uniform) else scale * 1e-9  # an integer grid's zero is rounded
    assert bool((least <= low + slack).all()) and bool((greatest >= high - slack).all())
    assert bool(((least > low - 2 * slack) | (greatest < high + 2 * slack)).all())  # and no wider than it must be


@pytest.mark.parametrize("bad", [(1.0, 2.0, 3.0), (-1.0, 1.0), (-2.0, -1.0, 0.0)])
def test_a_codebook_has_levels_on_both_sides_of_zero(bad):
    with pytest.raises(SettingError, match="3 to 256 levels"):
        Codebook("bad", bad)


@each_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cuda_graph_could_record_the_leaves(levels, dtype):
    """Tensors of the meta device hold no values: an operation that looks at one on the CPU fails."""
    draws = [torch.empty(32, 5, dtype=dtype, device="meta") for _ in range(9)]
    square = torch.empty(32, 32, dtype=dtype, device="meta")
    nothing = square[:0, :0]
    _round_leaf(levels, *draws, square, square, square)
    _round_leaf(levels, *draws, square, nothing, nothing)
    _descend_leaf(levels, *draws[:3], square, *(part[0] for part in draws[3:5]))
    with pytest.raises(RuntimeError):
        bool(draws[0].sum() > 0)


# --- scales -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e9]), double=st.booleans())
def test_the_nearest_power_of_two(seed, size, double):
    scale = (draw(40, seed=seed).abs() * size).to(torch.float64 if double else torch.float32)
    powers = torch.tensor([2.0**e for e in range(-126, 128)], dtype=torch.float64)
    expected = powers[(scale.double()[:, None] - powers).abs().argmin(1)]
    got = PowerOfTwo().nearest(scale)
    assert got.dtype == scale.dtype and torch.equal(got.double(), expected)
    assert torch.equal(PowerOfTwo().nearest(got), got)


def test_the_ends_of_powers_of_two():
    given = torch.tensor([1e-40, 2.0**-126, 1.5, 1.500001, 2.0**127, 3.3e38], dtype=torch.float32)
    assert PowerOfTwo().nearest(given).tolist() == [2.0**-126, 2.0**-126, 1.0, 2.0, 2.0**127, float("inf")]
    with pytest.raises(NumericalError, match="range"):
        fit(torch.full((1, 4), 1e60, dtype=torch.float64), Grid.of(None, PowerOfTwo()))


@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
@each_grid
def test_a_fit_is_no_worse_than_any_range_it_tries(grid, how):
    grid = replace(grid, fit=how)
    W, importance = draw(8, 9, seed=2), draw(9, seed=3).exp()
    scale, zero = fit(W, grid, importance if how == "hessian" else None)

    def rounded(p):
        low, high = W.amin(1).clamp(max=0) * p, W.amax(1).clamp(min=0) * p
        s, z = grid.scales.round(grid.levels.scale(low, high), -low, grid.levels)
        return s, z, decode(encode(W, s[:, None], z[:, None], grid), s[:, None], z[:, None], grid) - W

    tried = range(80) if how == "mse" else [0, *range(2, 80, 5)] if how == "hessian" else [0]
    found = decode(encode(W, scale[:, None], zero[:, None], grid), scale[:, None], zero[:, None], grid) - W
    cost = (lambda e: e.abs().pow(2.4).sum(1)) if how == "mse" else (lambda e: (e.square() * importance).sum(1))
    costs = torch.stack([cost(rounded(1 - i / 100)[2]) for i in tried])
    assert bool((cost(found) <= costs.amin(0) * (1 + 1e-9)).all())
    assert torch.equal(grid.scales.nearest(scale), scale)


# --- grids --------------------------------------------------------------------------------------------------------


def test_an_ordinary_grid_has_its_six_fields():
    assert list(asdict(Grid())) == ["bits", "group_size", "sym", "fit", "scale_dtype", "negative_scales"]
    assert Grid().levels == Uniform(4, 0, 15) and Grid().scales == Stored("float32", signed=True)
    for positive in (Grid(negative_scales=False), Grid(sym=False), Grid(bits="ternary")):
        assert positive.scales == Stored("float32")
    assert Grid(bits="ternary").levels == Uniform(2, 1, 3)


def test_named_grids():
    nf4, mx = Grid.named("nf4"), Grid.named("mxfp4", fit="mse")
    assert (nf4.levels, nf4.scales, nf4.group_size, nf4.bits) == (NF4, Stored("float32"), 64, 4)
    assert (mx.levels, mx.scales, mx.group_size, mx.fit) == (FP4, PowerOfTwo(), 32, "mse")
    assert Grid.named("nf4", group_size=16).group_size == 16
    with pytest.raises(SettingError, match="'nf5', only nf4, mxfp4"):
        Grid.named("nf5")


def test_a_custom_grid_is_a_value_like_any_other():
    grid = Grid.named("nf4")
    half = replace(grid, scale_dtype="float16")
    assert half.levels == NF4 and half.scales == Stored("float16") and half != grid
    assert len({grid, Grid.named("nf4"), half, Grid(), Grid.of()}) == 4
    assert json.loads(json.dumps(asdict(grid)))["own_levels"]["name"] == "nf4"
    for wrong in ({"bits": 3}, {"sym": False}):
        with pytest.raises(SettingError, match="belong to the levels"):
            replace(grid, **wrong)


def test_dequantize_looks_the_codes_up():
    grid = Grid.named("nf4", group_size=3)
    codes = torch.randint(0, 16, (4, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = draw(4, 4).abs()
    solved = Quantized(codes, scale, torch.zeros(4, 4, dtype=torch.uint8))
    torch.testing.assert_close(dequantize(solved, grid), values(codes, scale, solved.zero, grid))


@each_grid
def test_rounding_to_nearest_beats_every_other_code(grid):
    W = draw(5, 10, seed=4)
    scale, zero = fit_groups(W, grid)
    solved = round_to_nearest(W, scale, zero, grid)
    error = (values(solved.codes, scale, zero, grid) - W).abs()
    for r in range(5):
        for j, allowed in enumerate(choices(scale[r : r + 1], zero[r : r + 1], grid, 10)):
            assert error[r, j].item() == pytest.approx(min(abs(v - W[r, j].item()) for v in allowed), abs=1e-12)


# --- solvers ------------------------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("order", ORDERS)
def test_the_sweep_is_least_squares_column_by_column(grid, order):
    """After each rounded column the others are solved again by dense least squares, without any factor."""
    p = problem(4, 9, seed=1)
    A, factor = damped(p.H), factorize(p.H, order=order)
    scale, zero = fit_groups(p.W, grid)
    got = sweep(p.W, factor, grid, (scale, zero))
    root = torch.linalg.cholesky(A).T
    for r in range(4):
        free, q, wanted = factor.order.tolist(), torch.zeros(9, dtype=torch.float64), root @ p.W[r]
        allowed = choices(scale[r : r + 1], zero[r : r + 1], grid, 9)
        while free:
            best = torch.linalg.lstsq(root[:, free], (wanted - root @ q)[:, None], driver="gelsd").solution[0, 0].item()
            j = free.pop(0)
            q[j] = min(allowed[j], key=lambda v, best=best: abs(v - best))
        torch.testing.assert_close(dequantize(got, grid)[r], q, rtol=1e-9, atol=1e-9)
        assert got.certificate.loss[r].item() == pytest.approx(float((p.W[r] - q) @ A @ (p.W[r] - q)), rel=1e-8)


@each_grid
@pytest.mark.parametrize("order", ORDERS)
def test_a_beam_of_all_answers_is_the_exhaustive_optimum(grid, order):
    n = 3 if grid.levels.count > 8 else 4
    improved = 0
    for seed in range(2):
        p = problem(6, n, seed=seed, tokens=n)  # so strongly correlated that one answer is not enough
        A, factor, (scale, zero) = damped(p.H), factorize(p.H, order=order), fit_groups(p.W, grid)
        got = beam_sweep(p.W, factor, grid, (scale, zero), grid.levels.count**n)
        one, plain = beam_sweep(p.W, factor, grid, (scale, zero), 1), sweep(p.W, factor, grid, (scale, zero))
        assert torch.equal(one.codes, plain.codes)
        for mine, its in zip(one.certificate, plain.certificate, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)
        for r in range(6):
            allowed = choices(scale[r : r + 1], zero[r : r + 1], grid, n)
            every = torch.tensor(list(itertools.product(*allowed)), dtype=torch.float64)
            error = p.W[r] - every
            losses = ((error @ A) * error).sum(1)
            torch.testing.assert_close(dequantize(got, grid)[r], every[losses.argmin()], rtol=1e-9, atol=1e-12)
            assert got.certificate.loss[r].item() == pytest.approx(losses.min().item(), rel=1e-8)
        improved += int((got.certificate.loss < one.certificate.loss * (1 - 1e-9)).sum())
    assert improved


@each_grid
@pytest.mark.parametrize("carry", ["value", "code", "clamped"])
def test_a_moving_target_carries_values_of_the_grid(grid, carry):
    """The recurrence column by column: inside a block v pushes later targets, across blocks what ``carry`` names."""
    p = problem(4, 10, seed=6)
    factor, (scale, zero) = factorize(p.H), fit_groups(p.W, grid)
    P = draw(10, 10, seed=7).triu(1) / 5
    got = sweep(p.W, factor, grid, (scale / 2, zero), push=Push(P, carry, block=4))
    for r in range(4):
        allowed = choices(scale[r : r + 1] / 2, zero[r : r + 1], grid, 10)
        target, v, q = (torch.zeros(10, dtype=torch.float64) for _ in range(3))
        for j in range(10):
            inside = [min(max(x, values[0]), values[-1]) for x, values in zip(v.tolist(), allowed, strict=True)]
            carried = {"value": v, "code": q, "clamped": torch.tensor(inside, dtype=torch.float64)}[carry]
            x = torch.where(torch.arange(10) >= j // 4 * 4, v, carried)
            target[j] = p.W[r, j] + x[:j] @ P[:j, j]
            v[j] = target[j] + (target - q)[:j] @ factor.feedback[:j, j]
            q[j] = min(allowed[j], key=lambda value, at=v[j]: abs(value - float(at)))
        torch.testing.assert_close(dequantize(got, grid)[r], q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if not grid.scales.free])
def test_a_round_of_refinement_is_the_naive_round(grid):
    """Each group's best scale that can be stored, then each column's best value, all errors formed anew."""
    p = problem(4, 9, seed=5)
    A, (scale, zero) = damped(p.H), fit_groups(p.W, grid)
    scale = grid.scales.nearest(scale * 1.6)  # room to get better
    start = round_to_nearest(p.W, scale, zero, grid)
    got, expected, s = refine(p.W, A, start, grid), dequantize(start, grid), scale.clone()
    width = 9 if grid.group_size == -1 else grid.group_size
    moved = 0
    for r, g in itertools.product(range(4), range(s.shape[1])):
        part = range(g * width, min(9, g * width + width))
        inside = torch.zeros(9, dtype=torch.float64)
        inside[list(part)] = expected[r, list(part)] / s[r, g]
        if (length := float(inside @ A @ inside)) > 0:
            best = float((p.W[r] - expected[r] + inside * s[r, g]) @ A @ inside) / length
            near = float(grid.scales.nearest(torch.tensor([best]).double())) if best * s[r, g] > 0 else float(s[r, g])
            if abs(near - best) < abs(float(s[r, g]) - best):
                moved += 1
                expected[r] += inside * (near - s[r, g])
                s[r, g] = near
        for j in part:
            allowed = choices(s[r : r + 1], zero[r : r + 1], grid, 9)[j]
            best = expected[r, j].item() + float((p.W[r] - expected[r]) @ A[:, j]) / A[j, j].item()
            expected[r, j] = min(allowed, key=lambda v, best=best: abs(v - best))
    assert moved
    torch.testing.assert_close(got.scale, s, rtol=1e-6, atol=0)
    torch.testing.assert_close(dequantize(got, grid), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(grid.scales.nearest(got.scale), got.scale)


@each_grid
@pytest.mark.parametrize("order", ORDERS)
def test_the_bound_holds_where_nothing_is_clipped_and_may_fail_where_it_is(grid, order):
    ratios = []
    for seed in range(8):
        p = problem(12, 16, seed=seed)
        scale, zero = fit_groups(p.W, replace(grid, fit="minmax"))
        wide = grid.scales.nearest(scale * 4)
        zero = torch.full_like(zero, 1.3) if grid.scales.free else zero  # about the middle of the range
        got = sweep(p.W, factorize(p.H, order=order), grid, (wide, zero)).certificate
        verify(got)
        free = got.clipped == 0
        ratios += (got.loss / got.bound)[free].tolist()
    assert len(ratios) > 10 and max(ratios) <= 1
    clipped = sweep(p.W, factorize(p.H), grid, (scale / 64, zero)).certificate
    assert bool((clipped.clipped > 0).all()) and bool((clipped.loss > clipped.bound).any())


def test_the_bound_of_uneven_levels_is_tight():
    """A weight in the middle of the widest gap is moved by exactly half of it."""
    grid, gap = Grid.of(CROOKED, group_size=-1), CROOKED.half_gap
    W = torch.tensor([[0.5 + gap, 0.5 + gap]], dtype=torch.float64)  # between the levels 0.5 and 4
    one = torch.ones(1, 1, dtype=torch.float64)
    got = sweep(W, factorize(torch.eye(2, dtype=torch.float64), damp_percent=0.0), grid, (one, one * 0)).certificate
    assert gap == 1.75 and float(got.loss) == float(got.bound) == 2 * gap**2 and int(got.clipped) == 0


METHODS = [
    RTN(),
    OBQ(),
    GPTQ(),
    GPTQ(order="natural", static_groups=False),
    GPTAQ(variant="released"),
    ResComp(variant="released"),
    NearPlane(beam=3),
    NearPlane(gate=False, shrink="none"),
]


@each_grid
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_takes_every_grid(grid, method):
    """Codes of the grid, scales as stored; and who reads data loses less than rounding to nearest does."""
    loss = rtn = 0.0
    for seed in range(3):
        p = problem(16, 24, seed=seed, drift=0.0)
        moments = p.moments.join(replace(p.moments)) if "held_out" in method.needs else p.moments
        solved = method.solve(p.W, method.prepare(moments), grid)
        assert solved.codes.dtype == torch.uint8
        assert solved.zero.dtype == (torch.float32 if grid.scales.free else torch.uint8)
        assert set(solved.codes.flatten().tolist()) <= set(every_level(grid.levels))
        assert torch.equal(grid.scales.nearest(solved.scale), solved.scale)
        Q, nearest = dequantize(solved, grid), dequantize(RTN().solve(p.W, None, grid), grid)
        torch.testing.assert_close(Q, values(solved.codes, solved.scale, solved.zero, grid))
        loss += float(((Q - p.W) @ p.H * (Q - p.W)).sum())
        rtn += float(((nearest - p.W) @ p.H * (nearest - p.W)).sum())
    assert loss < rtn or isinstance(method, RTN)


# --- scales that are rounded together -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs(Scales):
    """A scale is 1 to 15 times a unit, a power of two that two neighbouring groups of a row share."""

    joint: ClassVar[bool] = True

    def nearest(self, scale):
        return scale

    def round_rows(self, scale, zero):
        blocks = [self._times(part, self._unit(part)) for part in scale.split(2, 1)]
        return torch.cat(blocks, 1), zero

    def round_beside(self, wanted, scale, group):
        block = scale[group // 2 * 2 : group // 2 * 2 + 2]
        return self._times(wanted, self._unit(block.T)[:, 0])

    def _unit(self, block):
        return torch.exp2((block.amax(1, keepdim=True) / 15).log2().ceil())

    def _times(self, scale, unit):
        return (scale / unit).round().clamp(1, 15) * unit


@pytest.mark.parametrize("levels", [None, NF4], ids=["int3", "nf4"])
def test_scales_that_share_a_unit_need_one_class(levels):
    """The seam for nested scales: a class of one's own, and every solver keeps to what it can store."""
    fields = {} if levels else {"bits": 3}
    grid, free = (Grid.of(levels, scales, group_size=4, **fields) for scales in (Pairs(), None))
    p = problem(6, 24, seed=7)
    scale = fit_groups(p.W, grid)[0]
    assert not torch.equal(scale, fit_groups(p.W, free)[0])
    for method in (RTN(), GPTQ(), NearPlane(gate=False, shrink="none", rounds=3)):
        moments = p.moments.join(replace(p.moments)) if "held_out" in method.needs else p.moments
        solved = method.solve(p.W, method.prepare(moments), grid)
        for pair in solved.scale.split(2, 1):
            unit = Pairs()._unit(pair)
            assert torch.equal((pair / unit).round(), pair / unit) and bool((pair <= 15 * unit).all())
    assert not torch.equal(solved.scale, scale)  # refinement moved some
    with pytest.raises(SettingError, match="static"):
        GPTQ(order="natural", static_groups=False).solve(p.W, GPTQ(order="natural").prepare(p.moments), grid)
