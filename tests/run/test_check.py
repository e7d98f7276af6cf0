"""The check of a run: errors behind blocks and KL, against two whole models and the evaluation's own figures."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pytest import approx

import nearplane
from nearplane import Calibration, Grid
from nearplane.cli.summary import summary
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import dequantize, fit_groups, round_to_nearest
from nearplane.data.fresh import Checked, rows_of, texts_of, to_check
from nearplane.data.samples import gather
from nearplane.evaluation.perplexity import evaluate
from nearplane.models.source import load_tokenizer, open_source
from nearplane.run import check
from nearplane.run.check import Check, nearest
from nearplane.run.estimate import estimate
from nearplane.run.plan import make_plan
from nearplane.run.report import Report

SETTINGS: dict[str, Any] = {"bits": 3, "group_size": 32, "nsamples": 12, "seqlen": 24, "progress": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("check"), words=4000)


def given(folder: Path, **settings: Any) -> dict[str, Any]:
    return {**SETTINGS, "dataset": str(folder.parent / "text.txt"), **settings}


def states(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each block of a whole model returns, and the logits."""
    found: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found, logits


def shift(x: torch.Tensor, other: torch.Tensor) -> float:
    return float(((other - x).square().sum(-1) / x.square().sum(-1)).mean())


def windows_of(folder: Path, **settings: Any) -> Checked:
    plan = make_plan(folder, **{k: v for k, v in given(folder, **settings).items() if k != "progress"})
    assert plan.checked is not None
    return plan.checked


@pytest.mark.parametrize("method", ["nearplane", "gptq", "rtn"])
def test_errors_and_kl_are_those_of_two_whole_models(llama: Path, tmp_path: Path, method: str) -> None:
    """With a reference stream, without one, and without data: figures of the loaded checkpoint and its original."""
    report = nearplane.quantize(llama, tmp_path / "out", **given(llama, method=method))
    checked = windows_of(llama, method=method)
    assert checked.fresh and checked.windows == 21 and report.check is not None
    original, made = nearplane.load(llama), nearplane.load(tmp_path / "out", packed=False)
    (x, p), (other, q) = (states(model, checked.batch["input_ids"]) for model in (original, made))
    found = [row.error for row in report.blocks]
    assert [row.name for row in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert found == approx([shift(a, b) for a, b in zip(x, other, strict=True)], rel=1e-4)
    for name, weight in original.named_parameters():  # now the original, rounded
        if name.startswith("model.layers.") and weight.dim() == 2:
            fixed = Grid(bits=3, group_size=32, fit="minmax", negative_scales=False)
            rounded = dequantize(round_to_nearest(weight.data, *fit_groups(weight.data, fixed), fixed), fixed)
            weight.data = rounded
    third, _ = states(original, checked.batch["input_ids"])
    assert [row.rtn_error for row in report.blocks] == approx(
        [shift(a, b) for a, b in zip(x, third, strict=True)], rel=1e-4
    )
    p, q = (logits[:, :-1].log_softmax(-1).flatten(0, 1) for logits in (p, q))
    assert report.check["kl"] == approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert report.check["top1"] == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert report.check["tokens"] == 21 * 23 and report.check["error"] == found[-1] > 0


def test_kl_and_perplexities_are_the_evaluations(llama: Path, tmp_path: Path) -> None:
    """BOS stands before each window and is not scored, in both."""
    folder = tiny.save(tiny.build("llama"), tmp_path / "model")
    tiny.marking(folder)
    report = nearplane.quantize(folder, tmp_path / "out", **given(llama, method="gptq"))
    settings = {k: v for k, v in given(llama, method="gptq").items() if k != "progress"}
    checked = make_plan(folder, **settings).checked
    assert checked is not None and bool((checked.batch["input_ids"][:, 0] == 1).all())
    original, made = nearplane.load(folder), nearplane.load(tmp_path / "out", packed=False)
    rows = [row[1:].tolist() for row in checked.batch["input_ids"]]
    measured = evaluate(made, load_tokenizer(folder), dataset=rows, seqlen=24, reference=original)
    assert measured.windows == checked.windows and report.check is not None
    assert report.check["tokens"] == measured.tokens == checked.windows * 23
    assert report.check["kl"] == approx(measured.kl, rel=1e-3) and report.check["top1"] == measured.top1
    assert report.check["perplexity"] == approx(measured.perplexity, rel=1e-4)
    assert report.check["reference_perplexity"] == approx(measured.reference_perplexity, rel=1e-4)


def test_no_forward_waits_while_logits_are_compared(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits takes more memory than logits do; behind the last block nothing goes on."""
    waiting: list[int] = []
    for name in ("close", "finish"):
        known = getattr(Check, name)
        watched = lambda self, block, known=known: waiting.append(len(block.paused)) or known(self, block)  # noqa: E731
        monkeypatch.setattr(Check, name, watched)
    nearplane.quantize(llama, tmp_path / "out", **given(llama, method="gptq"))
    assert waiting[-1] == 0 and min(waiting[:-1]) > 0


def test_methods_are_compared_on_the_same_windows(llama: Path) -> None:
    """Whatever they read; and none of the windows shares a run of tokens with those of the calibration."""
    found = [windows_of(llama, method=method).batch["input_ids"] for method in ("nearplane", "gptq", "rtn")]
    assert all(torch.equal(found[0], other) for other in found[1:])
    settings = {k: v for k, v in given(llama).items() if k != "progress"}
    plan = make_plan(llama, **settings)
    assert plan.samples is not None
    runs = {tuple(row[i : i + 6].tolist()) for row in rows_of(plan.samples.arguments) for i in range(19)}
    shared = [tuple(row[i : i + 6].tolist()) in runs for row in found[0] for i in range(19)]
    assert sum(shared) <= 0.1 * len(shared)


def test_the_rounding_beside_it_does_not_follow_the_fit(llama: Path, tmp_path: Path) -> None:
    reports = [
        nearplane.quantize(llama, tmp_path / fit, **given(llama, method="gptq", fit=fit)) for fit in ("minmax", "mse")
    ]
    first, second = ([row.rtn_error for row in report.blocks] for report in reports)
    assert first == second and reports[0].blocks[-1].error != reports[1].blocks[-1].error
    ternary = dataclasses.replace(Grid(bits="ternary"), fit="mse")
    assert nearest(ternary) == Grid(bits="ternary", fit="minmax", negative_scales=False)
    q6_k = Grid.named("q6_k")  # its scales have a sign, whatever fits
    assert nearest(q6_k) == dataclasses.replace(q6_k, fit="minmax")


def test_rounding_to_nearest_is_its_own_comparison(llama: Path, tmp_path: Path) -> None:
    report = nearplane.quantize(llama, tmp_path / "out", **given(llama, method="rtn", fit="minmax", sym=False))
    assert [row.error for row in report.blocks] == [row.rtn_error for row in report.blocks]


def test_no_check_changes_nothing_but_the_report(llama: Path, tmp_path: Path) -> None:
    with_it, without = (
        nearplane.quantize(llama, tmp_path / str(check), **given(llama, check=check)) for check in (True, False)
    )
    assert without.check is None and without.blocks == [] and "check" not in without.seconds
    assert with_it.linears[0].error == without.linears[0].error and with_it.events == without.events
    for path in (tmp_path / "False").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "True" / path.name).read_bytes()
    assert with_it.settings == without.settings
    lines, bare = summary(with_it).splitlines(), summary(without).splitlines()
    assert with_it.check is not None
    assert (
        f"error {with_it.check['error']:.4f} (rtn {with_it.check['rtn_error']:.4f}) of the hidden state behind "
        "model.layers.1, on held-out windows" in lines
    )
    (said,) = (line for line in lines if line.startswith("KL to the original "))
    assert said.endswith(f"on 483 held-out tokens of {llama.parent / 'text.txt'}") and "perplexity" in said
    assert any(line.startswith("mean error of linears") for line in bare)
    assert not any(line.startswith(("KL", "error")) for line in bare)
    assert Report.read(tmp_path / "True").check == with_it.check
    assert Report.read(tmp_path / "True").blocks == with_it.blocks
    with pytest.raises(nearplane.SettingError, match="check must be True or False; got 1"):
        nearplane.quantize(llama, tmp_path / "other", **given(llama, check=1))


def test_of_a_dataset_that_is_used_up_calibration_windows_are_read_and_named(llama: Path, tmp_path: Path) -> None:
    rows = [row.tolist() for row in tiny.tokens(6, 24, seed=3)]
    report = nearplane.quantize(llama, tmp_path / "out", **given(llama, dataset=rows, nsamples=6))
    assert report.check is not None and not report.check["held_out"] and report.check["windows"] == 6
    (told,) = (event for event in report.events if "checked" in event)
    assert told.startswith("the run is checked on windows of the calibration, where errors are less than elsewhere")
    assert "on 138 calibration tokens of" in summary(report)
    more = rows + [row.tolist() for row in tiny.tokens(3, 24, seed=4)]
    report = nearplane.quantize(llama, tmp_path / "more", **given(llama, dataset=more, nsamples=6))
    assert report.check is not None and report.check["held_out"] and report.check["windows"] == 3


def test_a_run_that_reads_no_data_fetches_none(llama: Path) -> None:
    text = str(llama.parent / "text.txt")
    mix = Calibration(dataset=[(text, 3), ("wikitext2", 1)], nsamples=8, seqlen=24)
    checked, told = to_check(open_source(llama), mix, None, None)
    assert checked is not None and checked.fresh and text in checked.origin
    assert told is not None and "a method that reads no data fetches and writes none" in told
    for name in ("wikitext2", "allenai/c4"):  # nothing is fetched for it
        found = texts_of(Calibration(dataset=name, dataset_split="train"), None)
        assert found.dataset is None and found.dataset_split is None


def test_samples_of_the_models_own_are_left_out_of_a_mix(llama: Path) -> None:
    text = str(llama.parent / "text.txt")
    source = open_source(llama)
    source.read_weights()
    mix = Calibration(dataset=f"{text}:3,self:1", nsamples=8, seqlen=24)
    used = gather(source, dataclasses.replace(mix, dataset=text))
    checked, why = to_check(source, mix, used, None)
    assert checked is not None and why is None and checked.origin == text and checked.fresh
    assert texts_of(dataclasses.replace(mix, dataset="self"), used).dataset is None
    both = texts_of(dataclasses.replace(mix, dataset=f"{text}:3,self:1,embedded:2"), used).dataset
    assert both == [(text, 3.0), ("embedded", 2.0)]


@pytest.mark.parametrize(
    "settings",
    [
        {"head_bits": 4},
        {"ignore": (r"layers\.1\.",)},
        {"act_bits": 8},
        {"rotate": ("r1", "r2", "r4")},
        {"format": "mlx"},
    ],
)
def test_what_the_logits_pass_besides(llama: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A quantized head, blocks behind the last one with anything to quantize, rounded activations, rotations, formats."""
    report = nearplane.quantize(llama, tmp_path / "out", **given(llama, method="gptq", **settings))
    ids = windows_of(llama).batch["input_ids"]
    original, made = nearplane.load(llama), nearplane.load(tmp_path / "out", packed=False)
    (_, p), (_, q) = (states(model, ids) for model in (original, made))
    p, q = (logits[:, :-1].log_softmax(-1).flatten(0, 1) for logits in (p, q))
    assert report.check is not None
    assert report.check["kl"] == approx(
        float((p.exp() * (p - q)).sum(1).mean()), rel=2e-2 if "act_bits" in settings else 1e-3
    )
    ignored = "ignore" in settings
    assert [row.name for row in report.blocks] == ["model.layers.0", "model.layers.1"][: 1 if ignored else 2]
    assert report.check["block"] == f"model.layers.{0 if ignored else 1}"


@pytest.mark.parametrize("kind", ["bert", "t5", "gemma2", "mixtral"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    """Masked ones and encoders with decoders have no perplexity; all have errors behind blocks."""
    build = tiny.build_mixture if kind in tiny.MIXTURES else tiny.build
    folder = tiny.save(build(kind), tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text(4000))
    report = nearplane.quantize(folder, tmp_path / "out", **given(folder, method="gptq", group_size=16))
    assert report.check is not None and report.check["held_out"]
    assert all(row.error is not None and 0 < row.error < 1 for row in report.blocks)
    assert report.check["kl"] > 0 and ("perplexity" in report.check) == (kind not in ("bert", "t5"))


def test_a_tuned_model_is_checked_as_it_is_stored(llama: Path, tmp_path: Path) -> None:
    """By the figures of the loaded checkpoint; errors behind blocks stay those of the walk."""
    report = nearplane.quantize(llama, tmp_path / "out", **given(llama, method="gptq", bits=2, tune=8))
    assert report.tuning is not None and report.tuning["kept"] and report.check is not None
    ids = windows_of(llama, method="gptq", bits=2, tune=8).batch["input_ids"]
    original, made = nearplane.load(llama), nearplane.load(tmp_path / "out", packed=False)
    (x, p), (other, q) = (states(model, ids) for model in (original, made))
    p, q = (logits[:, :-1].log_softmax(-1).flatten(0, 1) for logits in (p, q))
    assert report.check["kl"] == approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert report.check["error"] == approx(shift(x[-1], other[-1]), rel=1e-4)
    assert report.check["error"] != report.blocks[-1].error


def test_a_run_goes_without_its_check_where_memory_does_not_suffice(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = given(llama, method="gptq")
    sketched = {k: v for k, v in settings.items() if k != "progress"} | {"device": "cpu", "sketch": True}
    need = estimate(make_plan(llama, **sketched)).memory[0].need
    known = check.needed
    monkeypatch.setattr(check, "needed", lambda plan: known(plan) | {"logits": 1 << 34})
    found = estimate(make_plan(llama, **sketched)).memory[0]
    assert found.where == "the check" and found.need > 1 << 34
    monkeypatch.setattr("nearplane.run.estimate.available_memory", lambda: need + (1 << 28))
    report = nearplane.quantize(llama, tmp_path / "out", **settings)
    (told,) = (event for event in report.events if "checked" in event)
    assert report.check is None and told.startswith(
        "the run is not checked on held-out windows: memory does not suffice"
    )
    forced = nearplane.quantize(llama, tmp_path / "forced", **settings, force=True)
    assert forced.check is not None and forced.check["kl"] > 0
    forecast = nearplane.plan(llama, **{k: v for k, v in settings.items() if k != "progress"})
    assert not forecast.lacking() and told in str(forecast)


def test_a_finished_walk_keeps_what_was_checked(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after the last block and before the export: no block runs again, and figures are those of the first session."""
    whole = nearplane.quantize(llama, tmp_path / "whole", **given(llama))

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    for name, first in (("checked", True), ("unchecked", False)):
        with monkeypatch.context() as patch:
            patch.setattr("nearplane.run.resume.Saver.finish", ended)
            with pytest.raises(KeyboardInterrupt):
                nearplane.quantize(llama, tmp_path / name, **given(llama, check=first))
        report = nearplane.quantize(llama, tmp_path / name, **given(llama, resume=True))
        assert report.check == (whole.check if first else None)
        assert report.blocks == (whole.blocks if first else [])
        said = ["the run is not checked: an earlier session, which did not check, had finished all blocks"]
        assert [event for event in report.events if "checked" in event] == ([] if first else said)
    stored = json.loads((tmp_path / "checked" / "report.json").read_text())
    assert stored["check"] == whole.check and math.isfinite(stored["check"]["kl"])


def test_a_text_that_was_named_and_is_not_there_is_refused_without_data_too(llama: Path, tmp_path: Path) -> None:
    settings = given(llama, method="rtn", dataset=str(tmp_path / "nofile.txt"))
    with pytest.raises(NearplaneError, match=r"nofile\.txt"):
        nearplane.quantize(llama, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_tuned_check_is_that_of_the_block_it_names(llama: Path, tmp_path: Path) -> None:
    """Where later blocks are left dense, the error is that behind the last one that is quantized."""
    settings = given(llama, method="gptq", tune=4, ignore=(r"layers\.1\.",))
    report, checked = nearplane.quantize(llama, tmp_path / "out", **settings), windows_of(llama, **settings)
    models = (nearplane.load(llama), nearplane.load(tmp_path / "out", packed=False))
    (x, _), (other, _) = (states(model, checked.batch["input_ids"]) for model in models)
    assert report.check is not None and report.check["block"] == "model.layers.0"
    assert report.check["error"] == approx(shift(x[0], other[0]), rel=1e-3)
    assert report.check["judged_tuning"] and ", which judged the tuning" in summary(report)
