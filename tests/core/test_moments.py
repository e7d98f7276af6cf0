import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.moments import Moments, add_gram


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
    with pytest.raises(SettingError, match="hold no D"):
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


# --- the residual stream's drift, and held-out tokens -------------------------------------------------------------


def three_streams(tokens, n, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, k, generator=g, dtype=torch.float64) for k in (n, n, width))


def all_three(n, width, *batches):
    m = Moments.zeros(n, drift=True, residual=width, dtype=torch.float64)
    for batch in batches:
        m.add(*batch)
    return m


def dense(xhat, x, drift):
    """H, D and R token by token."""
    tokens = [*zip(xhat, x, drift, strict=True)]
    return (
        sum(torch.outer(t, t) for t, _, _ in tokens) / len(tokens),
        sum(torch.outer(r - t, t) for t, r, _ in tokens) / len(tokens),
        sum(torch.outer(d, t) for t, _, d in tokens) / len(tokens),
    )


def same_three(m, expected):
    for mine, its in zip((m.H, m.D, m.R), expected, strict=True):
        same(mine, its)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 7), st.lists(st.integers(0, 30), max_size=4))
def test_all_three_moments_are_the_dense_formulas(tokens, n, width, cuts):
    streams = three_streams(tokens, n, width)
    edges = [0, *sorted(min(c, tokens) for c in cuts), tokens]
    m = all_three(n, width, *([s[a:b] for s in streams] for a, b in itertools.pairwise(edges)))
    same_three(m, dense(*streams))
    assert (m.tokens, m.dropped) == (tokens, 0)


@pytest.mark.parametrize("keep_d", [True, False])
def test_the_residual_drift_goes_with_or_without_d(keep_d):
    xhat, x, drift = three_streams(12, 4, 3)
    m = Moments.zeros(4, drift=keep_d, residual=3, dtype=torch.float64)
    m.add(xhat, x if keep_d else None, drift)
    same(m.R, dense(xhat, x, drift)[2])
    assert (m.D is not None) == keep_d
    for wrong in ((xhat, None if keep_d else x, drift), (xhat, x if keep_d else None, None)):
        with pytest.raises(ValueError, match="exactly when"):
            m.add(*wrong)
    with pytest.raises(ValueError, match="exactly when"):
        moments(4).add(xhat, x, drift)
    with pytest.raises(ValueError, match="cannot be merged"):
        m.merge(Moments.zeros(4, drift=keep_d, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_not_finite_anywhere_is_dropped_everywhere(bad):
    streams = three_streams(12, 4, 3)
    broken = [s.clone() for s in streams]
    broken[0][1, 2], broken[1][5, 0], broken[2][8, 1] = bad, bad, bad
    broken[0][9, 0] = broken[2][9, 2] = bad  # one token, counted once
    keep = [0, 2, 3, 4, 6, 7, 10, 11]
    m = all_three(4, 3, [s[:6] for s in broken], [s[6:] for s in broken])
    same_three(m, dense(*(s[keep] for s in streams)))
    assert (m.tokens, m.dropped) == (8, 4)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 6), st.integers(1, 5))
def test_joining_keeps_the_held_tokens_beside(first, second, n, width):
    streams = three_streams(first + second, n, width)
    own, held = all_three(n, width, [s[:first] for s in streams]), all_three(n, width, [s[first:] for s in streams])
    own.dropped, held.dropped = 2, 3
    fitted, kept = own.H.clone(), [held.H.clone(), held.D.clone(), held.R.clone()]
    joined = own.join(held)
    assert joined.held is held and (joined.tokens, joined.dropped) == (first + second, 5)
    same_three(held, kept)
    if first + second:
        same_three(joined, dense(*streams))
    if first:
        rest = dense(*(s[:first] for s in streams))
        before = joined.H.clone(), joined.D.clone(), joined.R.clone()
        for moment, expected in zip("HDR", rest, strict=True):
            torch.testing.assert_close(joined.fit(moment), expected, rtol=1e-10, atol=1e-10)
        assert all(map(torch.equal, before, (joined.H, joined.D, joined.R)))
        same(joined.fit("H"), fitted)
    if second:
        same_three(joined.held, dense(*(s[first:] for s in streams)))


def test_without_held_tokens_all_are_fitted():
    streams = three_streams(9, 4, 3)
    m = all_three(4, 3, streams)
    assert all(torch.equal(m.fit(k), getattr(m, k)) for k in "HDR")


def test_merging_shards_merges_what_they_hold():
    streams = three_streams(20, 4, 3)
    parts = [all_three(4, 3, [s[a:b] for s in streams]) for a, b in ((0, 7), (7, 10), (10, 16), (16, 20))]
    shards = parts[0].join(parts[1]), parts[2].join(parts[3])
    before = [t.clone() for shard in shards for m in (shard, shard.held) for t in (m.H, m.D, m.R)]
    whole = shards[0].merge(shards[1])
    assert all(map(torch.equal, before, (t for shard in shards for m in (shard, shard.held) for t in (m.H, m.D, m.R))))
    same_three(whole, dense(*streams))
    held = [7, 8, 9, 16, 17, 18, 19]
    assert (whole.tokens, whole.held.tokens) == (20, 7)
    same_three(whole.held, dense(*(s[held] for s in streams)))
    rest = [i for i in range(20) if i not in held]
    for moment, expected in zip("HDR", dense(*(s[rest] for s in streams)), strict=True):
        torch.testing.assert_close(whole.fit(moment), expected, rtol=1e-10, atol=1e-10)


def test_check_reads_the_residual_drift():
    with pytest.raises(NumericalError, match="overflowed"):
        Moments(torch.eye(3), tokens=5, R=torch.full((2, 3), float("inf"))).check()


# --- the Gram matrix by halves -------------------------------------------------------------------------------------

WIDTHS = [1, 33, 255, 256, 257, 513, 1100]  # around one, two and four leaves


@pytest.mark.parametrize("n", WIDTHS)
def test_gram_matrix_by_halves(n):
    first, second = three_streams(7, n, n)[:2]
    total = torch.full((n, n), float("nan"), dtype=torch.float64)
    add_gram(total, first, 0.0, 0.5)  # keep = 0 forgets even what is not finite
    same(total, 0.5 * first.T @ first)
    add_gram(total, second, 0.25, 2.0)
    same(total, 0.125 * first.T @ first + 2.0 * second.T @ second)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrix_is_symmetric_to_the_last_bit(n, dtype):
    total = torch.zeros(n, n, dtype=dtype)
    for batch in three_streams(7, n, n)[:2]:
        add_gram(total, batch.to(dtype), 0.5, 1 / 7)
    assert torch.equal(total, total.T)


# --- weights ------------------------------------------------------------------------------------------------------


def weighted(tokens, n=4, out=3, seed=0):
    xhat, drift = streams(tokens, n, seed)[0], streams(tokens, out, seed + 1)[0]
    return xhat, drift, streams(tokens, 1, seed + 2)[0][:, 0].square()


def test_weighted_moments_are_the_weighted_means():
    """Batch by batch, over merged shards and over the tokens that are not held out; a weight of 1 is none."""
    xhat, drift, weight = weighted(60)
    held = torch.arange(60) % 4 == 3

    def of(rows):
        m = Moments.zeros(4, residual=3, weighted=True, dtype=torch.float64)
        for part in torch.arange(60)[rows].split(7):
            m.add(xhat[part], None, drift[part], weight[part])
        return m

    def dense(rows):
        w, x, r = weight[rows], xhat[rows], drift[rows]
        return (x.T * w) @ x / w.sum(), (r.T * w) @ x / w.sum()

    merged, joined = of(~held).merge(of(held)), of(~held).join(of(held))
    for m in (of(slice(None)), merged, joined):
        for found, expected in zip((m.H, m.R), dense(slice(None)), strict=True):
            same(found, expected)
        assert m.tokens == 60 and m.weight == pytest.approx(float(weight.sum()))
    for name, expected in zip("HR", dense(~held), strict=True):
        torch.testing.assert_close(joined.fit(name), expected, rtol=1e-9, atol=1e-9)
    plain, ones = Moments.zeros(4, dtype=torch.float64), Moments.zeros(4, weighted=True, dtype=torch.float64)
    plain.add(xhat)
    ones.add(xhat, weight=torch.ones(60))
    assert torch.equal(plain.H, ones.H) and plain.weight == ones.weight == 60


def test_a_token_of_weight_0_changes_nothing_and_one_that_is_not_finite_is_dropped():
    xhat, drift, weight = weighted(8)
    few, all_ = (Moments.zeros(4, residual=3, weighted=True, dtype=torch.float64) for _ in range(2))
    weight[[1, 4]] = torch.tensor([0.0, float("inf")], dtype=torch.float64)
    rest = [0, 2, 3, 5, 6, 7]
    few.add(xhat[rest], None, drift[rest], weight[rest])
    all_.add(xhat[[1]], None, drift[[1]], weight[[1]])
    all_.add(xhat, None, drift, weight)
    same(all_.H, few.H)
    same(all_.R, few.R)
    assert (all_.tokens, all_.dropped) == (8, 1) and all_.weight == pytest.approx(few.weight)


def test_weights_are_given_where_they_are_kept():
    xhat, _, weight = weighted(5)
    with pytest.raises(ValueError, match="weight is needed exactly when"):
        Moments.zeros(4, dtype=torch.float64).add(xhat, weight=weight)
    with pytest.raises(ValueError, match="weight is needed exactly when"):
        Moments.zeros(4, weighted=True, dtype=torch.float64).add(xhat)
    with pytest.raises(ValueError, match="cannot be merged"):
        Moments.zeros(4).merge(Moments.zeros(4, weighted=True))
