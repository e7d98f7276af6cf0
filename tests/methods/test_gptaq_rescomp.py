"""GPTAQ and ResComp: the released loops, the consistent form, the meaning of P and R, and their reductions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import column_order, damped, drift_rows, inverse_root, problem, published, static_scales

from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, fit_groups
from nearplane.core.sweep import sweep
from nearplane.methods import GPTAQ, GPTQ, ResComp
from nearplane.methods.gptaq import drift_push

ORDERS = ["natural", "activation", "pivot"]
# (in_features, group): several blocks of 128; groups that divide a block or are a multiple of it.
SHAPES = [(200, 64), (300, 256), (260, -1), (280, 128)]


def solve(method, p, grid):
    return method.solve(p.W, method.prepare(p.moments), grid)


def differing(a, b):
    return int((a.to(torch.float64) != b.to(torch.float64)).sum())


def expected(p, grid, order, static, *, alpha=0.25, alpha2=0.0, across="v", block=128):
    """The published loop on this problem; P and R by their meaning, row by row."""
    A = damped(p.H)
    perm = column_order(A, order)
    here = lambda M: M[perm][:, perm]  # noqa: E731
    return published(
        p.W,
        A,
        grid,
        order=perm,
        scales=static_scales(p.W, grid) if static else None,
        P=alpha * drift_rows(here(A), here(p.D)),
        R=alpha2 * drift_rows(here(A), here(p.D + p.H)) if alpha2 else None,
        across=across,
        block=block,
    )


def settings_of(static):
    return [{"order": o} for o in ORDERS] if static else [{"order": "natural", "static_groups": False}]


CASES = [(shape, options) for shape in SHAPES for static in (True, False) for options in settings_of(static)]


# --- P ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@given(n=st.integers(1, 24), seed=st.integers(0, 99))
def test_rows_of_p_regress_the_drift_on_the_columns_left(order, n, seed):
    p = problem(1, n, seed=seed)
    factor = factorize(p.H, order=order)
    A, D = (M[factor.order][:, factor.order] for M in (damped(p.H), p.D))
    P = drift_push(factor, p.D)
    torch.testing.assert_close(P, drift_rows(A, D), rtol=1e-8, atol=1e-9)
    assert not P.tril().any()
    U = inverse_root(A)
    torch.testing.assert_close(P, (D @ U.T).triu(1) @ U, rtol=1e-8, atol=1e-9)


def test_prepare_scales_p_by_alpha_and_leaves_the_moments_alone():
    p = problem(1, 10)
    D = p.D.clone()
    push = GPTAQ(alpha=0.5, order="natural").prepare(p.moments).push
    torch.testing.assert_close(push.matrix, 0.5 * drift_rows(damped(p.H), D), rtol=1e-9, atol=1e-10)
    assert torch.equal(p.D, D)


# --- GPTAQ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, options", CASES, ids=str)
def test_gptaq_released_matches_the_published_loop(shape, options):
    n, size = shape
    p = problem(6, n, seed=n)
    grid = Grid(bits=3, group_size=size, fit="mse")
    want = expected(p, grid, options["order"], options.get("static_groups", True), across="q")
    got = solve(GPTAQ(variant="released", **options), p, grid)
    assert differing(got.codes, want.codes) == 0
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-6, atol=0)


# A dynamic group across a block border reads stale columns in the published loop: blocks that divide, or hold, the groups.
BLOCKS = [(block, options) for block in (1, 40, 1000) for options in settings_of(True) + settings_of(False)]
BLOCKS += [(128, options) for options in settings_of(True)]


@pytest.mark.parametrize(("block", "options"), BLOCKS, ids=str)
def test_gptaq_consistent_is_the_loop_at_any_block_size(block, options):
    p = problem(6, 160, seed=7)
    static = options.get("static_groups", True)
    grid = Grid(
        bits=3, group_size=40, fit="mse"
    )  # a multiple of 1 and 40; at 128 only static groups, which need no alignment
    want = expected(p, grid, options["order"], static, block=block)
    assert differing(solve(GPTAQ(**options), p, grid).codes, want.codes) == 0


@given(
    n=st.integers(1, 40),
    size=st.sampled_from([-1, 1, 5, 16, 64]),
    options=st.sampled_from(settings_of(True) + settings_of(False)),
    alpha=st.sampled_from([0.25, 1.0]),
    sym=st.booleans(),
    panel=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_gptaq_consistent_at_any_shape_and_panel(*, n, size, options, alpha, sym, panel, seed):
    p = problem(3, n, seed=seed)
    grid = Grid(bits=3, group_size=size, sym=sym, fit="mse")
    static = options.get("static_groups", True)
    state = GPTAQ(alpha=alpha, **options).prepare(p.moments)
    scales = fit_groups(p.W, grid) if static else None
    got = sweep(p.W, state.factor, grid, scales, push=state.push, panel=panel)
    assert differing(got.codes, expected(p, grid, options["order"], static, alpha=alpha, block=1).codes) == 0


def test_the_forms_of_gptaq_differ_only_beyond_one_block():
    grid = Grid(bits=2, group_size=64, fit="mse")
    small, large = problem(6, 128), problem(6, 256)
    forms = GPTAQ(variant="consistent"), GPTAQ(variant="released")
    assert differing(*(solve(m, small, grid).codes for m in forms)) == 0
    assert differing(*(solve(m, large, grid).codes for m in forms)) > 0


# --- ResComp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, carry, across", [("gptaq", "org", "q"), ("gptaq", "allw", "clamped"), ("gptq", "allw", "clamped")]
)
@pytest.mark.parametrize("shape, options", [c for c in CASES if c[0][0] < 270 and c[1]["order"] != "pivot"], ids=str)
def test_rescomp_released_matches_the_published_loop(shape, options, carry, across, base):
    n, size = shape
    p = problem(4, n, seed=n)
    grid = Grid(bits=3, group_size=size, sym=False, fit="mse")
    if base == "gptq":
        p = p._replace(D=torch.zeros_like(p.D))
    static = options.get("static_groups", True)
    want = expected(p, grid, options["order"], static, alpha2=0.25, across=across)
    method = ResComp(base=base, carry=carry, variant="released", **options)
    assert differing(solve(method, p, grid).codes, want.codes) == 0


@pytest.mark.parametrize("bits, across", [(2, "q"), ("ternary", "q"), (3, "clamped"), (4, "clamped")])
def test_rescomp_chooses_the_published_carry_by_bits(bits, across):
    p = problem(6, 200, seed=2)
    grid = Grid(bits=bits, group_size=64, fit="mse")
    got = solve(ResComp(variant="released"), p, grid)
    for name in ("q", "clamped"):
        want = expected(p, grid, "activation", True, alpha2=0.25, across=name)
        assert (differing(got.codes, want.codes) == 0) == (name == across)


@pytest.mark.parametrize("base", ["gptaq", "gptq"])
@pytest.mark.parametrize("block", [1, 40, 1000])
@pytest.mark.parametrize("options", settings_of(True) + settings_of(False), ids=str)
def test_rescomp_consistent_is_the_loop_at_any_block_size(base, block, options):
    p = problem(6, 160, seed=7)
    grid = Grid(bits=3, group_size=40, fit="mse")
    if base == "gptq":
        p = p._replace(D=torch.zeros_like(p.D))
    want = expected(p, grid, options["order"], options.get("static_groups", True), alpha2=0.25, block=block)
    assert differing(solve(ResComp(base=base, **options), p, grid).codes, want.codes) == 0


def test_rescomp_on_gptq_ignores_a_drift_that_was_measured():
    p = problem(6, 60)
    grid = Grid(bits=3, group_size=16, fit="mse")
    without = p._replace(D=torch.zeros_like(p.D))
    method = ResComp(base="gptq")
    assert differing(solve(method, p, grid).codes, solve(method, without, grid).codes) == 0
    assert differing(solve(ResComp(), p, grid).codes, solve(method, p, grid).codes) > 0


# --- identity 3: reductions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["consistent", "released"])
@pytest.mark.parametrize("options", settings_of(True) + settings_of(False), ids=str)
def test_reductions(options, variant):
    p = problem(6, 160, seed=3)
    still = p._replace(D=torch.zeros_like(p.D))
    grid = Grid(bits=3, group_size=64, fit="mse")
    gptq, gptaq = solve(GPTQ(**options), p, grid), solve(GPTAQ(variant=variant, **options), p, grid)

    def same(got, want):
        assert differing(got.codes, want.codes) == 0
        torch.testing.assert_close(got.scale, want.scale, rtol=1e-7, atol=0)

    same(solve(GPTAQ(alpha=0.0, variant=variant, **options), p, grid), gptq)
    same(solve(GPTAQ(variant=variant, **options), still, grid), gptq)
    same(solve(ResComp(base="gptq", alpha2=0.0, variant=variant, **options), p, grid), gptq)
    same(solve(ResComp(alpha2=0.0, variant=variant, carry="org", **options), p, grid), gptaq)
    assert differing(gptaq.codes, gptq.codes) > 0


def test_identity_hessian_leaves_only_the_push():
    # With H = I (undamped) P is striu(D): no feedback, and targets that move with what was read.
    n = 30
    p = problem(4, n)._replace(H=torch.eye(n, dtype=torch.float64))
    state = GPTAQ(order="natural", damp_percent=0.0, alpha=1.0).prepare(p.moments)
    torch.testing.assert_close(state.push.matrix, p.D.triu(1))
    assert not state.factor.feedback.any()


def test_the_push_lowers_the_asymmetric_loss_on_a_fine_grid():
    """With steps too small to matter what is left to see is the drift, and P lowers it."""
    p = problem(3, 6, tokens=400, drift=0.1)
    grid = Grid(bits=8, group_size=-1, fit="mse")
    state = GPTAQ(order="natural", alpha=1.0).prepare(p.moments)
    fine = torch.full((3, 1), 0.05, dtype=torch.float64), torch.full((3, 1), 128.0, dtype=torch.float64)
    got = sweep(p.W, state.factor, grid, fine, push=state.push)
    Q = (got.codes.double() - 128) * 0.05
    before = (p.W @ p.Xhat - p.W @ p.X).square().sum()
    after = (Q @ p.Xhat - p.W @ p.X).square().sum()
    assert int(got.certificate.clipped.sum()) == 0 and after < before
