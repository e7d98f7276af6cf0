"""Blocks with nothing to quantize: those behind the last linear are not run, and the time left counts the others."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_resume import at_event, contents, in_a_child

import nearplane
import nearplane.run.stream
from nearplane import GPTQ, RTN, Calibration, Grid, NearPlane
from nearplane.cli.terminal import Terminal
from nearplane.models.source import Source
from nearplane.run.estimate import estimate
from nearplane.run.events import BlockDone
from nearplane.run.forward import Forward
from nearplane.run.plan import make_plan

GRID = Grid(bits=4, group_size=32)
LATER = ("layers.[234]",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("ignored"), num_hidden_layers=5)


def run(model: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    settings = {"method": NearPlane(), "grid": GRID, "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(model, out, **settings)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that forwards run, in the walk."""
    found: list[int] = []
    block = Forward.block

    def counted(self: Forward, i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        found.extend([i] if i == self.k else [])
        return block(self, i, original, *args, **kwargs)

    monkeypatch.setattr(Forward, "block", counted)
    return found


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("options", [{}, {"method": GPTQ()}, {"budget": 5.0, "method": GPTQ()}], ids=str)
def test_blocks_behind_the_last_linear_are_neither_read_nor_run(
    paused: bool, options: dict[str, Any], model: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not paused:
        monkeypatch.setattr(nearplane.run.stream, "IN_FLIGHT_BYTES", 0)
    loaded, load = [], Source.load

    def noted(self: Source, prefix: str, *args: Any, **kwargs: Any) -> None:
        loaded.append(prefix)
        load(self, prefix, *args, **kwargs)

    monkeypatch.setattr(Source, "load", noted)
    report = run(model, tmp_path / "out", ignore=LATER, check=False, **options)
    assert set(ran) == {0, 1}
    assert {name for name in loaded if "layers." in name} == {"model.layers.0", "model.layers.1"}
    assert len(report.linears) == 14
    assert "3 blocks after model.layers.1 hold nothing to quantize and are not run" in report.events
    nearplane.load(tmp_path / "out")(input_ids=tiny.tokens(1, 8))


def test_the_check_runs_them_on_its_windows(model: Path, tmp_path: Path, ran: list[int]) -> None:
    """Which is said, and the run has its KL."""
    report = run(model, tmp_path / "out", ignore=("layers.4",), method=GPTQ())
    assert set(ran) == {0, 1, 2, 3, 4} and report.check["kl"] > 0
    told = "1 blocks after model.layers.3 hold nothing to quantize and are not run, but for the windows of the check"
    assert any(event.startswith(told) for event in report.events)


def test_the_check_ends_where_most_blocks_come_behind(model: Path, tmp_path: Path, ran: list[int]) -> None:
    report = run(model, tmp_path / "out", ignore=LATER, method=GPTQ())
    assert set(ran) == {0, 1} and "kl" not in report.check and report.check["error"] > 0
    assert report.check["unanswered"] == "most blocks come behind model.layers.1 and are not run"


def test_no_block_that_has_a_linear_yet_is_left_out(model: Path, tmp_path: Path, ran: list[int]) -> None:
    """Dense blocks before and between are run; the last block's only linear is solved."""
    report = run(
        model, tmp_path / "out", ignore=("layers.[02]", "layers.3.*(q|k|v|o|gate|up)_proj", "layers.4"), check=False
    )
    assert set(ran) == {0, 1, 2, 3} and report.linears[-1].name == "model.layers.3.mlp.down_proj"
    ran.clear()
    report = run(model, tmp_path / "head", ignore=("layers",), head_bits=8, check=False)
    assert set(ran) == {0, 1, 2, 3, 4} and len(report.linears) == 1  # the head reads what comes out of all
    assert not any("not run" in event for event in report.events)


def test_the_codes_are_those_of_the_whole_run(model: Path, tmp_path: Path) -> None:
    """What later blocks would have computed changes nothing before them."""
    some, whole = (run(model, tmp_path / name, ignore=ignore) for name, ignore in (("some", LATER), ("whole", ())))
    found, expected = nearplane.load(tmp_path / "some"), nearplane.load(tmp_path / "whole")
    for name in [row.name for row in some.linears]:
        x = torch.randn(3, found.get_submodule(name).in_features)
        assert torch.equal(found.get_submodule(name)(x), expected.get_submodule(name)(x)), name
    assert [row.error for row in some.linears] == [row.error for row in whole.linears[:14]]


def test_a_decoder_behind_the_last_linear_is_not_run(tmp_path: Path, ran: list[int]) -> None:
    folder = tiny.save(tiny.build("bart"), tmp_path / "model")
    report = nearplane.quantize(folder, tmp_path / "out", method=RTN(), grid=GRID, towers=("encoder",), progress=False)
    assert ran == [] and all(".encoder." in row.name for row in report.linears)
    assert any("hold nothing to quantize and are not run" in event for event in report.events)


def test_a_killed_run_goes_on_and_a_finished_one_is_known_as_such(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole", ignore=LATER)
    out = tmp_path / "killed"

    def die() -> None:
        raise SystemExit(9)

    def cut() -> None:
        at_event(24, die, out)
        run(model, out, ignore=LATER)

    assert in_a_child(cut) != 0
    assert run(model, out, ignore=LATER, resume=True).resumed == 1
    assert contents(out) == contents(tmp_path / "whole")
    report = json.loads((out / "report.json").read_text())
    assert len({row["name"].split(".")[2] for row in report["linears"]}) == 2


def test_the_bar_and_the_time_left_count_what_is_solved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense block says nothing of how long others take; what is not run is not waited for."""
    stream, now = io.StringIO(), [0.0]
    show = Terminal(stream=stream)
    take = show.take

    def slow(event: Any) -> None:
        if isinstance(event, BlockDone):  # 1 s for a dense block, 60 s for another
            now[0] += 60 if event.block.stages else 1
        take(event)

    monkeypatch.setattr(show, "take", slow)
    monkeypatch.setattr("nearplane.cli.terminal.time.perf_counter", lambda: now[0])
    run(model, tmp_path / "out", ignore=("layers.[024]",), show=show, progress=True)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("block ")]
    assert [line[:9] for line in lines] == ["block 1/4", "block 2/4", "block 3/4", "block 4/4"]
    assert lines[0].endswith("no linear  1.0s") and lines[1].endswith("60.0s  eta 1:00")
    assert lines[2].endswith("no linear  1.0s  eta 1:00") and lines[3].endswith("60.0s")


def test_the_estimate_counts_what_is_run(model: Path) -> None:
    """Blocks that are not run have no part in it."""
    settings: dict[str, Any] = {
        "method": GPTQ(),
        "grid": GRID,
        "dataset": str(model.parent / "text.txt"),
        "sketch": True,
    }
    whole, some = (make_plan(model, ignore=ignore, **settings) for ignore in ((), LATER))
    assert [len(plan.walked) for plan in (whole, some)] == [5, 2] and len(some.blocks) == 5
    assert all("layers.0" in m.where or m.where.startswith("the ") for m in estimate(some).memory)
