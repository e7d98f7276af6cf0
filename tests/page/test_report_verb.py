"""The page beside a checkpoint: written with it, never at its cost, and written again by ``nearplane report``."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
from reports import report, sound
from safetensors import safe_open

import nearplane
from nearplane import Grid, Report
from nearplane.checkpoint.original import original_facts
from nearplane.cli import report as verb
from nearplane.cli.main import main
from nearplane.core.errors import NearplaneError
from nearplane.formats.store import Store
from nearplane.page import html, quality
from nearplane.page.facts import facts
from nearplane.page.words import size_of
from nearplane.run.job import Job
from nearplane.run.plan import draft


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    """Made by the command line."""
    folder = model.parent / "out"
    words = [
        "quantize",
        str(model),
        str(folder),
        "--bits",
        "3",
        "--group-size",
        "32",
        "--method",
        "gptq",
        "--nsamples",
        "4",
    ]
    words += ["--seqlen", "24", "--dataset", str(model.parent / "text.txt"), "--quiet", "--dtype", "float16"]
    assert main(words) == 0
    return folder


def quick(model: Path, out: Path, **settings: Any) -> Report:
    return nearplane.quantize(model, out, method="rtn", grid=Grid(4, 32), check=False, progress=False, **settings)


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_quantize_writes_the_page_of_its_report(model: Path, out: Path) -> None:
    found = sound((out / "report.html").read_text("utf-8"))
    written = content(out)
    assert [row["name"] for row in written["linears"] if row["name"] not in found.text] == []
    assert f"{written['check']['kl']:.3g}" in found.text
    assert f"nearplane quantize {model} NEW --method gptq" in found.text and "--bits 3 --group-size 32" in found.text
    assert f"nearplane quantize {model} NEW --config {out}/report.json" in found.text
    assert 0 < written["memory"]["peak"] < written["memory"]["available"] and written["memory"]["planned"] > 0
    assert html.page(written) == (out / "report.html").read_text("utf-8")
    assert Report.read(out).config == written["config"]
    assert nearplane.verify(out).ok


def test_a_run_from_python_has_a_command_too(model: Path, tmp_path: Path) -> None:
    """Objects that no command holds are named."""
    quick(model, tmp_path / "out")
    said = sound((tmp_path / "out" / "report.html").read_text("utf-8")).text
    assert f"nearplane quantize {model} NEW --" in said and "grid.group_size 32" in said
    nearplane.quantize(
        model, tmp_path / "own", dataset=["w1 w2 " * 200], nsamples=2, seqlen=16, bits=3, group_size=32, progress=False
    )
    said = sound((tmp_path / "own" / "report.html").read_text("utf-8")).text
    assert "Given as objects of Python, which no command holds: dataset" in said and "--config" not in said


@pytest.mark.parametrize("why", ["jinja2", "damage"])
def test_a_checkpoint_is_whole_without_its_page(
    why: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the page cannot be made, the run says so and ends well; the report is kept for a later page."""
    if why == "jinja2":
        monkeypatch.setitem(sys.modules, "jinja2", None)
        html._template.cache_clear()
    else:
        monkeypatch.setattr(quality, "tiles", lambda _run: {}["missing"])
    made = quick(model, tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists() and nearplane.verify(tmp_path / "out").ok
    (told,) = (event for event in made.events if "report.html was not written" in event)
    assert why in told and content(tmp_path / "out")["events"] == made.events
    monkeypatch.undo()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert sound((tmp_path / "out" / "report.html").read_text("utf-8"))


def test_a_converted_folder_has_a_page_of_its_own(out: Path, tmp_path: Path) -> None:
    """Format, engines and sizes of the new folder; the run's figures and command; the same when it is written again."""
    nearplane.convert(out, tmp_path / "new", "gptq")
    old, new = content(out), content(tmp_path / "new")
    assert new["converted"] == {"format": "gptq", "out": str(tmp_path / "new")}
    changed = {"converted", "engines", "bytes", "totals"}
    assert {k: v for k, v in new.items() if k not in changed} == {k: v for k, v in old.items() if k not in changed}
    assert new["engines"] != old["engines"] and new["bytes"]["before"] == old["bytes"]["before"]
    with safe_open(tmp_path / "new" / "model-00001-of-00001.safetensors", "pt") as file:
        assert new["bytes"]["after"] == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    weights = sum(row["shape"][0] * row["shape"][1] for row in new["linears"])
    assert new["totals"]["bits_per_weight"] == 8 * new["bytes"]["quantized"] / weights
    said = sound((tmp_path / "new" / "report.html").read_text("utf-8")).text
    assert "converted from the compressed-tensors checkpoint" in said and "convert NEW NEWER --format gptq" in said
    card = (tmp_path / "new" / "README.md").read_text()
    assert f"{new['totals']['bits_per_weight']:.2f} bits per weight" in card
    (tmp_path / "new" / "report.html").unlink()
    assert main(["report", str(tmp_path / "new")]) == 0
    assert sound((tmp_path / "new" / "report.html").read_text("utf-8")).text == said
    assert nearplane.verify(tmp_path / "new").ok


def test_a_report_that_is_damaged_is_converted_as_it_is(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "old")
    (tmp_path / "old" / "report.json").write_text("{")
    nearplane.convert(tmp_path / "old", tmp_path / "new", "gptq")
    assert (tmp_path / "new" / "report.json").read_text() == "{" and not (tmp_path / "new" / "report.html").exists()


def test_a_page_of_the_source_is_not_copied(model: Path, tmp_path: Path) -> None:
    (model / "report.html").write_text("of another run")
    try:
        quick(model, tmp_path / "out")
    finally:
        (model / "report.html").unlink()
    assert "<h1>" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_option_that_is_offered_is_taken(kind: str, tmp_path: Path) -> None:
    """Also with linears that engines fuse, and it reaches the linears that it names, and no others."""
    model = tiny.save(tiny.build(kind) if kind == "llama" else tiny.build_mixture(kind), tmp_path / "model")
    made = quick(model, tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    bad = quality.worst(facts(made.as_dict()))
    assert len(bad) == 10
    for option, name, reach in {(one.option, one.linear.name, one.reach) for one in bad}:
        flag, _, value = option.partition(" ")
        assert flag == "--override"
        plan = draft(model, Job.of(method="rtn", bits=4, group_size=32, override=[value.strip("'")]))
        wide = {site.name for site in plan.sites if plan.grid_of(site).bits == 8}
        assert name in wide and len(wide) == reach, option


def test_the_verb_writes_beside_one_and_where_it_is_told(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n" and (out / "report.html").read_bytes() == before
    opened: list[str] = []
    monkeypatch.setattr(verb.webbrowser, "open", lambda url: opened.append(url) or True)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(out), "--open", str(out / "report.json")]) == 0  # options may stand between
    assert capsys.readouterr().out == "report.html\n" and opened == [(tmp_path / "report.html").as_uri()]
    assert "2 runs" in sound((tmp_path / "report.html").read_text("utf-8")).text
    assert main(["report", str(out), "--output", "mine.html"]) == 0 and (tmp_path / "mine.html").read_bytes() == before
    monkeypatch.setattr(verb.webbrowser, "open", lambda _url: False)
    assert main(["report", str(out), "--output", "mine.html", "--open"]) == 2
    assert "no browser could be started; open mine.html in one." in capsys.readouterr().err


def test_mistakes_are_one_sentence(model: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "report.json").write_text((out / "report.json").read_text()[:999])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"score": 3}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "report.json").write_text("[1]")
    (tmp_path / "precious.html").write_text("<html>mine</html>")
    (tmp_path / "begun" / ".nearplane").mkdir(parents=True)
    for words, said in (
        ([tmp_path / "none"], "no such folder; give the OUT of nearplane quantize"),
        ([model], "has no report.json, which nearplane quantize writes"),
        ([tmp_path / "begun"], "--resume"),
        ([tmp_path / "cut"], "is not valid JSON"),
        ([tmp_path / "list"], "must hold a JSON object, and holds a list"),
        ([tmp_path / "other"], "is not the report of a quantization"),
        (
            [out, tmp_path / "other", "--output", tmp_path / "x.html"],
            f"{tmp_path / 'other' / 'report.json'} is not the report",
        ),
        ([model / "config.json"], "is not the report of a quantization"),
        ([out, "--output", tmp_path / "precious.html"], "is no page that nearplane wrote"),
        ([out, "--output", tmp_path], "must be a file that ends in .html"),
        ([out, "--output", tmp_path / "report.json"], "must be a file that ends in .html"),
        ([out, "--output", tmp_path / "no" / "x.html"], "there is no folder"),
        ([out, out], "an OUT is given twice"),
        ([out, "--original", tmp_path / "none"], "no such folder"),
        ([out, "--original", "someone/never-fetched"], "not in the local cache of the hub; nothing is downloaded here"),
        ([], "OUT must be given"),
        ([out, "--orignal", "x"], "did you mean --original?"),
    ):
        assert main(["report", *map(str, words)]) == 2, words
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert (tmp_path / "precious.html").read_text() == "<html>mine</html>" and not (tmp_path / "x.html").exists()


def test_the_original_is_told_part_by_part(model: Path, out: Path) -> None:
    store, written = Store(model), content(out)
    told = original_facts(str(model), [written])
    sizes = {name: store.nbytes(name) for name in store.names}
    quantized = sum(sizes[f"{row['name']}.weight"] for row in written["linears"])
    rows = {part.strip(): cells for part, *cells in told["rows"]}
    assert told["bytes"] == sum(sizes.values()) == written["bytes"]["before"]
    assert rows["14 quantized linears"] == [
        f"{quantized / 1e3:.3g} kB",
        f"{written['bytes']['quantized'] / 1e3:.1f} kB",
    ]
    assert rows["all that stays dense"][0] == size_of(told["bytes"] - quantized)
    assert rows["model.embed_tokens.weight: not a linear of a block"] == ["32.8 kB", "16.4 kB"]
    assert told["says"] == "That is the size that the report names."
    said = sound(html.page(written, original=told)).text
    assert "The original" in said and "14 quantized linears" in said
    written["bytes"]["before"] //= 2
    assert "may be another model or revision" in original_facts(str(model), [written])["says"]


def test_an_original_with_other_names_is_counted(tmp_path: Path) -> None:
    """Fused experts are one tensor in the original: their share is counted, and said to be about that."""
    model = tiny.save(tiny.build_mixture("qwen3_moe"), tmp_path / "model")
    made = quick(model, tmp_path / "out").as_dict()
    rows = original_facts(str(model), [made])["rows"]
    assert rows[0][0] == f"{len(made['linears'])} quantized linears"
    weights = sum(row["shape"][0] * row["shape"][1] for row in made["linears"])
    assert rows[0][1].removeprefix("about ") == f"{4 * weights / 1e3:.3g} kB"


def test_nothing_is_downloaded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(_id: str, **how: Any) -> str:
        asked.append(how)
        raise OSError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(NearplaneError, match="someone/model at revision v2: no such folder"):
        original_facts("someone/model@v2", [content(out)])
    assert [how["local_files_only"] for how in asked] == [True]


def test_the_page_of_an_earlier_version(tmp_path: Path) -> None:
    """Of one that wrote neither blocks nor a check, memory, command, or other engines than three."""
    old = report()
    for key in ("blocks", "check", "memory", "config", "revision", "tuning"):
        old.pop(key, None)
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert main(["report", str(tmp_path)]) == 0
    said = sound((tmp_path / "report.html").read_text("utf-8")).text
    assert (
        "is not recorded: the version that wrote this report did not check" in said
        and "command is not recorded" in said
    )
