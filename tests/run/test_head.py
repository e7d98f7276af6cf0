"""The output head quantized on request: behind the last block, on its own input, a tied one as a tensor of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane.checkpoint.engines import ENGINES, described, verdict
from nearplane.core.errors import SettingError
from nearplane.data.text import Calibration
from nearplane.formats.read import open_checkpoint
from nearplane.models.source import open_skeleton
from nearplane.run.events import BlockDone
from nearplane.run.resume import Saver

HEADS: dict[str, dict[str, Any]] = {
    "head_bits": {"head_bits": 8},
    "override": {"override": ("lm_head=bits=4,group_size=64",)},
    "rotated": {"head_bits": 8, "rotate": "r1,r2"},
    "budget": {"head_bits": 8, "budget": 4.0},
}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    data = {"dataset": str(folder / "text.txt"), "nsamples": 8, "seqlen": 16}
    return {"group_size": 32, "dtype": "float16", "progress": False, **data, **more}


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_solved_on_what_reaches_it(tied: bool, kind: str, format: str, tmp_path: Path) -> None:
    """The error that the report gives is that of the model's own forward through the quantized blocks."""
    model = tiny.with_text(tmp_path, tie_word_embeddings=tied)
    report = nearplane.quantize(model, tmp_path / "out", format=format, **settings(tmp_path, **HEADS[kind]))
    row, checkpoint = report.linears[-1], open_checkpoint(tmp_path / "out")
    bits, size = (4, 64) if kind == "override" else (8, 32)
    assert (row.name, row.bits, row.group_size, row.tokens) == ("lm_head", bits, size, 128)
    assert checkpoint.layers["lm_head"].grid.bits == bits
    config = checkpoint.config
    assert config["tie_word_embeddings"] is False and "lm_head" not in str(config["quantization_config"].get("ignore"))
    assert config["quantization_config"].get("lm_head", True) is True
    assert any("shares the input embedding's weight" in event for event in report.events) == tied
    assert nearplane.verify(tmp_path / "out").ok
    dense, packed = nearplane.load(tmp_path / "out", packed=False), nearplane.load(tmp_path / "out")
    tokenizer = nearplane.models.source.load_tokenizer(model)
    windows = Calibration(str(tmp_path / "text.txt"), nsamples=8, seqlen=16).load(tokenizer).ids
    seen: list[torch.Tensor] = []
    hook = dense.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        logits = dense(windows).logits
        torch.testing.assert_close(packed(windows).logits, logits, rtol=1e-3, atol=1e-3)
    hook.remove()
    if kind != "rotated":
        original = nearplane.load(model).get_output_embeddings().weight.detach()
        delta = dense.lm_head.weight.detach() - original
        error = float((seen[0] @ delta.T).square().sum() / (seen[0] @ original.T).square().sum())
        assert row.error == pytest.approx(error, rel=0.02)
    if tied and kind != "rotated":
        table = dense.get_input_embeddings().weight
        assert torch.equal(table, nearplane.load(model).get_input_embeddings().weight.half().float())
        assert "model.embed_tokens.weight" in checkpoint.dense and "lm_head.weight" not in checkpoint.dense


def test_a_head_is_resumed_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.with_text(tmp_path, tie_word_embeddings=True)
    nearplane.quantize(model, tmp_path / "whole", **settings(tmp_path, head_bits=8))
    take = Saver.take

    def stop(saver: Saver, event: Any) -> None:
        take(saver, event)
        if isinstance(event, BlockDone) and event.number == 1 and not event.replayed:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        nearplane.quantize(model, tmp_path / "out", **settings(tmp_path, head_bits=8))
    monkeypatch.undo()
    with pytest.raises(SettingError, match=r"override was .*lm_head"):
        nearplane.quantize(model, tmp_path / "out", **settings(tmp_path, resume=True))
    nearplane.quantize(model, tmp_path / "out", **settings(tmp_path, head_bits=8, resume=True))
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("mixed", [False, True])
def test_transformers_and_vllm_find_the_head(mixed: bool, tmp_path: Path) -> None:
    """vLLM's class of a head is no linear's, so that a group must name it; transformers then multiplies the same."""
    model = tiny.with_text(tmp_path, tie_word_embeddings=True)
    head = {"head_bits": 8} if mixed else {"override": ("lm_head=bits=4",)}
    nearplane.quantize(model, tmp_path / "out", **settings(tmp_path, **head))
    groups = open_checkpoint(tmp_path / "out").config["quantization_config"]["config_groups"].values()
    assert sum("lm_head" in group["targets"] for group in groups) == 1
    assert any("Linear" in group["targets"] for group in groups) != mixed
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, wanted = theirs(ids).logits, nearplane.load(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    skeleton = open_skeleton(tmp_path / "out")[1]
    judged = {engine: verdict(engine, described(open_checkpoint(tmp_path / "out"), skeleton)) for engine in ENGINES}
    if mixed:  # a head of 8 bits: a width, and no head, that OpenVINO does not take
        assert "8 bits" in str(judged.pop("openvino"))
    assert not any(found.refusals for found in judged.values() if not found.foreign)
    assert "output head was not tried" in str(judged["sglang"]) and "head" not in str(judged["vllm"])


def test_without_a_request_the_head_stays_dense(tmp_path: Path) -> None:
    """A pattern that is found in other names, too, does not mean the head."""
    model = tiny.with_text(tmp_path)
    nearplane.quantize(model, tmp_path / "out", override={".": {"bits": 8}}, **settings(tmp_path))
    checkpoint = open_checkpoint(tmp_path / "out")
    assert "lm_head" not in checkpoint.layers and "lm_head.weight" in checkpoint.dense
    assert {layer.grid.bits for layer in checkpoint.layers.values()} == {8}


def test_a_configuration_alone_is_planned(tmp_path: Path) -> None:
    model = tiny.with_text(tmp_path, tie_word_embeddings=True)
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    plans = [nearplane.plan(folder, head_bits=8, bits=4, group_size=32) for folder in (model, tmp_path / "bare")]
    assert all("15 linears in 3 blocks" in str(plan) for plan in plans)


def test_convert_keeps_the_head(tmp_path: Path) -> None:
    model = tiny.with_text(tmp_path, tie_word_embeddings=True)
    nearplane.quantize(model, tmp_path / "out", **settings(tmp_path, head_bits=8))
    nearplane.convert(tmp_path / "out", tmp_path / "new", "gptq")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["lm_head"] is True
    assert nearplane.verify(tmp_path / "new").ok
    a, b = (open_checkpoint(tmp_path / name).quantized("lm_head") for name in ("out", "new"))
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"head_bits": 8, "ignore": ("lm_head",)}, "head_bits quantizes the output head lm_head, and ignore 'lm_head'"),
        ({"head_bits": 8, "activations": nearplane.TokenGrid(8)}, "no engine rounds what goes into an output head"),
        ({"head_bits": 9}, "head_bits must be a whole number from 2 to 8; got 9"),
        ({"head_bits": True}, "head_bits must be a whole number from 2 to 8; got True"),
        ({"head_bits": 8, "group_size": 48, "format": "gptq"}, "lm_head: group_size 48 does not divide"),
    ],
)
def test_requests_that_are_refused(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = tiny.with_text(tmp_path)
    ignore = more.get("ignore", ("layers",) if "group_size" in more else ())
    with pytest.raises(SettingError, match=words):
        nearplane.plan(model, **{"group_size": 32, **more, "ignore": ignore})


def test_models_that_predict_no_token(tmp_path: Path) -> None:
    model = tiny.save(tiny.build("bert"), tmp_path / "model")
    with pytest.raises(SettingError, match="that is for decoders"):
        nearplane.plan(model, head_bits=8, group_size=32)


def test_a_budget_counts_the_body(tmp_path: Path) -> None:
    """A head whose bits are given is beside the budget, which the other linears share alike with and without the head."""
    model = tiny.with_text(tmp_path)
    reports = [
        nearplane.quantize(
            model, tmp_path / f"out{bits}", budget=3.9, head_bits=bits, **settings(tmp_path, method="rtn")
        )
        for bits in (None, 8)
    ]
    kept = [[row.bits for row in report.linears if row.name != "lm_head"] for report in reports]
    assert kept[0] == kept[1] and reports[1].linears[-1].bits == 8


def test_two_settings_of_a_head(tmp_path: Path) -> None:
    model = tiny.with_text(tmp_path)
    with pytest.raises(SettingError, match="both give the bits of the output head lm_head"):
        nearplane.plan(model, head_bits=8, override=("lm_head=bits=4",), group_size=32)
    plan = nearplane.plan(model, head_bits=8, override=("lm_head=group_size=64",), group_size=32).plan
    assert (plan.grids["lm_head"].bits, plan.grids["lm_head"].group_size) == (8, 64)


def test_a_class_without_a_head_of_its_own(tmp_path: Path) -> None:
    """vLLM 0.32 was run with a quantized head of Gemma 2, and knows no parameter of that name."""
    tiny.save(tiny.build("gemma2", tie_word_embeddings=True), tmp_path / "model")
    nearplane.quantize(tmp_path / "model", tmp_path / "out", method="rtn", head_bits=8, group_size=32, progress=False)
    found = nearplane.verify(tmp_path / "out", "vllm")
    assert any("no output head of its own in Gemma2ForCausalLM" in problem for problem in found.problems)
    assert nearplane.verify(tmp_path / "out", "transformers").ok
