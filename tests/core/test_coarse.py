"""Coarse products and blocked factors against plain ones in float64."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from nearplane.core import dense
from nearplane.core.dense import (
    BLOCK,
    LEAST_BLOCKED,
    LEAST_COARSE,
    cholesky_,
    coarse,
    coarse_linears,
    coarse_product,
    unit_solve,
)
from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, dequantize, fit_groups
from nearplane.core.moments import Moments
from nearplane.core.refine import Refinement, refine
from nearplane.core.sweep import sweep, sweep_with_slope

GRID = Grid(bits=3, group_size=32, sym=False)


@pytest.fixture(params=[False, True])
def fast(request, monkeypatch):
    """A processor with and one without instructions for bfloat16; torch has the arithmetic in either case."""
    monkeypatch.setattr(dense, "bfloat16_is_fast", lambda: request.param)
    monkeypatch.setattr(dense, "LEAST_COARSE", 1)
    return request.param


def spd(n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 50, n, generator=g, dtype=torch.float64)
    H = x.T @ x / n
    H.diagonal().add_(0.1)
    return H.to(dtype)


@pytest.mark.parametrize("n", [5, LEAST_BLOCKED - 1, LEAST_BLOCKED, LEAST_BLOCKED + BLOCK // 2])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_a_blocked_factor_is_the_factor(n, dtype, close):
    H = spd(n, dtype)
    got = H.clone()
    assert cholesky_(got) == 0 and not got.triu(1).any()
    torch.testing.assert_close(got.double(), torch.linalg.cholesky(H.double()), rtol=0, atol=close * n**0.5)


@pytest.mark.parametrize("bad", [3, BLOCK + 7, LEAST_BLOCKED - 1])
def test_a_blocked_factor_names_the_first_bad_minor(bad):
    H = spd(LEAST_BLOCKED)
    H[bad, bad] = -1
    assert cholesky_(H.clone()) == bad + 1 == int(torch.linalg.cholesky_ex(H)[1])


def test_a_rough_factor_is_near_and_only_where_damping_is_great(fast):
    H = spd(LEAST_BLOCKED, torch.float32)
    plain, rough = (factorize(H, damp_percent=10.0, rough=rough) for rough in (False, True))
    assert torch.equal(plain.feedback, rough.feedback) != fast
    torch.testing.assert_close(rough.feedback, plain.feedback, rtol=0, atol=2e-3)
    torch.testing.assert_close(rough.pivots, plain.pivots, rtol=2e-3, atol=0)
    little = [factorize(H, damp_percent=0.1, rough=rough) for rough in (False, True)]
    assert torch.equal(little[0].feedback, little[1].feedback)


def test_a_rough_factor_that_fails_is_made_again(fast, monkeypatch):
    """An indefinite result of rounding is no reason to raise the damping."""
    from nearplane.core import factor

    real = factor.cholesky_
    monkeypatch.setattr(factor, "cholesky_", lambda H, rough=False: 1 if rough else real(H, rough))
    H = spd(LEAST_BLOCKED, torch.float32)
    got, plain = (factorize(H, damp_percent=10.0, rough=rough) for rough in (True, False))
    assert torch.equal(got.feedback, plain.feedback) and got.raised == 0 and got.damp_percent == 10.0


def test_coarse_products(fast):
    a, b = torch.randn(40, 300), torch.randn(300, 50)
    exact = a.double() @ b.double()
    got = coarse_product(a, b)
    assert got.dtype == torch.float32 and (coarse(a).dtype == torch.bfloat16) == fast
    error = float((got.double() - exact).norm() / exact.norm())
    assert 1e-4 < error < 5e-3 if fast else error < 1e-6
    assert torch.equal(coarse_product(a.double(), b.double()), exact), "float64 is never coarse"


@pytest.mark.parametrize("n", [1, 128, 129, 300])
def test_a_unit_solve_errs_like_a_rounding_of_its_result(fast, n):
    factor = factorize(spd(n, torch.float32), damp_percent=0.01)
    T = factor.feedback.double() + torch.eye(n, dtype=torch.float64)
    B = torch.randn(7, n)
    exact = B.double() @ torch.linalg.inv(T)
    A = T * factor.pivots.double() @ T.T
    error = unit_solve(B, factor.feedback).double() - exact
    rounding = (exact.square() @ A.diagonal() * 2.0**-18).sum()  # of 8 digits, in the metric A
    assert float(((error @ A) * error).sum()) < (2 * float(rounding) if fast and n > 128 else 1e-4 * float(rounding))


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_slope_of_a_sweep_is_the_product_with_its_errors(fast, order, dtype):
    n = 300
    H, W = spd(n, dtype), torch.randn(9, n, dtype=dtype)
    factor, scales = factorize(H, order=order, damp_percent=0.1), fit_groups(W, GRID)
    got, slope = sweep_with_slope(W, factor, GRID, scales)
    plain = sweep(W, factor, GRID, scales)
    assert torch.equal(got.codes, plain.codes) and torch.equal(got.certificate.loss, plain.certificate.loss)
    A = H.double()
    A.diagonal().add_(factor.damp)
    expected = A @ (W - dequantize(got, GRID)).double().T
    close = 1e-10 if dtype == torch.float64 else 6e-3 if fast else 1e-5
    assert float((slope.double() - expected).norm() / expected.norm()) < close


def test_rounds_that_keep_their_slope_are_rounds_from_the_start():
    n = 600  # more than two panels
    H, W = spd(n), torch.randn(5, n, dtype=torch.float64)
    factor, scales = factorize(H, damp_percent=0.1), fit_groups(W, GRID)
    solved, slope = sweep_with_slope(W, factor, GRID, scales)
    A = H.clone()
    A.diagonal().add_(factor.damp)
    kept, one = Refinement(W, H, solved, GRID, slope, factor.damp), solved
    for _ in range(3):
        before, one = one, refine(W, A, one, GRID)
        got = kept.round()
        assert torch.equal(got.codes, one.codes) and not torch.equal(one.scale, before.scale)
        torch.testing.assert_close(got.scale, one.scale, rtol=1e-6, atol=0)


def test_coarse_rounds_lower_the_objective_as_plain_ones_do(monkeypatch):
    n = 600
    H, W = spd(n, torch.float32), torch.randn(40, n)
    factor, scales = factorize(H, order="activation", damp_percent=0.1), fit_groups(W, GRID)
    A = H.double()
    A.diagonal().add_(factor.damp)
    found = []
    for fast in (False, True):
        monkeypatch.setattr(dense, "bfloat16_is_fast", lambda fast=fast: fast)
        solved, slope = sweep_with_slope(W, factor, GRID, scales)
        rounds = Refinement(W, H, solved, GRID, slope, factor.damp)
        losses = []
        for each in (solved, rounds.round(), rounds.round()):
            error = (W - dequantize(each, GRID)).double()
            losses.append(float(((error @ A) * error).sum()))
        assert losses[0] > losses[1] > losses[2]
        found.append(losses[2])
    assert found[1] == pytest.approx(found[0], rel=5e-3)


CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_linears_are_coarse_while_it_lasts(fast, bias, conv):
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40, bias=bias)
    module, x = plain, torch.randn(2, 5, 96)
    if conv:
        module = Conv1D(40, 96)
        module.weight.copy_(plain.weight.T)
        module.bias.copy_(plain.bias if bias else torch.zeros(40))
    exact = module(x)
    with coarse_linears(CPU):
        rough = module(x)
    assert rough.dtype == torch.float32 and torch.equal(rough, exact) != fast
    # Factors and the product are rounded to 8 digits; the bias, which may be large, is not.
    size = (x.abs() @ plain.weight.abs().T) * 2**-7
    assert ((rough - exact).abs() <= size).all()
    assert torch.equal(module(x), exact)
    wanted = module.double()(x.double())
    with coarse_linears(CPU):
        assert torch.equal(module(x.double()), wanted)


@torch.no_grad()
def test_a_large_bias_stays_whole(fast):
    module = torch.nn.Linear(8, 4)
    module.bias.fill_(1000.001)
    with coarse_linears(CPU):
        assert torch.equal(module(torch.zeros(1, 8)), module.bias[None])


def test_what_is_small_or_learns_is_not_coarse(monkeypatch):
    monkeypatch.setattr(dense, "bfloat16_is_fast", lambda: True)
    torch.manual_seed(0)
    module, x = torch.nn.Linear(64, 64), torch.randn(LEAST_COARSE // 64**2, 64)
    exact, fewer = module(x), module(x[1:])
    with coarse_linears(CPU):
        assert torch.equal(module(x), exact)  # gradients are on
        with torch.no_grad():
            assert not torch.equal(module(x), exact)
            assert torch.equal(module(x[1:]), fewer)
    module.requires_grad_(False)
    with coarse_linears(CPU):
        assert torch.equal(module(x.requires_grad_()), exact)


@pytest.mark.parametrize("weighted", [True, False])
def test_only_D_is_summed_coarsely(fast, weighted):
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 24, generator=g) for _ in range(3)]
    found = []
    for rough in (True, False):
        moments = Moments.zeros(24, drift=True, residual=8, weighted=weighted, coarse=rough)
        for xhat in parts:
            x = xhat + 0.05 * torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
            moments.add(xhat, x, (x - xhat)[:, :8], xhat[:, 0].square() if weighted else None)
        found.append(moments)
    rough, exact = found
    assert torch.equal(rough.H, exact.H) and torch.equal(rough.R, exact.R)
    error = float((rough.D - exact.D).norm() / exact.D.norm())
    assert 2**-11 < error < 2**-7 if fast else error < 1e-6
    assert rough.merge(rough).coarse and not exact.merge(exact).coarse
