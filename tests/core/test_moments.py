import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearplane.core.errors import NumericalError
from nearplane.core.moments import Moments


def streams(tokens, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(tokens, n, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(), draw()


def moments(n, drift=True):
    return Moments.zeros(n, drift=drift, dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 30), st.integers(1, 9), st.lists(st.integers(0, 30), max_size=4))
def test_batches_add_up_to_the_dense_formula(tokens, n, cuts):
    xhat, x = streams(tokens, n)
    m = moments(n)
    edges = [0, *sorted(min(c, tokens) for c in cuts), tokens]
    for a, b in itertools.pairwise(edges):  # some batches are empty
        m.add(xhat[a:b], x[a:b])
    same(m.H, sum(torch.outer(t, t) for t in xhat) / tokens)
    same(m.D, sum(torch.outer(r - t, t) for t, r in zip(xhat, x, strict=True)) / tokens)
    assert (m.tokens, m.dropped) == (tokens, 0)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 6))
def test_merging_shards_is_adding_all(first, second, n):
    xhat, x = streams(first + second, n)
    parts = [moments(n), moments(n)]
    parts[0].add(xhat[:first], x[:first])
    parts[1].add(xhat[first:], x[first:])
    whole = moments(n)
    whole.add(xhat, x)
    merged = parts[0].merge(parts[1])
    same(merged.H, whole.H)
    same(merged.D, whole.D)
    assert merged.tokens == first + second


def test_merging_leaves_both_parts_alone():
    xhat, _ = streams(12, 3)
    a, b = moments(3, drift=False), moments(3, drift=False)
    a.add(xhat[:5])
    b.add(xhat[5:])
    before = a.H.clone(), b.H.clone()
    a.merge(b)
    assert torch.equal(a.H, before[0]) and torch.equal(b.H, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_tokens_not_finite_in_either_stream_are_dropped_and_counted(bad):
    xhat, x = streams(10, 4)
    m = moments(4)
    broken_hat, broken = xhat.clone(), x.clone()
    broken_hat[2, 1], broken[7, 3] = bad, bad
    m.add(broken_hat, broken)
    keep = [0, 1, 3, 4, 5, 6, 8, 9]
    clean = moments(4)
    clean.add(xhat[keep], x[keep])
    same(m.H, clean.H)
    same(m.D, clean.D)
    assert (m.tokens, m.dropped) == (8, 2)
    assert m.merge(m).dropped == 4


def test_a_batch_of_bad_tokens_changes_nothing_but_the_count():
    m = moments(3, drift=False)
    m.add(torch.full((5, 3), float("nan"), dtype=torch.float64))
    assert m.tokens == 0 and m.dropped == 5 and not m.H.any()
    with pytest.raises(NumericalError, match="5 of 5 calibration tokens have NaN"):
        m.check()


def test_a_batch_in_half_precision_is_summed_in_the_dtype_of_the_moments():
    xhat = torch.full((64, 2), 300.0, dtype=torch.float16)  # 300² is infinite in float16
    m = Moments.zeros(2)
    m.add(xhat)
    assert torch.equal(m.H, torch.full((2, 2), 9e4))


def test_streams_that_agree_have_no_drift():
    xhat, _ = streams(20, 5)
    m = moments(5)
    m.add(xhat, xhat.clone())
    assert not m.D.any()
    assert torch.equal(m.drift(), m.D)


def test_reference_stream_is_taken_exactly_when_drift_is_kept():
    xhat, x = streams(4, 2)
    with pytest.raises(ValueError, match="exactly when"):
        moments(2).add(xhat)
    with pytest.raises(ValueError, match="exactly when"):
        moments(2, drift=False).add(xhat, x)
    with pytest.raises(ValueError, match="cannot be merged"):
        moments(2).merge(moments(2, drift=False))
    with pytest.raises(ValueError, match="without D"):
        moments(2, drift=False).drift()


def test_check_names_empty_zero_and_overflown_moments():
    with pytest.raises(NumericalError, match="no calibration token"):
        moments(3).check()
    with pytest.raises(NumericalError, match="every calibration input to this layer is zero"):
        Moments(torch.zeros(3, 3), tokens=5).check()
    with pytest.raises(NumericalError, match="overflowed"):
        Moments(torch.eye(3) * float("inf"), tokens=5).check()
    with pytest.raises(NumericalError, match="overflowed"):
        Moments(torch.eye(3), torch.full((3, 3), float("nan")), tokens=5).check()
    Moments(torch.eye(3), torch.zeros(3, 3), tokens=5).check()
