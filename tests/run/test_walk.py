"""The whole walk, model folder to checkpoint to model, on tiny random models."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from close import near

import nearplane
import nearplane.api
from nearplane import GPTAQ, GPTQ, OBQ, RTN, Calibration, Grid, Moments, NearPlane, Quantized, ResComp
from nearplane.core.grid import dequantize
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.measure import Knowledge, measure
from nearplane.run.stream import Place, stream

KINDS = ["llama", "qwen3", "gemma2", "gpt2", "opt", "bloom", "phi", "phi3", "gpt_neox", "cohere", "mpt", "falcon"]
FEW = Calibration(nsamples=12, seqlen=24)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("walk"))


def calibration(folder: Path, **settings: Any) -> Calibration:
    return dataclasses.replace(FEW, dataset=str(folder.parent / "text.txt"), **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny.tokens(2, 20, seed=5), use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_rtn_stays_close_to_the_original(kind: str, tmp_path: Path) -> None:
    model = tiny.build(kind)
    folder = tiny.save(model, tmp_path / "model")
    format: Any = "gptq" if kind == "gpt2" else "compressed-tensors"
    grid = Grid(bits=8, group_size=32)
    report = nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=grid, format=format, progress=False)
    found = logits(nearplane.load(tmp_path / "out"))
    expected = logits(model)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(found, expected)
    assert report.totals["linears"] == sum(len(block.sites) for block in discover(open_source(folder)))


WRITTEN = [(kind, format) for kind in ("llama", "cohere", "opt") for format in ("compressed-tensors", "gptq_v2")]


@pytest.mark.parametrize(("kind", "format"), [*WRITTEN, ("gpt2", "gptq_v2")])
def test_what_is_written_is_what_was_solved(kind: str, format: Any, tmp_path: Path) -> None:
    """Every linear of the loaded checkpoint equals its solved codes; everything else is untouched."""
    model = tiny.build(kind)
    folder = tiny.save(model, tmp_path / "model")
    grid = Grid(bits=4, group_size=32, sym=False)
    solved: list[torch.Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(RTN):
        def solve(self, weight: torch.Tensor, state: None, grid: Grid) -> Quantized:
            quantized = super().solve(weight, state, grid)
            solved.append(dequantize(quantized, grid))
            return quantized

    dtype = "float16" if format == "gptq_v2" else "auto"
    nearplane.quantize(folder, tmp_path / "out", method=Spy(), grid=grid, format=format, dtype=dtype, progress=False)
    loaded, original = nearplane.load(tmp_path / "out", packed=False), model.state_dict()
    stages = [stage for block in discover(open_source(folder)) for stage in block.stages]
    for stage, expected in zip(stages, solved, strict=True):
        found = torch.cat([site.weight(loaded) for site in stage])
        torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=1e-6)
    quantized = {site.name + ".weight" for stage in stages for site in stage}
    for name, value in loaded.state_dict().items():
        if name not in quantized:
            torch.testing.assert_close(value, original[name], rtol=1e-3, atol=1e-4)


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs compute in float64, so that no code hangs on a GEMM's rounding."""
    plan_of = nearplane.api.complete

    def complete(*given: Any) -> Any:
        return dataclasses.replace(plan_of(*given), compute=torch.float64)

    monkeypatch.setattr(nearplane.api, "complete", complete)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_stage_solved_at_once_is_its_linears_solved_one_by_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v, gate and up: one call for all their rows, and to each linear of checkpoint and report its own."""
    model = tiny.build(kind)
    folder = tiny.save(model, tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    calls: list[tuple[Any, Grid, int]] = []

    @dataclasses.dataclass(frozen=True)
    class Spy(GPTQ):
        def solve(self, weight: torch.Tensor, state: Any, grid: Grid) -> Quantized:
            calls.append((state, grid, len(weight)))
            return super().solve(weight, state, grid)

    in_float64(monkeypatch)
    report = nearplane.quantize(
        folder,
        tmp_path / "out",
        method=Spy(),
        grid=Grid(bits=3, group_size=16, sym=False),
        calibration=calibration(folder),
        progress=False,
    )
    loaded, rows = nearplane.load(tmp_path / "out", packed=False), {row.name: row for row in report.linears}
    stages = [stage for block in discover(open_source(folder)) for stage in block.stages]
    assert max(map(len, stages)) > 1 and [row.name for row in report.linears] == [s.name for t in stages for s in t]
    for stage, (state, grid, height) in zip(stages, calls, strict=True):
        assert height == sum(site.shape[0] for site in stage)
        for site in stage:
            weight = site.weight(model).detach().double()
            alone, row = GPTQ().solve(weight, state, grid), rows[site.name]
            expected = dequantize(alone, grid)
            assert torch.equal(site.weight(loaded), expected.float())
            assert row.shape == site.shape
            assert row.weight_error == pytest.approx(float((expected - weight).norm() / weight.norm()) ** 2)
            assert alone.certificate is not None
            assert row.loss == pytest.approx(float(alone.certificate.loss.sum()))
            assert row.bound == pytest.approx(float(alone.certificate.bound.sum()))
            assert row.clipped == int(alone.certificate.clipped.sum())
    assert report.seconds["solve"] == pytest.approx(sum(row.seconds for row in report.linears), rel=0.25)


def test_moments_are_those_of_the_partly_quantized_model(llama: Path) -> None:
    """True-sequential: H of a late stage is measured behind all rounding before it; D compares with the original."""
    source, ids = open_source(llama), tiny.tokens(6, 16)
    grid, method = Grid(bits=2, group_size=32, sym=False), RTN()
    plain, rounded = nearplane.load(llama), nearplane.load(llama)
    site_name = "model.layers.1.mlp.down_proj"
    blocks = discover(source)
    for opened in stream(source, blocks, ids, place=Place(torch.device("cpu"), torch.float32), reference=True):
        for stage in opened.stages:
            if stage[0].name == site_name:
                measured = opened.observe(stage, frozenset({"H", "D"}))
            for site in stage:
                quantized = method.solve(opened.weight(site), None, grid)
                opened.replace(site, quantized, grid)
                if site.name != site_name:
                    rounded.get_submodule(site.name).weight.data = dequantize(quantized, grid)
    inputs = {}
    for name, model in (("x", plain), ("xhat", rounded)):
        model.get_submodule(site_name).register_forward_pre_hook(
            lambda _m, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1).double())
        )
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    xhat, x = inputs["xhat"], inputs["x"]
    assert measured.tokens == len(xhat) == 96 and measured.dropped == 0
    near(measured.H.double(), xhat.T @ xhat / 96, sums=96)
    assert measured.D is not None
    near(measured.D.double(), (x - xhat).T @ xhat / 96, sums=96)
    assert (x - xhat).norm() > 0.05 * x.norm()


METHODS = [
    GPTQ(),
    GPTQ(order="natural", static_groups=False),
    GPTQ(order="pivot"),
    GPTAQ(),
    GPTAQ(variant="released"),
    ResComp(),
    ResComp(base="gptq"),
    OBQ(),
    NearPlane(),
    NearPlane(shrink="row", beam=2, order="pivot"),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_method_beats_rounding(method: Any, llama: Path, tmp_path: Path) -> None:
    grid = Grid(bits=3, group_size=32, sym=False)
    report = nearplane.quantize(
        llama, tmp_path / "out", method=method, grid=grid, calibration=calibration(llama), progress=False
    )
    assert len(report.linears) == 14
    for row in report.linears:
        assert row.error is not None and row.rtn_error is not None
        assert 0 < row.error < row.rtn_error
        assert row.tokens == 12 * 24
        assert row.damp_percent == 0.01 or isinstance(method, NearPlane)
    assert logits(nearplane.load(tmp_path / "out")).isfinite().all()


def test_same_seed_same_bytes_and_another_seed_differs(llama: Path, tmp_path: Path) -> None:
    grid = Grid(bits=3, group_size=32)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        nearplane.quantize(llama, tmp_path / name, grid=grid, calibration=calibration(llama, seed=seed), progress=False)
    weights = [(tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_measuring_by_chunks_of_rows_changes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {}
    for size in (1 << 22, 200):  # all rows at once, and three
        monkeypatch.setattr(nearplane.run.measure, "MEASURED_AT_ONCE", size)
        rows[size] = nearplane.quantize(
            llama, tmp_path / str(size), calibration=calibration(llama), progress=False
        ).linears
    for one, other in zip(*rows.values(), strict=True):
        for key in ("error", "rtn_error", "weight_error"):
            assert getattr(other, key) == pytest.approx(getattr(one, key), rel=1e-4)


def test_report_beside_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    grid = Grid(bits=4, group_size=32)
    report = nearplane.quantize(llama, tmp_path / "out", grid=grid, calibration=calibration(llama), progress=False)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["settings"]["method"]["name"] == "NearPlane"
    assert stored["settings"]["grid"]["bits"] == 4
    assert stored["data"]["tokens"] == 288 and len(stored["data"]["sha256"]) == 64
    assert stored["versions"]["torch"] == torch.__version__
    assert len(stored["linears"]) == 14
    judged = stored["totals"]["rounds"] + stored["totals"]["rejected_rounds"]
    assert 8 <= judged <= 16  # of 8 inputs, not 14 linears, with two rounds at most
    assert {row["name"].rpartition(".")[2] for row in stored["linears"] if row["residual"]} == {"o_proj", "down_proj"}
    for key in ("error", "rtn_error", "loss", "bound", "bound_ratio", "clipped", "damp_percent", "tokens", "seconds",
                "alpha", "rounds", "rejected"):  # fmt: skip
        assert all(row[key] is not None for row in stored["linears"])
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert abs(size - stored["bytes"]["after"]) < 0.1 * size
    assert {row["name"] for row in stored["dense"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    # 4 bits and one float32 scale for 32 weights; the shape tensor is not free in so small a layer.
    assert 5 <= report.totals["bits_per_weight"] < 5.1


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_stream_that_no_output_joins_is_an_event(kind: str, tmp_path: Path) -> None:
    """Phi adds two outputs to its stream at once: asked to repair the stream, NearPlane cannot and says so."""
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(2000))
    report = nearplane.quantize(
        folder,
        tmp_path / "out",
        grid=Grid(bits=4, group_size=32),
        calibration=calibration(folder, nsamples=1, seqlen=3),
        progress=False,
    )
    assert any("residual stream" in event for event in report.events) == (kind == "phi")
    assert any(row.residual for row in report.linears) == (kind == "llama")
    assert any("too few tokens to hold any out" in event for event in report.events)
    assert report.totals["rounds"] == report.totals["rejected_rounds"] == 0


def test_damping_that_had_to_be_raised_is_reported(llama: Path, tmp_path: Path) -> None:
    """Eight tokens for 64 inputs, undamped: the Hessian is singular until damping is raised."""
    report = nearplane.quantize(
        llama,
        tmp_path / "out",
        method=GPTQ(damp_percent=0.0),
        grid=Grid(bits=4, group_size=32),
        calibration=calibration(llama, nsamples=1, seqlen=8),
        progress=False,
    )
    assert any("damping raised" in event for event in report.events)
    assert report.totals["damp_raised"] > 0
    assert max(row.damp_percent or 0 for row in report.linears) > 0


def test_a_method_of_ones_own(llama: Path, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Diagonal:
        """RTN that remembers how much data it saw."""

        strength: float = 0.5
        needs = frozenset({"H"})

        def prepare(self, moments: Moments) -> int:
            return moments.tokens

        def solve(self, weight: torch.Tensor, state: int, grid: Grid) -> Quantized:
            assert state == 288
            return RTN().solve(weight, None, grid)

    report = nearplane.quantize(
        llama,
        tmp_path / "out",
        method=Diagonal(),  # type: ignore[arg-type]
        grid=Grid(bits=4, group_size=32),
        calibration=calibration(llama),
        progress=False,
    )
    assert report.settings["method"] == {"name": "Diagonal", "strength": 0.5}


def test_tail_groups_round_trip_and_are_noted(llama: Path, tmp_path: Path) -> None:
    report = nearplane.quantize(llama, tmp_path / "out", method=RTN(), grid=Grid(bits=4, group_size=48), progress=False)
    assert any("divide" in event for event in report.events)
    assert logits(nearplane.load(tmp_path / "out")).isfinite().all()


def test_conv1d_is_refused_where_loaders_would_not_find_it(tmp_path: Path) -> None:
    """transformers looks for compressed-tensors in nn.Linear only and fills GPT-2's Conv1D with random weights."""
    folder = tiny.save(tiny.build("gpt2"), tmp_path / "model")
    with pytest.raises(nearplane.NearplaneError, match="random weights; use gptq"):
        nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=Grid(group_size=32), progress=False)
    assert not (tmp_path / "out").exists()


def test_errors_of_a_tall_weight_are_those_of_every_third_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2500, 16, generator=generator), torch.randn(64, 16, generator=generator)
    moments, grid = Moments.zeros(16), Grid(3, 16, False)
    moments.add(x)
    quantized = RTN().solve(weight, None, grid)
    row, _ = measure("a", weight, quantized, grid, Knowledge(moments))
    delta = dequantize(quantized, grid) - weight
    assert row.error == pytest.approx(float((x @ delta[::3].T).norm() / (x @ weight[::3].T).norm()) ** 2, rel=1e-4)
    assert row.weight_error == pytest.approx(float(delta.norm() / weight.norm()) ** 2, rel=1e-4)
