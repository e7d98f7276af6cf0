"""Linears whose output passes a norm before it joins the residual stream: what is measured, what is solved, what it is worth."""

import math
import os
from pathlib import Path
from typing import Any

import oracles
import pytest
import tiny
import torch
from test_forward import ALL, Reference, ids_of, opened_blocks, put, without_sinks
from test_ranks import exact, forked, same
from test_resume import at_event, contents, in_a_child

import nearplane
import nearplane.run.stream
from nearplane import Calibration, Grid, NearPlane
from nearplane.core.grid import dequantize
from nearplane.core.heldout import Trial
from nearplane.core.moments import Moments
from nearplane.models.source import open_source
from nearplane.run.observe import before_norm

GRID = Grid(bits=3, group_size=16, sym=False)
WITH_NORM: Any = ALL | {"norm"}


def uneven(kind: str, folder: Path, **settings: Any) -> Path:
    """A tiny model whose norms differ from output to output, and whose tokens differ in loudness."""
    model = tiny.build(kind, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.copy_(0.5 * parameter + torch.randn(parameter.shape, generator=generator) / 4 + 0.5)
            if parameter.dim() == 1 and "lambda" in name:
                parameter.copy_(0.2 + torch.rand(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(torch.rand(len(module.weight), 1, generator=generator).mul_(3).exp())
    return tiny.save(model, folder / kind)


# --- the derivation -----------------------------------------------------------------------------------------------


class Behind:
    """A linear in front of an RMSNorm, both streams token by token, in float64."""

    def __init__(self, seed: int = 0, out: int = 12, n: int = 16, tokens: int = 300) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.W, self.gain = draw(out, n), draw(out).mul(0.4).exp()
        self.x = draw(tokens, n) @ draw(n, n) / 4 * draw(tokens, 1).mul(0.7).exp()
        self.xhat = self.x + 0.1 * (self.x @ draw(n, n) / 4 + draw(tokens, n))
        direction = self.x / self.x.norm(dim=1, keepdim=True)
        self.R = 0.3 * direction @ draw(n, out) + 0.05 * draw(tokens, out)
        self.scale = self.factor(self.xhat @ self.W.T)

    @staticmethod
    def factor(y: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt(y.square().mean(1) + 1e-6)

    def norm(self, y: torch.Tensor) -> torch.Tensor:
        return self.gain * y * self.factor(y)[:, None]

    def error(self, Q: torch.Tensor) -> float:
        """Drift of the stream behind the addition."""
        wanted = self.norm(self.x @ self.W.T) + self.R
        return float((wanted - self.norm(self.xhat @ Q.T)).square().sum(1).mean())

    @property
    def moments(self) -> Moments:
        m = Moments.zeros(16, residual=12, weighted=True, dtype=torch.float64)
        m.gain = self.gain
        drift = before_norm(self.R, self.gain, self.scale) + (self.x - self.xhat) @ self.W.T
        for part in (slice(0, 100), slice(100, 300)):
            m.add(self.xhat[part], None, drift[part], self.scale[part].square())
        return m


def test_the_target_is_dense_weighted_least_squares() -> None:
    """Row by row: the weights that are nearest, behind a norm of fixed factors, to the original plus the drift."""
    m = Behind()
    moments, damp = m.moments, 0.01
    mass = float(m.scale.square().sum())
    torch.testing.assert_close(moments.H, (m.xhat.T * m.scale.square()) @ m.xhat / mass)
    ridge = damp * float(moments.H.diagonal().mean())
    rows = []
    for i, w in enumerate(m.W):  # ‖g s (x̂ q - w x) - R‖² over tokens, and the ridge towards w, as plain equations
        factor = m.gain[i] * m.scale / math.sqrt(mass)
        wanted = factor * (m.x @ w) + m.R[:, i] / math.sqrt(mass)
        pulled = float(m.gain[i]) * math.sqrt(ridge)
        left = torch.cat([factor[:, None] * m.xhat, pulled * torch.eye(16, dtype=torch.float64)])
        rows.append(torch.linalg.lstsq(left, torch.cat([wanted, pulled * w])[:, None]).solution[:, 0])
    aim = torch.stack(rows)
    A = oracles.damped(moments.H, damp)
    steps = oracles.column_order(A, "activation")
    scales = oracles.static_scales(aim, GRID, oracles.column_cost(moments.H, A, "activation"))
    expected = oracles.published(aim, A, GRID, order=steps, scales=scales)
    method = NearPlane(shrink="none", damping="fixed", rounds=0, damp_percent=damp)
    found = method.solve(m.W, method.prepare(moments), GRID)
    assert int((found.codes.double() != expected.codes).sum()) == 0
    torch.testing.assert_close(found.scale, scales[0])


@pytest.mark.parametrize("seed", range(3))
def test_weights_and_drift_lower_the_error_behind_the_norm(seed: int) -> None:
    """On the very tokens: against the plain target, against weights alone, and against the drift without weights."""
    m = Behind(seed)
    tokens = len(m.xhat)
    one, none = torch.ones(tokens, dtype=torch.float64), torch.zeros_like(m.R)
    errors = {}
    for name, weight, R in (
        ("plain", one, none),
        ("weights", m.scale, none),
        ("drift", one, m.R),
        ("both", m.scale, m.R),
    ):
        drift = before_norm(R, m.gain, m.scale) + (m.x - m.xhat) @ m.W.T
        H, G = ((m.xhat.T * weight.square()) @ m.xhat, (drift.T * weight.square()) @ m.xhat)
        errors[name] = m.error(m.W + G @ torch.linalg.inv(oracles.damped(H, 1e-6)))
    assert errors["both"] < errors["drift"] < errors["plain"]
    assert errors["both"] < errors["weights"] < errors["plain"]


@pytest.mark.parametrize("seed", range(3))
def test_the_norms_derivative_is_dropped_from_both_sides_or_from_none(seed: int) -> None:
    """Finite differences give it; in the pull alone it is worse, and the original's own factor makes no difference."""
    m = Behind(seed)
    y, u = m.xhat @ m.W.T, torch.nn.functional.normalize(m.xhat @ m.W.T, dim=1)
    step = 1e-6 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = m.scale[:, None] * m.gain * (step - u * (u * step).sum(1, keepdim=True))
    torch.testing.assert_close(m.norm(y + step) - m.norm(y), moved, rtol=1e-4, atol=1e-9)
    drift = before_norm(m.R, m.gain, m.scale) + (m.x - m.xhat) @ m.W.T
    behind = m.norm(m.x @ m.W.T) + m.R - m.norm(y)  # with the original's own factor
    wanted = m.gain * behind
    pulled = (wanted - u * (u * wanted).sum(1, keepdim=True)) / m.gain**2 / m.scale[:, None]
    w = m.scale.square()
    A = oracles.damped((m.xhat.T * w) @ m.xhat, 1e-6)
    dropped, own, kept = (
        m.error(m.W + (each.T * w) @ m.xhat @ torch.linalg.inv(A))
        for each in (drift, behind / (m.gain * m.scale[:, None]), pulled)
    )
    assert dropped < kept and dropped == pytest.approx(own, rel=0.05)


def test_rows_are_judged_together_by_what_they_add_to_the_stream() -> None:
    """The held-out loss is that behind the norm, so an output that the norm drops has no say."""
    m = Behind()
    m.gain = m.gain.clone()
    m.gain[3] = 0
    held = torch.arange(300) % 4 == 3
    parts = []
    for rows in (~held, held):
        part = Moments.zeros(16, residual=12, weighted=True, dtype=torch.float64)
        part.gain = m.gain
        drift = before_norm(m.R[rows], m.gain, m.scale[rows]) + (m.x - m.xhat)[rows] @ m.W.T
        part.add(m.xhat[rows], None, drift, m.scale[rows].square())
        parts.append(part)
    trial = Trial(m.W, parts[0].join(parts[1]), 12)

    def brute(Q: torch.Tensor) -> float:
        some = m.gain * m.scale[held, None] * (m.xhat[held] @ Q.T - m.x[held] @ m.W.T) - m.R[held] * (m.gain != 0)
        return float(some.square().sum() / m.scale[held].square().sum())

    method = NearPlane()
    solved = method.solve(m.W, trial.moments, GRID)
    codes = solved.codes.clone()
    codes[[0, 3]] ^= 1
    other = solved._replace(codes=codes)
    expected = brute(dequantize(solved, GRID)) - brute(dequantize(other, GRID))
    assert trial.losses(solved, GRID)[0] - trial.losses(other, GRID)[0] == pytest.approx(expected, rel=1e-8)
    codes = solved.codes.clone()
    codes[3] ^= 1
    assert trial.losses(solved._replace(codes=codes), GRID) == trial.losses(solved, GRID)
    assert torch.equal(trial.fit_pull()[3], torch.zeros(16, dtype=torch.float64))


def test_nothing_is_asked_of_an_output_or_a_token_that_the_norm_drops() -> None:
    found = before_norm(torch.ones(3, 4), torch.tensor([1.0, -2.0, 0.0, 1e-6]), torch.tensor([1.0, 0.0, 4.0]))
    assert torch.equal(found, torch.tensor([[1, -0.5, 0, 0], [0, 0, 0, 0], [0.25, -0.125, 0, 0]]))


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearplane.run.stream, "BATCH_TOKENS", 32)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "glm4"])
@pytest.mark.parametrize("paused", [True, False])
def test_moments_are_those_of_two_whole_models(
    kind: str, paused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors come from what the models' own norms make of the original weight on the quantized stream's input."""
    if not paused:
        monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    folder, ids = uneven(kind, tmp_path), ids_of(10)
    source, brute = open_source(folder), Reference(folder, ids)
    behind = 0
    for opened in opened_blocks(source, ids):
        for stage in opened.stages:
            site, found = stage[0], opened.observe(stage, WITH_NORM)
            x, xhat = (torch.cat(part) for part in brute.inputs(site.name))
            if site.passage is None:
                assert found.mass is None and found.gain is None
            else:
                behind += 1
                W, norm = opened.weight(site), brute.rounded.get_submodule(site.passage.norm)
                y = xhat @ W.T
                with torch.no_grad():
                    passed = norm(y)
                scale = torch.rsqrt(y.square().mean(1) + brute.rounded.config.rms_norm_eps)
                gain = (passed / y / scale[:, None]).median(0).values
                drift = torch.cat(
                    [without_sinks(*pair)[0] for pair in zip(*brute.inputs(site.passage.adds_to), strict=True)]
                )
                side = (x - xhat) @ W.T + drift / scale[:, None] / gain
                assert found.gain is not None and found.mass is not None and found.held is not None
                ratio = found.gain / gain  # gains are known up to a common factor, which the weights take
                torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
                for moments, rows in ((found, slice(None)), (found.held, torch.arange(160) // 16 % 4 == 3)):
                    w, a, b = scale[rows].square(), xhat[rows], side[rows]
                    H, R = ((left.T * w) @ a / w.sum() for left in (a, b))
                    for mine, its in ((moments.H, H), (moments.R, R)):
                        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 * float(its.abs().max()))
            brute.replace(put(opened, stage))
    assert behind == 4  # attention and feed-forward output of both blocks


def test_without_the_need_such_a_linear_is_any_other(tmp_path: Path) -> None:
    source = open_source(uneven("gemma2", tmp_path))
    for opened in opened_blocks(source, ids_of(4)):
        for stage in opened.stages:
            for needs in (ALL, frozenset({"H", "D", "norm"})):
                found = opened.observe(stage, needs)
                assert found.R is None and found.D is not None
                assert (found.mass is not None) == ("norm" in needs and stage[0].passage is not None)


def test_a_scale_weighs_all_tokens_alike(tmp_path: Path) -> None:
    """DINOv2's LayerScale: R is divided by it, and H is the plain one."""
    source = open_source(uneven("dinov2", tmp_path))
    pixels = tiny.batch("dinov2", 6)
    behind = 0
    for opened in opened_blocks(source, pixels):
        for stage in opened.stages:
            plain, found = (opened.observe(stage, needs) for needs in (ALL, WITH_NORM))
            if stage[0].passage is not None:
                behind += 1
                assert found.gain is not None and float(found.gain.std()) > 0.01
                torch.testing.assert_close(found.H, plain.H, rtol=1e-6, atol=1e-9)
                assert found.R is not None and plain.R is None
                assert found.mass == pytest.approx(found.tokens, rel=1e-6)
            put(opened, stage)
    assert behind == 4


# --- whole runs ---------------------------------------------------------------------------------------------------


def sequences(samples: int, length: int, seed: int) -> torch.Tensor:
    """Tokens that follow from the two before them, one of three each: something to learn."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (0, seed))
    following = torch.randint(3, tiny.VOCABULARY, (4, tiny.VOCABULARY, 3), generator=fixed)
    ids = torch.randint(3, tiny.VOCABULARY, (samples, length), generator=drawn)
    for t in range(2, length):
        ids[:, t] = following[ids[:, t - 2] % 4, ids[:, t - 1], torch.randint(3, (samples,), generator=drawn)]
    return ids


def trained(kind: str, folder: Path) -> Path:
    """A tiny model after 60 steps of training: what drifts in a random model, no linear could foresee."""
    model = tiny.build(kind, num_hidden_layers=3).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.div_(3)
    steps = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        ids = sequences(32, 24, 1000 + step)
        steps.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        steps.step()
    return tiny.save(model.eval(), folder / kind)


def quantized(folder: Path, out: Path, **options: Any) -> nearplane.Report:
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in sequences(64, 32, 5).flatten().tolist()))
    calibration = Calibration(dataset=str(text), nsamples=48, seqlen=32)
    settings = {"method": NearPlane(), "grid": GRID, "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(folder, out, **settings)


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_the_stream_is_nearer_on_tokens_that_were_not_seen(kind: str, tmp_path: Path) -> None:
    """Behind the second block; by a quarter and more, of which the weights alone give a part."""
    folder, ids = trained(kind, tmp_path), sequences(24, 32, seed=77)
    original, errors = nearplane.load(folder), []
    for number, method in enumerate([NearPlane(), NearPlane(residual=False), NearPlane(sandwich=False)]):
        out = tmp_path / str(number)
        report = quantized(folder, out, method=method)
        assert sum(row.residual for row in report.linears) == (6 if number == 0 else 0)
        with torch.no_grad():
            states = [
                model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[2]
                for model in (original, nearplane.load(out))
            ]
        errors.append(float((states[0] - states[1]).square().sum() / states[0].square().sum()))
    assert errors[0] < 0.8 * errors[2] and errors[0] < errors[1] < errors[2], errors


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    folder = uneven("gemma2", tmp_path, num_hidden_layers=3)
    quantized(folder, tmp_path / "whole")
    out = tmp_path / "killed"

    def die() -> None:
        raise SystemExit(9)

    def cut() -> None:
        at_event(30, die, out)
        quantized(folder, out)

    assert in_a_child(cut) != 0
    assert quantized(folder, out, resume=True).resumed == 1
    assert contents(out) == contents(tmp_path / "whole")


def test_ranks_measure_what_one_does(tmp_path: Path) -> None:
    """To the last bit of the checkpoint, in float64: weighted moments are averaged by their weights."""
    folder = uneven("gemma2", tmp_path)

    def work(out: str, world: str) -> float:
        os.environ["WORLD_SIZE"] = world
        exact(64)
        return float(quantized(folder, tmp_path / out).totals["mean_error"])

    forked(3, tmp_path, lambda _: work("ranks", "3"))
    forked(1, tmp_path, lambda _: work("alone", "1"))
    same(tmp_path / "ranks", tmp_path / "alone")
