"""The examples run as their docstrings say."""

import ast
import dataclasses
import importlib.util
import json
import sys
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane.cli.main import main
from nearplane.formats.read import open_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.with_text(tmp_path)


def test_own_loop(model: Path) -> None:
    results = load("own_loop").walk(str(model), str(model.parent / "text.txt"), nsamples=4, seqlen=32)
    assert len(results) == 14 and all(0 < value < 1 for _, value in results)
    text = str(model.parent / "text.txt")
    followed = load("own_loop").follow(str(model), method="gptq", dataset=text, nsamples=4, seqlen=32, group_size=32)
    assert [name for name, _ in followed] == [name for name, _ in results] and all(error for _, error in followed)


def test_own_grid(model: Path) -> None:
    errors = load("own_grid").compare(str(model), str(model.parent / "text.txt"), nsamples=4, seqlen=32)
    assert list(errors) == ["powers", "uniform"]
    for found in errors.values():
        assert len(found) == 7 and all(0 < error < 0.1 for error in found.values())


def test_own_method_from_the_command_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES.parent))
    words = [str(model), str(model.parent / "out"), "--method", "examples.own_method:Cautious", "--caution", "2"]
    words += ["--dataset", str(model.parent / "text.txt"), "--nsamples", "2", "--seqlen", "32", "--group-size", "32"]
    assert main(["quantize", *words]) == 0
    report = (model.parent / "out" / "report.json").read_text()
    assert '"caution": 2.0' in report
    # 64 inputs, 64 tokens: 0.01 * (1 + 2 * 64 / 64)
    assert '"damp_percent": 0.03' in report


def test_own_transform(model: Path, tmp_path: Path) -> None:
    """The stored weights are the balanced ones, and the model they make computes what the original does, up to rounding."""
    balanced = load("own_transform").BalancedMLP()
    settings: dict[str, Any] = {"method": "rtn", "bits": 8, "group_size": 32, "progress": False}
    report = nearplane.quantize(model, tmp_path / "out", transforms=[balanced], **settings)
    assert report.settings["balanced_mlp"] == {"strength": 1.0}
    assert any("MLPs balanced; logits agree" in event for event in report.events)
    made, original = (nearplane.load(path, packed=False) for path in (tmp_path / "out", model))
    for layer, old in zip(made.model.layers, original.model.layers, strict=True):
        up, down = layer.mlp.up_proj.weight.norm(dim=1), layer.mlp.down_proj.weight.norm(dim=0)
        torch.testing.assert_close(up, down, rtol=0.02, atol=0)
        assert float((old.mlp.up_proj.weight.norm(dim=1) / old.mlp.down_proj.weight.norm(dim=0) - 1).abs().max()) > 0.05
    logits = [m(input_ids=tiny.tokens(1, 16)).logits for m in (made, original)]
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.02
    wrong = dataclasses.make_dataclass("Wrong", [], bases=(type(balanced),), frozen=True)
    wrong._scaled = lambda self, source, up, down: (source.store.get(up) * 1.01, source.store.get(down))
    with pytest.raises(nearplane.NearplaneError, match="it would be another model"):
        nearplane.quantize(model, tmp_path / "wrong", transforms=[wrong()], **settings)


def test_own_format(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantized into it, read back, and converted into another format: the same codes, and the same weights."""
    own, out = load("own_format"), model.parent / "out"
    weight = own.main(str(model), str(out))
    assert "14 layers in plain-codes" in capsys.readouterr().out
    other, format = open_checkpoint(Path(f"{out}-ct")), own.PlainCodes()
    stored = open_checkpoint(out, formats=[format])
    name = next(iter(stored.layers))
    assert stored.store.dtype(f"{name}.codes") == torch.uint8 and torch.equal(weight, other.weight(name))
    for name in stored.layers:
        pairs = zip(stored.quantized(name)[:3], other.quantized(name)[:3], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    nearplane.convert(f"{out}-ct", f"{out}-back", format)
    back = open_checkpoint(Path(f"{out}-back"), formats=[format])
    assert back.store.names == stored.store.names
    assert all(torch.equal(back.store.get(name), stored.store.get(name)) for name in stored.store.names)
    with pytest.raises(
        nearplane.NearplaneError, match=r"quantized with plain-codes; nearplane reads compressed-tensors"
    ):
        nearplane.load(out)


def test_own_transform_after_a_rotation(tmp_path: Path) -> None:
    """The rotation has untied the head: config.json says so, whatever transform comes after."""
    tied = tiny.save(tiny.build("llama", tie_word_embeddings=True), tmp_path / "model")
    balanced, ids = load("own_transform").BalancedMLP(), tiny.tokens(1, 16)
    settings: dict[str, Any] = {"method": "rtn", "bits": 8, "group_size": 32, "progress": False}
    report = nearplane.quantize(tied, tmp_path / "out", transforms=[balanced], rotate="r1,r2", **settings)
    assert report.settings["rotate"]["kinds"] == ["r1", "r2"] and report.settings["balanced_mlp"] == {"strength": 1.0}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "nearplane_rotation" in config
    with torch.no_grad():
        found, expected = (nearplane.load(p, packed=False)(input_ids=ids).logits for p in (tmp_path / "out", tied))
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_demo_on_a_tiny_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("demo")
    text = str(model.parent / "text.txt")
    monkeypatch.setattr(demo, "CALIBRATION", nearplane.Calibration(dataset=text, nsamples=4, seqlen=32))
    monkeypatch.setattr(demo, "GRID", nearplane.Grid(bits=3, group_size=32, sym=False))

    def quantize(name: str, *args: object, **kwargs: object) -> nearplane.Report:
        return nearplane.quantize(model, *args, **kwargs)  # type: ignore[arg-type]

    def evaluate(name: str, **kwargs: object) -> nearplane.Evaluation:
        return nearplane.evaluate(model if name == "demo" else name, dataset=text, seqlen=64)

    monkeypatch.setattr(demo, "quantize", quantize)
    monkeypatch.setattr(demo, "evaluate", evaluate)
    demo.main(tmp_path / "demo-out")
    assert (tmp_path / "demo-out" / "nearplane" / "model.safetensors.index.json").exists()
    assert (tmp_path / "demo-out" / "rtn" / "report.json").exists()


def test_quickstart_notebook(model: Path, tmp_path: Path) -> None:
    """Every cell runs, on a small model in place of the demo; each last line is what a notebook would show."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]) and len(cells) >= 6
    shown, names = [], dict[str, Any]()
    text = f'dataset="{model.parent / "text.txt"}", '
    small = {
        '"demo", "out"': f'"{model}", "{tmp_path / "out"}"',
        "group_size=64": "group_size=32",
        "seqlen=512": "seqlen=32",
        "nsamples=16": text + "nsamples=16",
        "reference=MODEL": text + "reference=MODEL",
    }
    for cell in cells:
        *lines, last = ast.parse(reduce(lambda source, pair: source.replace(*pair), small.items(), cell)).body
        assert isinstance(last, ast.Expr)
        exec(compile(ast.Module(lines, []), "quickstart.ipynb", "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), "quickstart.ipynb", "eval"), names))
    plan, report, worst, measured, written, repeated = shown
    assert "srcdoc=" in report._repr_html_() and "Who loads it?" in report._repr_html_()
    assert "fits" in str(plan) and "14 linears" in str(report) and len(worst) == 5 and worst[0][1] >= worst[4][1] > 0
    assert measured.kl > 0 and written and repeated == (3, 16)
