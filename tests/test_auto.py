"""The form of AutoGPTQ's quick start: the same run as ``quantize``, in other lines."""

import errno
import html
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, GPTQConfig

import nearplane
from nearplane import NearplaneForCausalLM, SettingError

CONFIG = {"bits": 3, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.05, "seqlen": 32}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    return tiny.with_text(tmp_path)


def weights(folder: Path) -> bytes:
    return (folder / "model-00001-of-00001.safetensors").read_bytes()


def test_the_quick_start_of_autogptq(model: Path, tmp_path: Path) -> None:
    """One line each; the same bytes as from ``quantize``; nothing stays in the temporary folder."""
    texts = [(tmp_path / "text.txt").read_text()]
    wrapped = NearplaneForCausalLM.from_pretrained(model, CONFIG)
    with pytest.raises(SettingError, match="not quantized yet"):
        wrapped.save_quantized(tmp_path / "early")
    assert not (tmp_path / "early").exists()
    report = wrapped.quantize(texts, progress=False, batch_size=1, nsamples=8)
    with pytest.raises(SettingError, match="written as safetensors"):
        wrapped.save_quantized(tmp_path / "sub" / "out", use_safetensors=False)
    wrapped.save_quantized(tmp_path / "sub" / "out", use_safetensors=True)
    nearplane.quantize(model, tmp_path / "same", nearplane.Job.read(CONFIG), dataset=texts, nsamples=8, progress=False)
    assert weights(tmp_path / "sub" / "out") == weights(tmp_path / "same")
    assert nearplane.verify(tmp_path / "sub" / "out").ok
    assert wrapped.report is not None and wrapped.report.out == str(tmp_path / "sub" / "out") != report.out
    assert nearplane.Report.read(tmp_path / "sub" / "out").out == str(tmp_path / "sub" / "out")
    assert not list((tmp_path / "work").glob("nearplane-*"))
    with pytest.raises(SettingError, match=r"save_quantized\(out\), then .*from_quantized\(out\).generate"):
        wrapped.generate(input_ids=torch.arange(8)[None], max_new_tokens=2)
    loaded = NearplaneForCausalLM.from_quantized(tmp_path / "sub" / "out", device="cpu")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, nearplane.load(tmp_path / "same")(ids).logits)
    with pytest.raises(SettingError, match=r"saved already, in .*out; copy that folder"):
        wrapped.save_quantized(tmp_path / "again")


@pytest.mark.parametrize("settings", [{}, {"format": "gptq_v2"}, {"format": "mlx", "bits": 4}], ids=str)
def test_no_file_names_the_temporary_folder(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Commands of the page open the folder that the checkpoint was moved to."""
    wrapped = NearplaneForCausalLM.from_pretrained(model, CONFIG | settings)
    made = wrapped.quantize(str(tmp_path / "text.txt"), nsamples=2, progress=False).out
    wrapped.save_quantized(tmp_path / "my out")
    for path in (tmp_path / "my out").rglob("*"):
        assert path.is_dir() or Path(made).parent.name.encode() not in path.read_bytes(), path
    page = html.unescape((tmp_path / "my out" / "report.html").read_text())
    assert f"nearplane generate '{tmp_path / 'my out'}'" in page


def test_examples_in_the_forms_that_people_have(model: Path, tmp_path: Path) -> None:
    """Tokenized examples are all used, whatever their number; texts, and files with texts or messages, give windows."""
    tokenizer, text = AutoTokenizer.from_pretrained(model), (tmp_path / "text.txt").read_text()
    rows = [tokenizer(text[start : start + 120]) for start in range(0, 600, 120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text[a : a + 700]}) + "\n" for a in (0, 700)))
    wrapped = NearplaneForCausalLM.from_pretrained(str(model), GPTQConfig(bits=4, group_size=32), seqlen=32)
    found = {}
    for name, examples, more in (
        ("tokenized", rows, {}),
        ("some", rows, {"nsamples": 3}),
        ("texts", [text, text], {"nsamples": 4}),
        ("file", str(tmp_path / "rows.jsonl"), {"nsamples": 4}),
        ("none", None, {"dataset": str(tmp_path / "text.txt"), "nsamples": 4}),
    ):
        settings: dict[str, Any] = {"progress": False, "method": "gptq", "check": False, **more}
        found[name] = wrapped.quantize(examples, **settings).data["windows"]
    assert found == {"tokenized": 5, "some": 3, "texts": 4, "file": 4, "none": 4}
    wrapped.save_quantized(tmp_path / "out")
    assert nearplane.inspect(tmp_path / "out").kind == "gptq"
    assert not list((tmp_path / "work").glob("nearplane-*"))


def test_mistakes_are_said_before_the_run(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such folder"):
        NearplaneForCausalLM.from_pretrained(tmp_path / "none here")
    with pytest.raises(SettingError, match="did you mean group_size"):
        NearplaneForCausalLM.from_pretrained(model, {"groep_size": 32})
    wrapped = NearplaneForCausalLM.from_pretrained(model, CONFIG)
    with pytest.raises(SettingError, match="unknown setting"):
        wrapped.quantize(["text"], use_triton_please=True)
    wrapped.quantize((tmp_path / "text.txt").as_posix(), nsamples=2, progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(SettingError, match="not an empty folder"):
        wrapped.save_quantized(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    wrapped.save_quantized(tmp_path / "out")  # what could not be saved there is saved here


def test_another_disk_gets_a_copy(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = NearplaneForCausalLM.from_pretrained(model, CONFIG)
    wrapped.quantize(str(tmp_path / "text.txt"), nsamples=2, progress=False)
    rename, asked = os.replace, []

    def elsewhere(source: Any, target: Any) -> None:
        asked.append(source)
        if len(asked) == 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr("nearplane.auto.os.replace", elsewhere)
    wrapped.save_quantized(tmp_path / "out")
    assert len(asked) == 2 and nearplane.verify(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert not list((tmp_path / "work").glob("nearplane-*"))


def test_signatures_name_every_setting() -> None:
    """As help and completion show them: those of ``Job``, its parts and the default method, by their own names."""
    for function in (nearplane.quantize, nearplane.plan):
        named = inspect.signature(function).parameters
        assert {
            "bits",
            "group_size",
            "nsamples",
            "dataset",
            "damp_percent",
            "act_bits",
            "tune",
            "method",
            "resume",
        } <= set(named)
        assert named["bits"].default == 4 and "settings" not in named and "given" not in named
        for name in set(named) - {"model", "out", "show", "progress", "job", "ranks"}:
            nearplane.Job.of(**{name: named[name].default})
