"""What holds for every method: the protocol, what it needs, its options, odd shapes and hard inputs."""

from dataclasses import dataclass, replace

import oracles
import pytest
import torch
from oracles import problem

from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import Grid, Quantized, fit_groups
from nearplane.core.moments import Moments
from nearplane.methods import GPTAQ, GPTQ, METHODS, OBQ, RTN, Method, ResComp

DYNAMIC = {"order": "natural", "static_groups": False}
VARIANTS = [
    RTN(),
    OBQ(),
    GPTQ(),
    GPTQ(order="pivot"),
    GPTQ(**DYNAMIC),
    GPTAQ(),
    GPTAQ(variant="released", **DYNAMIC),
    ResComp(),
    ResComp(base="gptq", variant="released"),
    ResComp(carry="allw", variant="released", **DYNAMIC),
]


def solve(method, p, grid):
    return method.solve(p.W, method.prepare(p.moments), grid)


def check(solved, p, grid):
    """A well-formed answer: shapes, dtypes, codes in range, finite scales that are really the grid's."""
    out, n = p.W.shape
    groups = 1 if grid.group_size == -1 else -(-n // grid.group_size)
    assert solved.codes.shape == (out, n) and solved.codes.dtype == torch.uint8 and solved.codes.is_contiguous()
    assert solved.scale.shape == solved.zero.shape == (out, groups)
    assert solved.zero.dtype == torch.uint8 and solved.scale.dtype == p.W.dtype
    assert bool((solved.scale != 0).all()) and bool(solved.scale.isfinite().all())
    assert grid.scales.either_sign or bool((solved.scale > 0).all())
    least, greatest = grid.code_range
    assert int(solved.codes.min()) >= least and int(solved.codes.max()) <= greatest
    assert bool(oracles.values(solved.codes, (solved.scale, solved.zero.double()), grid).isfinite().all())


def damped_loss(p, solved, grid):
    Q = oracles.values(solved.codes, (solved.scale, solved.zero.double()), grid)
    return float(oracles.loss(p.W, Q, oracles.damped(p.H)).sum())


# --- the contract -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, needs",
    [
        (RTN(), set()),
        (OBQ(), {"H"}),
        (GPTQ(), {"H"}),
        (GPTAQ(), {"H", "D"}),
        (ResComp(), {"H", "D"}),
        (ResComp(base="gptq"), {"H"}),
    ],
)
def test_needs(method, needs):
    assert method.needs == needs
    # What is not needed is not read: solving works on moments without it.
    p = problem(3, 12)
    moments = Moments(p.H, p.D if "D" in needs else None, 12)
    method.solve(p.W, method.prepare(moments), Grid(group_size=4))


@pytest.mark.parametrize("method", [GPTAQ(), ResComp()])
def test_missing_drift_is_an_error_that_says_so(method):
    p = problem(3, 12)
    with pytest.raises(SettingError, match="hold no D"):
        method.prepare(Moments(p.H, None, 12))


@pytest.mark.parametrize("name", METHODS)
def test_registered_methods_satisfy_the_protocol(name):
    method = METHODS[name]()
    assert isinstance(method, Method)
    assert method == METHODS[name]() and hash(method) == hash(METHODS[name]())


def test_a_users_own_class_is_a_method():
    @dataclass(frozen=True)
    class HalfRange:
        """No base class: three members are the contract."""

        @property
        def needs(self):
            return frozenset()

        def prepare(self, moments):
            return None

        def solve(self, weight, state, grid):
            scale, _ = fit_groups(weight, grid)
            return RTN().solve(weight, state, grid)._replace(scale=scale / 2)

    assert isinstance(HalfRange(), Method)
    p = problem(3, 12)
    assert isinstance(solve(HalfRange(), p, Grid(group_size=4)), Quantized)
    assert not isinstance(object(), Method)


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_solving_leaves_weight_and_moments_alone(method):
    p = problem(3, 20)
    before = [t.clone() for t in (p.W, p.H, p.D)]
    solve(method, p, Grid(group_size=8))
    assert all(map(torch.equal, before, (p.W, p.H, p.D)))


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_one_preparation_serves_many_weights(method):
    p, q = problem(3, 20), problem(5, 20, seed=1)
    grid = Grid(group_size=8)
    state = method.prepare(p.moments)
    method.solve(q.W, state, grid)
    again = method.solve(p.W, state, grid)
    assert torch.equal(again.codes, solve(method, p, grid).codes)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GPTQ, GPTAQ, ResComp])
@pytest.mark.parametrize(
    "bad",
    [
        {"damp_percent": -0.1},
        {"damp_percent": 1.1},
        {"static_groups": False},
        {"order": "pivot", "static_groups": False},
    ],
)
def test_meaningless_options_are_refused(method, bad):
    with pytest.raises(SettingError):
        method(**bad)


@pytest.mark.parametrize(
    "method, bad",
    [
        (GPTQ, {"order": "random"}),
        (GPTAQ, {"variant": "published"}),
        (ResComp, {"variant": "published"}),
        (ResComp, {"base": "obq"}),
        (ResComp, {"carry": "none"}),
    ],
)
def test_unknown_choices_are_refused(method, bad):
    # Beartype may refuse them first, by the annotation; without it the method itself does.
    with pytest.raises((SettingError, TypeError)):
        method(**bad)


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.needs], ids=str)
def test_empty_moments_are_refused(method):
    with pytest.raises(NumericalError, match="no calibration token"):
        method.prepare(Moments.zeros(4, drift=True))


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.needs], ids=str)
def test_damp_percent_reaches_the_solver(method):
    p = problem(20, 30, tokens=10)
    grid = Grid(bits=2, group_size=8)
    assert not torch.equal(solve(method, p, grid).codes, solve(replace(method, damp_percent=1.0), p, grid).codes)


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.needs], ids=str)
def test_hessian_fit_weights_columns_by_their_cost(method):
    # Weight only the first column of a group: its grid must be another one than the plain search finds. H is diagonal, so
    # that a column's pivot is its damped diagonal.
    p = problem(20, 16)
    H = torch.full((16,), 1e-3, dtype=torch.float64)
    H[::8] = 1.0
    p = p._replace(H=H.diag(), D=torch.zeros_like(p.D))
    grid = Grid(bits=2, group_size=8, fit="hessian")
    solved = solve(method, p, grid)
    cost = (H * (H + 0.01 * H.mean())).sqrt()
    scale, _ = oracles.static_scales(p.W, grid, cost)
    plain, _ = oracles.static_scales(p.W, Grid(bits=2, group_size=8, fit="mse"))
    if not isinstance(method, ResComp) or method.static_groups:
        torch.testing.assert_close(solved.scale, scale)
    assert not torch.allclose(solved.scale, plain)


def test_rtn_cannot_weight_by_a_hessian():
    with pytest.raises(SettingError, match="calibration"):
        solve(RTN(), problem(2, 4), Grid(fit="hessian"))


# --- odd shapes and hard inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "out, n, size", [(1, 40, 16), (3, 1, 16), (1, 1, -1), (4, 33, 32), (4, 7, 128), (2, 50, 7), (3, 5, 1)]
)
def test_odd_shapes(method, out, n, size):
    p = problem(out, n, seed=out + n)
    for grid in (Grid(bits=3, group_size=size, fit="minmax"), Grid(bits=4, group_size=size, sym=False)):
        check(solve(method, p, grid), p, grid)


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 8, "ternary"])
def test_rank_deficient_hessian(method, dtype, bits):
    p = problem(6, 48, tokens=5)
    p = oracles.Problem(*(t.to(dtype) for t in p))
    grid = Grid(bits=bits, group_size=16)
    check(solve(method, p, grid), p, grid)


def with_dead_columns(p, dead):
    Xhat, X = p.Xhat.clone(), p.X.clone()
    Xhat[dead], X[dead] = 0, 0
    tokens = Xhat.shape[1]
    return p._replace(Xhat=Xhat, X=X, H=Xhat @ Xhat.T / tokens, D=(X - Xhat) @ Xhat.T / tokens)


DATA_FITS = [(method, fit) for method in VARIANTS for fit in ("mse", "hessian") if fit == "mse" or method.needs]


@pytest.mark.parametrize(("method", "fit"), DATA_FITS, ids=str)
def test_dead_columns_keep_their_rounded_weight(method, fit):
    dead = [0, 9, 10, 19]
    p = with_dead_columns(problem(4, 20, tokens=60), dead)
    grid = Grid(bits=4, group_size=10, fit=fit)
    solved = solve(method, p, grid)
    check(solved, p, grid)
    expected = oracles.rtn(p.W, grid, (solved.scale, solved.zero.double()))
    assert torch.equal(solved.codes[:, dead].double(), expected[:, dead])


def test_a_group_of_dead_columns_is_solved_as_rtn():
    dead = list(range(8, 16))
    p = with_dead_columns(problem(4, 20, tokens=60), dead)
    grid = Grid(bits=3, group_size=8, fit="hessian")
    solved = solve(GPTQ(), p, grid)
    scales = oracles.static_scales(p.W, Grid(bits=3, group_size=8, fit="minmax", negative_scales=False))
    assert torch.equal(solved.scale[:, 1], scales[0][:, 1])
    assert torch.equal(solved.codes[:, dead].double(), oracles.rtn(p.W, grid, scales)[:, dead])


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_column_a_million_times_larger(method, dtype):
    p = problem(6, 40)
    size = torch.ones(40, dtype=torch.float64)
    size[17] = 1e6
    big = oracles.Problem(
        p.W, p.Xhat * size[:, None], p.X * size[:, None], p.H * size * size[:, None], p.D * size * size[:, None]
    )
    big = oracles.Problem(*(t.to(dtype) for t in big))
    grid = Grid(bits=4, group_size=8)
    check(solve(method, big, grid), big, grid)


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.needs == {"H"}], ids=str)
def test_the_symmetric_methods_beat_rounding(method):
    grid = Grid(bits=3, group_size=16)
    total = [0.0, 0.0]
    for seed in range(4):
        p = problem(16, 64, seed=seed)
        total[0] += damped_loss(p, solve(method, p, grid), grid)
        total[1] += damped_loss(p, solve(RTN(), p, grid), grid)
    assert total[0] < 0.8 * total[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_drift_correction_beats_gptq_on_the_output(bits):
    grid = Grid(bits=bits, group_size=16)
    total = dict.fromkeys(("gptq", "gptaq"), 0.0)
    for seed in range(4):
        p = problem(16, 64, seed=seed, tokens=400)
        for name, method in (("gptq", GPTQ()), ("gptaq", GPTAQ(alpha=1.0))):
            solved = solve(method, p, grid)
            Q = oracles.values(solved.codes, (solved.scale, solved.zero.double()), grid)
            total[name] += float((Q @ p.Xhat - p.W @ p.X).square().sum())
    assert total["gptaq"] < total["gptq"]


def test_a_certificate_violation_is_not_passed_on(monkeypatch):
    """The sweep's own answer is verified before a method returns it."""
    p = problem(3, 12)
    grid = Grid(bits=8, group_size=4, sym=False)
    from nearplane.methods import base

    real = base.sweep

    def broken(*args, **options):
        solved = real(*args, **options)
        # In a row with a clipped code nothing is claimed, so the forged answer says that there is none.
        c = solved.certificate
        return solved._replace(certificate=c._replace(loss=c.bound * 2, clipped=torch.zeros_like(c.clipped)))

    monkeypatch.setattr(base, "sweep", broken)
    with pytest.raises(NumericalError, match="bug in the solver"):
        solve(GPTQ(), p, grid)
