"""Several ranks do what one does, and a rank that is gone ends the run with a sentence and a folder that can be resumed.

Ranks are forked from this process, with the environment that torchrun would give them and the store that it would keep;
one test starts torchrun itself.
"""

import dataclasses
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from test_resume import contents

import nearplane
import nearplane.api
from nearplane import GPTAQ, GPTQ, OBQ, RTN, Calibration, Grid, NearPlane, ResComp
from nearplane.cli.main import _how_to_resume, main
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.formats.journal import STATE
from nearplane.machine.signals import Interrupted
from nearplane.methods.base import Sweeping, rows_independent
from nearplane.run.forward import Forward
from nearplane.run.stream import OpenBlock

GRID = Grid(bits=3, group_size=16, sym=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("ranks"))


def run(model: Path, out: Path, samples: int = 7, seqlen: int = 24, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=samples, seqlen=seqlen)
    settings = {"method": GPTQ(), "grid": GRID, "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(model, out, **settings)


def exact(tokens: int = 48) -> None:
    """Compute in float64, in batches of so many tokens; for good, only in a child."""
    plan_of = nearplane.api.complete
    nearplane.api.complete = lambda *given: dataclasses.replace(plan_of(*given), compute=torch.float64)
    nearplane.run.stream.BATCH_TOKENS = tokens


def forked(world: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned or raised in each of ``world`` processes; None where one was killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
                try:
                    result = work(rank)
                except (NearplaneError, Interrupted) as error:
                    result = error, error.told
                (folder / f"rank-{rank}").write_bytes(pickle.dumps(result))
            finally:
                if sys.exc_info()[0]:
                    traceback.print_exc()
                os._exit(0)
    for pid in pids:
        os.waitpid(pid, 0)
    paths = [folder / f"rank-{rank}" for rank in range(world)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def same(found: Path, expected: Path) -> None:
    """The same bytes, and a report that differs in times and in the last digits only."""
    a, b = contents(found), contents(expected)
    close(a.pop("report.json"), b.pop("report.json"))
    assert a == b


def close(a: Any, b: Any) -> None:
    if isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-12)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            close(*pair)
    else:
        assert a == b


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("samples that do not divide", 2, {"method": GPTQ()}),
    ("samples that do not divide", 3, {"method": NearPlane()}),
    ("one batch for two ranks", 2, {"method": NearPlane(), "samples": 2}),
    ("few sequences: runs of tokens are held out", 3, {"method": NearPlane(), "samples": 3, "seqlen": 60}),
    ("no data", 2, {"method": RTN()}),
    ("scaled channels", 3, {"method": GPTQ(), "scale": "awq"}),
    ("scaled channels, one batch for two ranks", 2, {"method": RTN(), "scale": "awq", "samples": 2}),
    ("bits by a budget", 2, {"method": GPTQ(), "budget": 5.5}),
    ("bits by a budget, no data", 3, {"method": RTN(), "budget": 5.5}),
]


@pytest.mark.parametrize(("what", "world", "options"), CASES)
def test_ranks_do_what_one_does(what: str, world: int, options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """In float64, so that no code hangs on the order of a sum."""

    def work(rank: int) -> Any:
        exact()
        return run(model, tmp_path / "out", **options).totals["mean_weight_error"]

    def alone(_: int) -> Any:
        os.environ["WORLD_SIZE"] = "1"
        exact()
        return run(model, tmp_path / "alone", **options).totals["mean_weight_error"]

    results = forked(world, tmp_path, work)
    assert len(set(results)) == 1 and results[0] is not None  # every rank is given the report
    forked(1, tmp_path, alone)
    same(tmp_path / "out", tmp_path / "alone")
    if "budget" in options:
        choices = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["choices"]
        assert len({row["bits"] for row in choices}) > 1


def test_measuring_is_shared(model: Path, tmp_path: Path) -> None:
    """The batches that a budget's widths are judged by, and the rows that the report takes errors of: each by one rank."""

    def work(rank: int) -> tuple[int, int]:
        exact()
        forwards, rows, output, energy = [0], [0], OpenBlock.output, nearplane.run.measure.energy

        def counted_output(self: OpenBlock, batch: int) -> torch.Tensor:
            forwards[0] += 1
            return output(self, batch)

        def counted_energy(weight: torch.Tensor, H: torch.Tensor) -> float:
            rows[0] += len(weight)
            return energy(weight, H)

        OpenBlock.output = counted_output  # type: ignore[method-assign]
        nearplane.run.measure.energy = counted_energy
        run(model, tmp_path / f"out-{os.environ['WORLD_SIZE']}", samples=16, budget=5.5)
        return forwards[0], rows[0]

    def alone(_: int) -> tuple[int, int]:
        os.environ["WORLD_SIZE"] = "1"
        return work(0)

    first, second = forked(2, tmp_path, work)
    (whole,) = forked(1, tmp_path, alone)
    assert first == second and whole == tuple(2 * count for count in first)
    assert whole[0] == 2 * 2 * (1 + 4 * 4)  # two of eight batches, two blocks: as it was, and four units at four widths


def test_runs_held_out_of_a_module_that_sees_some_tokens_only(model: Path, tmp_path: Path) -> None:
    """Which runs depends on how many tokens the ranks before this one were shown."""
    options = {"method": NearPlane(target=False), "samples": 9, "seqlen": 60}

    def some_tokens() -> None:
        exact(60)
        pause = Forward.pause

        def cut(self: Forward, module: str, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, x.shape[-1])
            pause(self, module, rows[rows[:, 0] > 0] if "up_proj" in module or "gate_proj" in module else rows)
            return x

        Forward.pause = cut  # type: ignore[method-assign]

    def work(rank: int) -> None:
        some_tokens()
        run(model, tmp_path / "out", **options)

    def alone(_: int) -> None:
        os.environ["WORLD_SIZE"] = "1"
        some_tokens()
        run(model, tmp_path / "alone", **options)

    forked(2, tmp_path, work)
    forked(1, tmp_path, alone)
    same(tmp_path / "out", tmp_path / "alone")
    tokens = {row["tokens"] for row in json.loads((tmp_path / "out" / "report.json").read_text())["linears"]}
    assert max(tokens) == 540 and min(tokens) < 500


def test_errors_are_everyones_and_said_once(model: Path, tmp_path: Path) -> None:
    """Of rank 0 alone, of one rank's rows, and of one rank while the others wait for it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")

    def occupied(rank: int) -> None:
        run(model, tmp_path / "full")

    def rows(rank: int) -> None:
        def solve(*_: Any) -> Any:
            raise NumericalError(f"rows of {rank}")

        if rank == 1:
            Sweeping.solve = solve  # type: ignore[method-assign]
        run(model, tmp_path / "rows")

    def alone(rank: int) -> None:
        def replace(*_: Any) -> None:
            raise NearplaneError("here only.")

        if rank == 1:
            OpenBlock.replace = replace  # type: ignore[method-assign]
        run(model, tmp_path / "alone")

    for work, sentences in (
        (occupied, ["full is not empty"] * 2),
        (rows, [r"model.layers.0.self_attn.q_proj: rows of 1"] * 2),
        (alone, ["rank 1 ended the run: here only.", "here only."]),
    ):
        results = forked(2, tmp_path, work)
        for (error, told), sentence, silent in zip(results, sentences, (False, True), strict=True):
            assert sentence in str(error) and told == silent
    assert not (tmp_path / "rows").exists() and not (tmp_path / "alone").exists()


def signalled(rank: int, number: signal.Signals) -> list[int]:
    """Have rank 1 get a signal at its sixth stage; gives the count of stages."""
    stages, observed = [0], nearplane.run.stage.observed

    def count(*args: Any) -> Any:
        stages[0] += 1
        if rank == 1 and stages[0] == 6:
            os.kill(os.getpid(), number)
        return observed(*args)

    nearplane.run.stage.observed = count
    return stages


def test_a_killed_rank_is_named_and_the_run_can_go_on(model: Path, tmp_path: Path) -> None:
    """Of three; resumed by two."""
    out = tmp_path / "out"

    def work(rank: int) -> None:
        exact()
        signalled(rank, signal.SIGKILL)
        run(model, out, method=NearPlane(), budget=5.5)

    first, killed, last = forked(3, tmp_path, work)
    assert killed is None and (out / STATE).is_dir()
    for (error, told), silent in ((first, False), (last, True)):
        assert told == silent
        assert str(error).startswith("rank 1 (last seen at model.layers.1.self_attn.o_proj) is gone or does not answer")

    def again(rank: int) -> Any:
        exact()
        nearplane.run.budget._measure = None  # type: ignore[assignment]  # what it chose is read back
        return run(model, out, method=NearPlane(), budget=5.5, resume=True).resumed

    def alone(_: int) -> None:
        os.environ["WORLD_SIZE"] = "1"
        exact()
        run(model, tmp_path / "alone", method=NearPlane(), budget=5.5)

    (tmp_path / "rank-1").unlink(missing_ok=True)
    assert forked(2, tmp_path, again) == [1, 1]
    forked(1, tmp_path, alone)
    same(out, tmp_path / "alone")


def test_a_signal_to_one_rank_stops_all_after_the_stage(model: Path, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        stages = signalled(rank, signal.SIGTERM)
        words = ["quantize", str(model), str(tmp_path / "out"), "--method", "gptq", "--nsamples", "7", "--seqlen", "24"]
        return main([*words, "--dataset", str(model.parent / "text.txt"), "--group-size", "16"]), stages[0]

    assert forked(2, tmp_path, work) == [(143, 6), (143, 6)]
    assert (tmp_path / "out" / STATE).is_dir()


def test_who_promises_independent_rows() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own(GPTQ):
        def solve(self, *args: Any) -> Any:
            return super().solve(*args)

    class Promised(Own):
        rows_independent = True

    assert all(rows_independent(method) for method in (RTN(), OBQ(), GPTQ(), GPTAQ(), ResComp(), Promised()))
    assert not rows_independent(NearPlane()) and not rows_independent(Own())


def test_devices(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    """Refused before anything is connected."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match="cuda:0 is one GPU, and this run has several ranks"):
        run(model, tmp_path / "out", device="cuda:0")
    if torch.cuda.device_count() < 2:
        with pytest.raises(SettingError, match="rank 1 of this machine has no GPU"):
            run(model, tmp_path / "out", device="cuda")


def test_the_command_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run was started: alone, on one machine, on several."""
    (tmp_path / STATE).mkdir()
    words = ["quantize", "demo", str(tmp_path)]
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}
    nodes = {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    for environment, before in (
        ({}, "with: nearplane"),
        (torchrun, "with: torchrun --nproc-per-node 4 -m nearplane"),
        (
            nodes,
            "on each of the 2 nodes and with your rendezvous options, with: torchrun --nnodes 2 --nproc-per-node 4 -m",
        ),
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        _how_to_resume(words)
        said = capsys.readouterr().err
        assert before in said and said.endswith(f" quantize demo {tmp_path} --resume\n")


DRIVER = """
import dataclasses, os, signal, sys
import torch, nearplane.api
from nearplane.cli.main import main
plan_of, observed, stages = nearplane.api.complete, nearplane.run.stage.observed, []
nearplane.api.complete = lambda *given: dataclasses.replace(plan_of(*given), compute=torch.float64)
def count(*args):
    stages.append(1)
    if os.environ["RANK"] == "1" and len(stages) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return observed(*args)
nearplane.run.stage.observed = count
sys.exit(main(sys.argv[1:]))
"""


def test_torchrun(model: Path, tmp_path: Path) -> None:
    """The launcher itself: a rank is killed, the launcher fails, what is left goes on in one process."""
    out = tmp_path / "out"
    (tmp_path / "driver.py").write_text(DRIVER)
    words = ["--method", "gptq", "--bits", "3", "--group-size", "16", "--no-sym", "--nsamples", "7", "--seqlen", "24"]
    words += ["--dataset", str(model.parent / "text.txt")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "driver.py"), "quantize", str(model), str(out), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode != 0
    told = "nearplane: rank 1 (last seen at model.layers.1.self_attn.o_proj) is gone or does not answer"
    assert done.stderr.count(told) == 1
    again_by = ["torchrun", "--nproc-per-node", "2", "-m", "nearplane", "quantize", str(model), str(out), *words]
    assert f"go on with: {shlex.join([*again_by, '--resume'])}\n" in done.stderr

    def again(_: int) -> None:
        os.environ["WORLD_SIZE"] = "1"
        exact(2048)
        run(model, out, resume=True)
        run(model, tmp_path / "alone")

    forked(1, tmp_path, again)
    same(out, tmp_path / "alone")
