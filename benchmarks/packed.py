"""Packed linears against dense ones: decoding (one row) and prefill (several), by ratio in one run.

    python benchmarks/packed.py [--threads 1] [--rounds 5] [--shapes 4096x4096 ...] [--bits 4 3 2 8] [--rows 1 8 128]
        [--isa avx2] [--ggml PREFIX] [--scaling] [--json benchmarks/results/packed.json]

Groups of 128, asymmetric, float16 scales; "g32": groups of 32, symmetric, as ggml's Q4_0 has them. Weights of every contender
are rotated over --rotate MB, so that no cache serves them; rounds of all contenders are interleaved, and the median counts.
With one thread the time is the process's CPU time, with more it is wall time. Floor: the bytes of the packed weight at the
rate at which one thread reads memory, measured in every round, too.

Contenders: torch's bfloat16 and float32 F.linear, a plain bfloat16 GEMV of our own (bf16_gemv.cpp, one row,
one thread; compiled here, left out without a compiler), where they are installed onnxruntime's MatMulNBits (with onnx) and
OpenVINO's compressed MatMul, both with 8-bit activations, and with --ggml (or GGML_PREFIX) the mul_mat of an installed ggml,
which is llama.cpp's, also with 8-bit activations (ggml.py).
--scaling measures one thread against two instead, of the kernel and of reading: wall time, the 5th percentile of calls.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ggml import Ggml, installed
from sweep import record
from torch.nn import functional

from nearplane.core import compiled
from nearplane.runtime import cpu
from nearplane.runtime.layout import Tiles, tile

GROUP = 128
DENSE = ("torch bf16", "torch fp32", "own bf16")
READ = "reading memory"
Contender = Callable[[], Any]


def copies(size: int, rotate: int) -> int:
    """Weights of ``size`` bytes that take up the memory to be rotated over."""
    return max(1, -(-rotate // size))


def packed(out: int, columns: int, bits: int, rotate: int, group: int = GROUP) -> list[cpu.Handle]:
    """Random codes: what is multiplied does not change the time. Groups of 32 are symmetric, as Q4_0's."""
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    scale = (torch.rand(out, columns // group) * 0.01 + 0.01).half()
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if group == GROUP:
        zero = torch.randint(1, 2**bits, scale.shape, dtype=torch.uint8)
    first = tile(codes, scale, zero, bits, group)
    number = copies(first.nbytes, rotate)
    again = [Tiles(first.shape, *(part.clone() for part in (first.codes, first.scales, first.zeros, first.order)))
             for _ in range(number - 1)]  # fmt: skip
    return [cpu.prepare(tiles) for tiles in (first, *again)]


def own_gemv(folder: Path) -> ctypes.CDLL | None:
    """bf16_gemv.cpp for this machine; None without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    source, target = Path(__file__).with_name("bf16_gemv.cpp"), folder / "gemv.so"
    # Not -ffast-math: linked with it, a library has the whole process flush subnormal numbers to zero.
    flags = [
        "-O3",
        "-march=native",
        "-fassociative-math",
        "-fno-signed-zeros",
        "-fno-trapping-math",
        "-shared",
        "-fPIC",
    ]
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.gemv.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2]
    return library


def onnx_matmul(out: int, columns: int, bits: int, rows: int, rotate: int, threads: int) -> list[Any]:
    """Sessions of one MatMulNBits each (com.microsoft), with its int8 arithmetic; empty where it does not run."""
    import numpy as np
    import onnx
    import onnxruntime

    blocks, size = columns // GROUP, GROUP * bits // 8
    sessions = []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for _ in range(copies(out * columns * bits // 8, rotate)):
        tensors = [
            onnx.numpy_helper.from_array(np.random.randint(0, 256, (out, blocks, size), dtype=np.uint8), "b"),
            onnx.numpy_helper.from_array(np.random.rand(out * blocks).astype(np.float32), "s"),
            onnx.numpy_helper.from_array(np.random.randint(0, 256, out * -(-blocks * bits // 8), dtype=np.uint8), "z"),
        ]
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "b", "s", "z"], ["y"], domain="com.microsoft",
            K=columns, N=out, bits=bits, block_size=GROUP, accuracy_level=4,
        )  # fmt: skip
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [node], "g", [value("x", 1, [rows, columns])], [value("y", 1, [rows, out])], tensors
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
    return sessions


def openvino_matmul(out: int, columns: int, bits: int, rows: int, rotate: int, threads: int) -> list[Any]:
    """Compiled models of one compressed MatMul each, with dynamic quantization of activations in groups of 32."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    kind, groups = {4: openvino.Type.u4, 8: openvino.Type.u8}[bits], columns // GROUP
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}

    def codes(*shape: int) -> Any:
        packed = np.random.randint(0, 256, int(np.prod(shape)) * bits // 8, dtype=np.uint8)
        tensor = (
            openvino.Tensor(packed, openvino.Shape(shape), kind) if bits < 8 else openvino.Tensor(packed.reshape(shape))
        )
        return ops.convert(openvino.op.Constant(tensor), np.float16)

    models = []
    for _ in range(copies(out * columns * bits // 8, rotate)):
        x = ops.parameter([rows, columns], np.float32)
        scale = ops.constant(np.random.rand(out, groups, 1).astype(np.float16))
        weight = ops.multiply(ops.subtract(codes(out, groups, GROUP), codes(out, groups, 1)), scale)
        dense = ops.convert(ops.reshape(weight, ops.constant([out, columns]), False), np.float32)
        model = openvino.Model([ops.matmul(x, dense, False, True)], [x], "linear")
        models.append(openvino.compile_model(model, "CPU", settings).create_infer_request())
    return models


def each(calls: list[Contender]) -> None:
    """Call one after the other."""
    for call in calls:
        call()


class Round(NamedTuple):
    """One round of a contender."""

    run: Contender
    linears: int = 1
    size: int = 0
    """Bytes of one weight; 0: not packed."""

    @staticmethod
    def of(calls: list[Contender], size: int = 0) -> "Round":
        return Round(partial(each, calls), len(calls), size)


def median_times(rounds_of: dict[str, Round], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of one linear: every round goes through every copy of every contender; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in rounds_of}
    for r in range(rounds + 1):
        for name, one in rounds_of.items():
            start = clock()
            one.run()
            if r:
                times[name].append((clock() - start) / one.linears)
    return {name: statistics.median(found) for name, found in times.items()}


def reading(rotate: int, threads: int = 1) -> Contender:
    """Read ``rotate`` bytes, each thread its part: the floor."""
    kernel, memory = cpu.library(cpu.best() or "portable"), torch.ones(rotate // threads * threads, dtype=torch.uint8)
    assert kernel is not None
    parts = memory.view(threads, -1)

    def run() -> None:
        others = [
            threading.Thread(target=kernel.nearplane_read, args=(part.data_ptr(), part.numel())) for part in parts[1:]
        ]
        for other in others:
            other.start()
        kernel.nearplane_read(parts[0].data_ptr(), parts[0].numel())
        for other in others:
            other.join()

    return run


def contenders(
    out: int, columns: int, rows: int, args: argparse.Namespace, compiled: tuple[ctypes.CDLL | None, Ggml | None]
) -> dict[str, Round]:
    """Every way to multiply."""
    rotate, x = args.rotate << 20, torch.randn(rows, columns)
    gemv, ggml = compiled
    found = {READ: Round(reading(rotate))}
    if rows >= 64:  # compute, not memory, is what it takes: a few weights, more than the caches hold
        rotate = 64 << 20

    dense = [torch.randn(out, columns).bfloat16() for _ in range(copies(2 * out * columns, rotate))]
    half = x.bfloat16()
    found["torch bf16"] = Round.of([partial(functional.linear, half, w) for w in dense])
    full = [w.float() for w in dense[: copies(4 * out * columns, rotate)]]
    found["torch fp32"] = Round.of([partial(functional.linear, x, w) for w in full])
    if gemv is not None and rows == 1 and args.threads == 1:
        y = torch.empty(out)
        gemv.kept = x, y  # the calls know addresses only
        found["own bf16"] = Round.of(
            [partial(gemv.gemv, w.data_ptr(), x.data_ptr(), y.data_ptr(), out, columns) for w in dense]
        )
    for bits in args.bits:
        for group in (GROUP, 32) if ggml is not None and bits == 4 else (GROUP,):
            handles = packed(out, columns, bits, rotate, group)
            tiles: Any = handles[0].owners[1]
            for path in args.paths:
                calls = [partial(cpu.linear, x, handle, None, path, args.isa, args.threads) for handle in handles]
                found[f"{bits} bits {path}{' g32' * (group == 32)}"] = Round.of(calls, tiles.nbytes)
        if ggml is not None:
            for name, (product, number, size) in ggml.contenders(x, out, bits, rotate, args.threads).items():
                found[name] = Round(product, number, size)
        # Other runtimes rotate over at most 24 weights: each is a session of its own.
        size = out * columns * bits // 8
        others = (rows, min(rotate, 24 * size), args.threads)
        if args.onnx and bits in (2, 4, 8):
            feed = {"x": x.numpy()}
            sessions = onnx_matmul(out, columns, bits, *others)
            found[f"{bits} bits onnxruntime"] = Round.of(
                [partial(session.run, None, feed) for session in sessions], size
            )
        if args.openvino and bits in (4, 8):
            requests = openvino_matmul(out, columns, bits, *others)
            found[f"{bits} bits openvino"] = Round.of([partial(one.infer, [x.numpy()]) for one in requests], size)
    return found


def measure(args: argparse.Namespace, ggml: Ggml | None, folder: Path) -> list[dict[str, Any]]:
    clock = time.process_time if args.threads == 1 else time.perf_counter
    found: list[dict[str, Any]] = []
    gemv = own_gemv(folder)
    for shape in args.shapes:
        out, columns = map(int, shape.split("x"))
        for rows in args.rows:
            rounds_of = contenders(out, columns, rows, args, (gemv, ggml))
            seconds = median_times(rounds_of, args.rounds if rows < 64 else max(1, args.rounds // 2), clock)
            rate = (args.rotate << 20) / seconds[READ]
            for name, value in seconds.items():
                row: dict[str, Any] = {"shape": shape, "rows": rows, "name": name, "ms": 1e3 * value}
                if name == READ:
                    row["GB/s"] = rate / 1e9
                else:
                    row |= {f"x {dense}": seconds[dense] / value for dense in DENSE if dense in seconds}
                if rounds_of[name].size and rows == 1:
                    row["GB/s"] = rounds_of[name].size / value / 1e9
                    row["of the read rate"] = row["GB/s"] * 1e9 / rate
                found.append(row)
            print(table(found[-len(seconds) :]), flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ("ms", *(f"x {dense}" for dense in DENSE), "GB/s", "of the read rate")
    lines = [
        f"| {rows[0]['shape']}, {rows[0]['rows']} rows | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        lines.append(f"| {row['name']} | " + " | ".join(f"{row[c]:.2f}" if c in row else "" for c in columns) + " |")
    return "\n".join(lines) + "\n"


def best_of(calls: list[Contender], rounds: int) -> float:
    """Seconds of one call, wall time: the 5th percentile of single calls, which a moment of quiet is enough for."""
    times = []
    for _ in range(rounds):
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 20]


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Two threads against one: the kernel, and reading. One thread has one half of the weights, two have the other."""
    found = []
    slices = 32 << 20

    def report(name: str, shape: str, times: tuple[float, float], size: int) -> None:
        rates = {f"GB/s, {n}": size / t / 1e9 for n, t in zip((1, 2), times, strict=True)}
        found.append({"shape": shape, "name": name, "two_threads": times[0] / times[1], **rates})
        cells = " | ".join(f"{value:.1f}" for value in rates.values())
        print(f"| {shape} | {name} | {times[0] / times[1]:.2f} | {cells} |", flush=True)

    reads = [[reading(slices, n) for _ in range(4)] for n in (1, 2)]
    report(READ, "", (best_of(reads[0], args.rounds), best_of(reads[1], args.rounds)), slices)
    for shape in args.shapes:
        out, columns = map(int, shape.split("x"))
        x = torch.randn(1, columns)
        for bits in args.bits:
            handles = packed(out, columns, bits, args.rotate << 20)
            half = len(handles) // 2
            tiles: Any = handles[0].owners[1]
            for path in args.paths:
                calls = [[partial(cpu.linear, x, one, None, path, args.isa, n) for one in part]
                         for n, part in ((1, handles[:half]), (2, handles[half:]))]  # fmt: skip
                times = best_of(calls[0], args.rounds), best_of(calls[1], args.rounds)
                report(f"{bits} bits {path}", shape, times, tiles.nbytes)
    return found


def processor() -> str:
    """The processor's name and its instruction sets for integers, as Linux gives them."""
    path = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line) if path.exists() else {}
    known = {name.strip(): value.strip() for name, value in lines.items()}
    flags = [
        flag for flag in known.get("flags", "").split() if flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8")
    ]
    return f"{known.get('model name', 'unknown')}: {' '.join(flags)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--paths", nargs="+", default=["a16", "a8", "exact"])
    parser.add_argument("--rotate", type=int, default=300, help="MB of weights that one round reads")
    parser.add_argument("--isa", choices=list(compiled.ISAS), default=cpu.best(), help="instruction set; the fastest")
    parser.add_argument("--ggml", metavar="PREFIX", help="where ggml is installed (include and lib); GGML_PREFIX")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.onnx = bool(find_spec("onnxruntime") and find_spec("onnx"))
    args.openvino = bool(find_spec("openvino"))
    if cpu.best() is None:
        raise SystemExit(f"there is no C++ kernel to measure; {compiled.HOW}.")
    with tempfile.TemporaryDirectory() as folder:
        prefix = installed(args.ggml)
        ggml = None if prefix is None or args.scaling else Ggml(prefix, Path(folder))
        more = {"processor": processor(), "isa": args.isa, "ggml": ggml.version if ggml else "not run",
                "onnxruntime": args.onnx, "openvino": args.openvino, "load": os.getloadavg()}  # fmt: skip
        print(f"{more}; {args.threads} thread(s), one thread reads {cpu.read_rate():.1f} GB/s")
        rows = scaling(args) if args.scaling else measure(args, ggml, Path(folder))
    if args.json:
        record(args.json, rows, args.threads, **more, load_after=os.getloadavg())


if __name__ == "__main__":
    main()
