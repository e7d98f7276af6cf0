"""Scales of super-blocks: exact parts, fits by cost, refinement on the integers, and rows that do not divide."""

import itertools
import json
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, loss, problem

from nearplane.core.certificate import verify
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.factor import factorize
from nearplane.core.grid import PRESETS, Grid, Quantized, dequantize, fit_groups, round_to_nearest
from nearplane.core.nested import KINDS, Nested, described, scales_of
from nearplane.core.refine import refine
from nearplane.core.scales import Affine, PowerOfTwo, Signed
from nearplane.core.sweep import sweep
from nearplane.methods import GPTQ, OBQ, RTN, NearPlane

KINDS_OF_K = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
# Small super-blocks: with minima, without and with signs, bfloat16 above.
SMALL = {
    "minima": Grid.of(scales=Nested(2, 3), bits=2, group_size=4),
    "signed": Grid.of(scales=Nested(3, 4, signed=True, minima=False), bits=3, group_size=4),
    "plain": Grid.of(scales=Nested(2, 2, minima=False), bits=3, group_size=3),
    "bfloat16": Grid.of(scales=Nested(4, 6, dtype="bfloat16"), bits=4, group_size=3),
}
each_small = pytest.mark.parametrize("grid", SMALL.values(), ids=SMALL)


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_parts(solved, grid):
    """The parts are numbers a file holds, and multiply to the scales bit for bit; the offset up to one rounding."""
    scales = grid.scales
    parts = scales.parts(solved.scale, solved.zero)
    d, sub = parts.super_scale, parts.sub_scale
    stored = getattr(torch, scales.dtype)
    assert d.dtype == torch.float32 and sub.dtype == torch.int32
    assert torch.equal(d.to(stored).float(), d) and bool(d.isfinite().all())
    least, greatest = scales.most
    assert int(sub.min()) >= least and int(sub.max()) <= greatest and bool((sub != 0).all())
    product = d.repeat_interleave(scales.groups, 1) * sub
    assert torch.equal(product.to(solved.scale.dtype), solved.scale)
    if not scales.minima:
        assert parts.super_offset is None and parts.sub_offset is None and solved.zero.dtype == torch.uint8
        assert set(solved.zero.flatten().tolist()) == {2 ** (grid.bits - 1)}
        return parts
    dmin, m = parts.super_offset, parts.sub_offset
    assert torch.equal(dmin.to(stored).float(), dmin) and m.dtype == torch.int32
    assert int(m.min()) >= 0 and int(m.max()) < 2**scales.bits and solved.zero.dtype == torch.float32
    offset = dmin.repeat_interleave(scales.groups, 1) * m
    assert torch.equal(offset / product, solved.zero)
    torch.testing.assert_close(solved.scale.float() * solved.zero, offset, rtol=2.0**-23, atol=0)
    return parts


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS_OF_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_k_quant_has_exact_parts_after_every_solver(name, dtype):
    grid, p = Grid.named(name), problem(5, 512, seed=3, tokens=600, drift=0.0)
    W, H = p.W.to(dtype), p.H.to(dtype)
    factor = factorize(H)
    solved = sweep(W, factor, grid, fit_groups(W, grid, H.diagonal()))
    verify(solved.certificate)
    A = H.clone()
    A.diagonal().add_(factor.damp)
    refined = refine(W, A, solved, grid)
    for each in (RTN().solve(W, None, grid), solved, refined, refine(W, A, refined, grid)):
        check_parts(each, grid)
    assert not torch.equal(refined.scale, solved.scale)
    if grid.scales.minima:
        assert not torch.equal(refined.zero, solved.zero)
    # d stays where refinement moves the integers: the scales are multiples of the same numbers
    before, after = (grid.scales.parts(each.scale, each.zero) for each in (solved, refined))
    d = before.super_scale.repeat_interleave(grid.scales.groups, 1)
    assert torch.equal((refined.scale.float() / d).round() * d, refined.scale.float())
    assert after.super_scale.shape == (5, 512 // grid.scales.groups // grid.group_size)


@given(seed=st.integers(0, 999), name=st.sampled_from(["q2_k", "q4_k"]), top=st.sampled_from([1e-6, 1e-3, 1.0, 900.0]))
def test_parts_are_found_whatever_they_were(seed, name, top):
    scales, g = Grid.named(name).scales, torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    d, dmin = (((draw(4, 3) + 0.1) * top).half().float().clamp_min(2.0**-24) for _ in range(2))
    sub = torch.randint(1, 2**scales.bits, (4, 3 * scales.groups), generator=g)
    m = torch.randint(0, 2**scales.bits, sub.shape, generator=g)
    m[0] = 0  # a row without offsets
    scale = d.repeat_interleave(scales.groups, 1) * sub
    offset = dmin.repeat_interleave(scales.groups, 1) * m
    parts = scales.parts(scale, offset / scale)
    assert torch.equal(parts.super_scale.repeat_interleave(scales.groups, 1) * parts.sub_scale, scale)
    assert torch.equal(parts.super_offset.repeat_interleave(scales.groups, 1) * parts.sub_offset, offset)
    again = scales.parts(scale, offset / scale)
    assert all(map(torch.equal, parts, again))


@pytest.mark.parametrize("name", ["q3_k", "q6_k"])
def test_signed_parts_reach_the_least_integer(name):
    scales = Grid.named(name).scales
    half = 1 << (scales.bits - 1)
    sub = torch.tensor([[-half, half - 1, -1, 1] * (scales.groups // 4)])
    for d in (0.25, -0.25):
        parts = scales.parts(sub * d, torch.zeros(sub.shape, dtype=torch.uint8))
        assert torch.equal(parts.super_scale.repeat_interleave(scales.groups, 1) * parts.sub_scale, sub * d)
        assert int(parts.sub_scale.min()) >= -half and int(parts.sub_scale.max()) < half


def test_scales_that_are_not_nested_are_named():
    scale = torch.full((2, 16), 0.1)
    scale[1, 3] = 0.1234567
    with pytest.raises(NumericalError, match="row 0, super-block 0"):
        Grid.named("q2_k").scales.parts(torch.rand(1, 16) + 0.1, torch.zeros(1, 16))
    with pytest.raises(NumericalError, match="row 1"):
        Grid.named("q2_k").scales.parts(scale.half().float() + (scale > 0.11) * 1e-4, torch.zeros(2, 16))


# --- fitting ------------------------------------------------------------------------------------------------------


def plain_way(W, grid, importance):
    """What llama.cpp's own rounding does with scales: the largest of a super-block over the greatest integer."""
    scales, fields = grid.scales, {"bits": grid.bits, "group_size": grid.group_size}
    free = Grid.of(scales=Affine("float32") if scales.minima else Signed("float32"), **fields)
    scale, zero = fit_groups(W, free, importance)

    def rounded(value, most):
        blocks = value.unflatten(1, (-1, scales.groups))
        unit = (blocks.abs().amax(2, keepdim=True) / most).half().double()
        count = (blocks / unit).round()
        return (torch.where(count == 0, blocks.sign(), count) * unit).flatten(1)

    s = rounded(scale, scales.most[1])
    o = rounded((scale * zero).clamp_min(0), 2**scales.bits - 1) if scales.minima else zero * s
    return round_to_nearest(W, s, (o / s).float(), grid)


@pytest.mark.parametrize("name, share", [("q2_k", 0.93), ("q3_k", 0.99), ("q4_k", 0.99), ("q6_k", 1.001)])
def test_a_fit_by_cost_is_better_than_rounding_fitted_scales(name, share):
    W, importance, grid = weights(16, 512), weights(512, seed=1).mul(1.5).exp(), Grid.named(name)
    cost = lambda solved: float(((dequantize(solved, grid) - W).square() * importance).sum())  # noqa: E731
    fitted = round_to_nearest(W, *fit_groups(W, grid, importance), grid)
    check_parts(fitted, grid)
    assert cost(fitted) < share * cost(plain_way(W, grid, importance))


@pytest.mark.parametrize("name", ["minima", "signed", "plain"])
def test_no_integer_beside_a_fitted_one_is_much_better(name):
    """Exhaustive over the integers of each group, the super-scales as fitted."""
    grid, W, importance = SMALL[name], weights(12, 24, seed=2), weights(24, seed=3).exp()
    solved = round_to_nearest(W, *fit_groups(W, grid, importance), grid)
    parts, scales = check_parts(solved, grid), grid.scales
    cost = lambda s: ((dequantize(s, grid) - W).square() * importance).unflatten(1, (-1, grid.group_size)).sum(2)  # noqa: E731
    d = parts.super_scale.repeat_interleave(scales.groups, 1).double()
    dmin = parts.super_offset.repeat_interleave(scales.groups, 1).double() if scales.minima else None
    best = torch.full_like(d, torch.inf)
    for sub, m in itertools.product(range(scales.most[0], scales.most[1] + 1), range(8 if scales.minima else 1)):
        if sub:
            zero = (dmin * m / (d * sub)).float() if scales.minima else solved.zero
            best = torch.minimum(best, cost(round_to_nearest(W, d * sub, zero, grid)))
    mine = cost(solved)
    assert float(mine.sum()) < 1.05 * float(best.sum()) and bool((mine >= best * (1 - 1e-5)).all())


@each_small
def test_groups_of_zeros_are_exact_and_set_no_scale(grid):
    width = grid.group_size * grid.scales.groups
    W = weights(3, 2 * width)
    W[0, : grid.group_size] = 0
    W[1, :width] = 0
    W[2] = 0
    for importance in (None, torch.ones(2 * width, dtype=torch.float64), torch.zeros(2 * width, dtype=torch.float64)):
        solved = round_to_nearest(W, *fit_groups(W, grid, importance), grid)
        check_parts(solved, grid)
        Q = dequantize(solved, grid)
        assert not Q[1, :width].any() and not Q[2].any()
        assert float(Q[0, : grid.group_size].abs().max()) < 0.5  # the minimum of a group may be another one's
        assert float((Q - W).square().mean()) < 0.3


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e3])
@pytest.mark.parametrize("name", KINDS_OF_K)
def test_tiny_and_large_weights(name, size):
    grid, W = Grid.named(name), weights(3, 256) * size
    solved = RTN().solve(W, None, grid)
    check_parts(solved, grid)
    lost = float((dequantize(solved, grid) - W).square().sum() / W.square().sum())
    assert lost < 0.2 or size == 1e-7  # a float16 is no finer than 6e-8


def test_scales_beyond_float16_are_named():
    with pytest.raises(NumericalError, match="Nested scales in float16"):
        RTN().solve(weights(2, 256) * 1e9, None, Grid.named("q4_k"))


@pytest.mark.parametrize("columns", [255, 250, 128, 16, 257])
def test_rows_that_super_blocks_do_not_divide_are_refused(columns):
    for solver in (RTN(), NearPlane(gate=False, shrink="none", target=False, damping="fixed")):
        p = problem(2, columns, drift=0.0)
        with pytest.raises(SettingError, match=rf"16 groups of \d+ inputs, and does not divide the {columns} inputs"):
            solver.solve(p.W, solver.prepare(p.moments), Grid.named("q2_k"))


def test_groups_are_static():
    p = problem(2, 256)
    with pytest.raises(SettingError, match="static"):
        method = GPTQ(order="natural", static_groups=False)
        method.solve(p.W, method.prepare(p.moments), Grid.named("q2_k"))


# --- solving ------------------------------------------------------------------------------------------------------


@each_small
@pytest.mark.parametrize("method", [OBQ(), GPTQ(), NearPlane(gate=False, shrink="none"), NearPlane(beam=3)])
def test_every_method_takes_nested_scales(grid, method):
    mine = nearest = 0.0
    for seed in range(3):
        p = problem(8, 36 if grid.group_size == 4 and grid.scales.groups == 3 else 24, seed=seed, drift=0.0)
        moments = p.moments.join(replace(p.moments)) if "held_out" in method.needs else p.moments
        solved = method.solve(p.W, method.prepare(moments), grid)
        check_parts(solved, grid)
        for kind in ("mine", "nearest"):
            error = dequantize(solved if kind == "mine" else RTN().solve(p.W, None, grid), grid) - p.W
            if kind == "mine":
                mine += float(((error @ p.H) * error).sum())
            else:
                nearest += float(((error @ p.H) * error).sum())
    assert mine < nearest


@each_small
@given(seed=st.integers(0, 99), noise=st.sampled_from([0.0, 0.5]))
def test_no_round_raises_the_objective(grid, seed, noise):
    width = grid.group_size * grid.scales.groups
    p = problem(4, 2 * width, seed=seed)
    A, solved = damped(p.H), round_to_nearest(p.W, *fit_groups(p.W, grid), grid)
    g = torch.Generator().manual_seed(seed)
    other = torch.randint(0, 2**grid.bits, p.W.shape, generator=g, dtype=torch.uint8)
    solved = solved._replace(codes=torch.where(torch.rand(p.W.shape, generator=g) < noise, other, solved.codes))
    before = first = loss(p.W, dequantize(solved, grid), A)
    for _ in range(3):
        solved = refine(p.W, A, solved, grid)
        check_parts(solved, grid)
        after = loss(p.W, dequantize(solved, grid), A)
        assert bool((after <= before * (1 + 1e-6) + 1e-9).all())
        before = after
    assert float(before.sum()) < float(first.sum())


@pytest.mark.parametrize("minima", [True, False])
def test_the_exhaustive_optimum_is_a_fixed_point(minima):
    """Two groups of two weights: every integer, every minimum and every code, the super-scales given."""
    scales = Nested(2, 2, signed=not minima, minima=minima)
    grid = Grid.of(scales=scales, bits=2, group_size=2, sym=not minima)
    integers = [k for k in range(scales.most[0], scales.most[1] + 1) if k]
    options = list(itertools.product(integers, range(4) if minima else [0], *[range(4)] * 2))
    group = torch.tensor(options, dtype=torch.float64)  # sub, m, code, code
    values = lambda o, d, dmin: d * o[:, :1] * (o[:, 2:] - (0 if minima else 2)) - dmin * o[:, 1:2]  # noqa: E731
    for seed in range(4):
        p = problem(1, 4, seed=seed)
        A, d, dmin = damped(p.H), 0.375, 0.25 if minima else 0.0
        first = values(group, d, dmin)
        pairs = torch.cat([first[:, None].expand(-1, len(group), 2), first[None].expand(len(group), -1, 2)], 2)
        error = pairs.reshape(-1, 4) - p.W[0]
        losses = ((error @ A) * error).sum(1)
        # the answer must hold the unit itself, else a finer one would be found in it
        subs = torch.cartesian_prod(group[:, 0], group[:, 0])
        odd = (subs % 2 != 0).any(1)
        if minima:
            mins = torch.cartesian_prod(group[:, 1], group[:, 1])
            odd &= (mins % 2 != 0).any(1) & (mins.amax(1) > 1) | (mins.amax(1) == 3)
        losses = losses.masked_fill(~odd, torch.inf)
        k = int(losses.argmin())
        best = torch.stack([group[k // len(group)], group[k % len(group)]])
        scale = (d * best[:, 0])[None]
        zero = (dmin * best[:, 1] / scale).float() if minima else torch.full((1, 2), 2, dtype=torch.uint8)
        start = Quantized(best[:, 2:].reshape(1, 4).to(torch.uint8), scale, zero)
        got = refine(p.W, A, start, grid)
        after = float(loss(p.W, dequantize(got, grid), A))
        parts = check_parts(got, grid)
        if float(parts.super_scale.abs().max()) == d and (not minima or float(parts.super_offset.max()) == dmin):
            assert after == pytest.approx(float(losses[k]), rel=1e-6)


# --- a value like any other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_recorded_pickled_and_told_apart(name):
    grid = Grid.named(name)
    assert pickle.loads(pickle.dumps(grid)) == grid
    assert json.loads(json.dumps(asdict(grid)))["group_size"] == grid.group_size
    same = [other for other in PRESETS if asdict(Grid.named(other)) == asdict(grid)]
    assert same == [name]


def test_records_tell_kinds_of_scales_apart():
    assert len({json.dumps(asdict(Grid.of(scales=kind))) for kind in (Affine(), Signed(), Nested())}) == 3


@pytest.mark.parametrize("scales", [Signed("bfloat16"), Affine("float32"), Nested(8, 6), Nested(16, 8, True, False)])
def test_scales_come_back_from_their_description(scales):
    assert scales_of(json.loads(json.dumps(described(scales))), "here") == scales
    assert KINDS[scales.kind] is type(scales)


@pytest.mark.parametrize(
    "bad",
    [{}, {"kind": "other"}, {"kind": "affine"}, {"kind": "affine", "dtype": "int8"}, {"kind": "signed", "dtype": 3},
     {**asdict(Nested()), "bits": True}, {**asdict(Nested()), "bits": 9}, {**asdict(Nested()), "more": 1},
     {**asdict(Nested()), "groups": 0}],
)  # fmt: skip
def test_a_description_that_is_none_is_refused(bad):
    with pytest.raises(NearplaneError):
        scales_of(bad, "here")


def test_signs_and_offsets_do_not_go_together():
    for bad in (lambda: Nested(signed=True), lambda: Grid.of(scales=Signed(), sym=False)):
        with pytest.raises(SettingError, match="sign"):
            bad()


def test_plain_scales_have_no_description():
    with pytest.raises(SettingError, match="PowerOfTwo"):
        described(PowerOfTwo())
