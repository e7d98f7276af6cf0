"""``--tune``: scales, norms and biases move after the codes stand, and never for the worse."""

import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import templates
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import nearplane
from nearplane import Calibration, Grid, Job
from nearplane.cli.summary import summary
from nearplane.core.errors import SettingError
from nearplane.core.grid import by_column, fit_groups, round_to_nearest
from nearplane.core.scales import Affine
from nearplane.data.fresh import STRIDE, join, rows_of
from nearplane.formats.journal import STATE
from nearplane.run import estimate, student, tune
from nearplane.run.check import checked_tokens
from nearplane.run.plan import Plan, complete, draft

GRID = Grid(bits=3, group_size=16, sym=False)
STEPS = 12


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "STEP_TOKENS", 192)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tiny.build("llama", num_hidden_layers=2), tmp_path_factory.mktemp("tune"))


def made(kind: Any, folder: Path, words: int = 3000) -> Path:
    (folder / "text.txt").write_text(tiny.text(words))
    return tiny.save(kind, folder / "model")


def job(model: Path, **settings: Any) -> Job:
    calibration = Calibration(dataset=str(model.parent / "text.txt"), nsamples=8, seqlen=24)
    return Job.of(**{"grid": GRID, "calibration": calibration, "tune": STEPS, **settings})


def run(model: Path, out: Path, **settings: Any) -> nearplane.Report:
    return nearplane.quantize(model, out, job(model, **settings), progress=False)


def plan_of(model: Path, **settings: Any) -> Plan:
    return complete(draft(model, job(model, **settings)))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def hashes(folder: Path) -> dict[str, str]:
    """Every file's hash but those of the report and its page, whose times differ, and of the card, which names --tune."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.stem != "report" and p.name != "README.md")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def divergence(original: Path, folder: Path, batch: dict[str, Tensor]) -> float:
    """KL per token of a folder as it is loaded, by the definition, in float64."""
    with torch.no_grad():
        p, q = (
            nearplane.load(some, packed=False)(**batch).logits.double().log_softmax(-1) for some in (original, folder)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def only(values: dict[str, float]) -> float:
    (value,) = values.values()
    return value


@pytest.fixture(scope="module")
def both(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nearplane.Report]:
    """Checkpoints without and with a tuning, and the latter's report."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "STEP_TOKENS", 192)
        run(model, folder / "solved", tune=0)
        return folder / "solved", folder / "tuned", run(model, folder / "tuned")


def test_codes_and_sizes_stay_and_scales_and_norms_move(both: tuple[Path, Path, nearplane.Report]) -> None:
    solved, tuned = tensors(both[0]), tensors(both[1])
    assert solved.keys() == tuned.keys()
    differ = {name for name in solved if not torch.equal(solved[name], tuned[name])}
    norms = {name for name in solved if "norm" in name}
    assert differ == {name for name in solved if name.endswith("weight_scale")} | norms and len(norms) == 5
    assert all(solved[name].dtype == tuned[name].dtype and solved[name].shape == tuned[name].shape for name in solved)
    sizes = [{path.name: path.stat().st_size for path in folder.glob("*.safetensors")} for folder in both[:2]]
    assert sizes[0] == sizes[1]
    assert (both[0] / "config.json").read_text() == (both[1] / "config.json").read_text()


def test_what_was_judged_is_what_is_stored(both: tuple[Path, Path, nearplane.Report], model: Path) -> None:
    """Both figures of the report are those of the two checkpoints, on the windows that nothing else has seen."""
    record, plan = both[2].tuning, plan_of(model)
    assert record is not None and plan.fresh is not None and record["kept"] > 0
    (held,) = plan.fresh.held.values()
    assert only(record["before"]) == pytest.approx(divergence(model, both[0], held), rel=1e-4)
    assert only(record["after"]) == pytest.approx(divergence(model, both[1], held), rel=1e-4)
    assert only(record["after"]) < 0.98 * only(record["before"])
    text = tiny.tokens(16, 24, seed=99)  # windows of another text
    assert divergence(model, both[1], {"input_ids": text}) < divergence(model, both[0], {"input_ids": text})


def test_the_report_and_the_summary_say_what_was_done(both: tuple[Path, Path, nearplane.Report]) -> None:
    report = nearplane.Report.read(both[1])
    assert report.tuning == json.loads(json.dumps(both[2].tuning))
    assert report.settings["tune"] == STEPS and report.seconds["tune"] > 0
    record = both[2].tuning
    assert record is not None
    before, after = only(record["before"]), only(record["after"])
    line = f"tuned: held-out KL {before:.4g} -> {after:.4g}, by step {record['kept']} of {STEPS}; codes and sizes are the same"
    assert line in summary(both[2])
    assert "tune" not in nearplane.Report.read(both[0]).settings


def test_two_runs_are_one(both: tuple[Path, Path, nearplane.Report], model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(both[1])


def test_what_does_not_help_is_undone(
    both: tuple[Path, Path, nearplane.Report], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "SCALES", 0.2)
    monkeypatch.setattr(student, "OTHERS", 0.2)
    report = run(model, tmp_path / "out")
    record = report.tuning
    assert record is not None and record["kept"] == 0 and record["done"] == 2 * tune.APART < STEPS  # and ended early
    assert record["after"] == record["before"]
    assert hashes(tmp_path / "out") == hashes(both[0])
    assert any("8 steps did not help" in event and "undone" in event for event in report.events)
    assert "tuned:" not in summary(report)


def test_no_source_may_be_worse() -> None:
    course = tune.Progress()
    assert not course.take(0, {"a": 1.0, "b": 2.0})
    assert course.take(4, {"a": 0.9, "b": 2.0})
    assert not course.take(8, {"a": 0.1, "b": 2.01}) and not course.take(12, {"a": float("nan"), "b": 1.0})
    assert course.kept == 4 and course.stale == 2
    assert course.record()["after"] == {"a": 0.9, "b": 2.0}


def interrupting(patch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> list[int]:
    """Act before the ``at``-th step from now on; counts the steps taken."""
    taken, step = [0], tune._Work._step

    def counted(self: Any, share: float) -> None:
        if taken[0] + 1 == at:
            act()
        taken[0] += 1
        step(self, share)

    patch.setattr(tune._Work, "_step", counted)
    return taken


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_tuning_goes_on_where_it_was_judged(
    both: tuple[Path, Path, nearplane.Report], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, 10, interrupt)  # which is heard before the next step
        run(model, out)
    assert (out / STATE / tune.FILE).is_file() and not (out / "model.safetensors.index.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        taken = interrupting(patch, 0, interrupt)
        report = run(model, out, resume=True)
    assert taken[0] == STEPS - 8  # it was judged after 8 steps
    assert hashes(out) == hashes(both[1]) and report.resumed == 1
    assert report.tuning == both[2].tuning


def test_a_killed_tuning_and_another_number_of_steps(model: Path, tmp_path: Path) -> None:
    """A tuning of other steps begins anew from the same codes."""
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        with pytest.MonkeyPatch.context() as patch:
            interrupting(patch, 6, lambda: os._exit(9))
            run(model, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (out / STATE / tune.FILE).is_file()
    report = run(model, out, resume=True, tune=5)
    assert report.tuning is not None and report.tuning["steps"] == 5 and report.settings["tune"] == 5
    run(model, tmp_path / "five", tune=5)
    assert hashes(out) == hashes(tmp_path / "five")


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_state_is_another_beginning(
    damage: bytes | None, both: tuple[Path, Path, nearplane.Report], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupting(patch, 7, interrupt)
        run(model, out)
    state = out / STATE / tune.FILE
    state.write_bytes(state.read_bytes()[:-100] if damage is None else damage)
    run(model, out, resume=True)
    assert hashes(out) == hashes(both[1])


@pytest.mark.parametrize(
    ("scales", "columns"), [(None, 32), (None, 40), (Affine("float16"), 32), (Affine("float16"), 40)]
)
def test_gradients_are_those_of_the_dequantized_weight(scales: Any, columns: int) -> None:
    """Of x @ ((level - zero) * scale)ᵀ, or of x @ (level * scale - offset)ᵀ; 40 columns: the last group is smaller."""
    grid = Grid.of(scales=scales, bits=3, group_size=16, sym=False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, columns, generator=generator)
    solved = round_to_nearest(weight, *fit_groups(weight, grid), grid)
    linear = student.Scaled(solved, grid, torch.device("cpu"))
    x = torch.randn(7, columns, generator=generator, requires_grad=True)
    pull = torch.randn(7, 5, generator=generator)
    leaves = [move.leaf for move in linear.moves]
    (student._Multiply.apply(x, linear, *leaves) * pull).sum().backward()  # type: ignore[no-untyped-call]
    scale, zero = solved.scale.clone().requires_grad_(), solved.zero.float()
    offset = (zero * solved.scale).detach().requires_grad_()
    level, y = solved.codes.float(), x.detach().clone().requires_grad_()
    if scales is None:
        made = (level - by_column(zero, grid, columns)) * by_column(scale, grid, columns)
    else:
        made = level * by_column(scale, grid, columns) - by_column(offset, grid, columns)
    ((y @ made.T) * pull).sum().backward()
    for found, wanted in zip([x, *leaves], [y, scale, offset], strict=False):
        assert found.grad is not None and wanted.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-3)


def test_what_moves_is_rounded_to_what_is_stored() -> None:
    grid = Grid.of(scales=Affine("float16"), bits=3, group_size=16, sym=False)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    solved = round_to_nearest(weight, *fit_groups(weight, grid), grid)
    linear = student.Scaled(solved, grid, torch.device("cpu"))
    for move in linear.moves:
        move.delta.data.fill_(0.0123)
    linear.settle()
    assert isinstance(grid.scales, Affine)
    offset = grid.scales.offset(linear.scale, linear.zero)
    was = grid.scales.offset(solved.scale, solved.zero.float())
    for value, start in ((linear.scale, solved.scale), (offset, was)):
        assert torch.equal(value, value.half().float())
        torch.testing.assert_close(value, start + 0.0123 * solved.scale, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(linear.zero * linear.scale, offset)
    made = solved.codes * by_column(linear.scale, grid, 32) - by_column(offset, grid, 32)
    torch.testing.assert_close(linear.weight(torch.float32), made)


class Solved:
    """A part that holds weights rounded to nearest."""

    def __init__(self, plan: Plan) -> None:
        self.layers = {plan.disk_name(site.name): site for site in plan.sites}
        self.plan = plan

    def open(self) -> "Solved":
        return self

    def quantized(self, name: str) -> Any:
        site = self.layers[name]
        weight, grid = self.plan.source.tensor(f"{site.name}.weight").float(), self.plan.grid_of(site)
        return round_to_nearest(weight, *fit_groups(weight, grid), grid)


def test_a_16_bit_compute_dtype(tmp_path: Path) -> None:
    """As on a GPU: gradients in the model's dtype, numbers that move in float32."""
    plan = plan_of(made(tiny.build("llama", num_hidden_layers=1).bfloat16(), tmp_path))
    made_for: Any = [Solved(plan)]
    work = student.Student(dataclasses.replace(plan, compute=torch.bfloat16), made_for)
    before = {name: value.clone() for name, value in work.tuned().dense.items()}
    with work.at_work():
        assert plan.samples is not None
        work.divergence(plan.samples.arguments).backward()  # type: ignore[no-untyped-call]
        work.collect()
        for move in work.moves:
            assert move.delta.grad is not None and move.delta.grad.dtype == torch.float32
            assert bool(move.delta.grad.isfinite().all()) and bool(move.delta.grad.any())
            move.delta.data.sub_(0.05 * move.delta.grad.sign())
        work.settle()
        after = work.tuned().dense
    assert all(after[name].dtype == torch.bfloat16 and not torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.is_meta for parameter in plan.source.model.parameters())  # the skeleton is as it was
    assert not any("forward" in vars(module) for module in plan.source.model.modules())


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tied head, bfloat16": (lambda: tiny.build("llama", tie_word_embeddings=True).bfloat16(), {}),
    "quantized head": (lambda: tiny.build("llama"), {"head_bits": 4}),
    "rotated": (lambda: tiny.build("llama"), {"rotate": "r1,r2,r4"}),
    "no data": (lambda: tiny.build("llama"), {"method": "rtn"}),
    "offsets": (lambda: tiny.build("llama"), {"format": "mlx", "grid": Grid(bits=3, group_size=32)}),
    "gptq, biases, Conv1D": (lambda: tiny.build("gpt2"), {"format": "gptq", "grid": Grid(bits=3, group_size=32)}),
    "sandwich norms": (lambda: tiny.build("gemma2"), {}),
    "experts": (lambda: tiny.build_mixture("mixtral"), {}),
    "biases of experts": (lambda: tiny.build_mixture("gpt_oss"), {}),
    "encoder and decoder": (lambda: tiny.build("t5"), {}),
    "encoder": (lambda: tiny.build("bert"), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models_and_formats(kind: str, tmp_path: Path) -> None:
    """It falls or is undone, and the folder gives what was judged."""
    build, settings = KINDS[kind]
    model = made(build(), tmp_path)
    report = run(model, tmp_path / "out", tune=8, **settings)
    record, plan = report.tuning, plan_of(model, tune=8, **settings)
    assert record is not None and "failed" not in record and plan.fresh is not None
    assert only(record["after"]) <= only(record["before"])
    assert (record["kept"] > 0) != any("did not help" in event for event in report.events)
    assert record["moved"] == student.moving(plan)
    (held,) = plan.fresh.held.values()
    assert only(record["after"]) == pytest.approx(divergence(model, tmp_path / "out", held), rel=1e-3)
    if kind not in ("biases of experts", "encoder and decoder"):  # in these random ones no step helps
        assert record["kept"] > 0


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1"])
def test_gguf_moves_scales_alone(type: str, tmp_path: Path) -> None:
    """Norms come from the template; a file of the same size whose weights are closer."""
    model = made(tiny.build("llama", num_hidden_layers=1), tmp_path)
    settings = {"format": "gguf", "gguf_type": type, "grid": None, "template": tmp_path / "t.gguf"}
    templates.of_folder(model, tmp_path / "t.gguf", "F32")
    run(model, tmp_path / "solved", tune=0, **settings)
    report = run(model, tmp_path / "out", tune=8, **settings)
    record, plan = report.tuning, plan_of(model, tune=8, **settings)
    assert record is not None and plan.fresh is not None and record["kept"] > 0
    groups = sum(site.shape[0] * site.shape[1] // 32 for site in plan.sites)
    assert record["moved"] == groups * (2 if type == "Q4_1" else 1)
    (held,) = plan.fresh.held.values()
    assert only(record["after"]) == pytest.approx(divergence(model, tmp_path / "out", held), rel=1e-3)
    files = [next(folder.glob("*.gguf")).stat().st_size for folder in (tmp_path / "solved", tmp_path / "out")]
    assert files[0] == files[1]


def test_super_blocks_are_refused(tmp_path: Path) -> None:
    wide = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    model = made(tiny.build("llama", num_hidden_layers=1, **wide), tmp_path)
    templates.of_folder(model, tmp_path / "t.gguf")
    with pytest.raises(SettingError, match=r"tune moves each scale by itself, and nested scales, those of .*, cannot"):
        run(model, tmp_path / "out", format="gguf", gguf_type="Q4_K", grid=None, template=tmp_path / "t.gguf")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"act_bits": 8}, "rounded activations .* have none"),
        ({"offload": Path("x")}, "--offload is for runs that cannot"),
        ({"tune": -1}, "whole number of steps"),
        ({"tune": 1.5}, "whole number of steps"),
        ({"tune": True}, "whole number of steps"),
    ],
)
def test_refusals(settings: dict[str, Any], words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=words):
        run(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("whisper", "reads input_features"), ("vit", "reads pixel_values"), ("clip", "reads pixel_values")],
)
def test_what_is_no_text_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=words):
        run(made(tiny.build(kind), tmp_path), tmp_path / "out")


def test_a_model_without_words_is_refused(tmp_path: Path) -> None:
    kind = tiny.build("bert")
    with pytest.raises(SettingError, match="logits of models that predict tokens, and BertModel has none"):
        run(made(type(kind.bert)(kind.config).eval(), tmp_path), tmp_path / "out")


def test_calibration_windows_fill_up(tmp_path: Path) -> None:
    """Where the text has too few fresh windows, and only there. A method without calibration windows needs fresh ones."""
    model = made(tiny.build("llama", num_hidden_layers=1), tmp_path)
    few = dataclasses.replace(job(model).calibration, dataset=tiny.tokens(21, 24).tolist(), nsamples=16)
    for settings, calibrated in (({}, 0), ({"calibration": few}, 16)):
        record = run(model, tmp_path / f"out{calibrated}", tune=4, **settings).tuning
        assert record is not None and record["windows"]["calibration"] == calibrated
    few = dataclasses.replace(few, dataset=tiny.tokens(4, 24).tolist(), nsamples=4)
    with pytest.raises(SettingError, match="windows to tune on beside those that judge"):
        run(model, tmp_path / "out", method="rtn", calibration=few)


def test_several_processes_are_refused(model: Path) -> None:
    with pytest.raises(SettingError, match="tune runs in one process"):
        nearplane.plan(model, job(model), ranks=2)
    tune.refuse_ranks(0, 2)


def test_a_forward_without_gradients_keeps_what_was_solved(
    both: tuple[Path, Path, nearplane.Report], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = student.Student._log_probabilities
    monkeypatch.setattr(student.Student, "_log_probabilities", lambda self, batch: words(self, batch).detach())
    report = run(model, tmp_path / "out")
    assert report.tuning is not None and "does not require grad" in report.tuning["failed"]
    assert any("the model cannot be tuned" in event for event in report.events)
    assert hashes(tmp_path / "out") == hashes(both[0])


def test_fresh_windows_share_no_runs(model: Path) -> None:
    plan = plan_of(model)
    assert plan.fresh is not None and plan.fresh.more is not None and plan.samples is not None
    (held,) = plan.fresh.held.values()
    rows = [row for batch in (held, plan.fresh.more, plan.samples.arguments) for row in rows_of(batch)]
    fresh = len(held["input_ids"]) + len(plan.fresh.more["input_ids"])
    runs = [{tuple(row[i : i + 6].tolist()) for i in range(len(row) - 5)} for row in rows]
    for number in range(fresh):
        for other in range(len(rows)):
            shared = len(runs[number] & runs[other])
            assert other == number or shared <= 0.1 * len(runs[number])
    usual = complete(draft(model, job(model, tune=0)))
    assert usual.samples is not None and torch.equal(
        usual.samples.arguments["input_ids"], plan.samples.arguments["input_ids"]
    )


def test_a_short_text_makes_room_or_is_refused(tmp_path: Path) -> None:
    """Calibration windows that overlap with what judges are drawn anew, and the report says so."""
    model = made(tiny.build("llama", num_hidden_layers=1), tmp_path, words=700)
    calibration = Calibration(dataset=str(tmp_path / "text.txt"), nsamples=64, seqlen=24)
    report = run(model, tmp_path / "out", calibration=calibration, tune=4)
    told = [event for event in report.events if "drawn anew" in event]
    assert len(told) == 1
    plan = plan_of(model, calibration=calibration, tune=4)
    assert plan.fresh is not None and plan.samples is not None
    (held,) = plan.fresh.held.values()
    runs = {tuple(row[i : i + 6].tolist()) for row in held["input_ids"] for i in range(19)}
    for row in plan.samples.arguments["input_ids"]:
        assert sum(tuple(row[i : i + 6].tolist()) in runs for i in range(19)) <= 1
    windows = plan.samples.arguments["input_ids"]
    usual = complete(draft(model, job(model, calibration=calibration, tune=0)))
    assert usual.samples is not None
    kinds = [len({tuple(row) for row in some.tolist()}) for some in (windows, usual.samples.arguments["input_ids"])]
    assert kinds[0] >= kinds[1] and len(windows) == 64 and len(held["input_ids"]) == 4
    assert plan.samples.data["sha256"] == hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("rows", "held"), [(16, None), (21, 4), (60, 16)])
def test_rows_are_not_drawn_twice(rows: int, held: int | None, tmp_path: Path) -> None:
    """Of rows that calibration uses up, none is left to judge by: refused, rather than calibrated on a few."""
    model = made(tiny.build("llama", num_hidden_layers=1), tmp_path)
    calibration = Calibration(dataset=tiny.tokens(rows, 24).tolist(), nsamples=16, seqlen=24)
    if held is None:
        with pytest.raises(SettingError, match=r"the dataset leaves 0; .* fewer --nsamples"):
            plan_of(model, calibration=calibration, tune=4)
        return
    plan = plan_of(model, calibration=calibration, tune=4)
    assert plan.fresh is not None and plan.samples is not None
    batches = [
        *plan.fresh.held.values(),
        *([] if plan.fresh.more is None else [plan.fresh.more]),
        plan.samples.arguments,
    ]
    seen = [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]
    assert len(set(seen)) == len(seen) <= rows and plan.fresh.counts[0] >= held


def test_plan_counts_the_tuning(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_it, without = (nearplane.plan(model, job(model, tune=steps)) for steps in (8, 0))
    assert with_it.seconds["tune"] > 0 and "tune" not in without.seconds
    state = 16 * student.moving(with_it.plan)
    assert with_it.estimate.disk == without.estimate.disk | {"state of the tuning": state}
    parts = student.needed(with_it.plan)
    assert parts["model"] == 4 * sum(value.numel() for value in tiny.build("llama", num_hidden_layers=2).parameters())
    assert parts["codes"] == sum(site.shape[0] * site.shape[1] for site in with_it.plan.sites)
    monkeypatch.setattr(student, "LOGIT", 1 << 30)  # as of a very large vocabulary
    assert nearplane.plan(model, job(model)).estimate.memory[0].where == "the tuning"
    monkeypatch.setattr(estimate, "available_memory", lambda: 1 << 31)
    with pytest.raises(SettingError, match=r"at the tuning, .* without --tune it fits, needing"):
        run(model, tmp_path / "out")


def mixed(folder: Path, *more: str) -> Calibration:
    (folder / "other.txt").write_text(tiny.text(3000, seed=5))
    words = ",".join([f"{folder / 'text.txt'}:3", f"{folder / 'other.txt'}:1", *more])
    return Calibration(dataset=words, nsamples=8, seqlen=24)


def test_every_source_of_a_mix_judges(model: Path, tmp_path: Path) -> None:
    """Fresh windows of each source by its weight, of that source's text alone, and none that calibration has."""
    calibration = mixed(model.parent)
    record = run(model, tmp_path / "out", calibration=calibration).tuning
    run(model, tmp_path / "solved", calibration=calibration, tune=0)
    plan = plan_of(model, calibration=calibration)
    names = [str(model.parent / name) for name in ("text.txt", "other.txt")]
    assert record is not None and list(record["before"]) == names and record["kept"] > 0
    assert record["windows"] == {"held_out": 16, "fresh": 48, "calibration": 0}
    assert plan.fresh is not None and plan.fresh.more is not None and plan.samples is not None
    for name in names:
        held = plan.fresh.held[name]
        assert record["before"][name] == pytest.approx(divergence(model, tmp_path / "solved", held), rel=1e-4)
        assert record["after"][name] == pytest.approx(divergence(model, tmp_path / "out", held), rel=1e-4)
        assert record["after"][name] <= record["before"][name]
    texts = [" ".join(Path(name).read_text().split()) + " " for name in names]

    def source(row: Tensor) -> int:
        (found,) = [i for i, text in enumerate(texts) if " ".join(f"w{t}" for t in row.tolist()) + " " in text]
        return found

    assert [[source(row) for row in plan.fresh.held[name]["input_ids"]] for name in names] == [[0] * 12, [1] * 4]
    assert [source(row) for row in plan.fresh.more["input_ids"]].count(1) == 12
    batches = [*plan.fresh.held.values(), plan.fresh.more, plan.samples.arguments]
    rows = [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]
    assert len(set(rows)) == len(rows)


def test_a_mix_is_checked_on_the_windows_that_judge(model: Path, tmp_path: Path) -> None:
    calibration = mixed(model.parent, "self:2")
    report = run(model, tmp_path / "out", calibration=calibration)
    plan = plan_of(model, calibration=calibration)
    assert (
        report.tuning is not None and report.tuning["kept"] > 0 and plan.fresh is not None and plan.checked is not None
    )
    names = [str(model.parent / "text.txt"), str(model.parent / "other.txt"), "self"]
    assert [len(plan.fresh.held[name]["input_ids"]) for name in names] == [8, 4, 6]
    check = report.check
    assert check is not None and check["held_out"] and check["windows"] == 18 and check["origin"] == ", ".join(names)
    # All tokens that predict one that is scored: each behind the first of a window.
    ids = torch.cat([plan.fresh.held[name]["input_ids"] for name in names])
    with torch.no_grad():
        p, q = (
            nearplane.load(some, packed=False)(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
            for some in (model, tmp_path / "out")
        )
    assert check["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert checked_tokens(draft(model, job(model, calibration=calibration))) == ids.numel()  # as memory is counted


@pytest.mark.parametrize(
    ("method", "rows", "left"), [("nearplane", 7, 3), ("nearplane", 8, 4), ("rtn", 3, 3), ("rtn", 4, 4)]
)
def test_a_source_that_is_too_short_is_named(method: str, rows: int, left: int, model: Path) -> None:
    """Of a mix no calibration window is drawn anew: four of the rows are calibrated on, where the method reads any."""
    pairs = [(str(model.parent / "text.txt"), 1), (tiny.tokens(rows, 24, seed=9).tolist(), 1)]
    settings = {"calibration": Calibration(dataset=pairs, nsamples=8, seqlen=24), "method": method, "check": False}
    if left < 4:
        words = (
            rf"dataset rows in memory \(list\) leaves {left}; give a longer one, a lower weight, or fewer --nsamples"
        )
        with pytest.raises(SettingError, match=words):
            plan_of(model, **settings)
        return
    fresh = plan_of(model, **settings).fresh
    assert fresh is not None and len(fresh.held["rows in memory (list)"]["input_ids"]) == left


def test_sources_with_one_name_or_one_text(model: Path, tmp_path: Path) -> None:
    """Rows in memory have one name, and judge apart. What two files share is neither judged by and tuned on, nor judged twice."""
    parts = tiny.tokens(80, 24)
    pairs = [(parts[:40].tolist(), 1), (parts[40:].tolist(), 1)]
    fresh = plan_of(model, calibration=Calibration(dataset=pairs, nsamples=8, seqlen=24)).fresh
    names = ["rows in memory (list), source 1", "rows in memory (list), source 2"]
    assert fresh is not None and list(fresh.held) == names
    known = {tuple(row) for row in parts[40:].tolist()}
    assert {tuple(row) for row in fresh.held[names[1]]["input_ids"].tolist()} <= known
    (tmp_path / "again.txt").write_text((model.parent / "text.txt").read_text())
    words = f"{model.parent / 'text.txt'},{tmp_path / 'again.txt'}"
    fresh = plan_of(model, calibration=Calibration(dataset=words, nsamples=8, seqlen=24)).fresh
    assert fresh is not None and fresh.more is not None
    rows = [row for batch in (*fresh.held.values(), fresh.more) for row in rows_of(batch)]
    runs = [{tuple(row[i : i + 6].tolist()) for i in range(19)} for row in rows]
    assert all(len(a & b) <= 1 for number, a in enumerate(runs) for b in runs[:number])


@pytest.mark.parametrize("method", ["nearplane", "rtn"])
@pytest.mark.parametrize("build", [lambda: tiny.build("llama", num_hidden_layers=1), lambda: tiny.build("t5")])
def test_sources_of_different_lengths(build: Callable[[], Any], method: str, tmp_path: Path) -> None:
    """Padding is neither judged nor tuned on: figures are those of windows without padding."""
    model = made(build(), tmp_path)
    pairs = [(str(tmp_path / "text.txt"), 1), (tiny.tokens(40, 10, seed=9).tolist(), 1)]
    settings = {"calibration": Calibration(dataset=pairs, nsamples=8, seqlen=24), "method": method, "tune": 4}
    if method == "nearplane" and "T5" in type(build()).__name__:
        with pytest.raises(SettingError, match="different lengths are for models that read text only"):
            plan_of(model, **settings)
        return
    report, plan = run(model, tmp_path / "out", **settings), plan_of(model, **settings)
    assert report.tuning is not None and plan.fresh is not None and "failed" not in report.tuning
    short = plan.fresh.held["rows in memory (list)"]
    assert not any(name.endswith("attention_mask") for name in short)
    for name, held in plan.fresh.held.items():
        assert report.tuning["after"][name] == pytest.approx(divergence(model, tmp_path / "out", held), rel=1e-3)
    mask = join([plan.fresh.held[str(tmp_path / "text.txt")], short])["attention_mask"]
    assert sorted(mask.sum(1).tolist()) == [10] * len(short["input_ids"]) + [24] * (len(mask) - len(short["input_ids"]))


@pytest.mark.parametrize("method", ["nearplane", "rtn"])
@pytest.mark.parametrize("dataset", ["self", "mix"])
def test_the_model_writes_fresh_windows(dataset: str, method: str, model: Path, tmp_path: Path) -> None:
    """With another seed than it writes those of the calibration, and as many as are judged by and tuned on."""
    name = f"{model.parent / 'text.txt'}:1,self:1" if dataset == "mix" else dataset
    settings = {"calibration": Calibration(dataset=name, nsamples=8, seqlen=24), "tune": 4, "method": method}
    report, plan = run(model, tmp_path / "out", **settings), plan_of(model, **settings)
    record, fresh, key = report.tuning, plan.fresh, "self"
    assert record is not None and fresh is not None and fresh.more is not None
    if dataset == "self":
        key = f"the model's own samples (seed {STRIDE}, temperature 1)"
    assert list(record["before"]) == ([key] if dataset == "self" else [str(model.parent / "text.txt"), key])
    assert record["after"][key] <= record["before"][key]
    assert record["after"][key] == pytest.approx(divergence(model, tmp_path / "out", fresh.held[key]), rel=1e-3)
    batches = [*fresh.held.values(), fresh.more, *([] if plan.samples is None else [plan.samples.arguments])]
    rows = [tuple(row) for batch in batches for row in batch["input_ids"].tolist()]
    assert len(set(rows)) == len(rows) and all(len(row) == 24 for row in rows)
    assert fresh.counts == (16, 16) and len(fresh.held[key]["input_ids"]) == (16 if dataset == "self" else 8)
    forecast = nearplane.plan(model, job(model, **settings))
    assert student.written_fresh(forecast.plan) == (32 if dataset == "self" else 16)
    assert forecast.seconds["samples"] > 0 and forecast.estimate.memory[0].peak > 0


def test_what_cannot_write_is_refused(tmp_path: Path) -> None:
    """Before anything is read, also where the method reads no data."""
    model = made(tiny.build("bert"), tmp_path)
    with pytest.raises(SettingError, match="dataset self"):
        draft(model, job(model, calibration=Calibration(dataset="self", nsamples=8, seqlen=24), method="rtn"))


def test_a_killed_tuning_of_a_mix_ends_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    out, calibration = tmp_path / "out", mixed(model.parent, "self:2")
    pid = os.fork()
    if pid == 0:
        with pytest.MonkeyPatch.context() as patch:
            interrupting(patch, 10, lambda: os._exit(9))
            run(model, out, calibration=calibration)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (out / STATE / tune.FILE).is_file()
    with pytest.MonkeyPatch.context() as patch:
        taken = interrupting(patch, 0, interrupt)
        report = run(model, out, resume=True, calibration=calibration)
    whole = run(model, tmp_path / "whole", calibration=calibration)
    assert taken[0] == STEPS - 8 and report.tuning == whole.tuning and report.check == whole.check
    assert hashes(out) == hashes(tmp_path / "whole")
