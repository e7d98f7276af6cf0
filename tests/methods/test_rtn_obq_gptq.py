"""RTN, OBQ and GPTQ against the oracles, through the interface that users call."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import column_order, damped, problem, published, static_scales

from nearplane.core.grid import Grid
from nearplane.methods import GPTQ, OBQ, RTN


def solve(method, p, grid):
    return method.solve(p.W, method.prepare(p.moments), grid)


def differing(a, b):
    return int((a.to(torch.float64) != b.to(torch.float64)).sum())


def per_column(scales, n, grid):
    group = torch.arange(n) // (n if grid.group_size == -1 else grid.group_size)
    return scales[0][:, group], scales[1][:, group]


@given(
    n=st.integers(1, 40),
    size=st.sampled_from([-1, 1, 7, 16, 64]),
    bits=st.sampled_from([2, 3, 4, 8, "ternary"]),
    sym=st.booleans(),
    how=st.sampled_from(["minmax", "mse"]),
)
def test_rtn_rounds_every_weight(n, size, bits, sym, how):
    p = problem(3, n, seed=n)
    grid = Grid(bits=bits, group_size=size, sym=sym or bits == "ternary", fit=how)
    scales = static_scales(p.W, grid)
    got = solve(RTN(), p, grid)
    assert differing(got.codes, oracles.rtn(p.W, grid, scales)) == 0
    assert torch.equal(got.scale, scales[0]) and torch.equal(got.zero.double(), scales[1])
    assert got.certificate is None


@pytest.mark.parametrize("how", ["mse", "hessian"])
@pytest.mark.parametrize("options", [{"order": o} for o in ("natural", "activation", "pivot")], ids=str)
@pytest.mark.parametrize("size", [-1, 64, 100])
def test_gptq_with_static_groups(how, options, size):
    p = problem(6, 200, seed=1)
    grid = Grid(bits=3, group_size=size, sym=False, fit=how)
    A = damped(p.H, 0.05)
    importance = oracles.column_cost(p.H, A, options["order"]) if how == "hessian" else None
    scales = static_scales(p.W, grid, importance)
    expected = published(p.W, A, grid, order=column_order(A, options["order"]), scales=scales)
    got = solve(GPTQ(damp_percent=0.05, **options), p, grid)
    assert differing(got.codes, expected.codes) == 0
    assert int(got.certificate.clipped.sum()) == expected.clipped


@pytest.mark.parametrize("how", ["mse", "hessian"])
@pytest.mark.parametrize("size", [-1, 32, 100, 128, 160])
def test_gptq_with_dynamic_groups(how, size):
    p = problem(6, 300, seed=1)
    grid = Grid(bits=2, group_size=size, fit=how)
    importance = oracles.column_cost(p.H, damped(p.H)) if how == "hessian" else None
    # Any block: only a group that begins inside one and ends in the next would read stale columns there.
    block = size if size > 0 else 300
    expected = published(p.W, damped(p.H), grid, importance=importance, block=block)
    got = solve(GPTQ(order="natural", static_groups=False), p, grid)
    assert differing(got.codes, expected.codes) == 0


@pytest.mark.parametrize("order", ["natural", "activation", "pivot"])
def test_identity_hessian_makes_gptq_and_obq_plain_rounding(order):
    p = problem(5, 40)._replace(H=torch.eye(40, dtype=torch.float64))
    grid = Grid(bits=3, group_size=16, fit="mse")
    expected = solve(RTN(), p, grid)
    for method in (GPTQ(order=order), OBQ()):
        got = solve(method, p, grid)
        assert differing(got.codes, expected.codes) == 0 and torch.equal(got.scale, expected.scale)


def test_a_diagonal_hessian_feeds_nothing_back():
    p = problem(5, 40)
    p = p._replace(H=p.H.diagonal().diag())
    grid = Grid(bits=3, group_size=16, fit="mse")
    for method in (GPTQ(), OBQ(), GPTQ(order="natural", static_groups=False)):
        assert differing(solve(method, p, grid).codes, solve(RTN(), p, grid).codes) == 0


# --- OBQ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, size, bits", [(1, -1, 2), (5, 2, 2), (10, 4, 3), (12, -1, 4), (14, 5, "ternary")])
@pytest.mark.parametrize("how", ["mse", "hessian"])
def test_obq_matches_dense_least_squares_at_every_step(n, size, bits, how):
    p = problem(5, n, seed=n)
    grid = Grid(bits=bits, group_size=size, fit=how)
    A = damped(p.H)
    scales = static_scales(p.W, grid, oracles.column_cost(p.H, A) if how == "hessian" else None)
    scale, zero = per_column(scales, n, grid)
    got = solve(OBQ(), p, grid)
    assert torch.equal(got.scale, scales[0]) and torch.equal(got.zero.double(), scales[1])
    for r in range(5):
        codes, _ = oracles.obq(p.W[r], A, grid, scale[r], zero[r])
        assert differing(got.codes[r], codes) == 0


@pytest.mark.parametrize("order", ["natural", "activation", "pivot"])
def test_obq_in_a_fixed_order_is_the_sweep(order):
    p = problem(4, 12, seed=3)
    grid = Grid(bits=3, group_size=4, fit="mse")
    A = damped(p.H)
    perm = column_order(A, order)
    scale, zero = per_column(static_scales(p.W, grid), 12, grid)
    got = solve(GPTQ(order=order), p, grid)
    for r in range(4):
        codes, _ = oracles.obq(p.W[r], A, grid, scale[r], zero[r], order=perm)
        assert differing(got.codes[r], codes) == 0


def test_obq_first_rounds_to_the_nearest_hyperplane():
    # Distance from w to the plane {x_j = q_j} in the metric A is |w_j - q_j| / sqrt((A^-1)_jj).
    p = problem(12, 9, seed=5)
    grid = Grid(bits=2, group_size=3, fit="mse")
    A = damped(p.H)
    scale, zero = per_column(static_scales(p.W, grid), 9, grid)
    inverse = torch.linalg.inv(A).diagonal()
    first = []
    for r in range(12):
        nearest = scale[r] * ((p.W[r] / scale[r]).round().clamp(-zero[r], 3 - zero[r]))
        distance = (p.W[r] - nearest).abs() / inverse.sqrt()
        _, choices = oracles.obq(p.W[r], A, grid, scale[r], zero[r])
        assert choices[0] == int(distance.argmin())
        first.append(choices[0])
        # Nothing has been pushed into it yet, so OBQ leaves that weight at its own nearest value.
        got = solve(OBQ(), p, grid)
        assert float((got.codes[r, choices[0]] - zero[r, choices[0]]) * scale[r, choices[0]]) == pytest.approx(
            float(nearest[choices[0]])
        )
    assert len(set(first)) > 1  # rows differ: this is not one order for all


def test_obq_solves_rows_independently():
    p = problem(7, 16)
    grid = Grid(bits=3, group_size=8, fit="mse")
    together = solve(OBQ(), p, grid)
    for r in range(7):
        assert differing(solve(OBQ(), p._replace(W=p.W[r : r + 1]), grid).codes[0], together.codes[r]) == 0


def test_obq_in_chunks_of_rows_changes_nothing(monkeypatch):
    from nearplane.methods import obq

    p = problem(7, 16)
    grid = Grid(bits=3, group_size=8, fit="mse")
    together = solve(OBQ(), p, grid)
    monkeypatch.setattr(obq, "CHUNK_NUMBERS", 3 * 16**2)
    assert differing(solve(OBQ(), p, grid).codes, together.codes) == 0


def test_obq_refuses_a_layer_it_cannot_finish(monkeypatch):
    from nearplane.core.errors import SettingError
    from nearplane.methods import obq

    monkeypatch.setattr(obq, "MOST_WORK", 1e3)
    with pytest.raises(SettingError, match="gptq"):
        solve(OBQ(), problem(2, 12), Grid(group_size=4, fit="mse"))
