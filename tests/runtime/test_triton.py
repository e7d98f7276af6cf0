"""The Triton kernels under Triton's interpreter, against float64, and as they are compiled for a GPU, which needs none.

The interpreter is chosen by an environment variable that is read when a kernel is defined, hence a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

START = """
import json, sys
import torch
from problems import SCALES, problem
from nearplane.runtime import cpu, linear, reference, triton, tuned
from nearplane.runtime.tuned import Choice, DENSE
from nearplane.runtime.words import words

tuned.PROCESSORS = 2
DTYPES = torch.float32, torch.float16, torch.bfloat16
found = {}

def compare(name, given, rows, dtype, biased, choice):
    shape = given.tiles.shape
    x = torch.randn(rows, shape.columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.arange(float(shape.out)).to(dtype) if biased else None
    expected = x.double() @ given.dense.T + (0 if bias is None else bias.double())
    y = triton.linear(x, words(given.tiles), bias, choice)
    assert y.dtype == dtype and y.shape == (rows, shape.out)
    error = lambda y: float((y.double() - expected).norm() / expected.norm())
    assert error(reference.linear(x, given.tiles, bias)) < 8e-3
    key = name + " " + str(dtype)[6:]
    found[key] = max(found.get(key, 0.0), error(y))
    assert all(int(held.abs().sum()) == 0 for held in triton._streams.values()), "counters are 0 again"
    return x, bias, y
"""

FEW = """
# out, columns, group, shuffled, free zeros, symmetric, rows, rows of a program, bias, programs for each processor
CASES = [(50, 100, 32, False, False, False, 1, 1, True, 4), (33, 300, 128, False, True, False, 2, 2, False, 4),
         (20, 128, 64, True, False, True, 3, 4, True, 1), (17, 90, 40, True, True, False, 9, 8, False, 2),
         (64, 96, -1, False, False, True, 5, 8, True, 4), (5, 70, 70, False, False, False, 1, 1, False, 0)]
for bits in range(2, 9):
    for i, (out, columns, group, shuffled, free, sym, rows, each, biased, programs) in enumerate(CASES):
        given = problem(out, columns, bits, group, sym, SCALES[(i + bits) % 3], shuffled, free=free)
        choice = Choice("few", each, 64 if i % 2 else 32, 1 if i % 3 else 2, programs=programs)
        compare("few", given, rows, DTYPES[(i + bits // 2) % 3], biased, choice)
print(json.dumps(found))
"""

MANY = """
CASES = [(50, 100, 32, False, False, False, 16, 16, True, 4), (33, 300, 128, False, True, False, 20, 16, False, 4),
         (20, 128, 64, True, False, True, 70, 64, True, 1), (17, 90, 40, True, True, False, 3, 16, False, 2)]
for bits in range(2, 9):
    for i, (out, columns, group, shuffled, free, sym, rows, each, biased, programs) in enumerate(CASES):
        given = problem(out, columns, bits, group, sym, SCALES[(i + bits) % 3], shuffled, free=free)
        for dtype in DTYPES:
            choice = Choice("many", each, 32, 2 if i % 2 else 1, stages=3, programs=programs)
            compare("many", given, rows, dtype, biased, choice)
            compare("dense", given, rows, dtype, biased, DENSE)
print(json.dumps(found))
"""

# Orders in which programs arrive, as a GPU may have them; and the whole module.
REST = """
from triton.runtime import interpreter
given, place = problem(50, 200, 3, 32), interpreter.interpreter_builder.set_grid_idx
results = []
for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]):
    interpreter.interpreter_builder.set_grid_idx = lambda x, y, z: place(x, order[y], z)
    results.append(compare("orders", given, 2, torch.float32, True, Choice("few", 2, 64, 1, programs=4))[2])
    results.append(compare("orders", given, 2, torch.float32, True, Choice("few", 2, 64, 1, programs=4))[2])
interpreter.interpreter_builder.set_grid_idx = place
assert all(torch.equal(result, results[0]) for result in results)

# From an address that is no multiple of 8 bytes, a view that is not contiguous, no rows, and NaN.
flat = torch.randn(4 * 200 + 1).half()
x, weight = flat[1:].view(4, 200), words(given.tiles)
assert x.data_ptr() % 8
assert torch.equal(triton.linear(x, weight, None), triton.linear(x.clone(), weight, None))
assert torch.equal(triton.linear(x[:, None], weight, None)[:, 0], triton.linear(x.T.contiguous().T, weight, None))
assert triton.linear(x[:0], weight, None).shape == (0, 50)
x = x.clone(); x[1, 5] = torch.nan
assert triton.linear(x, weight, None).isnan().any(1).tolist() == [False, True, False, False]

# Ternary weights are codes of two bits with a zero of 1.
from nearplane.runtime.layout import dequantize, tile
codes, scale = torch.randint(0, 3, (40, 64), dtype=torch.uint8), torch.rand(40, 2).half() + 1
ternary = tile(codes, scale, torch.ones(40, 2, dtype=torch.uint8), 2, 32)
x = torch.randn(2, 64)
assert torch.allclose(triton.linear(x, words(ternary), None), x @ dequantize(ternary).T, atol=1e-4)

triton.supports = lambda shape, device, dtype: None if dtype in triton.DTYPES else "no"
cpu.supports = lambda *_: "no"
layer = linear.QuantizedLinear(given.tiles, torch.arange(50.0)).to("cpu")
assert layer.codes.dtype == torch.int32
for dtype in (*DTYPES, torch.float64):
    x = torch.randn(2, 3, 200).to(dtype)
    expected = x.double() @ given.dense.T + torch.arange(50.0)
    for y in (layer(x), torch.ops.nearplane.linear(
        x, *layer._parts(), layer.bias, *linear._described(layer.shape), "auto")):
        assert y.dtype == dtype and y.shape == (2, 3, 50)
        found["module " + str(dtype)[6:]] = float((y.double() - expected).norm() / expected.norm())
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
with torch.no_grad():
    assert torch.equal(compiled(x), layer(x))
print(json.dumps(found))
"""


@pytest.mark.parametrize("program", [FEW, MANY, REST], ids=["few", "many", "rest"])
def test_against_float64(program: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", START + program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("this Triton's interpreter cannot loop with this numpy (3.6.0 with 2.4)")
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    tolerance = {"float64": 1e-7, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
    assert errors and all(error < tolerance[name.split()[1]] for name, error in errors.items()), errors


def compiled(name: str, constants: dict[str, Any], stages: int, warps: int = 4) -> Any:
    """A kernel for a GPU of compute capability 9.0, of bfloat16 and groups with integer zeros."""
    triton = pytest.importorskip("triton", minversion="3.6", reason="no Triton whose compiler is called like this")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nearplane.runtime import triton_kernel

    kernel = getattr(triton_kernel, name)
    if not hasattr(kernel, "arg_names") or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    x = "*i64" if constants.get("WIDE") else "*bf16"
    pointers = {"x": x, "codes": "*i32", "scales": "*fp16", "zeros": "*u8", "order": "*i32", "bias": "*bf16", "y": "*bf16",
                "weight": "*bf16", "partial": "*fp32", "counters": "*i32"}  # fmt: skip
    names = kernel.arg_names
    signature = {n: pointers.get(n, "constexpr" if n.isupper() else "i32") for n in names}
    aligned = {*pointers, "out", "columns", "channels", "span"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})


COMMON = {"ZEROS": 1, "ORDER": False, "BIAS": True, "SPLIT": True}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_loaded_16_bytes_at_a_time(bits: int) -> None:
    """Of a block a thread loads as many words as a code has bits, for four channels at once, and nothing else is as large."""
    kind = {"BITS": bits, "WIDE": True, "KIND": 2, "ROWS": 1, "CHANNELS": 128, "BLOCKS": 4, "STAGES": 1}
    found = compiled("few", COMMON | kind, 1)
    body = found.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", body)) == bits
    # 32 inputs, four of 16 bits at once. Triton 3.6 writes each load once for every channel, and ptxas joins them.
    assert len(re.findall(r"ld\.global[\w.]*\.b64", body)) in (8, 32)
    assert len(re.findall(r"cvt\.rn\.f32\.[su](8|16|32)", body)) == 4  # zeros; codes become numbers by their bits
    assert found.asm["ttgir"].count("ttg.convert_layout") <= 2 and "mma" not in body
    assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add", body)) == 1  # the counter, and no sum


def test_many_rows_are_pipelined_on_tensor_cores() -> None:
    kind = {"BITS": 4, "PRECISION": "tf32", "ROWS": 16, "CHANNELS": 64, "BLOCKS": 2, "PLAIN": False}
    body = compiled("many", COMMON | kind, 3).asm["ptx"]
    assert "mma.sync" in body or "wgmma" in body
    assert "cp.async.cg.shared.global" in body
    written = compiled("unpack", {"BITS": 3, "ZEROS": 1, "ORDER": False, "CHANNELS": 64, "BLOCKS": 2}, 1).asm["ptx"]
    assert re.search(r"st\.global\.v4\.b32", written), "a row of the dense weight, 16 bytes at a time"
