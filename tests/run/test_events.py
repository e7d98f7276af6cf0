"""What the walk yields, and that reports are made of nothing else."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
import nearplane.core.grid
from nearplane.run.events import BlockDone, Compared, Noted, Solved, StageDone
from nearplane.run.plan import make_plan
from nearplane.run.walk import walk


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("events"))


def settings(model: Path, **more: Any) -> dict[str, Any]:
    text = str(model.parent / "text.txt")
    return {"bits": 3, "group_size": 32, "nsamples": 4, "seqlen": 32, "dataset": text, "device": "cpu", **more}


@pytest.mark.parametrize("method", ["rtn", "gptq", "nearplane"])
def test_events_come_in_the_order_of_the_work(model: Path, tmp_path: Path, method: str) -> None:
    plan = make_plan(model, **settings(model, method=method))
    events = [event for event in walk(plan) if not isinstance(event, Noted)]
    expected: list[tuple[type, str]] = []
    for block in plan.blocks:
        for stage in block.stages:
            expected += [(Solved, site.name) for site in stage] + [(StageDone, stage[0].name)]
        if block is plan.blocks[-1]:
            expected.append((Compared, block.name))
        expected.append((BlockDone, block.name))

    def name(event: Any) -> str:
        if isinstance(event, Solved):
            return event.site.name
        if isinstance(event, Compared):
            return str(event.record["block"])
        return event.stage[0].name if isinstance(event, StageDone) else event.block.name

    assert [(type(event), name(event)) for event in events] == expected
    assert [e.last for e in events if isinstance(e, StageDone)] == [
        s is b.stages[-1] for b in plan.blocks for s in b.stages
    ]
    phases = {"forward", "solve", "measure", "check"} | ({"observe", "prepare"} if method != "rtn" else set())
    assert all(event.seconds.keys() == phases for event in events if isinstance(event, BlockDone))
    report = nearplane.quantize(model, tmp_path / "out", progress=False, **settings(model, method=method))
    rows = [event.row for event in events if isinstance(event, Solved)]
    assert [(r.name, r.error, r.rounds) for r in report.linears] == [(r.name, r.error, r.rounds) for r in rows]
    assert report.bytes["quantized"] == sum(event.nbytes for event in events if isinstance(event, Solved))


def test_what_is_yielded_is_in_place(model: Path) -> None:
    """A reader may look at the live weight: it is the dequantized one."""
    plan = make_plan(model, **settings(model, method="gptq"))
    for event in walk(plan):
        if isinstance(event, Solved):
            live = event.site.weight(plan.source.model)
            assert torch.equal(live, nearplane.core.grid.dequantize(event.quantized, event.grid))


def test_a_model_is_opened_and_discovered_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a run that is checked against this machine first."""
    from nearplane.models import source
    from nearplane.run import plan

    counts = {"skeletons": 0, "probes": 0}
    build, discover = source.build_skeleton, plan.discover

    def built(*args: Any, **kwargs: Any) -> Any:
        counts["skeletons"] += 1
        return build(*args, **kwargs)

    def discovered(*args: Any) -> Any:
        counts["probes"] += 1
        return discover(*args)

    monkeypatch.setattr(source, "build_skeleton", built)
    monkeypatch.setattr(plan, "discover", discovered)
    nearplane.quantize(model, tmp_path / "out", progress=False, **settings(model))
    assert counts == {"skeletons": 1, "probes": 1}


@pytest.mark.parametrize("method", ["rtn", "nearplane"])
def test_weights_that_lie_on_the_grid_are_told(model: Path, tmp_path: Path, method: str) -> None:
    """A model that was quantized to a grid loses nothing on it: the report says why its errors are 0."""
    asked = {"sym": False, "fit": "minmax", "dtype": "float32", "progress": False}
    once = nearplane.quantize(model, tmp_path / "once", **settings(model, method="rtn", **asked))
    assert not any("lie on this grid" in event for event in once.events)
    nearplane.load(tmp_path / "once", packed=False).save_pretrained(tmp_path / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / file).write_bytes((model / file).read_bytes())
    told = "have weights that lie on this grid already, as those of a model that was quantized to it: they are"
    twice = nearplane.quantize(tmp_path / "dense", tmp_path / "twice", **settings(model, method=method, **asked))
    assert [event for event in twice.events if "lie on this grid" in event] == [
        f"all 14 linears {told} kept as they are, and their errors of 0 measure no grid and no method"
    ]
    assert max(row.weight_error for row in twice.linears) < 1e-11
    assert nearplane.run.report.Report.read(tmp_path / "twice").events == twice.events
    again = {**asked, "override": {"down_proj": {"bits": 2}}}
    part = nearplane.quantize(tmp_path / "dense", tmp_path / "part", **settings(model, method="rtn", **again))
    assert any(
        event.startswith("12 of 14 linears, the first model.layers.0.") and told in event for event in part.events
    )
    fine = nearplane.quantize(model, tmp_path / "fine", **settings(model, method="rtn", **{**asked, "bits": 8}))
    assert not any("lie on this grid" in event for event in fine.events)
