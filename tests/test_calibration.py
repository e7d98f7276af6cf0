"""What Python users hand over: datasets in memory, paths, numbers of NumPy, loaded models; and BOS from end to end."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

import nearplane
from nearplane import GPTQ, Calibration, NearplaneError, SettingError
from nearplane.cli.main import main
from nearplane.data.samples import _decoded, gather
from nearplane.models.source import load_tokenizer, open_source
from nearplane.run import forecast
from nearplane.run.probe import Products

SMALL: dict[str, Any] = {"bits": 3, "group_size": 32, "method": "gptq", "nsamples": 4, "seqlen": 24, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer puts <s> (1) before a text and </s> (2) behind it."""
    return tiny.marking(tiny.with_text(tmp_path_factory.mktemp("inputs")))


@pytest.fixture(scope="module")
def content(model: Path) -> str:
    return (model.parent / "text.txt").read_text()


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


class Stopping(GPTQ):
    """It gives up in the second block."""

    def solve(self, weight: Any, state: Any, grid: Any) -> Any:
        Stopping.left -= 1
        if Stopping.left < 0:
            raise KeyboardInterrupt
        return super().solve(weight, state, grid)

    left = 0


Stopping.__name__ = "GPTQ"


def test_a_dataset_in_memory_is_calibrated_on_and_recorded(model: Path, content: str, tmp_path: Path) -> None:
    """A file, its path and the same text in memory give the same bytes; the report has kind, number and hash."""
    path = model.parent / "text.txt"
    reports = {}
    for name, dataset in (("str", str(path)), ("path", path), ("list", [content]), ("dicts", [{"text": content}])):
        reports[name] = nearplane.quantize(model, tmp_path / name, dataset=dataset, **SMALL)
        assert weights(tmp_path / name) == weights(tmp_path / "str")
        stored = json.loads((tmp_path / name / "report.json").read_text())
        assert stored["data"]["sha256"] == reports["str"].data["sha256"] and stored["data"]["opening"] == "<s>"
        assert stored["settings"]["calibration"]["bos"] is True
    assert reports["path"].settings == reports["str"].settings and reports["path"].data == reports["str"].data
    held = reports["list"].settings["calibration"]["dataset"]
    assert held == reports["list"].data["dataset"] and (held["kind"], held["rows"]) == ("list", 1)
    assert len(held["sha256"]) == 64 and held["sha256"] == reports["dicts"].data["dataset"]["sha256"]


def test_padded_rows_enter_no_moment(model: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": tiny.tokens(1, length, seed=length)[0].tolist()} for length in (20, 9, 14)]
    report = nearplane.quantize(model, tmp_path / "out", dataset=rows, **{**SMALL, "nsamples": 8})
    assert {row.tokens for row in report.linears} == {43} and report.data["tokens"] == 43
    assert any("has 3 samples, fewer than nsamples=8" in event for event in report.events)
    assert not any("limit of positions" in event for event in report.events)


def test_a_run_on_a_dataset_in_memory_is_resumed(model: Path, content: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "method": GPTQ()}
    nearplane.quantize(model, tmp_path / "whole", dataset=[content], **settings)
    Stopping.left = 5
    with pytest.raises(KeyboardInterrupt):
        nearplane.quantize(model, tmp_path / "out", dataset=[content], **{**settings, "method": Stopping()})
    for changed, says in (
        ({"dataset": [content + " w9"]}, r"calibration\.dataset\.sha256 was"),
        ({"dataset": [content], "bos": False}, r"calibration\.bos was True when .* and is False now"),
    ):
        with pytest.raises(SettingError, match=says):
            nearplane.quantize(model, tmp_path / "out", resume=True, **settings, **changed)
    nearplane.quantize(model, tmp_path / "out", dataset=[content], resume=True, **settings)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_bos_decides_the_windows(model: Path, content: str) -> None:
    source = open_source(model)
    with_bos = gather(source, Calibration([content], nsamples=6, seqlen=24))
    without = gather(source, Calibration([content], nsamples=6, seqlen=24, bos=False))
    assert (with_bos.arguments["input_ids"][:, 0] == 1).all() and (with_bos.arguments["input_ids"][:, 1:] > 2).all()
    assert not (without.arguments["input_ids"][:, 0] == 1).any() and without.data["opening"] == ""
    assert with_bos.data["sha256"] != without.data["sha256"] and with_bos.data["tokens"] == 6 * 24


def test_a_start_token_that_the_tokenizer_writes_is_not_doubled() -> None:
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 10, 11, 12, 13, 14]])
    for start, expected in ((1, [1, 5, 6]), (2, [2, 1, 5])):
        decoder = tiny.build("t5", decoder_start_token_id=start)
        assert _decoded(decoder, {"input_ids": ids}, keep=True)["decoder_input_ids"][0].tolist() == expected


def test_encoders_begin_with_their_first_token_too(content: str, tmp_path: Path) -> None:
    folder = tiny.marking(tiny.save(tiny.build("bert"), tmp_path / "bert"), "[CLS]", "[SEP]")
    (tmp_path / "a.csv").write_text("body\n" + content)
    settings: dict[str, Any] = {"reference": folder, "dataset": tmp_path / "a.csv", "seqlen": np.int64(32)}
    result = nearplane.compare(folder, dataset_column="body", **settings)
    assert result.error["last_hidden_state"] == 0 and "each window begins with [CLS]" in result.protocol
    assert result.samples == 2000 // 31
    old = nearplane.compare(folder, dataset_column="body", bos=False, **settings)
    assert "[CLS]" not in old.protocol and old.samples == 2002 // 32
    with pytest.raises(SettingError, match="no column text, messages or input_ids; the columns are body"):
        nearplane.compare(folder, **settings)


def test_the_command_line(model: Path, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [{"body": "w5"}], "test": [{"body": content}]}))
    words = ["eval", str(model), "--dataset", str(path), "--seqlen", "32", "--windows", "2"]
    chosen = ["--dataset-column", "body", "--dataset-split", "test"]
    assert main([*words, *chosen]) == 0
    assert "each begins with <s>, unscored: 62 tokens scored" in capsys.readouterr().out
    assert main([*words, *chosen, "--no-bos", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bos"] is False and "first token of each unscored, <s> not put before: 62" in found["protocol"]
    for more, says in (
        ([], "several lists of rows, train, test; choose one with --dataset-split"),
        (["--dataset-split", "dev"], "the splits are train, test"),
        (["--dataset-split", "test"], "the columns are body"),
        (["--dataset-split", "train", "--dataset-column", "body"], "fewer than one window"),
    ):
        assert main([*words, *more]) == 2
        complaint = capsys.readouterr().err
        assert says in complaint and complaint.count("\n") == 1
    out = tmp_path / "out"
    quantize = ["quantize", str(model), str(out), "--dataset", str(path), "--bits", "4", "--group-size", "32"]
    assert main([*quantize, *chosen, "--nsamples", "4", "--seqlen", "24", "--no-bos", "--quiet"]) == 0
    calibration = nearplane.Report.read(out).settings["calibration"]
    assert (calibration["dataset_split"], calibration["dataset_column"], calibration["bos"]) == ("test", "body", False)


def test_plan_takes_the_same_datasets(model: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        forecast, "rates", lambda _plan, _found: forecast.Rates(1e-6, Products(*[1e-6] * 3), *[1e-6] * 9)
    )
    settings = {**SMALL}
    settings.pop("progress")
    for dataset in ([content], model.parent / "text.txt", torch.arange(3, 99)):
        assert nearplane.plan(model, dataset=dataset, **settings).estimate.windows == (4, 24)
    with pytest.raises(nearplane.NearplaneError, match="row 1 is null"):
        nearplane.plan(model, dataset=[None], **settings)


def test_models_of_images_refuse_texts(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("vit"), tmp_path / "model")
    for settings, says in (
        ({"dataset": ["w5"]}, "reads images or recordings from a folder; dataset is a list"),
        ({"dataset": tmp_path, "dataset_column": "text"}, "dataset_column is for texts"),
        ({"dataset": tmp_path, "dataset_split": "train"}, "dataset_split is for texts"),
    ):
        with pytest.raises(SettingError, match=says):
            nearplane.quantize(folder, tmp_path / "out", **settings, bits=4, group_size=32, method="gptq")
    assert not (tmp_path / "out").exists()


LOADED: dict[str, Callable[[Any, Path], Any]] = {
    "quantize": lambda model, out: nearplane.quantize(model, out / "new", bits=4),
    "plan": lambda model, _: nearplane.plan(model),
    "make_plan": lambda model, _: nearplane.make_plan(model),
    "open_source": lambda model, _: nearplane.open_source(model),
    "load": lambda model, _: nearplane.load(model),
    "evaluate": lambda model, _: nearplane.evaluate(model),
    "reference": lambda model, out: nearplane.evaluate(out, reference=model),
    "compare": lambda model, out: nearplane.compare(out, reference=model),
    "inspect": lambda model, _: nearplane.inspect(model),
    "bench": lambda model, _: nearplane.bench(model),
    "verify": lambda model, _: nearplane.verify(model),
    "convert": lambda model, out: nearplane.convert(model, out / "new", "gptq"),
}


@pytest.mark.parametrize("verb", LOADED)
def test_a_loaded_model_is_refused_in_a_sentence_that_says_how(verb: str, model: Path, tmp_path: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    how = r"save it and its tokenizer with save_pretrained\(FOLDER\), and give FOLDER"
    with pytest.raises(
        SettingError, match=rf"a loaded model \(LlamaForCausalLM\) .*{how}; .* give '{model}'"
    ) as caught:
        LOADED[verb](loaded, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    with pytest.raises(SettingError, match=rf"\(LlamaForCausalLM\) .*{how}\.$"):
        LOADED[verb](tiny.build("llama"), tmp_path)
    with pytest.raises(SettingError, match="MODEL is a transformers folder, a hub id, or demo; got a dict"):
        LOADED[verb]({}, tmp_path)


def test_paths_are_taken_everywhere(model: Path, tmp_path: Path) -> None:
    text, out = model.parent / "text.txt", tmp_path / "out"
    nearplane.quantize(model, out, dataset=text, offload=tmp_path / "states", **SMALL)
    few: dict[str, Any] = {"dataset": text, "seqlen": 32, "windows": 1}
    assert nearplane.evaluate(out, reference=model, **few).perplexity > 1
    assert nearplane.verify(out).ok and nearplane.inspect(out).quantized and nearplane.load(out) is not None
    assert nearplane.generate(out, "w5", max_new_tokens=1).new_tokens == 1
    with pytest.raises(SettingError, match="out must be a path; got 5"):
        nearplane.quantize(model, 5, **SMALL)  # type: ignore[arg-type]


NUMBERS = """
import numpy as np
from nearplane import GPTQ, Grid, Job, LoadSettings, NearPlane, Override, TokenGrid
i, f = np.int64, np.float32
method = NearPlane(beam=i(1), rounds=np.uint8(2), damp_percent=f(0.25), gate=np.True_)
assert repr(method) == repr(NearPlane(damp_percent=0.25))
grid = Grid(bits=i(3), group_size=np.int32(32), sym=np.False_)
assert repr(grid) == repr(Grid(bits=3, group_size=32, sym=False))
assert repr(TokenGrid(bits=i(8), clip=f(0.5))) == repr(TokenGrid(clip=0.5))
assert repr(Override("q_proj", bits=i(4))) == repr(Override("q_proj", bits=4))
assert repr(LoadSettings(head_bits=i(4))) == repr(LoadSettings(head_bits=4))
assert repr(GPTQ(damp_percent=f(0.5))) == repr(GPTQ(damp_percent=0.5))
job = Job(widths=(i(2), i(4)), rotate=("r1",), rotate_seed=i(3), budget=f(3.5))
assert repr(job) == repr(Job(widths=(2, 4), rotate=("r1",), rotate_seed=3, budget=3.5))
"""


def test_numbers_of_numpy_are_numbers_in_every_settings_class() -> None:
    """In a process of its own, because the tests check the types of arguments."""
    subprocess.run([sys.executable, "-c", NUMBERS], check=True)


def test_numbers_of_numpy_are_keywords(model: Path, content: str, tmp_path: Path) -> None:
    """With the same bytes and the same report as Python's own."""
    i = np.int64
    numbers = {"bits": i(3), "group_size": np.int32(32), "nsamples": np.uint8(4), "seqlen": i(24), "seed": i(0)}
    for name, settings in (("numpy", numbers), ("python", {name: int(value) for name, value in numbers.items()})):
        nearplane.quantize(model, tmp_path / name, dataset=[content], method="gptq", progress=False, **settings)
    assert weights(tmp_path / "numpy") == weights(tmp_path / "python")
    found, wanted = (nearplane.Report.read(tmp_path / name) for name in ("numpy", "python"))
    assert found.settings == wanted.settings
    measured = nearplane.evaluate(model, dataset=[content], seqlen=i(32), windows=i(2), kv_bits=i(8))
    assert json.loads(json.dumps(measured.as_dict()))["windows"] == 2


@dataclass(frozen=True)
class Odd(GPTQ):
    """A method of a user, with a field that settings do not usually have."""

    note: Any = None


@pytest.mark.parametrize(
    ("value", "stored"),
    [(Path("a/b"), "a/b"), (torch.float16, "torch.float16"), (np.float32(0.5), 0.5), ((1, Path("c")), [1, "c"])],
)
def test_settings_are_recorded_as_json_has_them(value: Any, stored: Any, model: Path, tmp_path: Path) -> None:
    nearplane.quantize(
        model, tmp_path / "out", dataset=model.parent / "text.txt", **{**SMALL, "method": Odd(note=value)}
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["method"]["note"] == stored


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), torch.zeros(3), b"x"])
def test_what_the_report_cannot_hold_is_refused_before_compute(value: Any, model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Watching(Odd):
        def prepare(self, moments: Any) -> Any:
            seen.append(moments)
            return super().prepare(moments)

    method = dataclasses.replace(Watching(), note=value)
    with pytest.raises(SettingError, match=r"method\.note is .*, which report\.json cannot hold"):
        nearplane.quantize(model, tmp_path / "out", dataset=model.parent / "text.txt", **{**SMALL, "method": method})
    assert not seen and not (tmp_path / "out").exists()


def test_names_that_the_report_cannot_hold_are_refused_before_compute(
    model: Path, content: str, tmp_path: Path
) -> None:
    """Bytes that are no UTF-8 in the name of a file."""
    text = tmp_path / os.fsdecode(b"\xff.txt")
    text.write_text(content)
    for dataset, out, name in (
        (text, tmp_path / "out", "calibration.dataset"),
        ([content], tmp_path / text.stem, "OUT"),
    ):
        with pytest.raises(SettingError, match=f"{name} is .*, which is not UTF-8"):
            nearplane.quantize(model, out, dataset=dataset, **SMALL)
        assert not out.exists()


def test_the_tokenizer_of_the_tests_marks_a_text(model: Path) -> None:
    assert load_tokenizer(model)("w5 w6")["input_ids"] == [1, 5, 6, 2]


@pytest.mark.parametrize("ones", [np.ones(9), np.ones(9, bool), torch.ones(1, 9), [1.0] * 9])
def test_masks_of_any_number(ones: Any) -> None:
    """Ones are what ``np.ones`` makes, floats among them; other values are no mask."""
    row = {"input_ids": np.arange(9), "attention_mask": ones}
    made = Calibration(dataset=[row], nsamples=1, seqlen=9).load(None)
    assert made.ids.tolist() == [list(range(9))]
    with pytest.raises(NearplaneError, match="attention_mask holds other values than 0 and 1"):
        Calibration(dataset=[{**row, "attention_mask": np.arange(9)}], nsamples=1, seqlen=9).load(None)
    with pytest.raises(NearplaneError, match="token ids \\(negative numbers\\)"):
        Calibration(dataset=[{"input_ids": [3, -1]}], nsamples=1, seqlen=2).load(None)
