"""The K-best sweep between its two ends: K = 1 is the sweep, K = all is exhaustive search."""

import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, inverse_root, problem, static_scales

from nearplane.core import beam
from nearplane.core.beam import beam_sweep
from nearplane.core.certificate import verify
from nearplane.core.factor import factorize
from nearplane.core.grid import Grid
from nearplane.core.sweep import sweep

ORDERS = ["natural", "activation", "pivot"]


def differing(a, b):
    return int((a.double() != b.double()).sum())


def same_certificate(a, b):
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(a.bound, b.bound, rtol=1e-12, atol=0)
    assert torch.equal(a.clipped, b.clipped)


def wide_scales(out, groups, seed=0):
    """Scales so coarse that 8 bits never clip a weight of size one: an unbounded lattice, as Babai has it."""
    g = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(out, groups, generator=g, dtype=torch.float64)
    return scale, torch.full_like(scale, 128.0)


def recount(p, grid, scales, order, codes):
    """Loss, bound and clipped codes of given codes, from U of the papers (``UᵀU = (H+λI)⁻¹``)."""
    n = p.W.shape[1]
    A = damped(p.H)
    U = inverse_root(A[order][:, order])
    Q = oracles.values(codes, scales, grid)
    W = p.W[:, order].clone()
    width = n if grid.group_size == -1 else grid.group_size
    least, greatest = (1, 3) if grid.bits == "ternary" else (0, 2**grid.bits - 1)
    loss, bound, clipped = W.new_zeros(len(W)), W.new_zeros(len(W)), torch.zeros(len(W), dtype=torch.long)
    for i, j in enumerate(order):
        s, z = scales[0][:, j // width], scales[1][:, j // width]
        free = (W[:, i] / s).round() + z
        clipped += (free < least) | (free > greatest)
        error = (W[:, i] - Q[:, j]) / U[i, i]
        W[:, i:] -= torch.outer(error, U[i, i:])
        loss += error**2
        bound += (s / U[i, i]) ** 2 / 4
    return loss, bound, clipped


# --- K = 1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits, sym", [(2, True), (3, False), ("ternary", True)])
@pytest.mark.parametrize("n, size", [(1, -1), (5, 3), (63, 16), (64, 64), (65, 32), (130, 48)])
def test_one_answer_is_the_sweep(order, bits, sym, n, size):
    p = problem(5, n, seed=n)
    grid = Grid(bits=bits, group_size=size, sym=sym)
    scales, factor = static_scales(p.W, grid), factorize(p.H, order=order)
    got, expected = beam_sweep(p.W, factor, grid, scales, 1), sweep(p.W, factor, grid, scales)
    assert differing(got.codes, expected.codes) == 0
    assert torch.equal(got.scale, expected.scale) and torch.equal(got.zero, expected.zero)
    same_certificate(got.certificate, expected.certificate)


def test_one_answer_rounds_ties_as_the_sweep():
    W = torch.tensor([[0.5, -0.5, 1.5]], dtype=torch.float64)
    grid, factor = Grid(bits=2, group_size=-1, sym=False), factorize(torch.eye(3, dtype=torch.float64))
    for zero in (0, 1, 2, 3):
        scales = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), float(zero), dtype=torch.float64)
        got, expected = beam_sweep(W, factor, grid, scales, 1), sweep(W, factor, grid, scales)
        assert differing(got.codes, expected.codes) == 0


# --- K = all ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits, sym", [(2, True), (2, False), ("ternary", True)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_all_answers_hold_the_exhaustive_optimum(order, bits, sym, n):
    grid = Grid(bits=bits, group_size=2, sym=sym)
    levels = [1, 2, 3] if bits == "ternary" else range(4)
    every = torch.tensor(list(itertools.product(levels, repeat=n)), dtype=torch.float64)
    improved = False
    for seed in range(3):
        p = problem(3, n, seed=seed)
        A, scales, factor = damped(p.H), static_scales(p.W, grid), factorize(p.H, order=order)
        got = beam_sweep(p.W, factor, grid, scales, len(every))
        greedy = beam_sweep(p.W, factor, grid, scales, 1)
        for r in range(3):
            row = tuple(part[r : r + 1].expand(len(every), -1) for part in scales)
            error = p.W[r] - oracles.values(every, row, grid)
            losses = ((error @ A) * error).sum(1)
            assert torch.equal(got.codes[r].double(), every[losses.argmin()])
            assert float(got.certificate.loss[r]) == pytest.approx(float(losses.min()), rel=1e-9)
        improved |= differing(got.codes, greedy.codes) > 0
    assert improved or n < 4  # keeping one answer is not enough somewhere


# --- between ------------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 80),
    out=st.integers(1, 5),
    size=st.sampled_from([-1, 5, 16, 64]),
    bits=st.sampled_from([2, 3, 4, "ternary"]),
    sym=st.booleans(),
    order=st.sampled_from(ORDERS),
    width=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_certificate_describes_the_answer(*, n, out, size, bits, sym, order, width, seed):
    p = problem(out, n, seed=seed)
    grid = Grid(bits=bits, group_size=size, sym=sym or bits == "ternary")
    scales, factor = static_scales(p.W, grid), factorize(p.H, order=order)
    got = beam_sweep(p.W, factor, grid, scales, width)
    least, greatest = (1, 3) if bits == "ternary" else (0, 2**bits - 1)
    assert least <= int(got.codes.min()) and int(got.codes.max()) <= greatest
    direct = oracles.loss(p.W, oracles.values(got.codes, scales, grid), damped(p.H))
    torch.testing.assert_close(got.certificate.loss, direct, rtol=1e-8, atol=1e-12)
    loss, bound, clipped = recount(p, grid, scales, factor.order.tolist(), got.codes)
    torch.testing.assert_close(got.certificate.loss, loss, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got.certificate.bound, bound, rtol=1e-8, atol=0)
    assert bool((got.certificate.clipped >= clipped).all())  # more where a better answer was given up for being clipped


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [2, 4, 5])
def test_no_answer_breaks_the_bound_of_an_unclipped_lattice(order, width):
    grid = Grid(bits=8, group_size=8)
    for seed in range(6):
        p = problem(20, 70, seed=seed)
        factor, scales = factorize(p.H, order=order), wide_scales(20, 9, seed)
        got = beam_sweep(p.W, factor, grid, scales, width).certificate
        assert int(got.clipped.sum()) == 0
        assert bool((got.loss <= got.bound * (1 + 1e-9)).all())
        verify(got)


def test_an_answer_that_avoids_a_clipped_one_is_no_bug():
    """The cheapest answer of the first column is clipped in the second, so the other wins: unclipped, above the bound."""
    W = torch.tensor([[0.0, 11.3]], dtype=torch.float64)
    H = torch.tensor([[2.0, 0.1], [0.1, 0.01]], dtype=torch.float64)  # d = 1, 0.01 and M[0, 1] = 10
    scales = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    got = beam_sweep(W, factorize(H, damp_percent=0.0), Grid(bits=2, group_size=-1), scales, 2)
    assert got.codes.tolist() == [[3, 3]]
    assert float(got.certificate.loss[0]) == pytest.approx(1.0009)
    assert float(got.certificate.loss[0]) > float(got.certificate.bound[0])
    verify(got.certificate)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3])
def test_more_answers_lose_less_on_average(order, bits):
    grid = Grid(bits=bits, group_size=16)
    total = dict.fromkeys((1, 4, 16), 0.0)
    for seed in range(4):
        p = problem(16, 70, seed=seed)
        factor, scales = factorize(p.H, order=order), static_scales(p.W, grid)
        for width in total:
            total[width] += float(beam_sweep(p.W, factor, grid, scales, width).certificate.loss.sum())
    assert total[16] < total[4] < total[1]


@pytest.mark.parametrize("panel", [1, 7, 16, 1000])
@pytest.mark.parametrize("order", ORDERS)
def test_panel_changes_no_code(panel, order, monkeypatch):
    p = problem(6, 130, seed=1)
    grid = Grid(bits=2, group_size=48)
    factor, scales = factorize(p.H, order=order), static_scales(p.W, grid)
    expected = beam_sweep(p.W, factor, grid, scales, 4)
    monkeypatch.setattr(beam, "PANEL", panel)
    got = beam_sweep(p.W, factor, grid, scales, 4)
    assert differing(got.codes, expected.codes) == 0
    same_certificate(got.certificate, expected.certificate)


def test_rows_are_solved_on_their_own():
    p = problem(6, 70, seed=2)
    grid = Grid(bits=2, group_size=16, sym=False)
    factor, scales = factorize(p.H, order="activation"), static_scales(p.W, grid)
    whole = beam_sweep(p.W, factor, grid, scales, 4)
    for r in range(6):
        row = beam_sweep(p.W[r : r + 1], factor, grid, tuple(part[r : r + 1] for part in scales), 4)
        assert differing(row.codes, whole.codes[r : r + 1]) == 0


def test_inputs_are_left_alone():
    p = problem(4, 70, seed=2)
    grid = Grid(bits=2, group_size=16)
    factor, scales = factorize(p.H, order="pivot"), static_scales(p.W, grid)
    given_before = [t.clone() for t in (p.W, *factor[:3], *scales)]
    beam_sweep(p.W, factor, grid, scales, 3)
    assert all(map(torch.equal, given_before, (p.W, *factor[:3], *scales)))
