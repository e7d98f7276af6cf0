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
from nearplane import Grid
from nearplane.cli.summary import summary
from nearplane.core.grid import dequantize, fit_groups, round_to_nearest
from nearplane.data.fresh import Checked, rows_of, to_check
from nearplane.evaluation.perplexity import evaluate
from nearplane.models.source import load_tokenizer
from nearplane.run.check import nearest
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
