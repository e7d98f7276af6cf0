"""Rotations of every order: orthogonal, seeded, and flat where a Hadamard matrix is known."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearplane.transforms.hadamard import hadamard, online, rotation

# Orders up to 300 that neither construction reaches, from the literature's list of Paley orders.
UNREACHED = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}


def test_every_order_is_orthogonal() -> None:
    for n in range(1, 301):
        keeps_mean = n % 2 == 0 or n < 64  # both, on half of the orders each
        R = rotation(n, seed=n, keeps_mean=keeps_mean).matrix
        assert R.shape == (n, n) and float((R @ R.T - torch.eye(n)).abs().max()) < 1e-12, n
        if keeps_mean:
            assert float((R.sum(1) - 1).abs().max()) < 1e-11, n
    for n in range(4, 301, 4):
        R = rotation(n, seed=n).matrix
        assert float((R @ R.T - torch.eye(n)).abs().max()) < 1e-12, n


def test_hadamard_matrices_where_they_are_known() -> None:
    known = [n for n in range(1, 301) if (n < 3 or n % 4 == 0) and n not in UNREACHED]
    for n in range(1, 301):
        H = hadamard(n)
        assert (H is not None) == (n in known), n
        if H is not None:
            assert bool((H.abs() == 1).all()) and torch.equal(H @ H.T, n * torch.eye(n).double())


@pytest.mark.parametrize("n", [64, 12, 28, 52, 344, 576, 148])  # 28 = 27 + 1, 52 = 2 (25 + 1), 344 = 7^3 + 1
def test_true_hadamards_have_entries_of_one_size(n: int) -> None:
    turn = rotation(n, seed=3)
    assert turn.flat
    torch.testing.assert_close(turn.matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=1e-12, atol=0)
    # The mirror that keeps the mean leaves them nearly so.
    kept = rotation(n, seed=3, keeps_mean=True).matrix.abs()
    assert float(kept.max()) < 3 * n**-0.5 + 8 / n


def test_a_seed_is_a_rotation() -> None:
    for n in (64, 72, 7, 92):
        assert torch.equal(rotation(n, 5).matrix, rotation(n, 5).matrix)
        assert not torch.equal(rotation(n, 5).matrix, rotation(n, 6).matrix)


@given(n=st.integers(1, 99), rows=st.integers(0, 3), keeps_mean=st.booleans())
def test_the_fast_way_is_the_product_with_the_matrix(n: int, rows: int, keeps_mean: bool) -> None:
    turn = rotation(n, seed=1, keeps_mean=keeps_mean)
    parts = [torch.diag(turn.left), torch.diag(turn.right)]
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < turn.power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), sylvester)
    dense = parts[0] @ torch.kron(sylvester / turn.power**0.5, turn.core) @ parts[1]
    if turn.mirror is not None:
        dense = dense @ (torch.eye(n).double() - 2 * torch.outer(turn.mirror, turn.mirror))
    x = torch.randn(2, rows, n, dtype=torch.float64)
    torch.testing.assert_close(turn.apply(x), x @ dense, rtol=1e-10, atol=1e-12)
    assert turn.apply(x.float()).dtype == torch.float32


def test_online_rotations_are_made_without_chance() -> None:
    """Orthogonal at every order, flat where a Hadamard matrix is known, and by the stated rule, whatever torch draws."""
    for n in (*range(1, 80), 172, 300):
        turn = online(n, seed=n)
        R = turn.matrix
        assert float((R @ R.T - torch.eye(n)).abs().max()) < 1e-12, n
        torch.testing.assert_close(turn.inverse.matrix, R.T, rtol=0, atol=1e-12)
        assert float(R.abs().max()) < 1.42 * n**-0.5, n  # Hartley's entries are at most √2 of the mean
        assert not turn.flat or float((R.abs() - n**-0.5).abs().max()) < 1e-12, n
    bits = hashlib.shake_256(b"nearplane 12 7").digest(2)
    signs = [1.0 if bits[i // 8] >> i % 8 & 1 else -1.0 for i in range(12)]
    assert online(12, 7).left.tolist() == signs and not torch.equal(online(12, 8).matrix, online(12, 7).matrix)
