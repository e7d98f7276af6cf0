"""Samples that a model writes itself: against forwards without a cache, kept for a resume, and refused with a reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane import GPTQ, Calibration, NearplaneError, SettingError
from nearplane.cli.main import main
from nearplane.data import own
from nearplane.data.own import keep, kept, opened, own_memory, own_samples
from nearplane.data.windows import Tokens
from nearplane.formats.journal import STATE
from nearplane.models.source import open_source
from nearplane.run import estimate, forecast

CPU = torch.device("cpu")
CHAT = (
    "{% for m in messages %}{{ '<s> w7 ' + m['role'].replace('user', 'w8') + ' ' + m['content'] + ' w9 ' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer puts <s> (1) before a text and </s> (2) behind it."""
    return tiny.marking(tiny.with_text(tmp_path_factory.mktemp("own")))


def written(folder: Path, nsamples: int = 5, seqlen: int = 14, **settings: Any) -> Tokens:
    calibration = Calibration("self", nsamples=nsamples, seqlen=seqlen, **settings)
    found = own_samples(open_source(folder, sketch=True), calibration, CPU, torch.float32)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma3_text", "mamba"])
def test_tokens_follow_the_models_distribution(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is where the summed probability of a forward without a cache passes the number drawn for it."""
    monkeypatch.setattr(own, "MOST_ROWS", 2)  # batches of 2, 2 and 1
    folder = tiny.save(tiny.build_mixture(kind) if kind in tiny.MIXTURES else tiny.build(kind), tmp_path / "model")
    tiny.marking(folder)
    ids = written(folder, seed=3).ids
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chances = torch.rand(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        logits = dense(input_ids=ids, use_cache=False).logits.double()
    assert ids.shape == (5, 14) and bool((ids[:, 0] == 1).all()) and len(set(ids[:, 1].tolist())) == 5
    for row in range(5):
        for step in range(12):
            below = logits[row, 1 + step].softmax(-1).cumsum(-1)
            token = int(ids[row, 2 + step])
            assert below[token] > chances[row, step] - 1e-4 and (
                token == 0 or below[token - 1] <= chances[row, step] + 1e-4
            )


def test_first_tokens_are_spread_over_the_most_probable(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "FIRST", 20)
    ids, dense = (
        written(model).ids,
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
    )
    with torch.no_grad():
        scores = dense(input_ids=torch.tensor([[1]])).logits[0, -1]
    scores[[1, 2]] = -torch.inf  # special tokens
    rank = {int(token): place for place, token in enumerate(scores.argsort(descending=True))}
    assert [rank[int(token)] // 4 for token in ids[:, 1]] == [0, 1, 2, 3, 4]


def test_equal_seeds_give_equal_samples(model: Path) -> None:
    a, b, c = written(model), written(model), written(model, seed=1)
    assert torch.equal(a.ids, b.ids) and a.recipe == b.recipe and not torch.equal(a.ids, c.ids)
    assert a.recipe is not None and a.recipe["temperature"] == 1.0 and a.recipe["seed"] == 0
    assert not a.ids.is_inference()
    assert a.origin == "the model's own samples (seed 0, temperature 1)" and a.opening == "<s>"
    bare = written(model, bos=False)
    assert bare.opening == "" and not bool((bare.ids[:, 0] == 1).any())


def test_a_chat_template_opens_the_users_turn(tmp_path: Path) -> None:
    folder = tiny.marking(tiny.with_text(tmp_path), template=CHAT)
    found = written(folder)
    assert found.ids[:, :3].tolist() == [[1, 7, 8]] * 5 and len(set(found.ids[:, 3].tolist())) == 5
    assert found.recipe is not None and found.recipe["prompt"] == "the chat template's opening of a user's turn"
    assert written(folder, bos=False).ids[:, :2].tolist() == [[7, 8]] * 5
    with pytest.raises(SettingError, match="seqlen=4 leaves no room behind the 3 tokens of the prompt"):
        written(folder, seqlen=4)
    tokenizer = open_source(folder).tokenizer
    for template, why in (
        ("{{ raise_exception('no') }}", "refuses a user's turn"),
        ("w5", "does not write a user's words"),
    ):
        tokenizer.chat_template = template
        ids, told, begun = opened(tokenizer, bos=True)
        assert ids == [1] and why in told and begun == "<s>"


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "whisper", "vit", "wav2vec2"])
def test_models_that_write_no_text_are_refused(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.build(kind), tmp_path / "model")
    with pytest.raises(SettingError, match="dataset self is for models that predict the next token of a text"):
        nearplane.plan(folder, dataset="self", method="gptq", nsamples=4, seqlen=16, bits=4, group_size=16)


def test_a_cache_that_changes_what_is_written_is_refused(tmp_path: Path) -> None:
    """RWKV's generation in transformers does not follow its forward."""
    folder = tiny.marking(tiny.save(tiny.build("rwkv"), tmp_path / "model"))
    with pytest.raises(NearplaneError, match="token by token what its forward of the whole window does not say"):
        written(folder)


def test_kept_samples_are_taken_if_they_are_the_same(model: Path, tmp_path: Path) -> None:
    made = written(model)
    (tmp_path / STATE).mkdir()
    assert kept(tmp_path, made.recipe or {}, 5, 14) is None
    keep(made, tmp_path)
    recipe = made.recipe or {}
    found = kept(tmp_path, recipe, 5, 14)
    assert found is not None and torch.equal(found, made.ids)
    assert kept(tmp_path, recipe, 4, 14) is None and kept(tmp_path, recipe, 5, 13) is None
    assert kept(tmp_path, recipe | {"model": "another"}, 5, 14) is None
    keep(made._replace(sha256="0" * 64), tmp_path)
    assert kept(tmp_path, recipe, 5, 14) is None
    (tmp_path / STATE / own.KEPT).write_bytes(b"damaged")
    assert kept(tmp_path, recipe, 5, 14) is None


class Stopping(GPTQ):
    """It gives up in the second block."""

    left = 0

    def solve(self, weight: Any, state: Any, grid: Any) -> Any:
        Stopping.left -= 1
        if Stopping.left < 0:
            raise KeyboardInterrupt
        return super().solve(weight, state, grid)


Stopping.__name__ = "GPTQ"
SMALL: dict[str, Any] = {"bits": 3, "group_size": 32, "nsamples": 6, "seqlen": 24, "progress": False}


def test_a_run_is_resumed_on_the_samples_that_it_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = f"{model.parent / 'text.txt'}:2,self:1"
    whole = nearplane.quantize(model, tmp_path / "whole", dataset=mix, method=GPTQ(), **SMALL)
    Stopping.left = 5
    with pytest.raises(KeyboardInterrupt):
        nearplane.quantize(model, tmp_path / "out", dataset=mix, method=Stopping(), **SMALL)
    for other in (mix.replace(":2", ":3"), "self", f"{model.parent / 'text.txt'}"):
        with pytest.raises(SettingError, match=r"calibration\.dataset was '.*:2,self:1' when"):
            nearplane.quantize(model, tmp_path / "out", dataset=other, method=GPTQ(), resume=True, **SMALL)
    monkeypatch.setattr(own, "_Writing", None)  # nothing is written again
    report = nearplane.quantize(model, tmp_path / "out", dataset=mix, method=GPTQ(), resume=True, **SMALL)
    assert not (tmp_path / "out" / STATE).exists()
    shards = [(tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in ("whole", "out")]
    assert shards[0] == shards[1] and report.data == whole.data
    stored = json.loads((tmp_path / "out" / "report.json").read_text())["data"]["sources"]
    assert [(row["source"], row["weight"], row["windows"]) for row in stored][1] == ("self", 1, 2)
    assert [row["windows"] for row in stored] == [4, 2] and {row["seqlen"] for row in stored} == {24}
    assert all(len(row["sha256"]) == 64 for row in stored) and stored[1]["recipe"]["temperature"] == 1


def test_a_mix_in_memory_is_recorded_and_resumed(model: Path, tmp_path: Path) -> None:
    content = (model.parent / "text.txt").read_text()
    mix = [([content], 2), ("embedded", 1)]
    report = nearplane.quantize(model, tmp_path / "out", dataset=mix, method="gptq", **SMALL)
    found = report.settings["calibration"]["dataset"]
    assert [row["weight"] for row in found] == [2, 1] and found[1]["source"] == "embedded"
    assert found[0]["source"]["kind"] == "list" and found[0]["source"] == report.data["sources"][0]["dataset"]
    Stopping.left = 5
    with pytest.raises(KeyboardInterrupt):
        nearplane.quantize(model, tmp_path / "cut", dataset=mix, method=Stopping(), **SMALL)
    with pytest.raises(SettingError, match=r"calibration\.dataset was"):
        nearplane.quantize(
            model, tmp_path / "cut", dataset=[([content], 1), ("embedded", 1)], method=GPTQ(), resume=True, **SMALL
        )
    again = nearplane.quantize(model, tmp_path / "cut", dataset=mix, method=GPTQ(), resume=True, **SMALL)
    assert again.data == report.data and again.resumed == 1


def test_plan_tells_of_a_mix_and_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix = f"{model.parent / 'text.txt'}:2,self:1"
    found = nearplane.plan(model, dataset=mix, method="gptq", nsamples=6, seqlen=24, bits=3, group_size=32)
    rows = found.as_dict()["sources"]
    assert [(row["source"], row["weight"], row["windows"]) for row in rows][1] == ("self", 1, 2) and rows[0][
        "seed"
    ] == 0
    assert "samples 4 of " in str(found) and "2 of self (weight 1)" in str(found) and found.seconds["samples"] > 0
    with pytest.raises(SettingError, match="self has a weight of 1 of 3, less than one of nsamples=1"):
        nearplane.plan(model, dataset=mix, method="gptq", nsamples=1, seqlen=24, bits=3, group_size=32)
    few = estimate._with_samples(found.plan, 1)  # as suggestions try, although no source may get less than one
    assert estimate.estimate(few).windows == (1, 24)
    weights, beside = own_memory(found.plan.source, found.plan.calibration, 4)
    assert weights == 4 * sum(p.numel() for p in found.plan.source.model.parameters()) and beside > 0
    monkeypatch.setattr(estimate, "own_memory", lambda *_: (1 << 50, 0))
    with pytest.raises(SettingError, match=r"needs .* at writing its own samples .*; --dataset without self; --force"):
        forecast.refuse(found.plan, Path())
    monkeypatch.undo()
    assert own_memory(found.plan.source, Calibration(nsamples=6), 4) == (0, 0)
    forecast.refuse(replace(found.plan, job=replace(found.plan.job, calibration=Calibration(nsamples=6))), Path())


def test_the_terminal_and_eval_tell_of_a_mix(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    words = ["quantize", str(model), str(tmp_path / "out"), "--bits", "3", "--group-size", "32", "--method", "gptq"]
    assert main([*words, "--dataset", "text.txt:2,self:1", "--nsamples", "6", "--seqlen", "24"]) == 0
    told = capsys.readouterr().err
    assert "calibration a mix: 6 windows of 24 tokens, each begins with <s>" in told
    assert "  text.txt, weight 2: 4 windows\n  self, weight 1: 2 windows (the model's own samples (seed " in told
    for dataset in ("text.txt:2,self:1", "self"):
        assert main(["eval", str(model), "--dataset", dataset, "--seqlen", "24"]) == 2
        assert "is to calibrate on" in capsys.readouterr().err


def test_a_method_that_reads_no_data_writes_no_samples(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "_Writing", None)
    report = nearplane.quantize(model, tmp_path / "out", dataset="self", method="rtn", **SMALL)
    assert report.data == {"origin": "none: this method reads no calibration data"}
