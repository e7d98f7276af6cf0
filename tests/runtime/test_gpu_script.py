"""The script for a session that has a GPU, run without one: its parts, its file, its budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not in this copy")
def test_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run("all", "--dry", "--json", str(tmp_path / "dry.json"))
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter cannot loop with this numpy (3.6.0 with 2.4)")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "dry.json").read_text())
    parts = found["parts"]
    assert found["device"] == "no GPU" and all(name.startswith("dry ") for name in parts)
    assert {name: part["end"] for name, part in parts.items()} == dict.fromkeys(
        ("dry kernel", "dry decode", "dry quantize", "dry equal"), "done"
    )
    products = parts["dry kernel"]["rows"][1:]
    assert {(row["rows"], row["bits"]) for row in products} == {(n, bits) for n in (1, 16) for bits in (4, 3, 2)}
    for row in products:  # codes, and a scale of two bytes and a zero of one for 128 inputs
        assert row["bytes"] == 64 * 128 * row["bits"] / 8 + 64 * 3
        assert row["times bf16"] == pytest.approx(row["bf16 us"] / row["packed us"])
    steps = parts["dry decode"]["rows"]
    assert [row["bits"] for row in steps] == [16, 3, 4, 2]
    assert all(row["same tokens"] and row["as generate"] for row in steps)
    assert [row["method"] for row in parts["dry quantize"]["rows"]] == ["gptq", "nearplane"]
    assert all(0 < row["solver's share"] < 1 for row in parts["dry quantize"]["rows"])
    assert all(row["tensors"] > 10 and not row["differing"] for row in parts["dry equal"]["rows"])


@pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not in this copy")
def test_what_is_done_is_kept(tmp_path: Path) -> None:
    """A part whose time is over ends after a row; what other parts wrote stays."""
    pytest.importorskip("triton", reason="Triton is not installed")
    path = tmp_path / "dry.json"
    path.write_text(json.dumps({"parts": {"dry equal": {"end": "done"}}}))
    assert run("kernel", "--dry", "--budget", "0", "--json", str(path)).returncode == 0
    parts = json.loads(path.read_text())["parts"]
    assert parts["dry equal"] == {"end": "done"}
    assert parts["dry kernel"]["end"] == "out of time" and len(parts["dry kernel"]["rows"]) == 1
    path.write_text("{}")
    assert "another benchmark's" in run("kernel", "--dry", "--json", str(path)).stderr
