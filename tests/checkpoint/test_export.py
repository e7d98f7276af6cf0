"""The last step: parts are packed into shards, whatever the format."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.export import copied_bytes
from nearplane.core.activations import TokenGrid
from nearplane.formats.parts import Writer
from nearplane.formats.read import open_checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"format": "compressed-tensors"},
    "rotated": {"format": "compressed-tensors", "rotate": "r4"},
    "int-quantized": {"format": "compressed-tensors", "activations": TokenGrid(8)},
    "gptq": {"format": "gptq"},
    "gptq_v2": {"format": "gptq_v2"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("export") / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_what_export_takes_beside_the_shards(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts lie on the disk until the last shard has been written; all weights of a small model are in one shard."""
    options = dict(KINDS[kind])
    most, finish = [], Writer.finish

    def finished(writer: Writer) -> None:
        writer.flush()
        sealed = {name for record in writer.records for name in record["shards"]}
        files = [path for path in writer.out.glob("*.unfinished") if path.name in sealed]
        most.append((len(list(writer.out.glob("shard-*"))), sum(path.stat().st_size for path in files)))
        finish(writer)

    monkeypatch.setattr(Writer, "finish", finished)
    grid = Grid(bits=4, group_size=32)
    nearplane.quantize(model, tmp_path / "out", method=RTN(), grid=grid, progress=False, **options)
    layers = open_checkpoint(tmp_path / "out").layers.values()
    stored = Grid(4, 32, scale_dtype="float16" if "gptq" in kind else "float32")
    weights = [(layer.shape, stored) for layer in layers]
    shards, size = most[0]
    assert shards == 1 == len(list((tmp_path / "out").glob("model-*.safetensors")))
    assert size - 20_000 < copied_bytes(weights) < size  # the rest are headers
    assert not list((tmp_path / "out").glob("*.unfinished")) and not (tmp_path / "out" / ".nearplane").exists()
    assert nearplane.verify(tmp_path / "out").ok


def test_every_format_holds_the_same_codes(model: Path, tmp_path: Path) -> None:
    """A run exports as a conversion of it does: file for file, but for who wrote it and how."""
    for format in ("compressed-tensors", "gptq_v2"):
        options: dict[str, Any] = {"method": RTN(), "grid": Grid(bits=3, group_size=32, sym=False), "dtype": "float16"}
        nearplane.quantize(model, tmp_path / format, format=format, progress=False, **options)
    nearplane.convert(tmp_path / "compressed-tensors", tmp_path / "converted", "gptq_v2")
    a, b = open_checkpoint(tmp_path / "gptq_v2"), open_checkpoint(tmp_path / "converted")
    assert a.store.names == b.store.names
    assert all(torch.equal(a.store.get(name), b.store.get(name)) for name in a.store.names)


def test_the_report_has_the_engines_verdicts(model: Path, tmp_path: Path) -> None:
    grid = Grid(bits=3, group_size=32)
    nearplane.quantize(model, tmp_path / "out", method=RTN(), grid=grid, format="gptq", progress=False)
    found = json.loads((tmp_path / "out" / "report.json").read_text())["engines"]
    assert list(found) == ["vllm", "sglang", "transformers", "llama.cpp", "mlx", "onnxruntime-genai", "openvino"]
    for engine, said in found.items():
        checked = nearplane.verify(tmp_path / "out", engine)
        assert [f"engine {engine}: {refusal}." for refusal in said["refusals"]] == list(checked.problems)
        assert [f"engine {engine}: {caveat}." for caveat in said["caveats"]] == list(checked.notes)
    assert found["vllm"]["refusals"] and found["sglang"]["caveats"]
