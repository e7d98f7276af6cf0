"""Identities of docs/method.md, sections 8 and 9, that tie the published matrices to the factor."""

import pytest
import torch
from oracles import problem

from nearplane import GPTAQ, GPTQ, Grid, Moments, ResComp
from nearplane.core.factor import factorize
from nearplane.core.grid import encode, fit_groups
from nearplane.methods.gptaq import drift_push

GRID = Grid(bits=3, group_size=32, sym=False, fit="mse")


def parts(order: str = "natural"):
    p = problem(5, 96, seed=11)
    factor = factorize(p.H, order=order, damp_percent=0.01)
    D = p.D[factor.order[:, None], factor.order]
    T = factor.feedback + torch.eye(96, dtype=torch.float64)
    S = (D @ torch.linalg.inv(T).T).triu(1) / factor.pivots
    return p, factor, T, S


@pytest.mark.parametrize("order", ["natural", "activation", "pivot"])
def test_push_times_factor_needs_one_solve_less(order):
    p, factor, T, S = parts(order)
    torch.testing.assert_close(drift_push(factor, p.D) @ T, S, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ["natural", "activation", "pivot"])
def test_damping_of_the_hessian_in_rescomps_numerator_cancels(order):
    p, factor, T, S = parts(order)
    undamped = drift_push(factor, p.D + p.H)
    damped = drift_push(factor, p.D + p.H + factor.damp * torch.eye(96, dtype=torch.float64))
    torch.testing.assert_close(undamped, damped, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(undamped @ T, S + factor.feedback, rtol=1e-8, atol=1e-10)
    alone = torch.eye(96, dtype=torch.float64) - torch.linalg.inv(T)
    torch.testing.assert_close(drift_push(factor, p.H), alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "alpha", "alpha2"),
    [(GPTQ(), 0.0, 0.0), (GPTAQ(alpha=0.4), 0.4, 0.0), (ResComp(alpha=0.3, alpha2=0.6), 0.3, 0.6)],
    ids=str,
)
def test_all_sweeping_methods_are_one_recurrence(method, alpha, alpha2):
    """V = W + E M + alpha V S + alpha2 (W - V)(S + M), column by column."""
    p, factor, _, S = parts("activation")
    moments = Moments(p.H, p.D if "D" in method.needs else None, tokens=1)
    got = method.solve(p.W, method.prepare(moments), GRID)
    scale, zero = (x[:, factor.order // 32] for x in fit_groups(p.W, GRID))
    W, M = p.W[:, factor.order], factor.feedback
    V, E, codes = torch.zeros_like(W), torch.zeros_like(W), torch.zeros_like(W)
    for j in range(96):
        V[:, j] = W[:, j] + E @ M[:, j] + alpha * V @ S[:, j] + alpha2 * (W - V)[:, :j] @ (S + M)[:j, j]
        codes[:, j] = encode(V[:, j], scale[:, j], zero[:, j], GRID)
        E[:, j] = W[:, j] - scale[:, j] * (codes[:, j] - zero[:, j])
    assert torch.equal(got.codes[:, factor.order].double(), codes)
