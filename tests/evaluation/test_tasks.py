"""Tasks of lm-evaluation-harness: with the harness where it is installed, our own side with a small stand-in everywhere."""

import io
import json
import math
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane import NearplaneError, SettingError, evaluate_tasks
from nearplane.cli.main import main
from nearplane.evaluation import tasks
from nearplane.evaluation.tasks import PAPER

with_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: pip install 'nearplane[tasks]'"
)
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
{more}
"""
QUESTIONS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its 4-bit checkpoint, and a task of twenty questions in a folder of its own."""
    place = tmp_path_factory.mktemp("tasks")
    tiny.marking(tiny.with_text(place), last="")
    assert (
        main(["quantize", str(place / "model"), str(place / "out"), "--method", "rtn", "--group-size", "32", "--quiet"])
        == 0
    )
    rows = [
        {"q": f"w{i} w{i + 5}", "a": f"w{i + 2}", "b": f"w{i + 9}", "label": i % 2} for i in range(3, 3 + QUESTIONS)
    ]
    (place / "own").mkdir()
    (place / "own" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, more in (("own", ""), ("zero", "num_fewshot: 0")):
        text = TASK.format(name=name, rows=place / "own" / "rows.jsonl", more=more)
        (place / "own" / f"{name}.yaml").write_text(text)
    return place


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def accuracy(folder: Path, checkpoint: str, limit: int = QUESTIONS) -> float:
    """The share of questions whose answer is the likelier one, by plain arithmetic on the packed model."""
    model, right = nearplane.load(folder / checkpoint), 0
    for line in (folder / "own" / "rows.jsonl").read_text().splitlines()[:limit]:
        row = json.loads(line)
        scores = []
        for answer in (row["a"], row["b"]):
            ids = [1, *(int(word[1:]) for word in f"{row['q']} {answer}".split())]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
            scores.append(float(logits[len(ids) - 2, ids[-1]]))
        right += scores.index(max(scores)) == row["label"]
    return right / limit


@with_harness
@pytest.mark.usefixtures("offline")
def test_the_harness_on_a_packed_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of our own, by its name in a folder: the accuracy is that of plain arithmetic."""
    words = ["eval", str(folder / "out"), "--tasks", "own", "--include-path", str(folder / "own"), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    told = found["tasks"]
    assert told["results"]["own"]["acc"] == accuracy(folder, "out")
    assert told["samples"] == {"own": QUESTIONS} and told["shots"] == {"own": 0} and told["versions"] == {"own": "2.0"}
    from lm_eval import __version__

    assert told["harness"] == __version__ and "perplexity" not in found and found["model"] == str(folder / "out")
    assert f"lm-evaluation-harness {__version__}, own (version 2.0); 0-shot; no chat template" == told["protocol"]


@with_harness
@pytest.mark.usefixtures("offline")
def test_files_limits_shots_and_a_reference(folder: Path) -> None:
    file, zero = str(folder / "own" / "own.yaml"), str(folder / "own" / "zero.yaml")
    result = evaluate_tasks(
        folder / "out", [file, zero], limit=7, num_fewshot=2, reference=folder / "model", batch_size=3
    )
    assert result.samples == {"own": 7, "zero": 7} and result.shots == {"own": 2, "zero": 0}
    assert result.notes == ("zero is 0-shot by its own file, not 2-shot",)
    assert result.results["zero"]["acc"] == accuracy(folder, "out", 7)
    assert result.reference["zero"]["acc"] == accuracy(folder, "model", 7)
    assert "the first 7 questions of each task" in result.protocol and "own 2-shot, zero 0-shot" in result.protocol


@with_harness
@pytest.mark.usefixtures("offline")
def test_what_the_harness_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "gone.yaml"
    gone.write_text(TASK.format(name="gone", rows=tmp_path / "nothing.jsonl", more=""))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        TASK.format(name="wrong", rows=folder / "own" / "rows.jsonl", more="").replace("{{q}}", "{{q.x.y}}")
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [\n")
    for task, sentence in (
        (str(gone), "the data of task"), (str(wrong), "cannot be made of its file"), (str(broken), "cannot be made of its file"),
        (str(tmp_path / "none.yaml"), "does not exist"),
    ):  # fmt: skip
        assert main(["eval", str(folder / "out"), "--tasks", task]) == 2, task
        said = capsys.readouterr().err
        assert sentence in said and "Traceback" not in said, said


class Manager:
    """In place of the harness's, which reads thousands of files."""

    def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
        self.all_tasks = [*(PAPER if include_defaults else ()), *(["own"] if include_path else [])]

    def load(self, name: str) -> dict[str, Any]:
        if name == "boolq" and Fake.offline:
            raise ConnectionError("Couldn't reach 'super_glue' on the Hub")
        return {"tasks": {name: name}, "groups": {}}


class Fake:
    offline = False
    asked: dict[str, Any] = {}  # noqa: RUF012


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """A stand-in that answers accuracies which are known."""

    def simple_evaluate(
        *, model: Any, tasks: list[str], limit: int | None, num_fewshot: int | None, log_samples: bool
    ) -> Any:
        Fake.asked = {"tasks": tasks, "limit": limit, "num_fewshot": num_fewshot, **vars(model)}
        results = {
            name: {
                "alias": name,
                "acc,none": 0.1 * k,
                "acc_stderr,none": 0.01,
                **({"acc_norm,none": 0.2 * k} if k % 2 else {}),
            }
            for k, name in enumerate(tasks, 1)
        }
        results[tasks[0]]["acc_stderr,none"] = "N/A"
        counts = {name: {"original": 9, "effective": limit or 9} for name in tasks}
        return {
            "results": results,
            "n-shot": dict.fromkeys(tasks, 0),
            "n-samples": counts,
            "versions": dict.fromkeys(tasks, 1.0),
        }

    monkeypatch.setattr(Fake, "offline", False)
    parts = {
        "lm_eval": {"__version__": "9.9", "simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": SimpleNamespace},
        "datasets": {
            "exceptions": SimpleNamespace(DatasetsError=LookupError),
            "config": SimpleNamespace(HF_HUB_OFFLINE=True),  # no network is asked for
        },
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module, raising=False)
    return Fake


def test_the_papers_set_and_its_mean(folder: Path, harness: type[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    """Of acc_norm where there is one, else acc, as GPTAQ's code takes it; the packed model is what is asked."""
    result = evaluate_tasks(folder / "out", "paper", limit=5, batch_size=4, reference=folder / "model")
    assert harness.asked["tasks"] == ["piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "boolq"]
    assert harness.asked["num_fewshot"] == 0 and harness.asked["limit"] == 5 and harness.asked["batch_size"] == 4
    assert result.mean == pytest.approx((0.2 + 0.2 + 0.6 + 0.4 + 1.0 + 0.6) / 6)
    assert result.reference_mean == result.mean
    assert result.results["piqa"] == {"acc": 0.1, "acc_stderr": None, "acc_norm": 0.2}
    assert "mean of 6 tasks 0.5000 (reference 0.5000): acc_norm where there is one" in str(result)
    assert "GPTAQ, arXiv 2504.02692" in str(result) and "hellaswag acc 0.2000 ± 0.0100" in str(result)
    assert "lm-evaluation-harness 9.9" in result.protocol
    evaluate_tasks(folder / "out", "own,piqa", include_path=folder)
    packed = [type(module).__name__ for module in harness.asked["pretrained"].modules()]
    assert "QuantizedLinear" in packed and harness.asked["tasks"] == ["own", "piqa"]
    assert evaluate_tasks(folder / "out", list(PAPER)).mean is None  # named one by one, these are six tasks
    assert main(["eval", str(folder / "out"), "--tasks", "paper", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tasks"]
    assert math.isclose(told["mean"], 0.5) and told["harness"] == "9.9"


def test_a_text_beside_tasks(folder: Path, harness: type[Fake], capsys: pytest.CaptureFixture[str]) -> None:
    """Where an option about a text is given: one object, or both texts."""
    text = str(folder / "text.txt")
    words = ["eval", str(folder / "out"), "--tasks", "piqa", "--limit", "3", "--dataset", text, "--seqlen", "40"]
    assert main([*words, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["perplexity"] > 1 and both["seqlen"] == 40 and both["tasks"]["samples"] == {"piqa": 3}
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "perplexity " in said and "piqa acc 0.1000" in said and said.count("protocol: ") == 2


def test_what_is_refused(
    folder: Path,
    harness: type[Fake],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(folder / "out")
    for words, sentence in (
        (["--tasks", "piqua"], "there is no task 'piqua'; did you mean piqa?"),
        (["--tasks", "zzzzzz"], "a file of your own ends in .yaml"),
        (["--tasks", "piqa,,"], "separated by commas"),
        (["--tasks", "piqa", "--limit", "0"], "limit must be a whole number of at least 1"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "num_fewshot must be a whole number of at least 0"),
        (["--tasks", "piqa", "--batch-size", "0"], "batch_size must be"),
        (["--tasks", "paper", "--num-fewshot", "5"], "the tasks of paper are zero-shot"),
        (["--tasks", "piqa", "--include-path", str(tmp_path / "no")], "is no folder"),
        (["--tasks", "piqa", "--kv-bits", "4"], "--kv-bits is for reading a text"),
        (["--limit", "3"], "--limit is about tasks; give --tasks NAME, too"),
        (["--include-path", str(tmp_path)], "--include-path is about tasks"),
    ):
        assert main(["eval", out, *words]) == 2, words
        said = " ".join(capsys.readouterr().err.split())
        assert sentence in said and "Traceback" not in said, (words, said)
    monkeypatch.setattr(Fake, "offline", True)
    assert main(["eval", out, "--tasks", "paper"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the data of task boolq cannot be read (ConnectionError: Couldn't reach 'super_glue'" in said
    assert "fetch it where there is a network" in said
    vit = tiny.save(tiny.build("bert"), tmp_path / "bert")
    assert main(["eval", str(vit), "--tasks", "piqa"]) == 2 and "are for language models" in capsys.readouterr().err
    bare = tiny.save(tiny.build("llama"), tmp_path / "bare")
    with pytest.raises(NearplaneError, match="neither BOS nor EOS"):
        evaluate_tasks(bare, "piqa")
    with pytest.raises(SettingError, match="tasks are names"):
        evaluate_tasks(bare, [])


def test_without_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(folder / "out"), "--tasks", "piqa"]) == 2
    said = capsys.readouterr().err
    assert "cannot be imported" in said and "pip install 'nearplane[tasks]'" in said and "Traceback" not in said


def test_an_old_harness(folder: Path, harness: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Manager, "load")
    with pytest.raises(NearplaneError, match=r"lm-evaluation-harness 9\.9 is too old"):
        evaluate_tasks(folder / "out", "piqa")


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a log would keep each step of them. Afterwards other bars are drawn as ever."""
    from tqdm.auto import tqdm

    def drawn(terminal: bool, inside: bool) -> str:
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        with tasks._without_bars() if inside else nullcontext():
            list(tqdm([1, 2, 3], mininterval=0))
        return stream.getvalue()

    assert drawn(False, True) == "" and "\r" in drawn(True, True) and "\r" in drawn(False, False)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then caches alone are read, without the retries of each file; afterwards all is as it was."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    asked: list[str] = []

    def offline(answers: bool) -> tuple[bool, bool]:
        def head(address: str, timeout: float) -> None:
            asked.append(address)
            if not answers:
                raise OSError("no network")

        monkeypatch.setattr(tasks, "get_session", lambda: SimpleNamespace(head=head))
        with tasks._one_try():
            return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE

    for place in (constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    assert offline(answers=True) == (False, False) and offline(answers=False) == (True, True) and len(asked) == 2
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert offline(answers=False)[0] and len(asked) == 2
