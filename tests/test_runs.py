"""The scripts under runs/ that make the published tables, on a tiny model, and the benchmark of packed linears, on tiny ones."""

import json
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from nearplane.runtime import cpu

RUNS = Path(__file__).parent.parent / "runs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_text(tmp_path_factory.mktemp("runs"), words=4000).parent


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(RUNS / name), run_name="script")


def test_rotation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each cell, and a table; a second call goes on from there."""
    text, out = str(folder / "text.txt"), folder / "rotation"
    words = ["--model", str(folder / "model"), "--dataset", text, "--test", text, "--nsamples", "4", "--seqlen", "24"]
    words += ["--windows", "2", "--settings", "W4A4", "--out", str(out), "--methods"]
    main = script("rotation.py")["main"]
    main([*words, "RTN"])
    first = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["cell"] for row in first] == ["original", "W4A4|RTN|none", "W4A4|RTN|r1,r2", "W4A4|RTN|r1,r2,r4"]
    assert len({row["perplexity"] for row in first}) == 4 and all(row["tokens"] == 96 for row in first)
    capsys.readouterr()
    main([*words, "RTN", "GPTQ", "--kinds", "none"])
    assert capsys.readouterr().out.startswith("W4A4|GPTQ|none ")
    rows = out.with_suffix(".md").read_text().splitlines()
    assert rows[2] == "| method | W4A4, none | W4A4, r1,r2 | W4A4, r1,r2,r4 |"
    assert rows[4].startswith(f"| RTN | {first[1]['perplexity']:.2f} |") and rows[5].endswith(" |  |  |")
    words.remove("--test")  # cells of two texts would stand in one table
    words.remove(text)
    with pytest.raises(SystemExit, match=f"cells of {text}, {text}, not of .*embedded text v"):
        main([*words, "RTN"])


def test_what_is_calibrated_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for the original and each dataset, KL on every domain; a second call runs nothing again."""
    monkeypatch.syspath_prepend(str(RUNS))
    text, out = str(folder / "text.txt"), folder / "calibration_text"
    study = script("calibration_text.py")
    monkeypatch.setitem(study["main"].__globals__, "MODULES", ("sched",))
    words = [
        "--model",
        str(folder / "model"),
        "--wikitext",
        text,
        "--shakespeare",
        text,
        "--nsamples",
        "4",
        "--seqlen",
        "24",
    ]
    words += ["--eval-seqlen", "32", "--windows", "2", "--seeds", "0", "1", "--group-size", "32", "--out", str(out)]
    words += ["--threads", "1", "--datasets", "embedded", f"{text}:3,self"]
    study["main"](words)
    cells = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(cells) == 1 + 2 * 2 and list(cells[1]["domains"]) == ["wikitext", "shakespeare", "python"]
    assert [row["windows"] for row in cells[2]["data"]["sources"]] == [3, 1]
    capsys.readouterr()
    study["main"]([*words, "--table"])
    rows = capsys.readouterr().out.splitlines()
    kl = [cell["domains"]["wikitext"]["kl"] for cell in cells if "|embedded|" in cell["cell"]]
    assert (
        len(kl) == 2
        and min(kl) > 0
        and rows[2].startswith(f"| NearPlane | 3 | embedded | 4 | 96 | 2 | {sum(kl) / 2:.3f} ± ")
    )
    assert len(study["dialogs"]()) > 5 and all(turns[0]["role"] == "user" for turns in study["dialogs"]())


def test_trainers(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the quantized block alone move; the control reads the tuning's windows; a second call runs nothing again."""
    monkeypatch.syspath_prepend(str(RUNS))
    text, out = str(folder / "text.txt"), folder / "trainers"
    study = script("trainers.py")
    monkeypatch.setitem(sys.modules["calibration_text"].__dict__, "MODULES", ("sched",))
    words = [
        "--calibration",
        text,
        "--wikitext",
        text,
        "--shakespeare",
        text,
        "--model",
        str(folder / "model"),
        "--out",
        str(out),
    ]
    words += ["--blocks", "1", "--bits", "3", "--group-size", "32", "--nsamples", "4", "--seqlen", "24", "--tune", "1"]
    words += ["--eval-seqlen", "32", "--windows", "2", "--seeds", "0", "--threads", "1", "--rows", "NearPlane"]
    words += ["NearPlane, tuned", "NearPlane, more windows", "NearPlane, tuned, every norm"]
    study["main"](words)
    before = out.with_suffix(".jsonl").read_bytes()
    cells = {line["cell"].split("|")[-2]: line for line in map(json.loads, before.splitlines())}
    plain, tuned, control, every = (cells[row] for row in words[-4:])
    hidden = transformers.AutoConfig.from_pretrained(folder / "model").hidden_size
    moved = every["tuning"]["moved"] - tuned["tuning"]["moved"]
    assert moved == 3 * hidden  # two norms of the dense block, and the last
    assert tuned["sha256"] == plain["sha256"] != control["sha256"] and plain["linears"] == 7
    assert control["windows"] == 4 + tuned["tuning"]["windows"]["fresh"] > 4 and str(folder) not in before.decode()
    assert all(cell["cpu_seconds"] > 0 and cell["domains"]["wikitext"]["kl"] > 0 for cell in (plain, tuned, control))
    capsys.readouterr()
    study["main"](words)
    assert out.with_suffix(".jsonl").read_bytes() == before
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].count("|") == rows[2].count("|") and rows[2].startswith("| 1 | 3 | 4 | NearPlane | 1 | ")


def test_quality_study(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds and two sizes of the rows that the summary compares; a second call runs nothing again."""
    study, text = script("quality.py"), str(folder / "text.txt")
    monkeypatch.setitem(study["main"].__globals__, "WINDOWS_TOKENS", 128)
    words = ["--calibration", text, "--test", text, "--models", str(folder / "model"), "--bits", "3", "--groups", "16"]
    words += [
        "--rows",
        "GPTQ",
        "GPTAQ",
        "ResComp",
        "+ refinement = NearPlane",
        "--seeds",
        "0",
        "1",
        "--nsamples",
        "4",
        "8",
    ]
    words += ["--eval-seqlen", "32", "--out", str(folder / "study"), "--threads", "1"]
    study["main"](words)
    cells = [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]
    assert len(cells) == 1 + 2 * 2 * 4
    assert all({"test", "kl", "top1", "commit", "tokens"} <= cell.keys() for cell in cells[1:])
    lines = (folder / "study.md").read_text().splitlines()
    means = {cell["cell"]: cell["test"] for cell in cells}
    for row, windows in ((lines[2], 4), (lines[3], 8)):
        assert f"| {cells[1]['tokens'] * windows // 4} | 2 |" in row
        assert f"{sum(means[f'model|3|16|{windows}|GPTAQ|{seed}'] for seed in (0, 1)) / 2:.2f} ±" in row
    assert any("by calibration tokens" in line for line in lines)
    before = (folder / "study.jsonl").read_bytes()
    study["main"](words)
    assert (folder / "study.jsonl").read_bytes() == before


def test_fresh_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every variant on every linear; leaving the residual target out changes the linears that have one, and no other."""
    variants = ["NearPlane", "GPTQ", "GPTAQ", "no residual target", "no refinement"]
    words = [
        "--text",
        str(folder / "text.txt"),
        "--model",
        str(folder / "model"),
        "--blocks",
        "1",
        "--group-size",
        "16",
    ]
    script("fresh_tokens.py")["main"]([*words, "--nsamples", "4", "--threads", "1", "--variants", *variants])
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()]
    assert [row[0] for row in rows] == variants
    moved = {kind for kind, value in zip(head[1:], rows[3][1:], strict=True) if float(value) != 0}
    assert {"o_proj", "down_proj"} & moved and moved <= {"o_proj", "down_proj"}


def test_what_a_width_costs(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit of the block asked for; the model is as it was after each, or the last one's KL would hold the others'."""
    monkeypatch.setattr("nearplane.run.stream.BATCH_TOKENS", 2048)  # which the script changes
    words = ["--text", str(folder / "text.txt"), "--model", str(folder / "model"), "--tokens", "8", "32", "24"]
    main = script("what_a_width_costs.py")["main"]
    main([*words, "--blocks", "0", "1"])
    *rows, _, said = capsys.readouterr().out.strip().splitlines()
    found = {row["unit"]: row for row in map(json.loads, rows)}
    assert len(found) == 8 and all(0 < row[key] < 2 for row in found.values() for key in ("output", "stream", "kl"))
    assert "over 8 units" in said
    main([*words, "--blocks", "1"])
    *alone, _, _ = capsys.readouterr().out.strip().splitlines()
    for row in map(json.loads, alone):
        assert row["kl"] == pytest.approx(found[row["unit"]]["kl"], rel=1e-3)


def test_sentence_encoder(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods; the table is made of kept cells; more bits are nearer to the original, in every figure."""
    monkeypatch.syspath_prepend(str(RUNS))
    model = tiny.save(tiny.build("electra"), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "w0"
    tokenizer.save_pretrained(model)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(tiny.text(8 + n % 9, seed=n) for n in range(30)))
    words = [
        "--calibration",
        str(lines),
        "--test",
        str(lines),
        "--model",
        str(model),
        "--bits",
        "8",
        "3",
        "--group",
        "32",
    ]
    words += [
        "--rows",
        "RTN",
        "GPTQ",
        "--seeds",
        "0",
        "1",
        "--nsamples",
        "12",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "study"),
    ]
    main = script("encoder.py")["main"]
    main(words)
    cells = {c.pop("cell"): c for c in map(json.loads, (tmp_path / "study.jsonl").read_text().splitlines())}
    assert len(cells) == 2 * (1 + 2)
    fine, rough = cells["model|8|32|GPTQ|0"], cells["model|3|32|GPTQ|0"]
    assert (
        0 < fine["error"] < rough["error"]
        and rough["embedding_least"] <= rough["embedding"] < fine["embedding"] <= 1.0001
    )
    assert rough["error"] < cells["model|3|32|RTN|0"]["error"] and rough["tokens"] > 12 * 8
    said = capsys.readouterr().out
    main(words)
    assert "| 3 | GPTQ | 2 | " in said and capsys.readouterr().out.strip() == said[said.index("| bits") :].strip()


def test_whole_whisper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny one on noise: a rounded encoder is farther away, and says other words, at fewer bits."""
    monkeypatch.syspath_prepend(str(RUNS))
    model, drawn = tiny.save(tiny.build("whisper"), tmp_path / "model"), torch.Generator().manual_seed(0)
    settings = {"feature_size": 16, "chunk_length": 1, "hop_length": 333, "n_fft": 400}
    transformers.WhisperFeatureExtractor(**settings).save_pretrained(model)
    study = script("whisper.py")

    def speech(folder: Path, _text: str, count: int, _seed: int) -> None:
        for n in range(count):
            np.save(folder / f"{n}.npy", torch.randn(16, 48, generator=drawn).numpy())

    sounds = [torch.randn(16000, generator=drawn).numpy() for _ in range(3)]
    for name, value in {
        "real_speech": lambda: sounds,
        "make_speech": speech,
        "PREFIX": [1, 5],
        "END": 100,
        "LONGEST": 6,
    }.items():
        monkeypatch.setitem(study["main"].__globals__, name, value)
    words = [
        "--model",
        str(model),
        "--bits",
        "8",
        "2",
        "--group",
        "32",
        "--rows",
        "GPTQ",
        "--nsamples",
        "6",
        "--threads",
        "1",
    ]
    study["main"]([*words, "--out", str(tmp_path / "study")])
    fine, rough = map(json.loads, (tmp_path / "study.jsonl").read_text().splitlines())
    assert fine["cell"] == "model|8|32|GPTQ|0" and rough["windows"] == 6
    assert 0 < fine["error"] < rough["error"] and 0 < fine["kl"] < rough["kl"] and rough["top1"] <= fine["top1"] <= 1
    assert "| 2 | GPTQ | 1 | " in capsys.readouterr().out
    assert study["words_changed"](["a b, c", "d"], ["A x c y", "d"]) == 2 / 5


@pytest.mark.skipif(cpu.best() is None, reason="no C++ kernel was built (no compiler)")
def test_packed_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every contender that is installed is timed at every shape, and the record has their ratios."""
    benchmarks = RUNS.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    words = [
        "packed.py",
        "--rounds",
        "1",
        "--shapes",
        "256x128",
        "--bits",
        "3",
        "8",
        "--rows",
        "1",
        "8",
        "--rotate",
        "1",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", [*words, str(folder / "packed.json")])
    before = torch.get_num_threads()
    runpy.run_path(str(benchmarks / "packed.py"), run_name="__main__")
    torch.set_num_threads(before)
    assert "| 256x128, 8 rows |" in capsys.readouterr().out
    rows = json.loads((folder / "packed.json").read_text())["rows"]
    own = [row for row in rows if row["name"].split()[0] in ("3", "8")]
    assert len(own) >= 2 * 2 * 3 and all(row["ms"] > 0 and row["x torch bf16"] > 0 for row in own)
    assert all(row["of the read rate"] > 0 for row in own if row["rows"] == 1)


def test_vision_study(tmp_path: Path) -> None:
    """Disjoint images to calibrate, train and test on, one line per cell; a second call measures nothing again."""
    image = pytest.importorskip("PIL.Image")
    model = tiny.save(tiny.build("dinov2"), tmp_path / "model")
    size = {"height": 32, "width": 32}
    (model / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )
    drawn = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number, name in enumerate(("dark", "bright")):
            for i in range(9):
                pixels = (60 + 120 * number + 30 * torch.randn(20, 20, 3, generator=drawn)).clamp(0, 255).byte()
                image.fromarray(pixels.numpy()).save(tmp_path / "one.png")
                archive.write(tmp_path / "one.png", f"{name}/{i}.png")
    study = script("vision.py")
    (tmp_path / "split").mkdir()
    study["split"](tmp_path / "images.zip", tmp_path / "split", 4, 8)
    parts = [set((tmp_path / "split" / part).rglob("*.png")) for part in ("calibration", "train", "test")]
    read = [path.read_bytes() for part in parts for path in part]
    assert [len(part) for part in parts] == [6, 4, 8] and len(set(read)) == 18
    words = ["--images", str(tmp_path / "images.zip"), "--model", str(model), "--cells", "2-4", "--rows", "RTN", "GPTQ"]
    words += ["--train", "4", "--test", "8", "--nsamples", "4", "--seeds", "0", "1", "--out", str(tmp_path / "study")]
    for _ in range(2):
        study["main"](words)
        cells = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text().splitlines()]
        assert [cell["cell"] for cell in cells] == ["2-4|RTN|0", "2-4|GPTQ|0", "2-4|GPTQ|1"]
    assert len({cell["error"] for cell in cells}) == 3
    assert all(cell["original"] == 1 and cell["test"] == 8 and cell["train"] == 4 for cell in cells)
    table = (tmp_path / "study.md").read_text().splitlines()
    assert table[2].endswith("W2A4: error | accuracy |") and [row.split(" |")[0] for row in table[4:]] == [
        "| RTN",
        "| GPTQ",
    ]


def test_bos_study(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows with and without BOS begin at the same places."""
    study, text = script("bos.py"), str(folder / "text.txt")
    model = tiny.save(tiny.build("llama"), tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"bos_token": "w1"})
    tokenizer.save_pretrained(model)
    drawn = study["windows"](study["stand_in"](str(model), tmp_path / "marked"), text, 6, 24, 0)
    assert (drawn["with"][:, 0] == 1).all() and torch.equal(drawn["with"][:, 1:], drawn["without"][:, :-1])
    words = ["--model", str(model), "--calibration", text, "--test", text, "--methods", "gptq", "--nsamples", "4"]
    study["main"]([*words, "--seqlen", "64", "--windows", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("original: perplexity with BOS ") and len(lines) == 5
    assert lines[3].startswith("| gptq | 0 | with BOS |") and lines[4].startswith("| gptq | 0 | without BOS |")


# Families whose sizes follow from each other, with what holds of their tiny models: sections of rotary dimensions; heads of
# mamba's and of attention; kinds of layers; a class that no mapping has.
FAMILIES = {
    "qwen2_5_vl": ("named", "Qwen2_5_VLModel", {"language_model.layers": 2}),
    "nemotron_h": ("named", "NemotronHForCausalLM", {"model.layers": 4}),
    "mamba2": ("named", "Mamba2ForCausalLM", {"backbone.layers": 2}),
    "zaya": ("scaled", "ZayaForCausalLM", {"model.layers": 2}),
    "siglip2_text_model": ("named", "Siglip2TextModel", {"encoder.layers": 2}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_type(kind: str, tmp_path: Path) -> None:
    """From sizes to 8 bits and back."""
    rows: list[dict[str, Any]] = []
    script("models.py")["measure"](kind, tmp_path, rows.append)
    row, (sizing, name, towers) = rows[-1], FAMILIES[kind]
    assert row["step"] == "passes" and 0 < row["error"] < 0.1
    assert (row["sizing"], row["class"], row["towers"]) == (sizing, name, towers)


def test_sizes_of_a_model_type_fit_each_other() -> None:
    """Scaled or named: heads times their dimensions are the width, and one part's output is as wide as the next one's input."""
    script("models.py")  # which finds the module below
    sizing_of, settings_of = (getattr(sys.modules["tiny_configs"], name) for name in ("Scaled", "settings_of"))
    for sizing in ("named", "scaled"):
        text = transformers.AutoConfig.for_model("llama4_text", **settings_of("llama4_text", sizing))
        assert text.num_attention_heads * text.head_dim == text.hidden_size <= 128
        assert text.num_attention_heads % text.num_key_value_heads == 0
        whole = transformers.AutoConfig.for_model("qwen2_5_vl", **settings_of("qwen2_5_vl", sizing)).text_config
        sections, head = whole.rope_parameters["mrope_section"], whole.hidden_size // whole.num_attention_heads
        assert len(sections) == 3 and sum(sections) == head // 2
    zamba = transformers.AutoConfig.for_model("zamba2")
    assert sizing_of(zamba, False).sizes(zamba)["layers_block_type"] == ["linear_attention", "hybrid"]
    assert transformers.AutoConfig.for_model("segformer", **settings_of("segformer", "scaled")).depths == [2, 2, 2, 2]


def test_types_that_do_not_pass_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of others, other inputs, convolutions and failures are counted apart."""
    found = script("models.py")
    made = "nearplane makes input_ids only."
    rows = [
        {"type": "sam_mask_decoder", "step": "class", "reason": "NearplaneError: no class"},
        {
            "type": "qwen2_5_vl_vision",
            "step": "discovery",
            "reason": f"NearplaneError: /model: A reads grid_thw; {made}",
        },
        {"type": "patchtst", "step": "discovery", "reason": f"NearplaneError: /model: B reads past_values; {made}"},
        {"type": "resnet", "step": "discovery", "reason": "NearplaneError: /model: no list of 3 blocks", "lists": 0},
        {"type": "albert", "step": "discovery", "reason": "NearplaneError: /model: no list of 2 blocks", "lists": 1},
        {"type": "llama", "step": "round trip", "error": 0.2},
    ]
    wholes = {"sam_mask_decoder": ["sam"], "qwen2_5_vl_vision": ["qwen2_5_vl"]}
    monkeypatch.setattr(sys.modules["tiny_models"], "wholes", lambda: wholes)
    page = found["table"](rows)
    assert "- 0 of 6 types pass" in page and "- 2 are parts" in page and "- 1 read inputs" in page
    assert "- 1 have no linears" in page and "- 2 fail." in page
    assert "| qwen2_5_vl_vision | qwen2_5_vl | reads grid_thw |" in page and "| patchtst | reads past_values |" in page
    assert "| llama | round trip: features differ by 0.2 |" in page


@pytest.mark.parametrize(("kind", "works"), [("llama", "as it is"), ("mamba", "dequantize=True")])
def test_a_type_in_transformers(kind: str, works: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict before is what happens."""
    monkeypatch.delitem(sys.modules, "models", raising=False)  # the folder of that name here
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "runs"))
    row = script("transformers_types.py")["measure"](kind, tmp_path)
    assert (row["said"], row["works"]) == (works, works) and row["dequantize=True"] == "equal", row
