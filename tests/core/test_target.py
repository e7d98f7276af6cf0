"""The exact target against dense least squares on the tokens themselves, and its shrinkage against a scan."""

from typing import NamedTuple

import pytest
import torch
from oracles import column_order, problem, refit_rest, static_scales

from nearplane.core.factor import factorize
from nearplane.core.grid import Grid
from nearplane.core.sweep import sweep
from nearplane.core.target import full_step, pull, shrinkage

ORDERS = ["natural", "activation", "pivot"]
TINY = 1e-12  # damping that leaves plain least squares


class Layer(NamedTuple):
    """One layer: weight, both streams and the drift of the residual stream, tokens in columns."""

    W: torch.Tensor
    Xhat: torch.Tensor
    X: torch.Tensor
    R: torch.Tensor

    def moment(self, left):
        return left @ self.Xhat.T / self.Xhat.shape[1]

    @property
    def H(self):
        return self.moment(self.Xhat)

    @property
    def D(self):
        return self.moment(self.X - self.Xhat)

    def pull(self):
        return pull(self.W, self.D, self.moment(self.R))

    def loss(self, Q):
        """``‖Q X̂ - W X - R‖²`` per token, of each row."""
        return (Q @ self.Xhat - self.W @ self.X - self.R).square().sum(1) / self.Xhat.shape[1]


def layer(out=4, n=12, *, seed=0, **settings):
    p = problem(out, n, seed=seed, **settings)
    g = torch.Generator().manual_seed(1000 + seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return Layer(p.W, p.Xhat, p.X, draw(out, n) @ p.Xhat / n + draw(out, p.Xhat.shape[1]))


def split(full, first):
    """The same weight on the first tokens and on the others."""
    return tuple(
        Layer(full.W, full.Xhat[:, part], full.X[:, part], full.R[:, part])
        for part in (slice(first), slice(first, None))
    )


def damp_of(H, percent=0.01):
    return percent * float(H.diagonal().mean())


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("drift, residual", [(True, True), (True, False), (False, True)])
def test_step_is_the_dense_formula(order, n, drift, residual):
    x = layer(n=n, seed=n)
    tokens = x.Xhat.shape[1]
    dense = torch.zeros_like(x.W)
    for t in range(tokens):
        left = (x.W @ (x.X[:, t] - x.Xhat[:, t]) if drift else 0) + (x.R[:, t] if residual else 0)
        dense += torch.outer(left, x.Xhat[:, t]) / tokens
    got = pull(x.W, x.D if drift else None, x.moment(x.R) if residual else None)
    torch.testing.assert_close(got, dense, rtol=1e-10, atol=1e-12)
    inverse = torch.linalg.inv(x.H + damp_of(x.H) * torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(full_step(got, factorize(x.H, order=order)), dense @ inverse, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_full_step_solves_the_least_squares_problem(order):
    x = layer(seed=3)
    step = full_step(x.pull(), factorize(x.H, order=order, damp_percent=TINY))
    best = torch.linalg.lstsq(x.Xhat.T, (x.W @ x.X + x.R).T, driver="gelsd").solution.T
    torch.testing.assert_close(x.W + step, best, rtol=1e-7, atol=1e-9)
    assert bool((x.loss(x.W + step) < x.loss(x.W)).all())


def test_no_drift_is_no_step():
    x = layer()
    factor = factorize(x.H, order="pivot")
    for D in (None, torch.zeros_like(x.H)):
        for R in (None, torch.zeros_like(x.W)):
            asked = pull(x.W, D, R)
            assert asked.shape == x.W.shape and not asked.any()
            assert not full_step(asked, factor).any()


def test_inputs_are_left_alone():
    x = layer()
    D, R, factor = x.D, x.moment(x.R), factorize(x.H, order="activation")
    asked = pull(x.W, D, R)
    step = full_step(asked, factor)
    H = x.H
    given = (x.W, D, R, asked, step, H, *factor[:3])
    before = [t.clone() for t in given]
    pull(x.W, None, R)
    pull(x.W, D, R)
    full_step(asked, factor)
    shrinkage(step, asked, H, by_row=True)
    shrinkage(step, asked, H, by_row=False)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("percent", [TINY, 0.01, 0.3])
def test_completing_the_square(order, percent):
    x = layer(seed=5)
    damp = damp_of(x.H, percent)
    A = x.H + damp * torch.eye(len(x.H), dtype=torch.float64)
    target = x.W + full_step(x.pull(), factorize(x.H, order=order, damp_percent=percent))
    constant = x.loss(target) + damp * (target - x.W).square().sum(1)
    for seed in range(3):
        Q = torch.randn(x.W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        square = ((Q - target) @ A * (Q - target)).sum(1)
        asked = x.loss(Q) + damp * (Q - x.W).square().sum(1)
        torch.testing.assert_close(square + constant, asked, rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_sweep_on_the_target_is_asymmetric_least_squares(order):
    """Identity 4 with the residual term: after each rounded column the others are the dense optimum."""
    x = layer(n=20, seed=2)
    damp, grid = damp_of(x.H), Grid(bits=3, group_size=8)
    factor = factorize(x.H, order=order)
    target = x.W + full_step(x.pull(), factor)
    scales = static_scales(target, grid)
    root = x.Xhat.shape[1] ** 0.5
    ridge = damp**0.5 * torch.eye(20, dtype=torch.float64)
    expected = refit_rest(
        torch.cat([x.Xhat.T / root, ridge]),
        torch.cat([(x.W @ x.X + x.R).T / root, ridge @ x.W.T]),
        grid,
        column_order(x.H + damp * torch.eye(20, dtype=torch.float64), order),
        scales,
    )
    assert int((sweep(target, factor, grid, scales).codes.double() != expected).sum()) == 0
    # Without the residual term it is another problem, or this says nothing about it.
    other = x.W + full_step(pull(x.W, x.D, None), factor)
    assert int((sweep(other, factor, grid, scales).codes.double() != expected).sum()) > 0


# --- the share of it that held-out tokens want --------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [True, False])
def test_shrinkage_is_the_least_held_out_loss(by_row):
    shares = torch.linspace(0, 1, 2001, dtype=torch.float64)
    seen = []
    for seed in range(8):
        # Few tokens, and a little drift under much noise: shares from none to all of the step.
        fitted, held = split(layer(6, 10, seed=seed, tokens=40), 24)
        step = full_step(fitted.pull(), factorize(fitted.H)) * (0.5 if seed % 2 else 2)
        alpha = shrinkage(step, held.pull(), held.H, by_row=by_row)
        assert alpha.shape == (6 if by_row else 1, 1)
        assert bool(((alpha >= 0) & (alpha <= 1)).all())
        scan = torch.stack([held.loss(held.W + a * step) for a in shares])
        scan = scan if by_row else scan.sum(1, keepdim=True)
        assert float((alpha[:, 0] - shares[scan.argmin(0)]).abs().max()) <= 0.5 / 2000 + 1e-9
        at = held.loss(held.W + alpha * step)
        assert bool(((at if by_row else at.sum(0, keepdim=True)) <= scan.amin(0) * (1 + 1e-12)).all())
        seen += alpha.flatten().tolist()
    assert sum(0.01 < a < 0.99 for a in seen) >= 2 and 1.0 in seen and (not by_row or 0.0 in seen)


@pytest.mark.parametrize("by_row", [True, False])
def test_no_step_is_taken_against_the_held_out_pull(by_row):
    x = layer(seed=6)
    step = full_step(x.pull(), factorize(x.H))
    assert bool((shrinkage(step, x.pull(), x.H, by_row=by_row) > 0.9).all())
    assert not shrinkage(step, -x.pull(), x.H, by_row=by_row).any()


def test_rows_decide_for_themselves():
    x = layer(seed=6)
    signs = torch.tensor([1, -1, 1, -1], dtype=torch.float64)[:, None]
    alpha = shrinkage(full_step(x.pull(), factorize(x.H)), signs * x.pull(), x.H, by_row=True)
    assert (alpha[:, 0] > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("by_row", [True, False])
def test_where_nothing_is_measured_no_step_is_taken(by_row):
    x = layer(seed=6)
    step = full_step(x.pull(), factorize(x.H))
    assert not shrinkage(step, x.pull(), torch.zeros_like(x.H), by_row=by_row).any()
    assert not shrinkage(torch.zeros_like(step), x.pull(), x.H, by_row=by_row).any()
    step[1] = 0
    alpha = shrinkage(step, x.pull(), x.H, by_row=by_row)
    assert bool(alpha.isfinite().all())
    assert not by_row or ((alpha[:, 0] > 0).tolist() == [True, False, True, True])


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_step_fitted_to_noise_is_shrunk_away(by_row, seed):
    n, tokens = 48, 40  # fewer tokens than inputs, and a drift that no weight can follow
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    W, mix = draw(6, n), torch.eye(n, dtype=torch.float64) + draw(n, n) / n**0.5

    def sample(count):
        Xhat = mix @ draw(n, count)
        return Layer(W, Xhat, Xhat + 0.5 * draw(n, count), 0.5 * draw(6, count))

    fitted, held = split(sample(tokens), 30)
    fresh = sample(5000)
    step = full_step(fitted.pull(), factorize(fitted.H))
    alpha = shrinkage(step, held.pull(), held.H, by_row=by_row)
    none, shrunk, full = (float(fresh.loss(W + share * step).sum()) for share in (0.0, alpha, 1.0))
    assert full > 1.2 * none  # the trap is set
    assert shrunk < 0.5 * full
    assert shrunk < (1.15 if by_row else 1.05) * none  # a row alone hears the noise of ten tokens


def test_a_step_that_holds_is_taken():
    full = layer(6, 24, seed=1, tokens=6000)
    fitted, held = split(full, 3000)
    step = full_step(fitted.pull(), factorize(fitted.H, damp_percent=1e-4))
    alpha = shrinkage(step, held.pull(), held.H, by_row=False)
    assert float(alpha) > 0.9
    assert float(held.loss(held.W + alpha * step).sum()) < 0.9 * float(held.loss(held.W).sum())
