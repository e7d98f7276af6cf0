"""The identities of design section 9 that concern the sweep, in float64 at zero differing codes."""

import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import column_order, damped, inverse_root, problem, published, static_scales

from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, by_column, fit_groups
from nearplane.core.sweep import Push, sweep

ORDERS = ["natural", "activation", "pivot"]


def differing(a, b):
    return int((a.to(torch.float64) != b.to(torch.float64)).sum())


def run(p, grid, *, order="natural", static=True, target=None, **options):
    scales = fit_groups(p.W, grid, options.get("importance")) if static else None
    return sweep(p.W if target is None else target, factorize(p.H, order=order), grid, scales, **options)


def wide_scales(out, groups, seed=0):
    """Scales so coarse that 8 bits never clip a weight of size one: an unbounded lattice, as Babai has it."""
    g = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(out, groups, generator=g, dtype=torch.float64)
    return scale, torch.full_like(scale, 128.0)


# --- identity 1: the published algorithm --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("n, size", [(150, 32), (150, -1), (270, 200), (37, 64), (24, 1), (5, 3)])
def test_static_groups_match_published_gptq(order, sym, n, size):
    p = problem(5, n, seed=n + size)
    grid = Grid(bits=3, group_size=size, sym=sym)
    scales = static_scales(p.W, grid)
    A = damped(p.H)
    perm = column_order(A, order)
    expected = published(p.W, A, grid, order=perm, scales=scales)
    got = run(p, grid, order=order)
    assert differing(got.codes, expected.codes) == 0
    assert torch.equal(got.scale, scales[0]) and torch.equal(got.zero.double(), scales[1])
    if n <= 150:  # and once more against elimination in the inverse itself
        assert differing(got.codes, oracles.gptq(p.W, A, grid, order=perm, scales=scales)) == 0


@pytest.mark.parametrize("how", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("n, size", [(150, 32), (150, -1), (270, 200), (37, 64), (24, 1), (5, 3)])
def test_dynamic_groups_match_published_gptq(how, sym, n, size):
    p = problem(5, n, seed=n + size)
    grid = Grid(bits=3, group_size=size, sym=sym, fit=how)
    importance = p.H.diagonal() if how == "hessian" else None
    expected = published(p.W, damped(p.H), grid, importance=importance, block=n)
    got = run(p, grid, static=False, importance=importance)
    assert differing(got.codes, expected.codes) == 0
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-7, atol=0)
    assert differing(got.zero, expected.zero) == 0


@pytest.mark.parametrize("bits", [2, 4, 8, "ternary"])
@pytest.mark.parametrize("static", [True, False])
def test_every_width_matches_published_gptq(bits, static):
    p = problem(6, 48, seed=9)
    grid = Grid(bits=bits, group_size=16)
    expected = published(p.W, damped(p.H), grid, scales=static_scales(p.W, grid) if static else None)
    assert differing(run(p, grid, static=static).codes, expected.codes) == 0


@given(
    n=st.integers(1, 45),
    out=st.integers(1, 6),
    size=st.sampled_from([-1, 1, 4, 8, 13, 32, 64]),
    sym=st.booleans(),
    static=st.booleans(),
    order=st.sampled_from(ORDERS),
    panel=st.integers(1, 50),
    seed=st.integers(0, 999),
)
def test_any_shape_matches_published_gptq(*, n, out, size, sym, static, order, panel, seed):
    p = problem(out, n, seed=seed)
    order = order if static else "natural"
    grid = Grid(bits=3, group_size=size, sym=sym)
    A = damped(p.H)
    expected = oracles.gptq(
        p.W, A, grid, order=column_order(A, order), scales=static_scales(p.W, grid) if static else None
    )
    assert differing(run(p, grid, order=order, static=static, panel=panel).codes, expected) == 0


def test_target_is_left_alone():
    p = problem(3, 20)
    before = p.W.clone()
    scales = fit_groups(p.W, Grid(group_size=8))
    kept = [s.clone() for s in scales]
    push = Push(torch.randn(20, 20, dtype=torch.float64).triu(1) * 0.1)
    sweep(p.W, factorize(p.H), Grid(group_size=8), scales, push=push)
    sweep(p.W, factorize(p.H), Grid(group_size=8), push=push)
    assert torch.equal(p.W, before) and all(map(torch.equal, scales, kept))


# --- identities 2 and 4: dense least squares ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n, size", [(1, -1), (6, 4), (24, 8)])
def test_sweep_is_least_squares_over_the_remaining_columns(order, n, size):
    p = problem(4, n, seed=n)
    grid = Grid(bits=2, group_size=size, sym=False)
    A = damped(p.H)
    expected = oracles.least_squares(p.W, A, grid, column_order(A, order), static_scales(p.W, grid))
    assert differing(run(p, grid, order=order).codes, expected) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_exact_target_is_asymmetric_least_squares(order):
    p = problem(4, 20, seed=2)
    grid = Grid(bits=3, group_size=8)
    A = damped(p.H)
    target = p.W + p.W @ p.D @ torch.linalg.inv(A)
    scales = static_scales(target, grid)
    got = sweep(target, factorize(p.H, order=order), grid, scales)
    damp = 0.01 * float(p.H.diagonal().mean())
    expected = oracles.least_squares_asymmetric(
        p.W, p.Xhat, p.X, damp=damp, grid=grid, order=column_order(A, order), scales=scales
    )
    assert differing(got.codes, expected) == 0
    # The drift is large enough to matter, or this says nothing.
    assert differing(got.codes, sweep(p.W, factorize(p.H, order=order), grid, scales).codes) > 0


# --- identity 5: what must change no code -------------------------------------------------------------------------


@pytest.mark.parametrize("panel", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("pushed", [False, True])
def test_panel_changes_no_code(panel, static, pushed):
    p = problem(5, 200, seed=1)
    grid = Grid(bits=3, group_size=48)
    matrix = oracles.drift_rows(damped(p.H), p.D)
    push = Push(matrix) if pushed else None
    got, reference = (run(p, grid, static=static, push=push, panel=k) for k in (panel, 128))
    assert differing(got.codes, reference.codes) == 0
    torch.testing.assert_close(got.scale, reference.scale, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.certificate.loss, reference.certificate.loss, rtol=1e-9, atol=0)
    assert torch.equal(got.certificate.clipped, reference.certificate.clipped)


@pytest.mark.parametrize("carry", ["code", "clamped"])
@pytest.mark.parametrize("panel", [32, 1000])
def test_panel_changes_no_code_of_a_released_push(carry, panel):
    p = problem(5, 300, seed=1)
    grid = Grid(bits=3, group_size=64)
    push = Push(oracles.drift_rows(damped(p.H), p.D), carry)
    assert differing(run(p, grid, push=push, panel=panel).codes, run(p, grid, push=push).codes) == 0


@pytest.mark.parametrize("carry", ["value", "code", "clamped"])
def test_only_a_released_push_depends_on_its_block(carry):
    p = problem(8, 96, seed=1)
    grid = Grid(bits=2, group_size=32)
    matrix = oracles.drift_rows(damped(p.H), p.D)
    small, large = (run(p, grid, push=Push(matrix, carry, block)) for block in (16, 96))
    assert (differing(small.codes, large.codes) > 0) == (carry != "value")


def test_thread_count_changes_no_code():
    p = problem(48, 192, seed=1)
    grid = Grid(bits=3, group_size=64)
    before = torch.get_num_threads()
    try:
        codes = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes.append([run(p, grid, order="activation").codes, run(p, grid, static=False).codes])
    finally:
        torch.set_num_threads(before)
    for other in codes[1:]:
        assert all(differing(a, b) == 0 for a, b in zip(codes[0], other, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_changes_no_code():
    p = problem(32, 256, seed=1)
    grid = Grid(bits=3, group_size=64)
    push = Push(oracles.drift_rows(damped(p.H), p.D))
    for order, static, move in itertools.product(ORDERS, (True, False), (None, push)):
        if static or order == "natural":
            here = run(p, grid, order=order, static=static, push=move)
            moved = move and Push(move.matrix.cuda())
            q = p._replace(W=p.W.cuda(), H=p.H.cuda())
            there = run(q, grid, order=order, static=static, push=moved)
            assert differing(here.codes, there.codes.cpu()) == 0


@given(seed=st.integers(0, 999), n=st.integers(1, 40))
def test_permuting_inputs_permutes_codes(seed, n):
    p = problem(4, n, seed=seed)
    grid = Grid(bits=3, group_size=-1)
    shuffle = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = p._replace(W=p.W[:, shuffle], H=p.H[shuffle][:, shuffle])
    codes = run(p, grid, order="activation").codes
    assert differing(run(shuffled, grid, order="activation").codes, codes[:, shuffle]) == 0


# --- identity 6: the loss and the certificate ---------------------------------------------------------------------


@given(
    n=st.integers(1, 40),
    size=st.sampled_from([-1, 5, 8]),
    order=st.sampled_from(ORDERS),
    static=st.booleans(),
    panel=st.sampled_from([3, 128]),
    seed=st.integers(0, 99),
)
def test_additive_loss_is_the_loss(*, n, size, order, static, panel, seed):
    p = problem(3, n, seed=seed)
    grid = Grid(bits=3, group_size=size)
    got = run(p, grid, order=order if static else "natural", static=static, panel=panel)
    Q = oracles.values(got.codes, (got.scale, got.zero), grid)
    torch.testing.assert_close(got.certificate.loss, oracles.loss(p.W, Q, damped(p.H)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_bound_and_clipped_count_match_their_definitions(order):
    p = problem(7, 150, seed=3)
    grid = Grid(bits=3, group_size=64, sym=False)
    scales = static_scales(p.W, grid)
    A = damped(p.H)
    perm = column_order(A, order)
    expected = published(p.W, A, grid, order=perm, scales=scales)
    got = run(p, grid, order=order).certificate
    d = inverse_root(A[perm][:, perm]).diagonal() ** -2
    bound = sum(d[i] * scales[0][:, j // 64] ** 2 for i, j in enumerate(perm)) / 4
    torch.testing.assert_close(got.bound, bound, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-9, atol=0)
    assert int(got.clipped.sum()) == expected.clipped > 0


@given(
    n=st.integers(1, 30),
    size=st.sampled_from([-1, 4, 8]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 999),
)
def test_certificate_holds_on_unclipped_lattices(n, size, order, seed):
    p = problem(4, n, seed=seed)
    grid = Grid(bits=8, group_size=size)
    solved = sweep(p.W, factorize(p.H, order=order), grid, wide_scales(4, grid.group_count(n), seed))
    certificate = solved.certificate
    assert int(certificate.clipped.sum()) == 0
    Q = oracles.values(solved.codes, (solved.scale, solved.zero), grid)
    assert bool((oracles.loss(p.W, Q, damped(p.H)) <= certificate.bound * (1 + 1e-9)).all())


def test_mean_loss_is_about_a_third_of_the_bound():
    grid = Grid(bits=8, group_size=8)
    parts = []
    for seed in range(20):
        p = problem(50, 24, seed=seed)
        parts.append(sweep(10 * p.W, factorize(p.H), grid, wide_scales(50, 3, seed)).certificate)
    ratio = sum(float(c.loss.sum()) for c in parts) / sum(float(c.bound.sum()) for c in parts)
    assert ratio == pytest.approx(1 / 3, abs=0.02)


def test_bound_is_tight():
    p = problem(4, 20, seed=8)
    grid = Grid(bits=8, group_size=8)
    factor = factorize(p.H)
    scales = wide_scales(4, 3)
    # (v - q) = (w - q) T, so this target puts every v just under half a step from its grid point.
    T = factor.feedback + torch.eye(20, dtype=torch.float64)
    steps = scales[0][:, torch.arange(20) // 8]
    Q = steps * torch.randint(-5, 6, (4, 20), generator=torch.Generator().manual_seed(0))
    target = Q + (0.5 - 1e-9) * steps @ torch.linalg.inv(T)
    got = sweep(target, factor, grid, scales)
    torch.testing.assert_close(oracles.values(got.codes, scales, grid), Q)
    torch.testing.assert_close(got.certificate.loss, got.certificate.bound, rtol=1e-7, atol=0)


# --- identity 7: exhaustive search --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_exhaustive_search_is_never_beaten(order, n):
    grid = Grid(bits=2, group_size=2, fit="minmax", sym=False)
    gap = False
    for seed in range(4):
        p = problem(3, n, seed=seed)
        A = damped(p.H)
        scales = static_scales(p.W, grid)
        got = run(p, grid, order=order)
        every = torch.tensor(list(itertools.product(range(4), repeat=n)), dtype=torch.float64)
        for r in range(3):
            row = (scales[0][r : r + 1], scales[1][r : r + 1])
            E = p.W[r] - oracles.values(every, tuple(t.expand(len(every), -1) for t in row), grid)
            losses = ((E @ A) * E).sum(1)
            mine = got.codes[r].double()
            index = int((every == mine).all(1).nonzero())  # the solver's codes are among all codes
            assert float(got.certificate.loss[r]) == pytest.approx(float(losses[index]), rel=1e-9)
            assert float(got.certificate.loss[r]) >= float(losses.min()) * (1 - 1e-9)
            gap |= bool(losses[index] > losses.min() * 1.001)
            if int(got.certificate.clipped.sum()) == 0:
                assert float(losses.min()) <= float(got.certificate.bound[r])
    assert gap or n < 3  # greedy is not optimal somewhere, so that the comparison is not an equality in disguise


# --- edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_identity_hessian_is_plain_rounding(order):
    p = problem(4, 50)
    grid = Grid(bits=3, group_size=16)
    eye = p._replace(H=torch.eye(50, dtype=torch.float64))
    scales = static_scales(p.W, grid)
    assert differing(run(eye, grid, order=order).codes, oracles.rtn(p.W, grid, scales)) == 0
    dynamic = run(eye, grid, static=False)
    assert differing(dynamic.codes, oracles.rtn(p.W, grid, scales)) == 0


def test_codes_of_a_symmetric_grid_stay_in_range_when_everything_is_clipped():
    p = problem(3, 20)
    grid = Grid(bits=3, group_size=-1)
    tiny = torch.full((3, 1), 1e-6, dtype=torch.float64), torch.full((3, 1), 4.0, dtype=torch.float64)
    got = sweep(p.W, factorize(p.H), grid, tiny)
    assert int(got.certificate.clipped.sum()) == 60
    assert set(got.codes.flatten().tolist()) == {0, 7}


def test_float32_agrees_with_float64_in_all_but_a_few_codes():
    p = problem(16, 200, seed=4)
    grid = Grid(bits=4, group_size=64)
    single = p._replace(W=p.W.float(), H=p.H.float())
    fast, exact = (run(some, grid) for some in (single, p))
    # A group whose sign turns round has the same values, nearly, and all of its codes are others.
    steps = [(some.codes.double() - 8) * by_column(some.scale.sign(), grid, 200) for some in (fast, exact)]
    assert differing(*steps) < 0.01 * p.W.numel()
