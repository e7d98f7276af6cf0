"""The Triton kernel under Triton's interpreter, against float64. The interpreter is chosen by an environment variable that
is read when a kernel is defined, hence a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import torch
from problems import SCALES, problem
from nearplane.runtime.triton import linear

found = {}
for bits in (2, 3, 4, 8):
    for i, (out, columns, group, shuffled) in enumerate([(50, 100, 32, False), (33, 300, 128, False), (20, 128, 64, True)]):
      for free in (False, True):
        given = problem(out, columns, bits, group, i == 1, SCALES[i], shuffled, free=free)
        few, many = [(1, torch.float32), (17, torch.float16), (3, torch.bfloat16), (0, torch.float32)], (70, torch.float16)
        for rows, dtype in [*few, many]:
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = None if i == 2 else torch.arange(float(out)).to(dtype)
            expected = x.double() @ given.dense.T + (0 if bias is None else bias.double())
            y = linear(x, given.tiles, bias)
            assert y.dtype == dtype and y.shape == (rows, out)
            error = float((y.double() - expected).norm() / expected.norm()) if rows else 0.0
            found[str(dtype)] = max(found.get(str(dtype), 0.0), error)
print(json.dumps(found))
"""


def test_against_float64() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert errors["torch.float32"] < 1e-6
    assert errors["torch.float16"] < 1e-3 and errors["torch.bfloat16"] < 8e-3
