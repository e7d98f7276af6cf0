"""The exact target against dense least squares on the tokens, and what held-out tokens take of it."""

from typing import NamedTuple

import pytest
import torch
from oracles import column_order, damped, problem, refit_rest, static_scales

from nearplane.core.factor import factorize
from nearplane.core.grid import Grid
from nearplane.core.sweep import sweep
from nearplane.core.target import full_step, mixed_step, pull, row_shares, shares

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

    @property
    def behind(self):
        """Drift of the stream behind the linear."""
        return self.W @ (self.X - self.Xhat) + self.R

    def pull(self):
        return pull(self.W, None, self.moment(self.behind))

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
    got = pull(x.W, x.D if drift else None, x.moment(x.behind if drift else x.R) if residual else None)
    torch.testing.assert_close(got, dense, rtol=1e-10, atol=1e-12)
    inverse = torch.linalg.inv(x.H + damp_of(x.H) * torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(full_step(got, factorize(x.H, order=order)), dense @ inverse, rtol=1e-8, atol=1e-10)


def share(value, rows=1):
    """One share, or one for each of ``rows``."""
    return value * torch.linspace(1, 2, rows, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("out, n", [(4, 12), (12, 12), (13, 12), (40, 12), (1, 1), (3, 1)])
@pytest.mark.parametrize("percents", [(0.01,), (0.0, 0.3), (0.01, 0.3, 10.0)])
@pytest.mark.parametrize("by_row", ["none", "first", "last", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mixed_step_is_the_dense_formula(out, n, percents, by_row, dtype):
    """Few rows and many, which take different ways."""
    x = layer(out, n, seed=n)
    asked, H, last = x.pull(), x.H, len(percents) - 1
    mix, expected = {}, torch.zeros_like(asked)
    for k, percent in enumerate(percents):
        own = by_row == "all" or (by_row == "first" and k == 0) or (by_row == "last" and k == last)
        mix[percent] = share((-1) ** k * 0.7 / (k + 1), out if own else 1)
        expected += mix[percent] * (asked @ torch.linalg.inv(damped(H, percent)))
    given = [t.to(dtype) for t in (asked, H, *mix.values())]
    before = [t.clone() for t in given]
    got, raised = mixed_step(given[0], given[1], dict(zip(mix, given[2:], strict=True)))
    assert raised == 0
    assert all(map(torch.equal, given, before))
    assert got.dtype == dtype and got.is_contiguous()
    close = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(got.double(), expected, **close)


@pytest.mark.parametrize("out", [2, 30])
def test_an_empty_mix_is_no_step(out):
    x = layer(out)
    asked = x.pull()
    got, _ = mixed_step(asked, x.H, {})
    assert torch.equal(got, torch.zeros_like(asked)) and got.data_ptr() != asked.data_ptr()


@pytest.mark.parametrize("out", [2, 30])
def test_a_mixed_step_raises_its_damping_where_it_must(out):
    H = torch.eye(8, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05  # eigenvalue -0.05: damping 0.01 is too little, 0.1 is enough
    asked = layer(out, 8).pull()
    got, raised = mixed_step(asked, H, {0.01: share(0.5)})
    assert raised == 1
    torch.testing.assert_close(got, 0.5 * (asked @ torch.linalg.inv(damped(H, 0.1))))


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
    D, R, factor = x.D, x.moment(x.behind), factorize(x.H, order="activation")
    asked = pull(x.W, D, R)
    step = full_step(asked, factor)
    H = x.H
    given = (x.W, D, R, asked, step, H, *factor[:3])
    before = [t.clone() for t in given]
    pull(x.W, None, R)
    pull(x.W, D, R)
    full_step(asked, factor)
    row_shares(step, asked, H)
    shares([step, step + asked], asked, H)
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


def spectrum(x, percents=(0.01, 0.3, 10.0)):
    """The step with several dampings: from all directions of the input to the strongest alone."""
    return [full_step(x.pull(), factorize(x.H, damp_percent=percent)) for percent in percents]


def mixed(steps, parts):
    return sum(part * step for part, step in zip(parts, steps, strict=True))


def test_one_share_is_the_least_held_out_loss():
    scan = torch.linspace(0, 3, 3001, dtype=torch.float64)
    seen = []
    for seed in range(12):
        fitted, held = split(layer(2, 10, seed=seed, tokens=40), 24)
        step = full_step(fitted.pull(), factorize(fitted.H)) * (0.5 if seed % 3 else -1)
        (share,) = shares([step], held.pull(), held.H)
        losses = torch.stack([held.loss(held.W + a * step).sum() for a in scan])
        assert abs(share - float(scan[losses.argmin()])) <= 0.5e-3 + 1e-9
        assert float(held.loss(held.W + share * step).sum()) <= float(losses.min()) * (1 + 1e-12)
        seen.append(share)
    assert 0.0 in seen and any(0.05 < share < 1 for share in seen) and any(1 < share < 3 for share in seen)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_several_shares_are_the_least_together(count):
    """On the tokens: a share above 0 has no slope left, one at 0 could only grow the loss."""
    taken = set()
    for seed in range(30):
        fitted, held = split(layer(3, 12, seed=seed, tokens=48), 30)
        steps = spectrum(fitted, (0.001, 0.1, 1.0, 0.3)[:count])
        steps[-1] = steps[-1] * (1 if seed % 2 else -1)  # one that some layers do not want
        parts = shares(steps, held.pull(), held.H)
        assert len(parts) == count and min(parts) >= 0
        missed = (held.W + mixed(steps, parts)) @ held.Xhat - held.W @ held.X - held.R
        for step, part in zip(steps, parts, strict=True):
            image = step @ held.Xhat
            slope = float((missed * image).sum() / (missed.norm() * image.norm()))
            assert abs(slope) < 1e-9 if part > 0 else slope > -1e-9
        taken.add(sum(part > 0 for part in parts))
    assert {1, 2} <= taken if count > 1 else taken == {0, 1}


def test_row_shares_are_the_least_held_out_loss_within_the_step():
    scan = torch.linspace(0, 1, 2001, dtype=torch.float64)
    seen = []
    for seed in range(8):
        fitted, held = split(layer(6, 10, seed=seed, tokens=40), 24)
        step = full_step(fitted.pull(), factorize(fitted.H)) * (0.5 if seed % 2 else 2)
        share = row_shares(step, held.pull(), held.H)
        assert share.shape == (6, 1) and bool(((share >= 0) & (share <= 1)).all())
        losses = torch.stack([held.loss(held.W + a * step) for a in scan])
        assert float((share[:, 0] - scan[losses.argmin(0)]).abs().max()) <= 0.5 / 2000 + 1e-9
        assert bool((held.loss(held.W + share * step) <= losses.amin(0) * (1 + 1e-12)).all())
        seen += share.flatten().tolist()
    assert sum(0.01 < a < 0.99 for a in seen) >= 2 and 1.0 in seen and 0.0 in seen


def test_no_step_is_taken_against_the_held_out_pull():
    x = layer(seed=6)
    steps = spectrum(x)
    assert bool((row_shares(steps[0], x.pull(), x.H) > 0.9).all())
    assert not row_shares(steps[0], -x.pull(), x.H).any()
    assert sum(shares(steps, x.pull(), x.H)) > 0.9
    assert shares(steps, -x.pull(), x.H) == [0.0, 0.0, 0.0]


def test_rows_decide_for_themselves():
    x = layer(seed=6)
    signs = torch.tensor([1, -1, 1, -1], dtype=torch.float64)[:, None]
    share = row_shares(full_step(x.pull(), factorize(x.H)), signs * x.pull(), x.H)
    assert (share[:, 0] > 0).tolist() == [True, False, True, False]


def test_where_nothing_is_measured_no_step_is_taken():
    x = layer(seed=6)
    step = full_step(x.pull(), factorize(x.H))
    nothing, none = torch.zeros_like(x.H), torch.zeros_like(step)
    assert not row_shares(step, x.pull(), nothing).any() and not row_shares(none, x.pull(), x.H).any()
    assert shares([step, 2 * step], x.pull(), nothing) == [0.0, 0.0]
    part, other = shares([step, none], x.pull(), x.H)
    assert part > 0.9 and other == 0
    step[1] = 0
    assert (row_shares(step, x.pull(), x.H)[:, 0] > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-12, 1e-7])
def test_steps_that_say_the_same_share_one_share(dtype, apart):
    x = layer(seed=6)
    step = full_step(x.pull(), factorize(x.H))
    noise = torch.randn(step.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = [step, 0.5 * step + apart * noise, 2 * step]
    (alone,) = shares([step], x.pull(), x.H)
    parts = shares([s.to(dtype) for s in steps], x.pull().to(dtype), x.H.to(dtype))
    assert min(parts) >= 0
    best, mine = (float(x.loss(x.W + s).sum()) for s in (alone * step, mixed(steps, parts)))
    assert mine == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_fitted_to_noise_is_shrunk_away(seed):
    n, tokens = 48, 40  # fewer tokens than inputs, and a drift that no weight can follow
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    W, mix = draw(6, n), torch.eye(n, dtype=torch.float64) + draw(n, n) / n**0.5

    def sample(count):
        Xhat = mix @ draw(n, count)
        return Layer(W, Xhat, Xhat + 0.5 * draw(n, count), 0.5 * draw(6, count))

    fitted, held = split(sample(tokens), 30)
    fresh = sample(5000)
    steps = spectrum(fitted)
    loss = lambda step: float(fresh.loss(W + step).sum())  # noqa: E731
    none, full = loss(torch.zeros_like(W)), loss(steps[0])
    assert full > 2 * none  # the trap is set
    judge = held.pull(), held.H
    for shrunk, slack in (
        (mixed(steps[:1], shares(steps[:1], *judge)), 1.05),
        (mixed(steps, shares(steps, *judge)), 1.1),
        (row_shares(steps[0], *judge) * steps[0], 1.15),  # a row alone hears the noise of ten tokens
    ):
        assert loss(shrunk) < 0.5 * full and loss(shrunk) < slack * none


def test_a_step_that_holds_is_taken():
    fitted, held = split(layer(6, 24, seed=1, tokens=6000), 3000)
    step = full_step(fitted.pull(), factorize(fitted.H, damp_percent=1e-4))
    (share,) = shares([step], held.pull(), held.H)
    assert 0.9 < share < 1.1
    assert float(held.loss(held.W + share * step).sum()) < 0.9 * float(held.loss(held.W).sum())
