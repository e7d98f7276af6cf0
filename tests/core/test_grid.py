"""fit, encode and decode against plain loops over Python floats."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.grid import (
    Certificate,
    Course,
    Grid,
    Quantized,
    decode,
    dequantize,
    encode,
    fit,
    fit_groups,
    group_index,
    round_to_nearest,
)
from nearplane.core.levels import NF4

ALL_BITS = [2, 3, 4, 5, 8, "ternary"]
GRIDS = [(bits, sym) for bits in ALL_BITS for sym in (True, False) if sym or bits != "ternary"]


def weights(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def levels(grid):
    """Least code, greatest code, zero of a symmetric grid."""
    return (1, 3, 2) if grid.bits == "ternary" else (0, 2**grid.bits - 1, 2 ** (grid.bits - 1))


def stored(x, dtype="float32"):
    """A Python float as a checkpoint of this dtype holds it."""
    return torch.tensor(x, dtype=torch.float64).to(getattr(torch, dtype)).double().item()


def slow_range(w, grid, p=1.0, sign=1):
    """Scale and zero of one group whose range is shrunk to p, in Python floats."""
    least, greatest, middle = levels(grid)
    low, high = min(0.0, *w) * p, max(0.0, *w) * p
    if grid.sym:
        low, high = -max(-low, high), max(-low, high)
    s = (high - low) / (greatest - least)
    s = stored(s, grid.scale_dtype) if s > 0 else 1.0
    z = middle if grid.sym else min(max(round(-low / s), least), greatest)
    return sign * s, z


def signs(grid):
    """The signs that a scale may have."""
    return (1, -1) if grid.sym and grid.negative_scales and grid.bits != "ternary" else (1,)


def slow_extreme(w, grid):
    """Scale and zero with which the larger extreme has the last code of the longer side."""
    most = max(w, key=abs)
    s = stored(abs(most) / 2 ** (grid.bits - 1), grid.scale_dtype)
    return (-s if most > 0 else s), levels(grid)[2]


def slow_round(w, s, z, grid):
    least, greatest, _ = levels(grid)
    return min(max(round(w / s) + z, least), greatest)  # Python rounds ties to even, as torch does


def slow_fit(w, grid, importance=None):
    """One group by the definition of section 4: the published search, penalty by penalty, with both signs."""

    def errors(fitted):
        s, z = fitted
        return [s * (slow_round(x, s, z, grid) - z) - x for x in w]

    if grid.fit == "minmax":
        tried = [slow_range(w, grid), *([slow_extreme(w, grid)] if len(signs(grid)) == 2 else [])]
        return min(tried, key=lambda fitted: sum(e * e for e in errors(fitted)))

    def error(tried):
        i, sign = tried
        missed = errors(slow_range(w, grid, 1 - i / 100, sign))
        if grid.fit == "mse":
            return sum(abs(e) ** 2.4 for e in missed)
        return sum(h * e * e for h, e in zip(importance, missed, strict=True))

    def best(steps):
        return min(((i, sign) for i in steps for sign in signs(grid)), key=error)

    if grid.fit == "mse":
        i, sign = best(range(80))
    else:  # ours: the middle of every five, then the rest of the best five
        first = best((0, *range(2, 80, 5)))
        i, sign = min(first, best(max(0, first[0] + d) for d in (1, -1, 2, -2)), key=error)
    s, z = slow_range(w, grid, 1 - i / 100, sign)
    return (s, z) if grid.fit == "mse" or grid.sym else slow_other_zero(w, s, z, grid, importance)


def slow_cost(w, s, z, grid, importance):
    return sum(h * (s * (slow_round(x, s, z, grid) - z) - x) ** 2 for h, x in zip(importance, w, strict=True))


def slow_other_zero(w, s, z, grid, importance):
    """The better of a scale and zero, and of eight scales with the integer on the other side of the exact zero."""
    least, greatest, _ = levels(grid)
    exact = -min(0.0, *w) * (greatest - least) / (max(0.0, *w) - min(0.0, *w))
    other = min(max(z + (1 if exact > z else -1), least), greatest)
    tried = [(s, z), *((stored(s * i / 25, grid.scale_dtype), other) for i in range(20, 35, 2))]
    return min(tried, key=lambda fitted: slow_cost(w, *fitted, grid, importance))


@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_fit_matches_a_slow_loop(bits, sym, how):
    grid = Grid(bits=bits, sym=sym, fit=how)
    w = weights(6, 13, seed=3) + torch.tensor([0, 0, 2.0, -2.0, 9.0, -9.0])[:, None]  # the last rows have one sign only
    importance = weights(13, seed=4).exp()
    scale, zero = fit(w, grid, importance if how == "hessian" else None)
    for row, s, z in zip(w.tolist(), scale.tolist(), zero.tolist(), strict=True):
        expected = slow_fit(row, grid, importance.tolist())
        assert (s, z) == pytest.approx(expected, rel=1e-12)


def test_hessian_fit_follows_the_important_column():
    # Two levels matter: with all the weight on the small column, the range must shrink towards it.
    w = torch.tensor([[0.31, -1.0]], dtype=torch.float64)
    grid = Grid(bits=2, fit="hessian")
    error = []
    for importance in ([1.0, 0.0], [0.0, 1.0]):
        s, z = fit(w, grid, torch.tensor(importance, dtype=torch.float64))
        q = decode(encode(w, s[:, None], z[:, None], grid), s[:, None], z[:, None])
        error.append((q - w).abs()[0].tolist())
    assert error[0][0] < error[1][0] and error[1][1] < error[0][1]


def test_importance_may_differ_by_row_and_survives_chunking():
    grid = Grid(bits=3, fit="hessian")
    w, importance = weights(3000, 40, seed=1), weights(3000, 40, seed=2).exp()  # more than one chunk of the search
    scale, zero = fit(w, grid, importance)
    for r in (0, 1637, 1638, 1639, 2999):
        s, z = fit(w[r], grid, importance[r])
        assert torch.equal(scale[r], s) and torch.equal(zero[r], z)


def test_shape_of_the_batch_does_not_matter():
    grid = Grid(bits=3, sym=False)
    w = weights(4, 5, 7)
    scale, zero = fit(w, grid)
    flat = fit(w.reshape(20, 7), grid)
    assert torch.equal(scale.reshape(-1), flat[0]) and torch.equal(zero.reshape(-1), flat[1])


@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_all_zero_group_gets_scale_one_and_stays_zero(bits, sym, how):
    grid = Grid(bits=bits, sym=sym, fit=how)
    w = torch.zeros(2, 5)
    scale, zero = fit(w, grid, torch.ones(5))
    assert torch.equal(scale, torch.ones(2))
    code = encode(w, scale[:, None], zero[:, None], grid)
    assert not decode(code, scale[:, None], zero[:, None]).any()


def test_hessian_fit_of_a_dead_group_keeps_the_full_range():
    grid = Grid(bits=4, fit="hessian")
    w = weights(3, 8)
    scale, _ = fit(w, grid, torch.zeros(8, dtype=torch.float64))
    assert torch.equal(scale, fit(w, Grid(bits=4, fit="minmax", negative_scales=False))[0])


@given(n=st.integers(1, 20), size=st.sampled_from([-1, 1, 3, 8, 32]), how=st.sampled_from(["minmax", "mse", "hessian"]))
def test_groups_are_fitted_one_by_one_and_the_tail_on_its_own(n, size, how):
    grid = Grid(bits=3, group_size=size, fit=how, sym=False)
    w, importance = weights(3, n), weights(n, seed=1).exp()
    scale, zero = fit_groups(w, grid, importance)
    width = n if size == -1 else size
    starts = list(range(0, n, width))
    assert scale.shape == zero.shape == (3, len(starts)) == (3, grid.group_count(n))
    for k, a in enumerate(starts):
        s, z = fit(w[:, a : a + width], grid, importance[a : a + width])
        assert torch.equal(scale[:, k], s) and torch.equal(zero[:, k], z)


def test_groups_are_contiguous_on_disk_whatever_the_order():
    order = torch.tensor([6, 0, 5, 2, 1, 4, 3])
    assert group_index(order, Grid(group_size=3)).tolist() == [2, 0, 1, 0, 0, 1, 1]
    assert group_index(order, Grid(group_size=-1)).tolist() == [0] * 7
    assert group_index(order, Grid(group_size=100)).tolist() == [0] * 7


def test_ternary_has_three_levels_on_two_bits():
    grid = Grid(bits="ternary", fit="minmax")
    w = torch.tensor([[-3.0, -1.0, 0.0, 1.4, 1.6, 3.0]])
    scale, zero = fit(w, grid)
    assert scale.tolist() == [3.0] and zero.tolist() == [2.0]
    code = encode(w, scale[:, None], zero[:, None], grid)
    assert code.tolist() == [[1, 2, 2, 2, 3, 3]]
    assert decode(code, scale[:, None], zero[:, None]).tolist() == [[-3, 0, 0, 0, 3, 3]]
    assert grid.storage_bits == 2 and grid.code_range == (1, 3)
    wild = encode(weights(50) * 100, scale, zero, grid)
    assert set(wild.tolist()) <= {1, 2, 3}


@given(bits=st.sampled_from(ALL_BITS), seed=st.integers(0, 99))
def test_encode_picks_the_nearest_allowed_level(bits, seed):
    grid = Grid(bits=bits, sym=bits == "ternary")
    least, greatest, _ = levels(grid)
    w = weights(4, 9, seed=seed) * 3
    s, z = weights(4, 1, seed=seed + 1).exp(), torch.full((4, 1), float(least + 1), dtype=torch.float64)
    allowed = torch.arange(least, greatest + 1, dtype=torch.float64)
    distance = (s * (allowed - z)).unsqueeze(1) - w.unsqueeze(2)
    assert torch.equal(encode(w, s, z, grid), allowed[distance.abs().argmin(2)])


def test_ties_go_to_even_before_the_zero_is_added():
    grid, one = Grid(bits=4, sym=False), torch.ones(1)
    value = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert (encode(value, one, one * 7, grid) - 7).tolist() == [-2, -2, 0, 0, 2, 2]
    assert (encode(value, one, one * 8, grid) - 8).tolist() == [-2, -2, 0, 0, 2, 2]


def test_codes_are_clamped_to_the_range():
    grid, one = Grid(bits=3), torch.ones(1)
    assert encode(torch.tensor([-99.0, -4.4, 3.4, 99.0]), one, one * 4, grid).tolist() == [0, 0, 7, 7]


def test_encode_leaves_its_arguments_alone():
    w, s, z = weights(5), torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    before = w.clone()
    encode(w, s, z, Grid())
    fit(w[None], Grid())
    assert torch.equal(w, before) and s == 1 and z == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("how", ["minmax", "mse"])
@pytest.mark.parametrize("sym", [True, False])
def test_scale_is_rounded_to_its_stored_dtype_before_a_code_is_chosen(dtype, how, sym):
    grid = Grid(bits=8, sym=sym, fit=how, scale_dtype=dtype)
    w = weights(8, 31) + 2.0
    scale, zero = fit(w, grid)
    assert torch.equal(scale.to(getattr(torch, dtype)).double(), scale)
    for row, s, z in zip(w.tolist(), scale.tolist(), zero.tolist(), strict=True):
        assert (s, z) == slow_fit(row, grid)  # the zero, too, belongs to the rounded scale


def test_a_scale_too_large_for_its_dtype_is_an_error_that_says_so():
    w = torch.full((1, 4), 1e7)
    with pytest.raises(NumericalError, match="float16"):
        fit(w, Grid(bits=2, fit="minmax", scale_dtype="float16"))
    fit(w, Grid(bits=2, fit="minmax", scale_dtype="bfloat16"))


def test_a_scale_never_rounds_to_zero():
    w = torch.full((1, 4), 1e-12)
    scale, zero = fit(w, Grid(fit="minmax", scale_dtype="float16"))
    assert scale.abs() > 0
    assert encode(w, scale[:, None], zero[:, None], Grid()).isfinite().all()


def test_every_value_inside_an_asymmetric_range_is_within_half_a_scale():
    grid = Grid(bits=4, sym=False, fit="minmax")
    w = weights(20, 30)
    s, z = (t[:, None] for t in fit(w, grid))
    # The zero is itself rounded, so an end of the range may lie half a step outside: one whole step there.
    assert bool(((decode(encode(w, s, z, grid), s, z) - w).abs() <= s * (1 + 1e-9)).all())
    inside = (w > s * (0.5 - z)) & (w < s * (14.5 - z))
    assert bool(((decode(encode(w, s, z, grid), s, z) - w).abs() <= s / 2 * (1 + 1e-9))[inside].all())


@pytest.mark.parametrize("size", [-1, 4, 5, 64])
def test_dequantize_gives_every_column_its_group(size):
    grid = Grid(bits=4, group_size=size, sym=False)
    w = weights(3, 10)
    scale, zero = fit_groups(w, grid)
    codes = torch.randint(0, 16, (3, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    got = dequantize(Quantized(codes, scale, zero.to(torch.uint8)), grid)
    width = 10 if size == -1 else size
    for r in range(3):
        for j in range(10):
            s, z = scale[r, j // width].item(), zero[r, j // width].item()
            assert got[r, j].item() == pytest.approx(s * (codes[r, j].item() - z), rel=1e-12)


def test_hessian_fit_without_calibration_is_refused():
    with pytest.raises(SettingError, match="reads no calibration data"):
        fit(torch.ones(2, 4), Grid(fit="hessian"))


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4.0},
        {"bits": "binary"},
        {"group_size": 0},
        {"group_size": -2},
        {"bits": "ternary", "sym": False},
        {"fit": "best"},
        {"scale_dtype": "float64"},
    ],
)
def test_bad_settings_are_refused(bad):
    # Grid is checked by beartype in tests, so a value outside its annotation may be refused there first.
    with pytest.raises((SettingError, TypeError)) as caught:
        Grid(**bad)
    if isinstance(caught.value, SettingError):
        assert isinstance(caught.value, NearplaneError) and str(next(iter(bad.values()))) in str(caught.value)


@pytest.mark.parametrize(
    "bad", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}, {"bits": "ternary", "sym": False}]
)
def test_bad_settings_of_the_right_type_raise_setting_errors(bad):
    with pytest.raises(SettingError):
        Grid(**bad)


def test_certificate_is_optional():
    empty = torch.zeros(1, 1)
    assert Quantized(empty.to(torch.uint8), empty, empty.to(torch.uint8)).certificate is None


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 5), slice(4, 9), slice(None, None, 2), slice(3, 3)])
def test_some_of_the_rows(part):
    codes, scale = torch.arange(30, dtype=torch.uint8).reshape(5, 6), weights(5, 3).abs()
    zero, course = torch.arange(15, dtype=torch.uint8).reshape(5, 3), Course(0.5, 0.01, 0, 2, 0)
    certificate = Certificate(scale[:, 0], scale[:, 1], torch.arange(5))
    got = Quantized(codes, scale, zero, certificate, course).rows(part)
    rows = list(range(5)[part])
    assert got.course is course
    for mine, whole in zip((*got[:3], *got.certificate), (codes, scale, zero, *certificate), strict=True):
        assert torch.equal(mine, whole[rows])
    assert Quantized(codes, scale, zero).rows(part).certificate is None


def test_the_search_reaches_its_deepest_step():
    # Only the first column counts, and one step of the grid is exactly that weight at p = 0.21, the last of 80 tries.
    w = torch.tensor([[0.14, 1.0]], dtype=torch.float64)
    scale, _ = fit(w, Grid(bits=2, fit="hessian"), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert scale.abs().item() == pytest.approx(0.14, rel=1e-6)


def test_small_scales_keep_the_precision_of_float16_subnormals():
    w = weights(4, 64, seed=9) * 1e-5
    exact = fit(w, Grid(bits=4, fit="minmax"))[0]
    stored = fit(w, Grid(bits=4, fit="minmax", scale_dtype="float16"))[0]
    assert float(stored.abs().max()) < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(stored, exact, rtol=0.1, atol=0)
    assert torch.equal(stored, stored.half().to(stored.dtype)) and bool((stored != 0).all())


# --- without data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "sym"), GRIDS)
def test_auto_without_data_is_minmax_and_then_least_squares_by_turns_with_the_codes(bits, sym):
    grid = Grid(bits=bits, sym=sym)
    w = weights(6, 13, seed=3) + torch.tensor([0, 0, 2.0, -2.0, 9.0, -9.0])[:, None]
    scale, zero = fit(w, grid)
    for row, got in zip(w.tolist(), zip(scale.tolist(), zero.tolist(), strict=True), strict=True):
        s, z = slow_fit(row, replace(grid, fit="minmax"))
        cost = slow_cost(row, s, z, grid, [1] * 13)
        for _ in range(3):
            steps = [slow_round(x, s, z, grid) - z for x in row]
            wanted = sum(a * x for a, x in zip(steps, row, strict=True)) / sum(a * a for a in steps)
            new = math.copysign(stored(abs(wanted)), s) if wanted * s > 0 else s
            if slow_cost(row, new, z, grid, [1] * 13) < cost:
                s, cost = new, slow_cost(row, new, z, grid, [1] * 13)
        assert got == pytest.approx((s, z), rel=1e-6)


@pytest.mark.parametrize("name", ["integers", "asymmetric", "nf4", "mxfp4", "q4_1", "q2_k", "ternary"])
def test_auto_without_data_never_loses_more_squared_error_than_minmax(name):
    own = {"integers": {"bits": 2}, "asymmetric": {"bits": 2, "sym": False}, "ternary": {"bits": "ternary"}}
    grid = Grid(**own[name], group_size=32) if name in own else Grid.named(name)
    w = weights(20, 256, seed=5)
    w[3] = 0
    missed = []
    for how in ("auto", "minmax"):
        chosen = replace(grid, fit=how)
        solved = round_to_nearest(w, *fit_groups(w, chosen), chosen)
        missed.append((dequantize(solved, chosen) - w).square().sum(1))
    assert bool((missed[0] <= missed[1] * (1 + 1e-9)).all()) and not missed[0][3]
    assert name == "mxfp4" or float(missed[0].sum()) < 0.95 * float(missed[1].sum())


# --- the other zero -----------------------------------------------------------------------------------------------


def test_a_zero_that_one_cheap_weight_rounded_the_wrong_way():
    # All but the first weight lie on the grid of scale 1 and zero 1; the first, which costs nothing, asks for zero 2.
    w = torch.tensor([[-1.8, -1.0, 0.0, 1.0, 2.0, 1.0]], dtype=torch.float64)
    importance = torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    grid = Grid(bits=2, sym=False, fit="minmax")
    assert fit(w, grid)[1].item() == 1  # 1.42 of [0, 3]
    w[0, 0] = -2.5
    assert fit(w, grid)[1].item() == 2
    scale, zero = fit(w, replace(grid, fit="hessian"), importance)
    assert zero.item() == 1 and scale.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("bits", "shrunk", "found"), [(2, 1.08, 1.03), (3, 1.05, 1.01)])
def test_the_fit_comes_near_the_best_of_all_zeros_and_a_fine_grid_of_scales(bits, shrunk, found):
    grid = Grid(bits=bits, sym=False, fit="hessian", scale_dtype="float16")
    w, importance = weights(200, 32, seed=11), weights(200, 32, seed=12).exp()

    def cost(scale, zero):
        return (squared(w, scale, zero, grid) * importance).sum(1)

    least = torch.full((200,), torch.inf, dtype=torch.float64)
    for zero in range(2**bits):
        for k in range(1, 301):
            scale = (k / 300 * 4 / (2**bits - 1) * w.abs().amax(1)).half().double()
            least = torch.minimum(least, cost(scale, torch.full_like(scale, float(zero))))
    ranges = torch.full_like(least, torch.inf)
    for i in range(80):  # what shrinking the range alone can find at most
        pairs = [slow_range(row, grid, 1 - i / 100) for row in w.tolist()]
        ranges = torch.minimum(
            ranges, cost(*(torch.tensor(part, dtype=torch.float64) for part in zip(*pairs, strict=True)))
        )
    ours = cost(*fit(w, grid, importance))
    assert float(ranges.sum() / least.sum()) > shrunk and float(ours.sum() / least.sum()) < found
    assert float((ours <= ranges * 1.001).double().mean()) > 0.9


# --- either sign --------------------------------------------------------------------------------------------------


def squared(w, scale, zero, grid):
    s, z = scale[..., None], zero[..., None]
    return (decode(encode(w, s, z, grid), s, z) - w).square()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_fit_is_the_better_of_fitting_a_group_and_its_mirror_image(bits, stored):
    grid = Grid(bits=bits, fit="mse", scale_dtype=stored)
    plain = Grid(bits=bits, fit="mse", scale_dtype=stored, negative_scales=False)
    w = weights(200, 32, seed=bits)
    (straight, zero), (mirrored, _), (scale, got) = fit(w, plain), fit(-w, plain), fit(w, grid)

    def cost(scale):
        return squared(w, scale, zero, grid).sqrt().pow(2.4).sum(1)

    assert torch.equal(got, zero)
    assert torch.equal(scale, torch.where(cost(-mirrored) < cost(straight), -mirrored, straight))
    assert 50 < int((scale < 0).sum()) < 150  # of 8 bits about 60: + is taken where both are as good
    for row in (0, 199):  # and nothing but the sign of the scale tells -w from w
        assert fit(-w[row], grid)[0].abs().item() == scale[row].abs().item()


# Of normal weights, means over seeds; measured before this test was written.
@pytest.mark.parametrize(
    ("bits", "width", "ratio"),
    [(2, 32, 0.81), (2, 64, 0.86), (3, 32, 0.82), (3, 128, 0.90), (4, 32, 0.86), (4, 128, 0.91)],
)
def test_the_error_of_gaussian_weights_falls_and_nothing_more_is_stored(bits, width, ratio):
    w = weights(1024, width, seed=5)
    plain = Grid(bits=bits, group_size=width, fit="mse", negative_scales=False)
    either = Grid(bits=bits, group_size=width, fit="mse")
    before, after = (float(squared(w, *fit(w, grid), grid).sum()) for grid in (plain, either))
    assert after / before == pytest.approx(ratio, abs=0.03)
    assert either.storage_bits == plain.storage_bits and either.code_range == plain.code_range
    assert either.held_in == plain.held_in


@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(bits="ternary"),
        Grid(bits=4, sym=False),
        Grid.of(NF4, group_size=-1),
        Grid.named("mxfp4"),
        Grid.named("q4_1"),
        Grid(bits=4, negative_scales=False),
    ],
    ids=["ternary", "asymmetric", "nf4", "mxfp4", "q4_1", "switched off"],
)
def test_no_scale_of_any_other_grid_is_negative(grid, how):
    grid = replace(grid, fit=how)
    scale, _ = fit(weights(300, 32), grid, weights(32, seed=1).exp())
    assert not grid.scales.either_sign and bool((scale > 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_never_errs_by_more_than_with_scales_above_0(bits):
    w = weights(300, 32, seed=7)
    w[:100] = w[:100].abs()  # of one sign: the longer side holds all of it
    w[100:200] -= 1
    plain, either = (Grid(bits=bits, fit="minmax", negative_scales=some) for some in (False, True))
    before, after = (squared(w, *fit(w, grid), grid).sum(1) for grid in (plain, either))
    assert bool((after <= before).all()) and float(after.sum()) < 0.95 * float(before.sum())
    turned = fit(w, either)[0] < 0
    assert int(turned[:100].sum()) > 50 and not bool((w[turned].amax(1) < -w[turned].amin(1)).any())


def test_negative_scales_are_a_bool():
    with pytest.raises((SettingError, TypeError)):
        Grid(negative_scales="no")
