"""What a trial says of its rows against the tokens themselves, and against sweeps that were really made."""

from dataclasses import replace

import oracles
import pytest
import torch
from layers import draw, layer

from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, Quantized, dequantize, fit_groups
from nearplane.core.heldout import Trial
from nearplane.core.moments import Moments
from nearplane.core.sweep import sweep

ORDERS = ["natural", "activation", "pivot"]
GRIDS = [Grid(bits=3, group_size=7, sym=False), Grid(bits=2, group_size=-1), Grid(bits="ternary", group_size=8)]


def inverse_feedback(A, order):
    """``T⁻¹`` of ``A = T diag(d) Tᵀ`` in solve order, from the U of the papers."""
    perm = oracles.column_order(A, order)
    U = oracles.inverse_root(A[perm][:, perm])
    return perm, U / U.diagonal()[:, None]


@pytest.mark.parametrize("out, rows, taken", [(6, 256, 6), (6, 6, 6), (10, 4, 4), (10, 9, 5), (9, 1, 1), (1, 4, 1)])
@pytest.mark.parametrize("residual", [False, True])
def test_its_rows_and_what_tokens_ask_of_them(out, rows, taken, residual):
    m = layer(out, 12, 40, residual=residual)
    trial = Trial(m.W, m.moments, rows)
    every = range(out)[trial.rows]
    assert len(every) == taken <= rows and len(set(torch.diff(torch.tensor(every)).tolist())) <= 1
    assert torch.equal(trial.weight, m.W[list(every)])
    H, pull = m.dense(m.held)
    torch.testing.assert_close(trial.H, H)
    torch.testing.assert_close(trial.pull, pull[list(every)])
    torch.testing.assert_close(trial.fit_pull(), m.dense(~m.held)[1][list(every)])


def test_without_drift_nothing_is_asked():
    m = layer(4, 12, 40)
    whole = m.moments
    held = Moments(whole.held_out().H, None, whole.held_out().tokens)
    trial = Trial(m.W, Moments(whole.H, None, whole.tokens, held=held), 4)
    assert not trial.pull.any() and not trial.fit_pull().any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_the_error_of_rounding_to_nearest(grid):
    m = layer(20, 20, 40)
    rows = m.W[::2][::4]  # ten rows are on trial, every fourth of them is rounded
    scales = oracles.static_scales(rows, replace(grid, fit="minmax"))
    nearest = oracles.values(oracles.rtn(rows, grid, scales), scales, grid)
    got = Trial(m.W, m.moments, 10).rounding(grid)
    torch.testing.assert_close(got, nearest - rows)
    assert bool(got.any())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("percent", [0.001, 0.01, 0.3])
def test_spread_is_that_of_the_explicit_inverse(order, percent):
    m = layer(6, 24, 80)
    trial, errors = Trial(m.W, m.moments, 6), draw(9, 6, 24)
    H = m.dense(~m.held)[0]
    perm, inverse = inverse_feedback(oracles.damped(H, percent), order)
    error = torch.empty_like(errors)
    error[:, perm] = errors[:, perm] @ inverse
    before = errors.clone()
    got = trial.spread(errors, factorize(H, order=order, damp_percent=percent))
    assert got == pytest.approx(float((m.xhat[m.held] @ error.T).square().sum(1).mean()))
    assert torch.equal(errors, before)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_spread_is_the_held_out_loss_of_a_sweep_that_clips_nothing(order, seed):
    """What a sweep leaves in the weight is ``ε T⁻¹``, ε what it rounded off column by column."""
    m, grid = layer(6, 24, 80, seed=seed), Grid(bits=8, group_size=8)
    H = m.moments.fit("H")
    factor = factorize(H, order=order)
    scale, zero = fit_groups(m.W, replace(grid, fit="minmax"))
    solved = sweep(m.W, factor, grid, (10 * scale, zero))
    assert not solved.certificate.clipped.any()
    error = dequantize(solved, grid) - m.W
    perm, inverse = inverse_feedback(oracles.damped(H), order)
    rounded_off = torch.empty_like(error)
    rounded_off[:, perm] = error[:, perm] @ torch.linalg.inv(inverse)
    width = torch.arange(24) // 8
    step = 10 * scale.abs()[:, width]
    assert bool((rounded_off.abs() <= 0.5000001 * step).all())  # half a step: nothing but rounding is in it
    assert bool((rounded_off.abs() > 0.3 * step).any())
    m.x = m.xhat  # the loss of the error alone
    expected = m.loss(solved, grid, m.held)
    assert Trial(m.W, m.moments, 6).spread(rounded_off, factor) == pytest.approx(expected)
    assert Trial(m.W, m.moments, 6).losses(solved, grid)[0] == pytest.approx(expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [256, 4])
def test_loss_is_that_of_the_held_out_tokens(residual, rows):
    m = layer(8, 20, 60, residual=residual)
    trial = Trial(m.W, m.moments, rows)
    grid = Grid(bits=3, group_size=8, sym=False)
    scale, zero = fit_groups(m.W, grid)
    codes = torch.randint(0, 8, (8, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    solved = Quantized(codes, scale, zero.to(torch.uint8))
    Q = m.W.clone()  # rows that are not tried cost nothing
    Q[trial.rows] = dequantize(solved, grid)[trial.rows]
    expected = m.loss_of(Q, m.held) - m.loss_of(m.W, m.held)
    assert trial.losses(solved, grid)[0] == pytest.approx(expected)
    assert trial.losses(solved.rows(trial.rows), grid)[0] == pytest.approx(expected)


def two_texts(out=8, n=20, tokens=120, seed=0, residual=False):
    """A layer whose held-out tokens are of two texts; which they are; and its moments."""
    m = layer(out, n, tokens, seed, residual)
    first = m.held & (torch.arange(tokens) % 8 == 3)
    texts = [first, m.held & ~first]
    return m, texts, m.part(~m.held).join(*map(m.part, texts))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [256, 4])
def test_each_text_has_a_loss_of_its_own(residual, rows):
    m, texts, moments = two_texts(residual=residual)
    trial, grid = Trial(m.W, moments, rows), Grid(bits=3, group_size=8, sym=False)
    Q = m.W.clone()
    solved = sweep(m.W, factorize(moments.H), grid, fit_groups(m.W, grid))
    Q[trial.rows] = dequantize(solved, grid)[trial.rows]
    expected = [m.loss_of(Q, text) - m.loss_of(m.W, text) for text in texts]
    assert trial.losses(solved, grid) == pytest.approx(expected) and expected[0] != pytest.approx(expected[1])
    torch.testing.assert_close(trial.H, m.dense(m.held)[0])  # the whole judges dampings, and proposes shares
    torch.testing.assert_close(moments.H, m.dense(m.held | ~m.held)[0])


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_confirmed_as_far_as_every_text_gains(by_row, seed):
    m, texts, moments = two_texts(seed=seed)
    trial = Trial(m.W, moments, 8)
    step = 1.5 * (trial.fit_pull() @ torch.linalg.inv(moments.fit("H")))
    share = trial.confirmed(step, by_row=by_row)
    rows = range(8) if by_row else [slice(None)]
    for row in rows:
        part = torch.zeros_like(step)
        part[row] = step[row]
        own = float(share[row].max() if by_row else share)
        best = []
        for text in texts:
            scan = torch.linspace(0, 1, 401, dtype=torch.float64)
            losses = [m.loss_of(m.W + a * part, text) for a in scan]
            best.append(float(scan[losses.index(min(losses))]))
        assert own == pytest.approx(min(best), abs=0.0026)
    assert 0 < float(share.max()) < 1
    assert torch.equal(Trial(m.W, m.moments, 8).confirmed(step), torch.ones(1, 1, dtype=torch.float64))  # one text


def test_a_text_that_nothing_is_held_out_of_does_not_judge():
    m, texts, _ = two_texts()
    moments = m.part(~m.held).join(m.part(texts[0]), m.part(texts[1] & ~m.held))
    assert Trial(m.W, moments, 8).sources == [] and moments.held.tokens == int(texts[0].sum())
