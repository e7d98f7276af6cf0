"""A run that is ended at any instant goes on where it was, and ends in the same bytes."""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, NearPlane
from nearplane.cli.main import main
from nearplane.core import dense
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.formats import parts as write
from nearplane.formats.journal import STATE, Journal
from nearplane.formats.parts import Writer
from nearplane.formats.store import INDEX
from nearplane.models.values import fingerprint
from nearplane.run.forward import Forward, OnDisk

TIMES = ("seconds", "resumed", "memory")
GRID = Grid(bits=3, group_size=16, sym=False)
DENSE = [r"re:model\.layers\.0\.(self_attn\.[qkv]|mlp\.(gate|up))_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.with_text(tmp_path_factory.mktemp("resume"), num_hidden_layers=3)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')  # sub-folders resume, too
    return folder


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    run(model, model.parent / "whole")
    return contents(model.parent / "whole")


def run(model: Path, out: Path, **options: Any) -> nearplane.Report:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    settings = {"method": NearPlane(), "grid": GRID, "calibration": calibration, "progress": False, **options}
    return nearplane.quantize(model, out, **settings)


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; the report without times and its own name."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert b"<h1>" in found.pop("report.html")  # has times, too
    report = json.loads(found.pop("report.json"))
    for key in (*TIMES, "out"):
        report.pop(key)
    report["totals"].pop("seconds")
    for row in report["linears"]:
        row.pop("seconds")
    return {**found, "report.json": report}


def in_a_child(work: Callable[[], object]) -> int:
    """Run something in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def at_event(number: int, act: Callable[[], None], folder: Path) -> list[int]:
    """Act when files below ``folder`` are opened for writing, renamed or removed for the ``number``-th time."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[1] is not None and set(str(args[1])) & set("wax+")
        opened = (
            event == "open" and args[1] is None and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        changed = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if (writes or opened or changed) and str(args[0]).startswith(str(folder)) and seen[0] >= 0:
            seen[0] += 1
            if seen[0] == number:
                act()

    sys.addaudithook(hook)  # for good: only in a child
    return seen


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_ends_in_the_same_bytes(seed: int, model: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL between any two changes of the folder, again and again until the run gets through: 20 and more in all."""
    out, dice, deaths = tmp_path / "out", random.Random(seed), 0
    for attempt in range(30):
        step = dice.randint(1, 14 if attempt < 8 else 300)

        def work(step: int = step) -> None:
            at_event(step, kill, out)
            run(model, out, resume=True)

        if in_a_child(work) == 0:
            break
        deaths += 1
    assert deaths >= 5
    assert contents(out) == whole


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_mixture_that_is_ended_routes_the_reference_as_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of the reference stream follow the quantized stream's routing where finished blocks run again, too."""
    (tmp_path / "text.txt").write_text(tiny.text(3000))
    model = tiny.save(tiny.build_mixture(kind, num_hidden_layers=3), tmp_path / "model")
    grid = Grid(bits=2, group_size=16, sym=False)  # few bits: streams apart enough for other routes
    run(model, tmp_path / "whole", grid=grid, check=False)
    out = tmp_path / "out"
    journal, solve = out / STATE, NearPlane.solve

    def dies(self: NearPlane, *args: Any) -> Any:
        if "layers.1" in "".join(path.read_text(errors="ignore") for path in journal.glob("*.json*")):
            kill()  # the first two blocks are stored
        return solve(self, *args)

    monkeypatch.setattr(NearPlane, "solve", dies)
    assert in_a_child(lambda: run(model, out, grid=grid, check=False)) != 0
    monkeypatch.undo()
    led, route = [], Forward.route

    def noted(self: Forward, *args: Any) -> Any:
        led.append(self.leader is None or self.leader() is not None)
        return route(self, *args)

    monkeypatch.setattr(Forward, "route", noted)
    run(model, out, grid=grid, resume=True, check=False)
    assert len(led) >= 6 and all(led)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("block", [0, 1, 2])
def test_killed_while_a_shard_is_written(block: int, model: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []

    def half(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        calls.append(path)
        if len(calls) == block + 1:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            kill()

    def work() -> None:
        write.save_file = half  # type: ignore[assignment]
        run(model, out)

    assert os.WTERMSIG(in_a_child(work)) == signal.SIGKILL
    assert len(list(out.glob("part-*"))) == block and (out / STATE).is_dir()
    with pytest.raises(NearplaneError, match="holds a run that was not finished"):
        nearplane.load(out)
    with pytest.raises(SettingError, match="holds a run that was not finished; resume it"):
        run(model, out)
    report = run(model, out, resume=True)
    assert contents(out) == whole and report.resumed == 1


# An export that copies, of a run that is soon planned.
EXPORTED: dict[str, Any] = {"format": "gptq_v2", "method": RTN()}


@pytest.fixture(scope="module", autouse=True)
def several_shards() -> Iterator[None]:
    """A block's part is one file of this size, and a checkpoint of it several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Writer.__init__.__kwdefaults__, "shard_bytes", 40_000)
        yield


@pytest.fixture(scope="module")
def solved(model: Path) -> tuple[Path, dict[str, Any]]:
    """A folder whose blocks are all done, to be exported as gptq_v2, and what an uninterrupted run leaves."""
    out = model.parent / "solved"
    run(model, model.parent / "whole-gptq", **EXPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearplane.run.resume.Saver.finish", failing)
        with pytest.raises(OSError):
            run(model, out, **EXPORTED)
    return out, contents(model.parent / "whole-gptq")


def test_an_export_killed_anywhere_ends_in_the_same_bytes(
    model: Path, solved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL at every single change of the folder, from the first block's part that is packed to the last one removed."""
    deaths = 0
    for step in range(1, 200):
        out = shutil.copytree(solved[0], tmp_path / str(step))

        def work(step: int = step, out: Path = out) -> None:
            at_event(step, kill, out)
            run(model, out, resume=True, **EXPORTED)

        if in_a_child(work) == 0:
            assert contents(out) == solved[1]
            break
        deaths += 1
        if (out / INDEX).exists():  # from here on a checkpoint that can be read, whatever else is there
            assert len(list(out.glob("model-*"))) == 4 and (out / "config.json").exists()
        else:
            assert len(list(out.glob("part-*"))) == 3
        if (out / STATE).exists():
            run(model, out, resume=True, **EXPORTED)
        assert contents(out) == solved[1]
        shutil.rmtree(out)
    assert deaths > 40


def test_an_export_onto_a_full_disk(model: Path, solved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """One sentence; the parts stay, what was begun of the shards does not, and the next run ends in the same bytes."""
    for step in range(1, 60, 3):
        out, told = shutil.copytree(solved[0], tmp_path / str(step)), tmp_path / f"told-{step}.txt"

        def work(step: int = step, out: Path = out, told: Path = told) -> None:
            def full() -> None:
                raise OSError(28, "No space left on device")

            at_event(step, full, out)
            try:
                run(model, out, resume=True, **EXPORTED)
            except NearplaneError as error:
                told.write_text(str(error))
                return
            told.write_text("done")

        assert in_a_child(work) == 0
        if told.read_text() != "done":
            assert "No space left" in told.read_text()
            if "is complete, but" not in told.read_text():
                assert len(list(out.glob("part-*"))) == 3 and not list(out.glob("shard-*"))
                assert not list(out.glob("*.safetensors")) and not (out / INDEX).exists()
            run(model, out, resume=True, **EXPORTED)
        assert contents(out) == solved[1]


def test_what_is_complete_is_not_written_again(
    model: Path, solved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Killed while tidying up: the checkpoint stays as it is, whatever of the records is gone."""
    whole = model.parent / "whole-gptq"
    for removed in (0, 1, 3):
        out = shutil.copytree(solved[0], tmp_path / str(removed))
        shutil.copytree(whole, out, dirs_exist_ok=True)
        for number in range(3, 3 - removed, -1):
            (out / STATE / f"block-{number - 1:05}.json").unlink()
        files = [path for path in out.glob("*") if path.is_file() and "part-" not in path.name]
        before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
        if removed < 3:  # a record is there to compare with
            with pytest.raises(SettingError):
                run(model, out, resume=True, **{**EXPORTED, "method": GPTQ()})
        method = Refusing() if removed == 3 else RTN()  # nothing is solved again
        report = run(model, out, resume=True, **{**EXPORTED, "method": method, "force": True})
        assert len(report.linears) == 21 and report.bytes["after"] > report.bytes["dense"] > 0
        assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before
        assert contents(out) == solved[1]


class Refusing(NearPlane):
    """A method that can solve nothing."""

    def solve(self, *_: Any) -> Any:
        raise NumericalError("nothing can be solved.")


def test_a_run_of_an_earlier_version_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2; nothing is changed."""
    out = tmp_path / "out"
    interrupted(model, out, 9)
    for number in range(2):
        rewrite(out, number, lambda record: record.pop("layout"))
    before = contents_of_state(out)
    told = "holds a run that an earlier version of nearplane began"
    with pytest.raises(SettingError, match=told):
        run(model, out, resume=True)
    assert main(["quantize", str(model), str(out), "--resume", "--method", "rtn"]) == 2
    assert capsys.readouterr().err.count(told) == 1 and contents_of_state(out) == before


@pytest.mark.parametrize("sym", [True, False])
def test_a_run_from_before_negative_scales_goes_on_without_them(sym: bool, model: Path, tmp_path: Path) -> None:
    """Its record has no such setting. A symmetric run is told what to give; an asymmetric one has no need of it."""
    out, positive = tmp_path / "out", {"grid": dataclasses.replace(GRID, sym=sym, negative_scales=False)}
    either = {"grid": dataclasses.replace(GRID, sym=sym)}
    run(model, tmp_path / "whole", **positive)
    interrupted(model, out, 9, **positive)
    for number in range(2):
        rewrite(out, number, lambda record: record["run"].pop("grid.negative_scales"))
    if sym:
        with pytest.raises(SettingError, match=r"grid\.negative_scales was False when .* was begun and is True now"):
            run(model, out, resume=True, **either)
    run(model, out, resume=True, **(positive if sym else either))
    before, after = contents(tmp_path / "whole"), contents(out)
    said = ("report.json", "README.md")  # of what was given
    assert {n: b for n, b in before.items() if n not in said} == {n: b for n, b in after.items() if n not in said}
    assert not any("negative_scales" in event for event in after["report.json"]["events"])


def test_killed_at_random_times(model: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """By the clock, from outside, wherever that falls."""
    dice = random.Random(7)
    out = tmp_path / "out"
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                run(model, out, resume=True)
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (out / INDEX).exists() and not (out / STATE).exists():
            break
    else:
        run(model, out, resume=True)
    assert contents(out) == whole


def test_a_full_disk_at_any_write_keeps_what_is_done(model: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Each change of the folder in turn is refused: one sentence, no half of a file under a name that counts."""
    for number in range(1, 44, 6):
        out, told = tmp_path / str(number), tmp_path / f"told-{number}.txt"

        def work(number: int = number, out: Path = out, told: Path = told) -> None:
            def full() -> None:
                raise OSError(28, "No space left on device")

            at_event(number, full, out)
            try:
                run(model, out)
            except NearplaneError as error:
                told.write_text(str(error))
                return
            told.write_text("done")

        assert in_a_child(work) == 0
        if told.read_text() == "done":  # where a refusal does no harm, such as in tidying up
            assert contents(out) == whole
            continue
        assert "No space left" in told.read_text()
        assert "is complete, but" in told.read_text() or not list(out.glob("*.safetensors"))
        run(model, out, resume=True)
        assert contents(out) == whole


def test_offloaded_hidden_states_change_nothing(model: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """And leave nothing behind, also where the run fails."""
    run(model, tmp_path / "out", offload=tmp_path / "deep" / "scratch")
    assert contents(tmp_path / "out") == whole
    assert not any((tmp_path / "deep" / "scratch").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(NearplaneError, match=r"file/scratch for hidden states cannot be written to"):
        run(model, tmp_path / "again", offload=tmp_path / "file" / "scratch")


def interrupted(model: Path, out: Path, after: int, method: NearPlane | None = None, **options: Any) -> None:
    """A run that ends after so many stages."""
    calls: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class NearPlaneThatStops(NearPlane):
        def solve(self, *args: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return super().solve(*args)

    NearPlaneThatStops.__name__ = "NearPlane"
    stopping = NearPlaneThatStops(**dataclasses.asdict(method or NearPlane()))
    with pytest.raises(KeyboardInterrupt):
        run(model, out, method=stopping, **options)


@pytest.mark.parametrize("after", [2, 4, 6])
def test_a_coarse_reference_goes_on_in_the_same_bytes(
    after: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its linears are rounded does not depend on when weights are put in place: q, k, v and up of block 0 stay dense."""
    monkeypatch.setattr(dense, "bfloat16_is_fast", lambda: True)
    exact = run(model, tmp_path / "exact", ignore=DENSE)
    monkeypatch.setattr(dense, "LEAST_COARSE", 1)
    coarse = run(model, tmp_path / "whole", ignore=DENSE)
    assert coarse.totals["mean_error"] != exact.totals["mean_error"]
    interrupted(model, tmp_path / "out", after, ignore=DENSE)
    run(model, tmp_path / "out", ignore=DENSE, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_changed_setting_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(model, out, 5)
    before = sorted(path.name for path in out.rglob("*"))
    text = str(model.parent / "text.txt")
    for changed, name in (
        ({"grid": dataclasses.replace(GRID, bits=4)}, r"grid\.bits was 3 when .* was begun and is 4 now"),
        ({"method": GPTQ()}, r"method\.name was 'NearPlane'"),
        ({"format": "gptq_v2"}, "format was 'compressed-tensors'"),
        ({"calibration": Calibration(dataset=text, nsamples=8, seqlen=24, seed=1)}, r"calibration\.seed was 0"),
    ):
        with pytest.raises(SettingError, match=name):
            run(model, out, resume=True, **changed)
        assert sorted(path.name for path in out.rglob("*")) == before
    original = (model.parent / "text.txt").read_text()
    (model.parent / "text.txt").write_text("Another text. " + original)
    try:
        with pytest.raises(SettingError, match="calibration text is not the one"):
            run(model, out, resume=True)
    finally:
        (model.parent / "text.txt").write_text(original)


def test_a_rotated_run_goes_on_with_the_same_rotation_only(model: Path, tmp_path: Path) -> None:
    out, turned = tmp_path / "out", {"rotate": "r1,r2,r4", "rotate_seed": 1}
    run(model, tmp_path / "whole", **turned)
    interrupted(model, out, 5, **turned)
    for changed, name in (
        ({}, r"rotate\.kinds was \['r1', 'r2', 'r4'\] when .* was begun and is None now"),
        ({"rotate": "r1", "rotate_seed": 1}, r"rotate\.kinds was \['r1', 'r2', 'r4'\] when .* and is \['r1'\] now"),
        ({"rotate": "r1,r2,r4", "rotate_seed": 2}, r"rotate\.seed was 1 when .* was begun and is 2 now"),
    ):
        with pytest.raises(SettingError, match=name):
            run(model, out, resume=True, **changed)
    run(model, out, resume=True, **turned)
    assert contents(out) == contents(tmp_path / "whole")
    interrupted(model, tmp_path / "plain", 5)
    with pytest.raises(SettingError, match=r"rotate\.kinds was None when .* was begun and is \['r1'\] now"):
        run(model, tmp_path / "plain", resume=True, rotate="r1")


def test_damping_and_samples_may_change_for_the_blocks_to_come(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(model, out, 5)
    text = str(model.parent / "text.txt")
    report = run(
        model,
        out,
        resume=True,
        method=NearPlane(damp_percent=0.05),
        calibration=Calibration(text, nsamples=12, seqlen=24),
    )
    first, last = report.linears[0], report.linears[-1]
    assert first.tokens == 8 * 24 and last.tokens == 12 * 24
    assert any("method.damp_percent was 0.1 in the blocks before model.layers.1" in event for event in report.events)
    assert any("calibration.nsamples was 8" in event for event in report.events)
    nearplane.load(out)


def test_what_an_earlier_resume_changed_is_still_told(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changed = {"method": NearPlane(damp_percent=0.05), "resume": True}
    interrupted(model, out, 5)
    interrupted(model, out, 5, **changed)  # one block more
    report = run(model, out, **changed)
    told = [event for event in report.events if "damp_percent" in event]
    assert len(told) == 1 and "in the blocks before model.layers.1 and is 0.05 from there on" in told[0]
    assert next(row.damp_percent for row in report.linears if "o_proj" in row.name) != 0.05 and report.resumed == 2


def copied(model: Path, folder: Path) -> Path:
    """The model and its text in another place, to be changed."""
    shutil.copytree(model, folder / "model")
    shutil.copy(model.parent / "text.txt", folder / "text.txt")
    return folder / "model"


def change(folder: Path, name: str) -> None:
    """Another weight of the same shape: its last number, by one bit."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1).view(torch.int32)[-1] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite(out: Path, number: int, act: Callable[[dict[str, Any]], object]) -> None:
    """Change a record, and keep it whole."""
    journal = Journal(out)
    record = journal.records()[0][number]
    act(record)
    journal.add(number, record)


@pytest.mark.parametrize("done", ["one block", "all blocks"])
def test_other_weights_of_the_same_shapes_are_refused(done: str, model: Path, tmp_path: Path) -> None:
    """Also where no block is opened again, by a sample of each. What is not done yet may be mended meanwhile."""
    source, out = copied(model, tmp_path), tmp_path / "out"
    if done == "one block":
        interrupted(source, out, 5)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nearplane.run.resume.Saver.finish", failing)
            with pytest.raises(OSError):
                run(source, out)
    first, last = "model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.k_proj.weight"
    name = first if done == "one block" else last
    for changed, told in (
        (name, rf"weights of {name[:14]} in .*model differ from those the finished block was made of \({name}\)"),
        ("model.embed_tokens.weight", r"what is copied from .*model \(embeddings, norms and the like\) differs"),
    ):
        change(source, changed)
        with pytest.raises(SettingError, match=told):
            run(source, out, resume=True)
        change(source, changed)  # back again
    if done == "one block":
        change(source, last)
    assert run(source, out, resume=True).resumed == 1


def test_another_number_of_ranks_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the report and on the screen; not where no sum over tokens can differ. A folder without a block, too."""
    for method, count in ((NearPlane(), 1), (RTN(), 0)):
        out = tmp_path / str(count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nearplane.run.resume.Saver.finish", failing)
            with pytest.raises(OSError):
                run(model, out, method=method, resume=True, progress=True)
        assert f"{out} holds no finished block to go on after: a new run begins" in capsys.readouterr().err
        rewrite(out, 0, lambda record: record.update(ranks=2))
        events = run(model, out, method=method, resume=True, progress=True).events
        told = [
            event
            for event in events
            if event.startswith("the number of ranks was 2 in the blocks before model.layers.1 ")
        ]
        said = capsys.readouterr().err
        assert len(told) == count == said.count("note: the number of ranks was 2") and "a new run begins" not in said


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 4104, 13001])
def test_a_fingerprint_sees_every_bit(size: int) -> None:
    value = torch.randint(0, 256, (size,), dtype=torch.uint8)
    first = fingerprint(value)
    for place in {*range(0, size, 97), *([size - 1] if size else [])}:
        value[place] ^= 1 << place % 8
        assert fingerprint(value) != first
        value[place] ^= 1 << place % 8
    assert fingerprint(value.clone()) == first


def test_what_has_to_be_mended_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an error the same command would meet it again."""

    def fail(*_: Any, **__: Any) -> None:
        raise NumericalError("weight w holds 1 NaN or Inf values.")

    monkeypatch.setattr("nearplane.api.quantize", fail)
    (tmp_path / STATE).mkdir()
    assert main(["quantize", "demo", str(tmp_path)]) == 2
    told = f"finished blocks are kept; once that is mended, go on with: nearplane quantize demo {tmp_path} --resume\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("what", ["record", "shard"])
def test_a_damaged_state_falls_back_to_the_last_good_block(
    what: str, model: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(model, out, 9)
    assert len(list((out / STATE).glob("block-*.json"))) == 2
    path = out / STATE / "block-00001.json" if what == "record" else next(out.glob("part-00002*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = run(model, out, resume=True)
    assert report.events[-1].endswith(f"{path.name} is damaged") or any(path.name in e for e in report.events)
    found, expected = contents(out), dict(whole)
    found["report.json"]["events"] = expected["report.json"]["events"]
    assert found == expected


def test_a_state_that_cannot_be_read_is_not_removed(
    model: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails while a run is resumed costs nothing of what the run had done."""
    out = tmp_path / "out"
    interrupted(model, out, 9)
    before = contents_of_state(out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(NearplaneError, match=r"block-00000\.json cannot be read: .*Input/output error"):
            run(model, out, resume=True)
    assert contents_of_state(out) == before
    run(model, out, resume=True)
    assert contents(out) == whole


def contents_of_state(out: Path) -> dict[str, bytes]:
    found = [path for path in out.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.name: path.read_bytes() for path in found}


def failing(*_: Any) -> bytes:
    raise OSError(5, "Input/output error")


def test_hidden_states_on_a_full_disk(tmp_path: Path) -> None:
    states = OnDisk(tmp_path, "quantized", 1)
    states.paths[0].symlink_to("/dev/full")
    with pytest.raises(NearplaneError, match=r"hidden states cannot be offloaded to .* \(0\.004 GB\)"):
        states[0] = torch.zeros(1000, 1000)
    assert states[0] is None


def test_two_runs_on_one_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    journal = Journal(out)
    journal.lock()
    for resume in (False, True):
        with pytest.raises(NearplaneError, match=rf"is being written by process {os.getpid()} on .*, since 20"):
            run(model, out, resume=resume)
    journal.release()
    run(model, out, resume=True, method=RTN())
    with pytest.raises(SettingError, match="is finished; there is nothing to resume"):
        run(model, out, resume=True)


def test_nan_in_a_block_is_named_and_the_blocks_before_it_are_safe(
    model: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "model")
    file = broken / "model.safetensors"
    good = file.read_bytes()
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    (tmp_path / "text.txt").write_text((model.parent / "text.txt").read_text())
    out = tmp_path / "out"
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        run(broken, out)
    file.write_bytes(good)
    run(broken, out, resume=True)
    found = contents(out)
    assert {k: v for k, v in found.items() if k != "report.json"} == {
        k: v for k, v in whole.items() if k != "report.json"
    }


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_stage_and_says_how_to_go_on(
    number: signal.Signals, status: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, solve, calls = tmp_path / "out", GPTQ.solve, []

    def signalled(self: GPTQ, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return solve(self, *args)

    monkeypatch.setattr(GPTQ, "solve", signalled)
    words = ["quantize", str(model), str(out), "--method", "gptq", "--bits", "3", "--group-size", "16"]
    words += ["--dataset", str(model.parent / "text.txt"), "--nsamples", "8", "--seqlen", "24"]
    assert main(words) == status
    told = capsys.readouterr().err
    assert "stopping after this stage" in told and len(calls) == 6
    assert f"finished blocks are kept; go on with: nearplane {' '.join(words)} --resume" in told
    assert main([*words, "--resume"]) == 0
    assert "1 of 3 blocks are done" in capsys.readouterr().err.replace("\n", " ")
    nearplane.load(out)
