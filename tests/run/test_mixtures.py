"""Mixtures of experts in a run: what an expert is shown, how it is solved where that is little, and what is told of it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from close import near
from torch import Tensor

import nearplane
from nearplane import GPTAQ, GPTQ, OBQ, RTN, Calibration, Grid, Moments, NearPlane
from nearplane.checkpoint.inspect import inspect
from nearplane.cli.terminal import expert_lines
from nearplane.core.activations import TokenGrid, round_tokens
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import dequantize
from nearplane.formats.parts import Writer
from nearplane.models.discover import discover
from nearplane.models.experts import EXPERT, set_visit
from nearplane.models.source import open_source
from nearplane.run.estimate import estimate
from nearplane.run.events import BlockDone
from nearplane.run.plan import make_plan
from nearplane.run.resume import Saver
from nearplane.run.stage import damped, told, unseen
from nearplane.run.stream import Place, stream

CPU = torch.device("cpu")
GRID = Grid(bits=3, group_size=16)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    (folder / "text.txt").write_text(tiny.text(2000))
    return tiny.save(tiny.build_mixture("qwen3_moe"), folder / "model")


def calibration(folder: Path, nsamples: int = 12, seqlen: int = 24, **settings: Any) -> Calibration:
    return Calibration(str(folder.parent / "text.txt"), nsamples, seqlen, **settings)


def watched(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the second block's mixture is given, (tokens, in), and the experts that its router chooses."""
    seen: dict[str, Tensor] = {}
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda _m, args, y: seen.update(x=args[0].reshape(-1, 64), index=y[2]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen["x"].double(), seen["index"]


def slices(model: Any, name: str) -> Tensor:
    """The weight of an expert's linear in transformers' fused parameters."""
    match = EXPERT.fullmatch(name)
    assert match is not None
    experts, expert = model.get_submodule(match[1]), int(match[2])
    if match[3] == "down_proj":
        return experts.down_proj.data[expert]
    return experts.gate_up_proj.data[expert].chunk(2)[match[3] == "up_proj"]


def rounded_walk(folder: Path, ids: Tensor, rounded: Any) -> Iterator[tuple[str, Moments]]:
    """Round every weight on the way, in ``rounded`` too; the moments of the second block's experts."""
    source = open_source(folder)
    needs: Any = frozenset({"H", "D"})
    for opened in stream(source, discover(source), ids, place=Place(CPU, torch.float32), reference=True):
        for stage in opened.stages:
            expert = EXPERT.fullmatch(stage[0].name)
            if expert and opened.k == 1:
                yield stage[0].name, opened.observe(stage, needs)
            for site in stage:
                solved = RTN().solve(opened.weight(site), None, GRID)
                opened.replace(site, solved, GRID)
                weight = slices(rounded, site.name) if expert else rounded.get_submodule(site.name).weight.data
                weight.copy_(dequantize(solved, GRID))


@pytest.mark.parametrize("bytes_in_flight", [4 << 30, 0])
def test_moments_of_an_expert(mixture: Path, bytes_in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """H of the tokens that the partly quantized model routes to it; D of the same tokens, whatever the original's router
    would choose."""
    monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", bytes_in_flight)
    plain, rounded = nearplane.load(mixture), nearplane.load(mixture)
    ids = tiny.tokens(6, 16)
    found = dict(rounded_walk(mixture, ids, rounded))
    (x, own), (xhat, index) = watched(plain, ids), watched(rounded, ids)
    assert not torch.equal(own.sort().values, index.sort().values)  # the two routers differ
    assert sum(m.tokens for n, m in found.items() if n.endswith("gate_proj")) == 2 * len(x)
    act, assigned = torch.nn.functional.silu, 0
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}"
        rows = (index == expert).any(1)
        assigned += int(rows.sum())
        for linear in ("gate_proj", "down_proj"):
            a, b = x[rows], xhat[rows]
            if linear == "down_proj":
                a, b = (
                    act(v @ slices(m, f"{name}.gate_proj").double().T) * (v @ slices(m, f"{name}.up_proj").double().T)
                    for v, m in ((a, plain), (b, rounded))
                )
            moments = found[f"{name}.{linear}"]
            assert moments.tokens == int(rows.sum()) and moments.D is not None
            near(moments.H.double(), b.T @ b / len(b), sums=96)
            near(moments.D.double(), (a - b).T @ b / len(b), sums=96)
    assert assigned == 2 * len(x)


def test_all_experts_are_shown_all_tokens_and_the_model_is_the_same(mixture: Path) -> None:
    """One stage for the gates and ups of a layer, which read one tensor; the stream is that of routed tokens."""
    ids, hidden = tiny.tokens(6, 16), []
    for visit in ("each", "all"):
        source = open_source(mixture)
        set_visit(source.model, visit)  # type: ignore[arg-type]
        blocks = discover(source)
        for opened in stream(source, blocks, ids, place=Place(CPU, torch.float32), reference=False):
            stages = [stage for stage in opened.stages if EXPERT.fullmatch(stage[0].name)]
            assert [len(stage) for stage in stages] == ([8, 1, 1, 1, 1] if visit == "all" else [2, 1] * 4)
            counts = [opened.observe(stage, frozenset({"H"})).tokens for stage in stages]
            assert (set(counts) == {96}) == (visit == "all")
            output = opened._forward(0, 0).until(None)
        hidden.append(output)
    near(hidden[0], hidden[1], sums=96)


@pytest.mark.parametrize("method", [GPTQ(), GPTAQ(), OBQ(), NearPlane()], ids=lambda m: type(m).__name__)
def test_few_tokens(method: Any, mixture: Path, tmp_path: Path) -> None:
    """Three tokens to two of four experts each: some see one, some none. All are solved, and told of."""
    report = nearplane.quantize(
        mixture,
        tmp_path / "out",
        method=method,
        grid=dataclasses.replace(GRID, fit="hessian"),
        calibration=calibration(mixture, 1, 3),
        progress=False,
    )
    rows = [row for row in report.linears if EXPERT.fullmatch(row.name)]
    counts = {row.tokens for row in rows}
    assert 0 in counts and 1 in counts and len(rows) == 24
    for row in rows:
        assert row.rounded == (row.tokens == 0) == (row.error is None)
        if row.tokens:
            assert (row.damp_percent or 0) >= min(1.0, 0.01 * row.shape[1] / row.tokens) - 1e-9
    assert report.totals["rounded_linears"] == sum(row.rounded for row in rows) > 0
    layers = {EXPERT.fullmatch(row.name)[1] for row in rows if row.rounded}  # type: ignore[index]
    assert len(expert_lines(rows)) == 2 and all("4 experts" in line for line in expert_lines(rows))
    for layer in layers:
        assert sum(e.startswith(f"{layer}:") and "rounded to nearest" in e for e in report.events) == 1
    assert sum("damped by count" in event for event in report.events) == 2
    assert not any("hold any out" in event and ".experts." in event for event in report.events)
    logits = nearplane.load(tmp_path / "out")(input_ids=tiny.tokens(1, 8)).logits
    assert bool(logits.isfinite().all())


def test_all_tokens_to_one_expert(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    model = tiny.build_mixture("deepseek_v3", num_experts_per_tok=1, num_hidden_layers=2)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))
    folder = tiny.save(model, tmp_path / "model")
    report = nearplane.quantize(
        folder, tmp_path / "out", grid=GRID, calibration=calibration(folder, 4, 24), progress=False
    )
    rows = {row.name: row for row in report.linears if EXPERT.fullmatch(row.name)}
    assert {name: row.tokens for name, row in rows.items()} == {n: 96 * (".experts.2." in n) for n in rows}
    (event,) = [event for event in report.events if "rounded to nearest" in event]
    assert event == (
        "model.layers.1.mlp.experts: 3 of 4 experts were reached by no token, or by zeros only, "
        "and rounded to nearest: 0, 1, 3"
    )
    shared = nearplane.quantize(
        folder,
        tmp_path / "all",
        grid=GRID,
        calibration=calibration(folder, 4, 24, all_experts=True),
        progress=False,
    )
    assert all(row.tokens == 96 and not row.rounded for row in shared.linears)


def test_inspect_shows_one_expert_of_a_layer(mixture: Path) -> None:
    told_of = str(inspect(mixture, GRID))
    assert told_of.count("mlp.experts: 4 experts") == 1 and "mlp.experts.0.down_proj" in told_of
    assert "mlp.experts.1." not in told_of
    assert told_of.count("routes tokens to experts, stays dense: mlp.gate") == 1


def test_damping_by_count() -> None:
    from nearplane.models.discover import Site

    expert = [Site("model.layers.0.mlp.experts.3.up_proj", (8, 64))]
    few, enough = Moments(torch.eye(64), tokens=16), Moments(torch.eye(64), tokens=64)
    assert damped(GPTQ(damp_percent=0.02), expert, few) == GPTQ(damp_percent=0.08)
    assert damped(GPTQ(damp_percent=0.9), expert, few) == GPTQ(damp_percent=1.0)
    for method, stage, moments in (
        (GPTQ(), expert, enough),
        (RTN(), expert, few),
        (GPTQ(), [Site("model.layers.0.mlp.up_proj", (8, 64))], few),
    ):
        assert damped(method, stage, moments) is method
    nothing = Moments(torch.zeros(64, 64))
    assert unseen(nothing) and not unseen(enough)
    assert not unseen(Moments(torch.zeros(64, 64), dropped=2)) and not unseen(few)
    assert told([]) == [] and expert_lines([]) == []


def test_resumed_and_planned(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops after a block goes on to the same bytes; the estimate counts all experts of a block."""
    settings: dict[str, Any] = {"grid": GRID, "calibration": calibration(mixture, 4, 12), "progress": False}
    monkeypatch.setitem(Writer.__init__.__kwdefaults__, "shard_bytes", 60_000)
    nearplane.quantize(mixture, tmp_path / "whole", **settings)
    take, calls = Saver.take, []

    def stop(saver: Saver, event: Any) -> None:
        take(saver, event)
        if isinstance(event, BlockDone):
            calls.append(event)
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        nearplane.quantize(mixture, tmp_path / "parts", **settings)
    monkeypatch.setattr(Saver, "take", take)
    assert len(calls) == 1
    nearplane.quantize(mixture, tmp_path / "parts", resume=True, **settings)
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    plans = [
        make_plan(str(mixture), method=NearPlane(), grid=GRID, calibration=settings["calibration"], sketch=sketch)
        for sketch in (False, True)
    ]
    found = [estimate(plan) for plan in plans]
    assert [b.stages for b in plans[0].blocks] == [b.stages for b in plans[1].blocks]
    block = sum(p.numel() for p in open_source(mixture).model.get_submodule("model.layers.0").parameters())
    linears = sum(s.shape[0] * s.shape[1] for s in plans[0].blocks[0].sites)
    assert found[0].memory[0].parts["block"] == found[1].memory[0].parts["block"] == 4 * (block + linears)


def test_experts_round_their_inputs(mixture: Path, tmp_path: Path) -> None:
    """Packed, every expert's linear rounds what it is given; fused into transformers' module it cannot, and that is said."""
    tokens = TokenGrid(4)
    settings: Any = {"grid": Grid(bits=8, group_size=-1), "calibration": calibration(mixture), "progress": False}
    nearplane.quantize(mixture, tmp_path / "out", method=GPTQ(), activations=tokens, **settings)
    model = nearplane.load(tmp_path / "out", arithmetic="exact")
    linears = {n: m for n, m in model.named_modules() if EXPERT.fullmatch(n)}
    assert len(linears) == 2 * 4 * 3 and all(m.activations == tokens for m in linears.values())
    some = linears["model.layers.1.mlp.experts.2.up_proj"]
    x, weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), some.dequantized()
    near(some(x), round_tokens(x, tokens) @ weight.T, sums=96)
    with pytest.raises(NearplaneError, match="packed=True"):
        nearplane.load(tmp_path / "out", packed=False)


def test_experts_that_cannot_be_taken_apart_are_said_to_stay_dense(tmp_path: Path) -> None:
    """JetMoE multiplies by its experts' weights itself."""
    folder = tiny.save(tiny.build("jetmoe", num_local_experts=4, num_experts_per_tok=2), tmp_path / "model")
    report = nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, progress=False)
    assert any("of the blocks' weights are in no linear that was found and stay dense" in e for e in report.events)
