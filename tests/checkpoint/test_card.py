"""The model card: its front matter, its figures, whose card it is, and that a resumed run ends with the same one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import nearplane
from nearplane import GPTQ, RTN, Calibration, Grid, Job
from nearplane.checkpoint.hub.card import Made, card, plainly
from nearplane.checkpoint.hub.origin import base_of, carried, front_matter, stated_base
from nearplane.cli import quantize as verb
from nearplane.cli.main import main
from nearplane.cli.options import parse
from nearplane.core.grid import PRESETS
from nearplane.formats.companions import CARD, is_ours, sealed
from nearplane.page.words import options_in
from nearplane.run.names import config_of

SETTINGS: dict[str, Any] = {
    "method": "gptq",
    "bits": 4,
    "group_size": 32,
    "nsamples": 4,
    "seqlen": 32,
    "dtype": "float16",
}
STATED = "---\nlicense: other\nlicense_name: own\nlanguage: no\npipeline_tag: text-generation\nbase_model: team/base\n---\n# It\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    model = tiny.with_text(folder)
    (model / CARD).write_text(STATED)
    nearplane.quantize(model, folder / "out", dataset=str(folder / "text.txt"), progress=False, **SETTINGS)
    return folder


def fields(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / CARD).data.to_dict()


def test_the_card_says_what_was_made(made: Path) -> None:
    """Front matter as the hub reads it, figures of the report, a command for each engine that loads the folder and no other."""
    out, text = made / "out", (made / "out" / CARD).read_text()
    expected = {
        "base_model": "team/base", "base_model_relation": "quantized", "library_name": "transformers", "license": "other",
        "license_name": "own", "language": "no", "pipeline_tag": "text-generation",
        "tags": ["nearplane", "quantized", "compressed-tensors", "4-bit"],
    }  # fmt: skip
    assert fields(out) == expected
    report = json.loads((out / "report.json").read_text())
    check, size = report["check"], report["bytes"]
    for said in (
        "| method | GPTQ |", "4 bits in groups of 32", f"{size['before'] / 1e6:.1f} MB before, {size['after'] / 1e6:.1f} MB now",
        f"{check['kl']:.4g} nats a token", f"{check['reference_perplexity']:.4g} before, {check['perplexity']:.4g} now",
        f"{check['tokens']} tokens scored, {check['windows']} windows that calibration has not used, of text.txt",
        "nearplane generate MODEL", f"nearplane {report['versions']['nearplane']}",
        "nearplane quantize model OUT --method gptq --bits 4",
    ):  # fmt: skip
        assert said in text, said
    loads = {engine for engine, judged in report["engines"].items() if not judged["refusals"]}
    commands = {
        "vllm": "vllm serve",
        "mlx": "mlx_lm",
        "llama.cpp": "llama-completion",
        "sglang": "sglang.launch_server",
    }
    assert {"vllm"} <= loads and "mlx" not in loads
    assert {engine for engine, word in commands.items() if word in text} == loads & commands.keys()
    assert str(made) not in text and "# It" not in text and not re.search(r"20\d\d-", text)
    assert is_ours(text) and nearplane.verify(out).ok


def test_the_command_repeats_the_run(made: Path) -> None:
    """The words of the report, parsed as the command line does, are the job again."""
    config = json.loads((made / "out" / "report.json").read_text())["config"]
    assert "not_kept" not in config
    _, settings = parse(verb, ["model", "out", *options_in(config)])
    assert Job.of(settings=settings) == Job.of(dataset=str(made / "text.txt"), **SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 3, "sym": False, "group_size": -1, "method": "nearplane", "check": False},
        {
            "override": {"down_proj": {"bits": 8, "sym": False}, "a=b": {"bits": 2}},
            "ignore": ["lm_.*", "x y"],
            "head_bits": 8,
        },
        {"budget": 3.5, "widths": [2, 4], "rotate": "r1,r2", "towers": ["text"], "tune": 5, "rotate_seed": 3},
        {"act_bits": 8, "act_sym": False, "sentences": True, "bos": False, "dataset": "a.txt:2,self", "seed": 4},
        {"format": "gguf", "gguf_type": "Q5_0", "template": "x.gguf", "damp_percent": 0.03},
        {"bits": "ternary", "dtype": "bfloat16", "device": "cpu", "revision": "v2", "trust_remote_code": True},
        {"negative_scales": False, "fit": "mse", "override": ["-v=gguf_type=Q8_0"]},
    ],
    ids=str,
)
def test_settings_come_back_from_their_words(settings: dict[str, Any]) -> None:
    job = Job.of(settings=settings)
    config = json.loads(json.dumps(config_of(job, "model")))
    assert "not_kept" not in config
    assert Job.of(settings=parse(verb, ["model", "out", *options_in(config)])[1]) == job


def test_whole_objects_are_said_by_what_differs_and_others_are_named() -> None:
    job = Job(method=GPTQ(damp_percent=0.2), grid=Grid(bits=3), calibration=Calibration(nsamples=7))
    words = ["--method", "gptq", "--damp-percent", "0.2", "--bits", "3", "--nsamples", "7"]
    assert options_in(config_of(job, "model")) == words
    assert config_of(Job.of(dataset=["one text"], method=RTN()), "model")["not_kept"] == ["dataset"]
    assert config_of(Job.of(grid=Grid.named(next(iter(PRESETS)))), "model")["not_kept"] == ["grid"]
    going_on = Job.of(bits=3, resume=True, force=True, offload="/tmp")
    assert config_of(going_on, "model") == config_of(Job.of(bits=3), "model")


def test_convert_writes_a_card_of_its_own(made: Path, tmp_path: Path) -> None:
    """With the base and the license of the checkpoint's card, edited or not; an unedited one is no note."""
    conversion = nearplane.convert(made / "out", tmp_path / "new", "gptq")
    text = (tmp_path / "new" / CARD).read_text()
    assert conversion.note is None and is_ours(text)
    assert fields(tmp_path / "new") == fields(made / "out") | {"tags": ["nearplane", "quantized", "gptq", "4-bit"]}
    assert "nearplane convert OUT NEW --format gptq" in text and "| method | GPTQ |" in text and "(gptq)" in text
    path = tmp_path / "new" / CARD
    path.write_text(text.replace("license: other", "license: mit"))
    assert nearplane.verify(tmp_path / "new").ok  # a card may be edited
    back = nearplane.convert(tmp_path / "new", tmp_path / "back", "gptq_v2")
    assert back.note is not None and "README.md (describes the original)" in back.note
    assert fields(tmp_path / "back")["license"] == "mit" and fields(tmp_path / "back")["base_model"] == "team/base"


def test_a_gguf_file_alone_has_no_card(made: Path, tmp_path: Path) -> None:
    assert "mlx_lm.generate" in card(Made("m", "mlx", (Grid(bits=4, sym=False),), None, engines=_loads("mlx")))
    text = card(Made("m", "gguf", (Grid(bits=4),), None, engines=_loads("llama.cpp"), file="m-Q4_0.gguf"))
    assert "library_name: gguf" in text and "llama-completion -m m-Q4_0.gguf" in text
    assert "base_model" not in text.split("---")[1]


def _loads(engine: str) -> Any:
    from nearplane.checkpoint.engines import Verdict

    return {engine: Verdict(basis="run here with it 1.0"), "vllm": Verdict(("it does not",))}


def test_a_resumed_run_ends_with_the_same_card_and_a_users_own_stays(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (made / "out" / CARD).read_text()

    def run(out: Path, blocks: int | None, **more: Any) -> nearplane.Report | None:
        from nearplane.run.resume import Saver

        take, done = Saver.take, [0]

        def stopping(self: Saver, event: Any) -> None:
            take(self, event)
            done[0] += isinstance(event, nearplane.BlockDone) and not event.replayed
            if blocks is not None and done[0] == blocks:
                raise KeyboardInterrupt

        monkeypatch.setattr(Saver, "take", stopping)
        try:
            return nearplane.quantize(
                made / "model", out, dataset=str(made / "text.txt"), progress=False, **SETTINGS, **more
            )
        except KeyboardInterrupt:
            return None
        finally:
            monkeypatch.undo()

    for name, own in (
        ("same", None),
        ("theirs", "# Mine\n"),
        ("edited", text.replace("Measured", "Mine")),
        ("ours", text),
    ):
        out = tmp_path / name
        assert run(out, 1) is None and not (out / CARD).exists()
        if own is not None:
            (out / CARD).write_text(own)
        report = run(out, None, resume=True)
        assert report is not None
        theirs = own is not None and own != text
        assert (out / CARD).read_text() == (own if theirs else text)
        assert any("is not as nearplane wrote it, and stays" in event for event in report.events) == theirs
        assert (out / "SHA256SUMS").read_text() == (made / "out" / "SHA256SUMS").read_text()


def test_where_the_base_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a path, neither of this machine nor of the one that trained the model."""
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "models--team--model" / "snapshots" / "c0ffee"
    cached.mkdir(parents=True)
    local = tmp_path / "local"
    local.mkdir()
    assert base_of("team/model@v2", cached, {}, {}) == "team/model"
    assert base_of(str(cached), cached, {"_name_or_path": "x/y"}, {}) == "team/model"
    assert base_of("demo", local, {}, {}) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_of("local", local, {"_name_or_path": "team/tuned"}, {"base_model": "team/base"}) == "team/tuned"
    for name in (
        str(local),
        "local",
        "./out",
        "/data/x/y",
        "out/checkpoint-500",
        "../a/b",
        "models/llama",
        "a/b/c",
        3,
        None,
        "",
    ):
        assert base_of("local", local, {"_name_or_path": name}, {"base_model": "team/base"}) == "team/base", name
        assert base_of("local", local, {"_name_or_path": name}, {"base_model": name}) is None, name
    assert stated_base({"base_model": ["a/b", "/x/y", "c/d"]}) == ["a/b", "c/d"]
    assert carried({"license": ["mit", 3], "language": [False, "de"], "tags": ["x"], "pipeline_tag": {}}) == {
        "license": ["mit"], "language": ["no", "de"]}  # fmt: skip


@pytest.mark.parametrize(
    "text", ["---\na: [\n---\n", "---\n- a\n- b\n---\n", "---\nlicense: \x00\n---\n", "---\n? {}: 1\n---\n"]
)
def test_a_source_card_that_cannot_be_read_is_a_note(made: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / CARD).write_text(text)
    found, told = front_matter(tmp_path)
    assert found == {} and told is not None and "README.md has no front matter that can be read" in told
    (tmp_path / CARD).write_bytes(b"---\nlicense: \xff\n---\n")
    assert front_matter(tmp_path)[1] is not None
    assert front_matter(tmp_path / "none") == ({}, None)


def test_a_model_of_the_hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its card is fetched with the small files; the new one names the id and the commit, and the license of the original."""
    commit = "a" * 40
    cached = tmp_path / "models--team--model" / "snapshots" / commit

    def snapshot_download(repo: str, *, revision: str | None = None, allow_patterns: Any = None) -> str:
        assert repo == "team/model"
        cached.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in (made / "model").iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(made / "model" / name, cached)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "dtype": "float16"}
    nearplane.quantize("team/model@main", "out", progress=False, **settings)
    text = (tmp_path / "out" / CARD).read_text()
    assert fields(tmp_path / "out")["base_model"] == "team/model" and fields(tmp_path / "out")["license_name"] == "own"
    assert f"nearplane quantize team/model@{commit} OUT --method rtn --bits 4 --group-size 32" in text
    assert f"[team/model](https://huggingface.co/team/model) at commit `{commit[:12]}`: its weights" in text
    assert "# model, 4 bits (compressed-tensors)" in text and str(tmp_path) not in text
    nearplane.convert("out", "new", "gptq")
    assert fields(tmp_path / "new")["base_model"] == "team/model"
    assert f"quantize team/model@{commit} OUT" in (tmp_path / "new" / CARD).read_text()


def test_cards_of_the_folder_are_kept_apart(tmp_path: Path) -> None:
    ours = sealed("# A\n")
    assert is_ours(ours) and not is_ours("# A\n") and not is_ours(None)
    for changed in (ours.replace("# A", "# B"), ours + "more\n", "x" + ours, ours.replace("\n", "\r\n")):
        assert not is_ours(changed)


def test_paths_are_shown_by_their_names() -> None:
    for text, expected in (
        ("--dataset /home/me/x.txt:2,/b/c.txt,self", "--dataset x.txt:2,c.txt,self"), ("~/a/b.gguf", "b.gguf"),
        ("team/model", "team/model"), ("C:\\me\\x.txt", "x.txt"),
        ("../up/x.txt", "x.txt"), ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("'/my text/of mine/c d.txt'", "'c d.txt'"),
        ("3 of /a/x.txt + 5 of /b c/y.txt, 2 rows", "3 of x.txt + 5 of y.txt, 2 rows"),
    ):  # fmt: skip
        assert plainly(text) == expected, text


def test_a_broken_card_is_an_event_of_the_run(tmp_path: Path) -> None:
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    (model / CARD).write_text("---\nlicense: [\n---\n")
    report = nearplane.quantize(model, tmp_path / "out", method="rtn", bits=4, group_size=32, progress=False)
    assert any("has no front matter that can be read" in event for event in report.events)
    front = yaml.safe_load((tmp_path / "out" / CARD).read_text().split("---")[1])
    assert "license" not in front and "base_model" not in front and "base_model_relation" not in front
    assert "none: this method reads no" not in (tmp_path / "out" / CARD).read_text()
    assert report.config is not None and options_in(report.config)[:2] == ["--method", "rtn"]
    assert main(["verify", str(tmp_path / "out")]) == 0
