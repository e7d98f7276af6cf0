import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import column_order, damped, inverse_root, problem

from nearplane.core.errors import NumericalError
from nearplane.core.factor import choose_order, damped_cholesky, factorize

ORDERS = ["natural", "activation", "pivot"]


def indefinite(n=8):
    """Eigenvalue -0.05, mean diagonal 1: damping 0.01 is too little, 0.1 is enough."""
    H = torch.eye(n, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05
    return H


@pytest.mark.parametrize("order", ORDERS)
@given(n=st.integers(1, 40), seed=st.integers(0, 99))
def test_factor_rebuilds_the_damped_matrix_in_its_order(order, n, seed):
    H = problem(1, n, seed=seed).H
    f = factorize(H, order=order, damp_percent=0.02)
    T = torch.eye(n, dtype=H.dtype) + f.feedback
    A = damped(H, 0.02)[f.order][:, f.order]
    torch.testing.assert_close(T @ f.pivots.diag() @ T.T, A, rtol=1e-10, atol=1e-12)
    assert not f.feedback.tril().any()
    assert sorted(f.order.tolist()) == list(range(n))
    assert f.raised == 0 and f.damp_percent == 0.02
    assert f.damp == pytest.approx(0.02 * float(H.diagonal().mean()))


@pytest.mark.parametrize("order", ORDERS)
def test_pivots_are_those_of_the_published_inverse_root(order):
    H = problem(1, 50, seed=5).H
    f = factorize(H, order=order)
    U = inverse_root(damped(H)[f.order][:, f.order])
    torch.testing.assert_close(f.pivots, 1 / U.diagonal() ** 2, rtol=1e-9, atol=0)
    # Row j of U over its diagonal inverts T: U = diag(d)^-1/2 T^-1.
    T = torch.eye(50, dtype=H.dtype) + f.feedback
    torch.testing.assert_close(torch.linalg.inv(T) / f.pivots.sqrt()[:, None], U, rtol=1e-8, atol=1e-10)


def test_factor_leaves_the_matrix_alone():
    H = problem(1, 6).H
    before = H.clone()
    factorize(H, order="pivot")
    assert torch.equal(H, before)


@pytest.mark.parametrize("order", ORDERS)
@given(n=st.integers(1, 24), seed=st.integers(0, 99))
def test_orders_match_brute_force(order, n, seed):
    A = damped(problem(1, n, seed=seed).H)
    assert choose_order(A, order).tolist() == column_order(A, order)


def test_activation_order_is_descending_and_keeps_ties_in_place():
    H = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]).diag()
    assert factorize(H, order="activation").order.tolist() == [1, 3, 2, 0, 4]


def test_pivot_order_lowers_the_sum_of_pivots():
    total = dict.fromkeys(ORDERS, 0.0)
    wins = 0
    for seed in range(30):
        H = problem(1, 32, seed=seed).H
        sums = {o: float(factorize(H, order=o).pivots.sum()) for o in ORDERS}
        wins += sums["pivot"] < sums["natural"]
        for o in ORDERS:
            total[o] += sums[o]
    assert wins >= 28 and total["pivot"] < total["activation"] < total["natural"]


def test_pivot_order_survives_a_singular_matrix():
    v = torch.arange(1.0, 7.0)
    order = choose_order(torch.outer(v, v), "pivot")
    assert sorted(order.tolist()) == list(range(6))


def test_damping_is_raised_and_reported_on_an_indefinite_matrix():
    H = indefinite()
    f = factorize(H, damp_percent=0.01)
    assert f.raised == 1 and f.damp_percent == pytest.approx(0.1) and f.damp == pytest.approx(0.1)
    T = torch.eye(8, dtype=H.dtype) + f.feedback
    torch.testing.assert_close(T @ f.pivots.diag() @ T.T, damped(H, 0.1)[f.order][:, f.order])


def test_no_damping_at_all_can_still_be_raised():
    H = torch.ones(4, 4, dtype=torch.float64)
    H[0, 0] = 1 - 1e-6
    f = factorize(H, damp_percent=0.0)
    assert f.raised >= 1 and f.damp_percent > 0 and f.pivots.min() > 0
    assert factorize(torch.eye(3), damp_percent=0.0).raised == 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_hopeless_matrix_is_a_numerical_error(order):
    H = torch.eye(5)
    H[0, 1] = H[1, 0] = 50.0
    with pytest.raises(NumericalError, match="not positive definite"):
        factorize(H, order=order)


def test_a_matrix_that_is_not_a_number_is_a_numerical_error():
    with pytest.raises(NumericalError):
        factorize(torch.full((3, 3), float("nan")))


# --- damped_cholesky ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [0.0, 0.01, 1.0, 30.0])
@given(n=st.integers(1, 40), seed=st.integers(0, 99))
def test_cholesky_rebuilds_the_damped_matrix(percent, n, seed):
    H = problem(1, n, seed=seed).H
    expected = damped(H, percent)
    copy = H.clone()
    lower, used, raised = damped_cholesky(lambda: copy, percent)
    torch.testing.assert_close(lower @ lower.T, expected, rtol=1e-10, atol=1e-12)
    assert lower.data_ptr() == copy.data_ptr()  # in place
    assert (used, raised) == (percent, 0) and not lower.triu(1).any()


@pytest.mark.parametrize("percent, used, raised", [(0.0, 0.1, 3), (0.001, 0.1, 2), (0.01, 0.1, 1), (0.06, 0.06, 0)])
def test_cholesky_raises_damping_from_the_matrix_as_it_was(percent, used, raised):
    H, expected = indefinite(), damped(indefinite(), used)
    found = damped_cholesky(H.clone, percent)
    assert found.raised == raised and found.damp_percent == pytest.approx(used)
    torch.testing.assert_close(found.lower @ found.lower.T, expected)
    assert torch.equal(H, indefinite())


@pytest.mark.parametrize("percent", [0.0, 0.5, 1.0, 30.0])
def test_cholesky_of_a_hopeless_matrix_is_a_numerical_error(percent):
    H = torch.eye(5)
    H[0, 1] = H[1, 0] = 50.0
    with pytest.raises(NumericalError, match=f"damp_percent={max(percent, 1):g}"):
        damped_cholesky(H.clone, percent)
    assert damped_cholesky((torch.eye(5) * 2 - 1).clone, 3.0).raised == 0  # more than the most it would raise to


def test_raised_damping_is_that_of_the_pivot_order():
    """Eigenvalue -0.05 again; which pivots are least depends on the damping."""
    unlike = 0
    for seed in range(10):
        H = problem(1, 12, seed=seed).H
        H /= H.diagonal().mean()
        values, vectors = torch.linalg.eigh(H)
        values[0] = -0.05
        H = vectors @ values.diag() @ vectors.T
        f = factorize(H, order="pivot", damp_percent=0.01)
        assert f.raised == 1 and f.damp_percent == pytest.approx(0.1)
        assert f.damp == pytest.approx(0.1 * float(H.diagonal().mean()))
        A = damped(H, 0.1)
        assert f.order.tolist() == column_order(A, "pivot")
        T = torch.eye(12, dtype=H.dtype) + f.feedback
        torch.testing.assert_close(T @ f.pivots.diag() @ T.T, A[f.order][:, f.order], rtol=1e-9, atol=1e-12)
        unlike += f.order.tolist() != choose_order(H, "pivot", 0.01).tolist()
    assert unlike > 0
