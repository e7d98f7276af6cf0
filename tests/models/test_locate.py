"""From what a user types to a folder: hub ids with revisions, by a stub of the hub, and adapters, which are no models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects

import nearplane
from nearplane import RTN, NearplaneError
from nearplane.cli.main import main
from nearplane.core.errors import SettingError
from nearplane.models.locate import locate, with_revision
from nearplane.run.plan import make_plan

COMMITS = {None: "a" * 40, "v2": "b" * 40, "refs/pr/1": "c" * 40}
Hub = list[tuple[str, str | None, bool]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub of one repository in three revisions, whose weights differ; lists what was asked of it."""
    asked: Hub = []
    commits = enumerate(COMMITS.values())
    remote = {commit: tiny.save(tiny.build("llama", seed=seed), tmp_path / "r" / commit) for seed, commit in commits}

    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)

    def snapshot_download(repo_id: str, *, revision: str | None = None, allow_patterns: Any = None) -> str:
        asked.append((repo_id, revision, "*.safetensors" in allow_patterns))
        commit = COMMITS.get(revision, revision)
        if repo_id != "team/model" or commit not in remote:
            raise huggingface_hub.errors.RevisionNotFoundError("404: no such revision", response=response)
        folder = tmp_path / "cache" / "snapshots" / str(commit)
        names = [path.name for path in remote[commit].iterdir()]
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(remote[commit] / name, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def weight(folder: Path) -> Any:
    return nearplane.load(folder, packed=False).state_dict()["model.embed_tokens.weight"]


def test_a_revision_reaches_the_hub_from_every_verb(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, quantize = tmp_path / "out", ["--method", "rtn", "--group-size", "32", "--quiet"]
    assert main(["quantize", "team/model@v2", str(out), *quantize]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["revision"], report["commit"], report["model"]) == ("v2", COMMITS["v2"], "team/model@v2")
    assert [weights for _, _, weights in hub] == [
        False,
        False,
        True,
    ]  # weights last, and of the commit that was read before
    assert {(name, revision) for name, revision, _ in hub} == {("team/model", "v2"), ("team/model", COMMITS["v2"])}
    assert (weight(out) - weight(tmp_path / "r" / COMMITS["v2"])).abs().max() == 0
    texts = tmp_path / "text.txt"
    texts.write_text(tiny.text(200))
    verbs: dict[str, list[str]] = {
        "plan": ["--method", "rtn", "--group-size", "32"], "verify": [], "inspect": [],
        "generate": ["--prompt", "w5", "--max-new-tokens", "2"],
        "eval": ["--dataset", str(texts), "--reference", "team/model@refs/pr/1"],
        "quantize": [str(tmp_path / "again"), *quantize],
    }  # fmt: skip
    for verb, more in verbs.items():
        for words in (["team/model@v2", *more], ["team/model", *more, "--revision", "v2"]):
            hub.clear()
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            assert main([verb, *words]) == 0, (verb, capsys.readouterr().err)
            first = {revision for _, revision, _ in hub} - {"refs/pr/1"}
            assert first <= {"v2", COMMITS["v2"]} and "v2" in first, verb
            assert (verb == "eval") == any(revision == "refs/pr/1" for _, revision, _ in hub)


def test_a_revision_in_python(hub: Hub, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": RTN(), "bits": 4, "group_size": 32, "progress": False}
    report = nearplane.quantize("team/model", tmp_path / "one", revision="refs/pr/1", **settings)
    assert report.revision == "refs/pr/1" and nearplane.Report.read(tmp_path / "one").commit == COMMITS["refs/pr/1"]
    report = nearplane.quantize("team/model", tmp_path / "two", **settings)
    assert (report.revision, report.commit) == (None, COMMITS[None])
    report = nearplane.quantize(tmp_path / "r" / COMMITS[None], tmp_path / "three", **settings)
    assert (report.revision, report.commit) == (None, None)
    for call in (nearplane.load, nearplane.inspect, nearplane.verify, nearplane.plan):
        hub.clear()
        more: dict[str, Any] = {"method": "rtn", "group_size": 32} if call is nearplane.plan else {}
        call("team/model", revision="v2", **more)  # type: ignore[operator]
        assert "v2" in {revision for _, revision, _ in hub}


def test_a_report_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    nearplane.quantize(
        tiny.save(tiny.build("llama"), tmp_path / "model"),
        tmp_path / "out",
        method=RTN(),
        group_size=32,
        progress=False,
    )
    path = tmp_path / "out" / "report.json"
    stored = json.loads(path.read_text())
    del stored["revision"], stored["commit"]
    path.write_text(json.dumps(stored))
    assert nearplane.Report.read(tmp_path / "out").commit is None


def test_what_has_no_revision(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "here")
    at = shutil.copytree(folder, tmp_path / "team@v2")
    assert locate(at) == at and locate("team@v2") == Path("team@v2") and not hub  # a folder, whatever its name
    for model, revision, sentence in (
        (str(folder), "v2", "is here, and not on the hub: it has no revision 'v2'"),
        ("here@v2", None, "here is here, and not on the hub"), ("demo@v2", None, "demo is here"), ("demo", "v2", "demo is here"),
        ("team@v2", "v2", "is here, and not on the hub"), ("team/model@v2", "v1", "give one of them"),
        ("team/model@", None, "without a revision"), ("team/model", "", "revision must be"),
        ("./absent@v2", None, "no such folder"), ("team/model", "absent", "at revision absent: no such folder, and the hub"),
    ):  # fmt: skip
        with pytest.raises(NearplaneError, match=sentence):
            locate(model, revision=revision)
        words = [model] if revision is None else [model, "--revision", revision]
        assert main(["verify", *words]) == 2
        heard = capsys.readouterr().err
        assert sentence in heard and "Traceback" not in heard
    with pytest.raises(SettingError, match="revision must be"):
        with_revision("team/model", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_to_be_merged_first(
    weights: str, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """From every verb, also beside a model: transformers would load that with the adapter on top."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "team/base", "peft_type": "LORA"}'
    )
    (tmp_path / "lora" / weights).write_bytes(b"x")
    beside = tiny.save(tiny.build("llama"), tmp_path / "both")
    (beside / "adapter_config.json").write_text("{}")
    verbs: list[list[str]] = [
        ["quantize", "lora", "out"], ["plan", "lora"], ["eval", "lora"], ["inspect", "lora"], ["bench", "lora"],
        ["generate", "lora", "--prompt", "x"], ["verify", "lora"], ["convert", "lora", "out", "--format", "gptq"],
    ]  # fmt: skip
    for words in verbs:
        assert main(words) == 2
        heard = capsys.readouterr().err
        assert "lora holds an adapter of team/base (adapter_config.json), and no model; merge it first" in heard, words
    for call in _calls():
        with pytest.raises(
            NearplaneError, match=r"holds an adapter \(adapter_config.json\) beside a model; merge it first"
        ):
            call(beside)


def _calls() -> list[Callable[[Path], object]]:
    return [nearplane.load, nearplane.inspect, nearplane.verify, lambda path: make_plan(path, sketch=True)]


VERBS = ["plan FILE", "quantize FILE OUT", "eval FILE", "generate FILE --prompt x", "verify FILE", "inspect FILE", "bench FILE",
         "convert FILE OUT --format gptq", "eval MODEL --reference FILE"]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_bare_gguf_file_is_no_model(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the file is, and what to give: its folder where nearplane wrote one, else the original's."""
    model, ours = tiny.save(tiny.build("llama"), tmp_path / "model"), tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "gguf", "file": "m-Q4_0.gguf"}})
    )
    bare, wanted = (
        tmp_path / "x-Q4_0.gguf",
        "a GGUF file, which llama.cpp opens and nearplane does not; give the transformers",
    )
    downloads, nameless = tmp_path / "downloads", tmp_path / "blobs" / "0a1b"
    downloads.mkdir(), nameless.parent.mkdir()
    for file in (ours / "m-Q4_0.gguf", ours / "other.gguf", bare, downloads / "y.gguf", nameless):
        file.write_bytes(b"GGUF" + bytes(20))
    for given, sentence in (
        (ours / "m-Q4_0.gguf", f"in a folder that nearplane wrote; give the folder, {ours}."),
        (ours / "other.gguf", f"other.gguf is {wanted}"), (bare, f"x-Q4_0.gguf is {wanted}"), (nameless, f"0a1b is {wanted}"),
        (downloads, f"downloads has no config.json, and y.gguf in it is {wanted}"),
        (model / "model.safetensors", f"is a file of a model folder; give the folder, {model}."),
        (tmp_path / "absent.gguf", "absent.gguf: no such file"),
    ):  # fmt: skip
        words = {"FILE": str(given), "OUT": str(tmp_path / "out"), "MODEL": str(model)}
        assert main([words.get(word, word) for word in verb.split()]) == 2
        told = capsys.readouterr().err.replace("\n", " ").replace("  ", " ")
        assert sentence in told and "Traceback" not in told, (given, told)
    assert not (tmp_path / "out").exists()


def test_python_refuses_a_bare_gguf_file(tmp_path: Path) -> None:
    file, model = tmp_path / "x.gguf", tiny.save(tiny.build("llama"), tmp_path / "model")
    file.write_bytes(b"GGUF")
    for call in (
        lambda: nearplane.load(file), lambda: nearplane.quantize(file, tmp_path / "out"), lambda: nearplane.verify(file),
        lambda: nearplane.evaluate(model, reference=file), lambda: nearplane.generate(str(file), "x"),
        lambda: nearplane.plan(file), lambda: nearplane.inspect(file), lambda: nearplane.bench(file),
        lambda: nearplane.convert(file, tmp_path / "out", "gptq"),
    ):  # fmt: skip
        with pytest.raises(NearplaneError, match=r"is a GGUF file.*--template"):
            call()
