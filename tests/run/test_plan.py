"""``plan``: its sizes against what is written and what lives in memory, its refusals, models that are only a config."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import nearplane
import nearplane.run.plan
from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, Method, Moments, NearPlane, Quantized, ResComp
from nearplane.cli.main import main
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.formats import FORMATS
from nearplane.formats.store import Store
from nearplane.machine.ranks import Ranks
from nearplane.models.discover import Block, discover
from nearplane.models.inputs import PROBE_TOKENS
from nearplane.models.sketch import Unsketchable
from nearplane.models.source import Source, open_source
from nearplane.run import estimate, forecast, probe
from nearplane.run.estimate import Estimate
from nearplane.run.forecast import Forecast
from nearplane.run.measure import Knowledge, measure
from nearplane.run.plan import Plan, make_plan
from nearplane.run.probe import Probe, Size
from nearplane.run.stream import IN_FLIGHT_BYTES

SMALL = Calibration(nsamples=4, seqlen=32)
FLAGS = ["--nsamples", "4", "--seqlen", "32", "--group-size", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """A folder that holds nothing but the configuration."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    return folder


def planned(model: Path, method: Method, format: str = "compressed-tensors", **grid: Any) -> Plan:
    settings: Any = {"method": method, "grid": Grid(**{"group_size": 32, **grid}), "calibration": SMALL}
    return make_plan(model, **settings, format=format, device="cpu", sketch=True, check=False)


def parts(model: Path, method: Method) -> dict[str, int]:
    return estimate.estimate(planned(model, method)).memory[0].parts


@pytest.mark.parametrize("kind", tiny.STAGES)
def test_stages_are_found_without_weights(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.build(kind), tmp_path / "m")
    true = discover(open_source(folder))
    assert discover(open_source(folder, sketch=True)) == true
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert discover(open_source(folder, sketch=True)) == true


@pytest.mark.parametrize(("format", "grid"), [
    ("compressed-tensors", {}), ("compressed-tensors", {"bits": 3, "sym": False, "group_size": 24}),
    ("compressed-tensors", {"bits": "ternary", "group_size": -1}), ("gptq", {"bits": 3}), ("gptq_v2", {"sym": False}),
])  # fmt: skip
def test_disk_is_what_is_written(format: Any, grid: dict[str, Any], model: Path, config: Path, tmp_path: Path) -> None:
    report = nearplane.quantize(
        model, tmp_path / "out", method=RTN(), grid=Grid(**{"group_size": 32, **grid}), format=format, progress=False
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for folder in (model, config):
        disk = estimate.estimate(planned(folder, RTN(), format, **grid)).disk
        assert disk["quantized"] == report.bytes["quantized"] and disk["dense"] == report.bytes["dense"]
        assert disk["quantized"] + disk["dense"] == index["metadata"]["total_size"]


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (32, 40), (33, 7)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_knows_its_bytes(name: str, shape: tuple[int, int]) -> None:
    for sym in (True, False):
        grid = Grid(bits=3, group_size=16, sym=sym, scale_dtype=FORMATS[name].scale_dtype(torch.bfloat16))
        if FORMATS[name].supports(grid, shape) is None:
            solved = RTN().solve(torch.randn(shape), None, grid)
            tensors = FORMATS[name].pack("x", solved, grid)
            assert FORMATS[name].nbytes(shape, grid) == sum(tensor.nbytes for tensor in tensors.values())


def _peak() -> Any:
    """The counter of live tensors in benchmarks/solver.py."""
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("solver_benchmark", folder / "solver.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module.Peak()


@dataclass(frozen=True)
class Mine:
    """A method of one's own: nothing in the package knows its arrays, nor the work it does."""

    @property
    def needs(self) -> frozenset[Any]:
        """H and D."""
        return frozenset({"H", "D"})

    def prepare(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Two square matrices stay, a third is needed on the way, and an array of fixed size."""
        scratch = torch.zeros(1 << 16)
        mean = moments.H.diagonal().mean() + scratch[0]
        damped = moments.H + 0.1 * mean * torch.eye(len(moments.H))
        return torch.linalg.inv(damped), damped

    def solve(self, weight: Tensor, state: tuple[Tensor, Tensor], grid: Grid) -> Quantized:
        """Half of the rows at a time, four arrays of a sample of rows, and a list that grows with the columns."""
        inverse, damped = state
        aimed = weight.clone()
        half = len(weight) // 2
        for part in (weight[:half], weight[half:]):
            moved = part @ damped
            aimed[: len(part)] += 1e-3 * (moved @ inverse)
        sample = [weight[:: max(1, len(weight) // 128)].clone() for _ in range(4)]
        panels = [aimed[:, a : a + 64].contiguous() for a in range(0, weight.shape[1], 64)]
        solved = RTN().solve(torch.cat(panels, 1), None, replace(grid, fit="minmax"))
        return solved._replace(scale=solved.scale + 0 * sample[0].mean())


TALL, WIDE, ADDS = (1600, 640, False), (640, 1408, False), (800, 800, True)
CASES = [(method, *shape) for method in (RTN(), GPTQ(), GPTAQ(), ResComp(), Mine()) for shape in (TALL, WIDE)]
CASES += [(NearPlane(), *shape) for shape in (TALL, WIDE, ADDS)]
CASES += [(NearPlane(rounds=0), *WIDE), (NearPlane(target=False), *TALL), (NearPlane(beam=2, rounds=0), *ADDS)]
CASES += [(nearplane.OBQ(), 40, 256, False)]  # slow: probed at a quarter of the size


@pytest.mark.parametrize(("method", "m", "n", "adds"), CASES, ids=lambda value: str(value)[:60])
def test_memory_and_work_at_a_size_that_was_not_probed(method: Any, m: int, n: int, adds: bool) -> None:
    """Within 25% of the tensors that live there, by another counter than the probe's own."""
    size, grid = Size(m, n, adds), Grid(group_size=64)
    probed = Probe(method, grid)
    held, work = probed.memory(size), probed.work(size)
    assert size not in {known for known, _ in probed._traces}
    weight, moments = probe.made_up(method.needs, size, torch.float32)
    state = None
    with torch.no_grad():
        if moments is not None:
            with _peak() as peak:
                state = method.prepare(moments)
            assert held.prepare == pytest.approx(peak.most, rel=0.4, abs=64 * n)
            assert held.state == pytest.approx(0 if state is moments else peak.now, rel=0.05, abs=1000)
        with _peak() as solving:
            method.solve(weight, state, grid)
    found, true = (max(a, b + c) for a, b, c in ((held.prepare, held.state, held.solve),
                   (0 if moments is None else peak.most, held.state, solving.most)))  # fmt: skip
    assert found == pytest.approx(true, rel=0.25)
    for counted, step in zip(work, probe.trace(method, size, grid), strict=True):
        assert counted.numbers == pytest.approx(step.work.numbers, rel=0.5, abs=1e5)
        for kind in probe.Products._fields:
            true = getattr(step.work, kind)
            assert getattr(counted, kind) == pytest.approx(true, rel=0.25, abs=0.1 * step.work.flops + 1e5)
        assert counted.flops == pytest.approx(step.work.flops, rel=0.25, abs=1e5)


def test_a_small_stage_is_probed_as_it_is() -> None:
    probed = Probe(GPTQ(), Grid(group_size=32))
    size = Size(96, 64)
    work, traces = probed.work(size), probe.trace(GPTQ(), size, Grid(group_size=32))
    assert list(work) == [step.work for step in traces]
    assert work[1].flops == 96 * 64**2 - 96 * 64  # a sweep's m n², and nothing on the diagonal


def test_measuring_a_weight_takes_what_is_said(model: Path) -> None:
    """The arrays of the report, beside the weight and its codes."""
    m, n = 256, 320
    for method, numbers in ((RTN(), estimate.MEASURING_ROUNDED), (GPTQ(), estimate.MEASURING)):
        weight, moments = probe.made_up(method.needs, Size(m, n), torch.float32)
        grid = Grid(group_size=64)
        solved = method.solve(weight, None if moments is None else method.prepare(moments), grid)
        with _peak() as peak:
            measure("", weight, solved, grid, Knowledge(moments))
        assert peak.most == pytest.approx(4 * numbers * m * n, rel=0.1)


@pytest.mark.parametrize("method", [GPTQ(), NearPlane(), Mine()], ids=lambda method: type(method).__name__)
def test_seconds_at_a_size_that_was_not_probed(method: Any) -> None:
    """On a machine whose clock is the work: 3 µs a call, half a ns a number, 10 ps a FLOP, of others half and a quarter."""
    flop = probe.Products(1e-11, 5e-12, 2.5e-12)

    def clock(run: Any) -> float:
        with probe.Trace() as done:
            run()
        work = done.work
        return 3e-6 * work.calls + 5e-10 * work.numbers + 1e-11 * (work.plain + work.wide / 2 + work.coarse / 4)

    probed, size = Probe(method, Grid(group_size=64)), Size(1600, 640)
    work = probed.work(size)
    call, number = probed.rates(clock, flop)
    assert call == pytest.approx(3e-6, rel=0.05) and number == pytest.approx(5e-10, rel=0.05)
    weight, moments = probe.made_up(method.needs, size, torch.float32)
    state = method.prepare(moments)
    true = clock(lambda: method.prepare(moments)) + clock(lambda: method.solve(weight, state, Grid(group_size=64)))
    found = sum(step.seconds(call, number, flop) for step in work)
    assert found == pytest.approx(true, rel=0.25)


def test_a_method_of_ones_own_is_estimated(model: Path, tmp_path: Path) -> None:
    plan = planned(model, Mine())
    found = estimate.estimate(plan)
    assert found.streams == 2 and found.memory[0].parts["factor"] > 0
    data = replace(SMALL, dataset=str(model.parent / "text.txt"))
    nearplane.quantize(
        model, tmp_path / "out", method=Mine(), grid=Grid(group_size=32), calibration=data, progress=False
    )


def test_nothing_is_probed_where_memory_is_plenty(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Size] = []
    trace = probe.trace
    monkeypatch.setattr(probe, "trace", lambda method, size, *rest: probed.append(size) or trace(method, size, *rest))
    plan, out = planned(model, GPTQ()), tmp_path / "out"
    guessed = forecast.refuse(plan, out)
    assert not probed and not guessed["close"]
    close = estimate.estimate(plan).memory[0]
    need = close.need
    assert guessed["planned"] > close.peak and guessed["available"] > guessed["planned"]
    probed.clear()
    monkeypatch.setattr(estimate, "available_memory", lambda: need + 10_000)
    counted = forecast.refuse(plan, out)
    assert probed and counted["close"]
    assert counted["planned"] == pytest.approx(close.peak, rel=0.05)  # the process has grown a little meanwhile


def test_a_method_that_cannot_solve_random_numbers_is_named(model: Path) -> None:
    @dataclass(frozen=True)
    class Picky(Mine):
        def prepare(self, moments: Moments) -> tuple[Tensor, Tensor]:
            raise NumericalError("not these.")

    with pytest.raises(SettingError, match=r"Picky cannot solve a stage of random numbers, .* not these"):
        estimate.estimate(planned(model, Picky()))


def test_probing_leaves_random_numbers_as_they_were(model: Path) -> None:
    before = torch.random.get_rng_state()
    estimate.estimate(planned(model, NearPlane()))
    assert torch.equal(before, torch.random.get_rng_state())


def test_memory_follows_its_formulas(model: Path) -> None:
    plan = planned(model, GPTQ())
    walk = estimate._Walk(plan)
    down = [found for where, found in walk.moments() if where.endswith("down_proj") and found["factor"]]
    tokens, hidden, inner = 4 * 32, 64, 96
    sites = sum(s.shape[0] * s.shape[1] for s in plan.blocks[0].sites)
    stored = {name: plan.source.store.shape(disk) for name, disk in plan.source.names.items()}
    outside = {n: torch.Size(s).numel() for n, s in stored.items() if "layers" not in n and not n.startswith("lm_head")}
    assert outside == {"model.embed_tokens.weight": tiny.VOCABULARY * hidden, "model.norm.weight": hidden}
    for found in down:
        assert found["outside"] == 4 * sum(outside.values())  # as many tokens as rows of the embedding
        assert found["block"] == 4 * (sites + 2 * hidden)  # two norms
        assert found["streams"] == 4 * tokens * hidden
        # The state, the residual, and in all blocks but the first the model's embeddings, which its own forward holds.
        assert found["paused"] == 4 * tokens * (inner + 3 * hidden)
        assert found["moments"] == 4 * inner**2 and found["factor"] == pytest.approx(4 * inner**2, rel=0.05)
    # The weight, 6 of Report.add, the codes, and a scale for each group.
    assert any(found["solver"] == pytest.approx(4 * hidden * inner * 7.3, rel=0.02) for found in down)
    few = estimate._Walk(plan.changed(calibration=Calibration(nsamples=1, seqlen=32)))
    assert few.outside == (32 + 1) * hidden and few.probed == (PROBE_TOKENS + 1) * hidden


def test_two_streams_where_a_reference_is_kept(model: Path) -> None:
    @cache
    def moments(method: Method) -> list[dict[str, int]]:
        return [found for _, found in estimate._Walk(planned(model, method)).moments()]

    def largest(method: Method, part: str) -> int:
        return max(found[part] for found in moments(method))

    for method in (GPTAQ(), NearPlane()):
        assert estimate.estimate(planned(model, method)).streams == 2
        assert largest(method, "streams") == 2 * largest(GPTQ(), "streams")
        assert largest(method, "paused") == 2 * largest(GPTQ(), "paused")
        assert largest(method, "block") > 1.9 * largest(GPTQ(), "block")
    assert estimate.estimate(planned(model, NearPlane(target=False))).streams == 1
    assert largest(RTN(), "streams") == largest(RTN(), "moments") == 0
    # H and D, and both again of the held-out tokens; the down projection's R is smaller than D.
    assert largest(NearPlane(residual=False), "moments") == 4 * largest(GPTQ(), "moments")
    assert largest(NearPlane(), "moments") == largest(GPTQ(), "moments") * 2 * (96 + 64) // 96


def test_a_budget_holds_codes_and_outputs(model: Path) -> None:
    """Beside the rest: what a block makes of the batches that widths are judged by, and the codes of every width."""
    settings: Any = {"method": GPTQ(), "grid": Grid(group_size=32), "device": "cpu", "sketch": True}
    settings["calibration"] = Calibration(nsamples=9 * 32, seqlen=64)  # nine batches, of which three are judged by
    plain, mixed = (make_plan(model, budget=budget, widths=(2, 4), **settings) for budget in (None, 4.2))
    first, second = (estimate._Walk(plan) for plan in (plain, mixed))
    assert (first.judged, second.judged) == (0, 3 * 32 * 64)
    solving = [
        [found["solver"] for where, found in walk.moments() if where.endswith("up_proj")] for walk in (first, second)
    ]
    assert {b - a for a, b in zip(*solving, strict=True)} == {0, 2 * 192 * 64}  # the gate and up projections' codes


def test_many_tokens_are_not_kept_waiting(model: Path) -> None:
    width = 2 * (64 + 96) * 4
    for tokens, kept in ((IN_FLIGHT_BYTES // width, True), (IN_FLIGHT_BYTES // width + 64, False)):
        calibration = Calibration(nsamples=-(-tokens // 64) if not kept else tokens // 64, seqlen=64)
        plan = make_plan(model, method=GPTQ(), calibration=calibration, device="cpu", sketch=True)
        walk = estimate._Walk(plan)
        assert walk.kept == kept and estimate.estimate(plan).kept == kept
        assert any(found["paused"] for _, found in walk.moments()) == kept


def test_a_run_that_cannot_fit_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(model), str(out), "--dataset", str(model.parent / "text.txt"), *FLAGS]
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    assert main(words) == 2
    message = capsys.readouterr().err.removeprefix(f"opening {model}\n")
    assert message.startswith("nearplane: needs ") and " MB at " in message and "1 kB are available" in message
    assert "--method gptq" in message and message.endswith("--force runs anyway.\n") and not out.exists()
    with pytest.raises(SettingError, match="are available"):
        nearplane.quantize(model, out, method=RTN(), grid=Grid(group_size=32), progress=False)
    with monkeypatch.context() as unread:
        unread.setattr(Store, "get", lambda _store, name: pytest.fail(f"{name} was read"))
        assert main(words) == 2 and capsys.readouterr().err.endswith(
            f"\n{message}"
        )  # it is said before a weight is read
    assert main([*words, "--force"]) == 0 and (out / "report.json").exists()
    capsys.readouterr()
    monkeypatch.setattr(estimate, "available_memory", lambda: None)  # nothing is known: nothing is refused
    for module in (estimate,):
        monkeypatch.setattr(module, "free_disk", lambda _folder: 10)
    with pytest.raises(SettingError, match="of disk, 0 kB are free; another disk, or fewer --bits"):
        nearplane.quantize(model, tmp_path / "b", method=RTN(), grid=Grid(group_size=32), progress=False)
    monkeypatch.setattr(estimate, "free_disk", lambda _folder: None)
    nearplane.quantize(model, tmp_path / "b", method=RTN(), grid=Grid(group_size=32), progress=False)


def test_a_model_that_reads_a_weight_itself_is_checked_once_its_weights_are_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_probe(source: Source) -> list[Block]:
        if source.sketch:
            raise Unsketchable("no")
        return discover(source)

    monkeypatch.setattr(nearplane.run.plan, "discover", no_probe)
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    with pytest.raises(SettingError, match="are available"):
        nearplane.quantize(model, tmp_path / "out", method=RTN(), grid=Grid(group_size=32), progress=False)


def test_plenty_of_memory_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run decides it: a generous guess fits, too."""
    plan = planned(model, GPTQ())
    found = Forecast(plan, estimate.estimate(plan), {"solve": 1.0})
    need = estimate.estimate(plan, None, estimate.ample(plan)).memory[0].need
    for more, plenty in ((10 << 20, True), (-(10 << 20), False)):
        monkeypatch.setattr(estimate, "available_memory", lambda: need + more)  # noqa: B023
        assert ("plenty is free" in str(found)) == plenty == found.as_dict()["plenty"]


# 20 blocks of 20 MB, of which the last, which lies highest, is kept: MB that remain, and MB of pages that such a block costs
# afterwards.
FREED = """
import resource, sys
from nearplane.machine.devices import give_memory_back
from nearplane.machine.memory import resident
if sys.argv[1] != "never":
    give_memory_back()
if sys.argv[1] == "plenty":
    give_memory_back(plenty=True)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
del_first = bytearray(30_000_000)
del del_first
before, blocks = resident(), [bytearray(b"x") * 20_000_000 for _ in range(20)]
del blocks[:-1]
left, seen = resident() - before, faults()
bytearray(20_000_000)
print(left // 1_000_000, (faults() - seen) * resource.getpagesize() // 1_000_000)
before, small = resident(), [bytearray(b"x") * 2_000_000 for _ in range(100)]
del small[:-1]
print((resident() - before) // 1_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_of_memory_leave_the_process() -> None:
    found = {}
    for word in ("asked", "plenty", "never"):
        ran = subprocess.run([sys.executable, "-c", FREED, word], stdout=subprocess.PIPE, text=True, check=True)
        found[word] = [int(figure) for figure in ran.stdout.split()]
    assert found["asked"][0] < 40 and found["asked"][1] >= 19 and found["asked"][2] < 10
    for word in ("plenty", "never"):
        assert found[word][0] > 300 and found[word][1] < 2


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates without measuring."""
    each = dict.fromkeys(forecast.Rates.__annotations__, 1e-6) | {"solver": probe.Products(1e-6, 1e-6, 1e-6)}
    monkeypatch.setattr(forecast, "rates", lambda _plan, _found: forecast.Rates(**each))


@pytest.mark.usefixtures("at_once")
def test_the_command(model: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (model, config):
        assert main(["plan", str(folder), *FLAGS]) == 0
        printed = capsys.readouterr().out
        for part in ("14 linears in 2 blocks; NearPlane, 4 bits, group 32, 4 x 32 tokens", "memory ", "base", "two streams",
                     "disk ", "time ", "observe", "largest stage model.layers.0.mlp.gate_proj+up_proj"):  # fmt: skip
            assert part in printed
    assert main(["plan", str(config), "--method", "gptq", "--json", *FLAGS]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"model", "method", "grid", "memory", "disk", "free_disk", "largest", "streams", "kept", "windows",
            "seconds", "lacking", "suggestions"} <= set(found)  # fmt: skip
    memory = found["memory"][0]
    assert memory["peak"] == sum(memory["parts"].values()) and memory["need"] == memory["peak"] - memory["base"]
    assert set(found["seconds"]) == {
        "start",
        "forward",
        "observe",
        "prepare",
        "solve",
        "measure",
        "write",
        "check",
        "total",
    }
    assert found["method"]["name"] == "GPTQ" and found["streams"] == 1


@pytest.mark.usefixtures("at_once")
def test_plan_and_quantize_have_the_same_flags(capsys: pytest.CaptureFixture[str]) -> None:
    def flags(command: str) -> set[str]:
        assert main([command, "--help", "--method", "gptaq"]) == 0
        words = capsys.readouterr().out.replace(",", " ").replace("|", " ").split()
        return {word.rstrip(".") for word in words if word.startswith("--")}

    assert flags("plan") - flags("quantize") == {"--json", "--ranks"}
    assert flags("quantize") - flags("plan") == {
        "--force",
        "--private",
        "--push-to-hub",
        "--quiet",
        "--resume",
        "--verbose",
    }


def test_hidden_states_need_room_where_they_go(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their disk is DIR's, not OUT's."""
    monkeypatch.setattr(estimate, "free_disk", lambda folder: 100 if folder.name == "small" else 1 << 40)
    plan = planned(model, NearPlane())
    assert estimate.estimate(plan, tmp_path / "large").lacking(tmp_path / "out") == []
    (told,) = estimate.estimate(plan, tmp_path / "small").lacking(tmp_path / "out")
    assert "for hidden states in" in told and "small, 0 kB are free" in told
    (told,) = estimate.estimate(plan, tmp_path / "large").lacking(tmp_path / "small")
    assert "of disk" in told


@pytest.mark.usefixtures("at_once")
def test_what_cannot_be_planned(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(folder: Path, *words: str) -> str:
        assert main(["plan", str(folder), *words]) == 2
        return capsys.readouterr().err

    assert "does not exist" in says(tmp_path)
    assert "divide" in says(config, "--format", "gptq", "--group-size", "40")
    raw = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(raw | {"dtype": "int3"}))
    assert "int3" in says(config)
    (config / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "quantized already" in says(config)
    (config / "config.json").write_text(json.dumps({"model_type": "longcat_flash"}))
    assert "merges weights" in says(config)
    (config / "config.json").write_text(json.dumps(raw))
    with pytest.raises(NearplaneError, match="no weights"):
        open_source(config, sketch=True).store.get("lm_head.weight")


def test_a_lack_is_reported_by_the_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 0)
    plan = planned(model, NearPlane())
    found: Estimate = estimate.estimate(plan)
    last = str(Forecast(plan, found, {"solve": 1.0})).splitlines()[-1]
    assert (
        last.startswith("This run does not fit: it needs ") and " Try: no flags make it fit here; --method gptq" in last
    )


def test_the_plan_ends_with_what_to_know(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 21_000_000_000)
    monkeypatch.setattr(forecast, "free_disk", lambda _folder: 60_000_000_000)
    plan = planned(model, GPTQ())
    last = str(Forecast(plan, estimate.estimate(plan), {"solve": 170.0})).splitlines()[-1]
    assert re.fullmatch(
        r"This run fits: it needs \d+ MB of 21\.0 GB memory and \d+ kB of 60\.0 GB disk, and takes about 3 min\.", last
    )


def test_what_is_advised_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set of flags is tried: with as much memory as the advised one takes, and no more, it runs."""
    data = Calibration(dataset=str(model.parent / "text.txt"), nsamples=64, seqlen=64)
    plan = planned(model, NearPlane()).changed(calibration=data)
    whole, small = (estimate.estimate(plan.changed(method=m, calibration=replace(data, nsamples=n))).memory[0]
                    for m, n in ((NearPlane(), 64), (NearPlane(), 32)))  # fmt: skip
    assert small.need < whole.need
    monkeypatch.setattr(estimate, "available_memory", lambda: small.need + (whole.need - small.need) // 4)
    (tip,) = estimate.suggestions(plan, estimate.estimate(plan), Path.cwd())
    assert tip.startswith(("--offload DIR fits", "--nsamples 32 fits"))


def test_advice_for_ranks_is_of_one_ranks_share(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the samples have been read, as of a model that cannot be sketched."""
    data = Calibration(dataset=str(model.parent / "text.txt"), nsamples=64, seqlen=64)
    settings: Any = {"method": NearPlane(), "grid": Grid(group_size=32), "calibration": data, "device": "cpu"}
    whole = make_plan(model, **settings)
    sketched = make_plan(model, **settings, sketch=True)
    share = estimate.shared(whole, None, 4, 4)
    assert whole.samples is not None and share.windows == (16, 64)
    base = {"base": 0}  # grows as this process does
    assert share.memory[0].parts | base == estimate.shared(sketched, None, 4, 4).memory[0].parts | base
    half = estimate.shared(sketched.changed(calibration=replace(data, nsamples=32)), None, 4, 4).memory[0].need
    monkeypatch.setattr(estimate, "available_memory", lambda: 4 * (half + (share.memory[0].need - half) // 4))
    with pytest.raises(SettingError, match=r"(--nsamples 32|--offload DIR) fits"):
        forecast.refuse(whole, Path.cwd(), ranks=Ranks(0, 4, 4))


def test_rounded_inputs_wait_beside_what_was_rounded(model: Path) -> None:
    plan = planned(model, GPTQ())
    plain, rounded = (
        estimate.estimate(p).memory[0].parts["paused"] for p in (plan, plan.changed(activations=TokenGrid(8)))
    )
    assert rounded - plain == 4 * 32 * 4 * 64  # samples x tokens x bytes x inputs of the stage that holds most


@pytest.mark.usefixtures("at_once")
def test_ranks_share_the_samples(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for ranks in ("1", "4"):
        assert (
            main(
                [
                    "plan",
                    str(config),
                    "--method",
                    "gptq",
                    "--nsamples",
                    "64",
                    "--seqlen",
                    "64",
                    "--ranks",
                    ranks,
                    "--no-check",
                    "--json",
                ]
            )
            == 0
        )
        found.append(json.loads(capsys.readouterr().out))
    one, four = (each["memory"][0]["parts"]["streams"] for each in found)
    assert four * 4 == one
    assert found[1]["seconds"]["solve"] == pytest.approx(found[0]["seconds"]["solve"] / 4)
    assert found[1]["seconds"]["observe"] == pytest.approx(found[0]["seconds"]["observe"] / 4)
    assert main(["plan", str(config), "--ranks", "0"]) == 2
    assert "ranks must be from 1" in capsys.readouterr().err


def test_exit_status_says_whether_it_fits(config: Path, monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 0)
    assert main(["plan", str(config), *FLAGS]) == 1


def test_figures_in_words() -> None:
    for size, words in (
        (0, "0 kB"),
        (4_100, "4 kB"),
        (2_500_000, "2.5 MB"),
        (25_000_000, "25 MB"),
        (1.2e10, "12.0 GB"),
    ):
        assert estimate.gb(size) == words
    for seconds, words in (
        (0.5, "0.5 s"),
        (100, "100 s"),
        (200, "3 min"),
        (9000, "2.5 h"),
        (2e5, "2.3 days"),
        (5e6, "58 days"),
    ):
        assert forecast.clock(seconds) == words


@pytest.mark.parametrize(
    "method", [RTN(), GPTQ(), GPTAQ(), NearPlane(), nearplane.OBQ()], ids=lambda m: type(m).__name__
)
def test_rates_are_measured_and_add_up(method: Method, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "PROBLEM", (16, 64))
    monkeypatch.setattr(forecast, "DISK_BYTES", 1024)
    plan = planned(model, method)
    found = estimate.estimate(plan)
    measured = forecast.rates(plan, found)
    assert measured.flop > 0 and measured.load > 0 and measured.call + measured.number > 0
    phases = forecast.seconds(plan, found, measured)
    assert all(value >= 0 for value in phases.values()) and phases["write"] > 0
    assert bool(phases["observe"]) == bool(method.needs)


def test_what_a_walk_does_at_full_width_is_measured_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    seen: dict[str, set[bool]] = {}

    @contextmanager
    def full_width(device: Any) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def watched(name: str) -> Any:
        known = getattr(forecast, name)
        return lambda *args: seen.setdefault(name, set()).add(bool(entered)) or known(*args)

    monkeypatch.setattr(forecast, "fast_forwards", full_width)
    for name in ("measure", "attending", "coarse"):
        monkeypatch.setattr(forecast, name, watched(name))
    add = forecast.Measuring.add
    monkeypatch.setattr(forecast.Measuring, "add",
                        lambda *args: seen.setdefault("add", set()).add(bool(entered)) or add(*args))  # fmt: skip
    plan = planned(model, GPTQ())
    forecast.rates(plan, estimate.estimate(plan))
    # Coarse products are never in full width. Moments are added for a probe of the solver, too, outside of it.
    assert seen == {"measure": {True}, "attending": {True}, "coarse": {False}, "add": {True, False}}


def test_a_coarse_product_and_one_at_full_width_are_counted_apart() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this torch has one way to multiply float32")
    with probe.Trace() as done:
        a @ b
        a.bfloat16() @ b.bfloat16()
        switch.fp32_precision = "bf16"  # as ``full_width`` does where that is faster
        try:
            a @ torch.cat([b, b], 1)
        finally:
            switch.fp32_precision = "none"
    assert done.work[2:] == (1024, 2048, 1024)
    assert done.work.busy(probe.Products(1.0, 0.5, 0.25)) == 1024 + 1024 + 256


def test_the_fit_finds_the_terms() -> None:
    shapes = [(64, 512), (1024, 256), (512, 512), (512, 1024)]
    rows = torch.tensor([[n, m * n, n * n] for m, n in shapes], dtype=torch.float64)
    for terms in ((3e-5, 2e-7, 1e-8), (0.0, 2e-7, 0.0), (3e-5, 0.0, 1e-7)):
        times = rows @ torch.tensor(terms, dtype=torch.float64)
        assert list(probe.non_negative(rows, times)) == pytest.approx(terms, rel=1e-6, abs=1e-15)


def test_time_counts_the_work(model: Path) -> None:
    """One FLOP a second, and nothing else costs: the sweep's m n² per stage, H's n² per token."""
    plan = planned(model, GPTQ())
    nothing = dict.fromkeys(forecast.Rates.__annotations__, 0.0) | {"solver": probe.Products(0.0, 0.0, 0.0)}
    found = estimate.estimate(plan)
    sizes = [estimate.size_of(stage, plan.method.needs) for block in plan.blocks for stage in block.stages]
    phases = forecast.seconds(
        plan, found, forecast.Rates(**nothing | {"gram": 1.0, "solver": probe.Products(1.0, 1.0, 1.0)})
    )
    assert phases["observe"] == 128 * sum(s.n**2 for s in sizes)
    assert phases["solve"] == pytest.approx(sum(s.m * s.n**2 for s in sizes), rel=0.03)
    assert phases["prepare"] == pytest.approx(sum(s.n**3 for s in sizes) / 3, rel=0.01)
    forward = forecast.seconds(plan, found, forecast.Rates(**nothing | {"flop": 1.0}))["forward"]
    stages = [s.m * s.n for s in sizes]
    assert forward == 128 * 2 * sum(stages[:-1])  # nothing runs behind the last stage's input
    attention = forecast.seconds(plan, found, forecast.Rates(**nothing | {"attention": 1.0}))["forward"]
    assert attention == 2 * 128 * 32 * 64  # of both blocks: each token, the window, the hidden size


def test_freed_blocks_stay_where_a_generous_guess_fits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(nearplane.api, "give_memory_back", lambda plenty=False: said.append(plenty))

    def run(name: str, **settings: Any) -> list[bool]:
        said.clear()
        words: dict[str, Any] = {"method": RTN(), "grid": Grid(group_size=32), "progress": False}
        nearplane.quantize(model, tmp_path / name, **words, **settings)
        return said

    need = estimate.estimate(planned(model, RTN())).memory[0].need
    assert run("plenty") == [False, True]
    assert run("forced", force=True) == [False]
    monkeypatch.setattr(estimate, "available_memory", lambda: need + (50 << 20))
    assert run("tight") == [False, False]
