"""What a GPU does: the packed kernel against bfloat16 products, and seconds and memory per block of an 8B model.

    python benchmarks/gpu.py kernel [--bits 4] [--json benchmarks/results/gpu.json]
    python benchmarks/gpu.py quantize FOLDER [--blocks 2] [--nsamples 128] [--seqlen 2048] [--methods gptq gptaq nearplane]

``kernel``: products with the shapes of Llama-3-8B, weights taken in turn from more than a cache holds. The floor is the
bytes of codes, scales and zeros at the rate of a device-to-device copy, measured in the same run.
``quantize``: makes FOLDER first, a Llama with the blocks of an 8B model in bfloat16 (structured random weights as
benchmarks/large.py has them; vocabulary 32000), and quantizes it at 4 bits in groups of 128. Memory is what the
allocator gave out, beside what ``plan`` says.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from large import CONFIG, make
from sweep import record
from triton.testing import do_bench

import nearplane
from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, NearPlane
from nearplane.run.estimate import CUDA_CONTEXT, estimate
from nearplane.run.plan import make_plan
from nearplane.runtime import reference, triton
from nearplane.runtime.layout import Tiles, dequantize, tile
from nearplane.runtime.linear import TENSORS

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # (out, in): o_proj, gate_proj, down_proj
ROWS = (1, 4, 16, 64, 256, 2048)
CACHE = 200 << 20  # bytes of weights in turn: more than an L2 cache
GB = 1e9
METHODS = {"rtn": RTN(), "gptq": GPTQ(), "gptaq": GPTAQ(), "nearplane": NearPlane()}


def packed(out: int, columns: int, bits: int) -> Tiles:
    """Random codes in groups of 128."""
    groups = columns // 128
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    scales = (torch.rand(out, groups) * 0.01 + 0.001).half()
    zeros = torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8)
    tiles = tile(codes, scales, zeros, bits, 128, None)
    return replace(tiles, **{name: getattr(tiles, name).cuda() for name in TENSORS})


def microseconds(work: Any, copies: list[Any]) -> float:
    """Median of one call, the copies in turn."""
    turn = 0

    def once() -> None:
        nonlocal turn
        turn = (turn + 1) % len(copies)
        work(copies[turn])

    return 1000 * float(do_bench(once, warmup=10, rep=60, return_mode="median"))


def copy_rate() -> float:
    """GB/s, bytes read plus bytes written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (microseconds(lambda _: b.copy_(a), [None]) * 1e-6) / GB


def kernels(bits: int) -> list[dict[str, Any]]:
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copies at {rate:.0f} GB/s; microseconds")
    rows = []
    for out, columns in SHAPES:
        one = packed(out, columns, bits)
        tiles = [one, *(copied(one) for _ in range(CACHE // one.nbytes))]
        dense = [dequantize(one).to("cuda", torch.bfloat16)]
        dense += [dense[0].clone() for _ in range(CACHE // dense[0].nbytes)]
        for n in ROWS:
            x = torch.randn(n, columns, device="cuda", dtype=torch.bfloat16)
            row = {"out": out, "in": columns, "bits": bits, "rows": n, "floor": one.nbytes / rate / GB * 1e6}
            row["bf16"] = microseconds(lambda w, x=x: torch.nn.functional.linear(x, w), dense)
            row["packed"] = microseconds(lambda t, x=x: triton.linear(x, t, None), tiles)
            row["plain"] = microseconds(lambda t, x=x: reference.linear(x, t, None), tiles[:1])
            rows.append(row)
            print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def copied(tiles: Tiles) -> Tiles:
    return replace(tiles, **{name: getattr(tiles, name).clone() for name in TENSORS})


def runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    config = CONFIG.__class__.from_dict(
        {**CONFIG.to_dict(), "hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": 128}
        | {"num_hidden_layers": args.blocks}
    )
    if not args.folder.exists():
        make(args.folder, config)
    rows = []
    for name in args.methods:
        grid, calibration = Grid(bits=4, group_size=128), Calibration(nsamples=args.nsamples, seqlen=args.seqlen)
        method = METHODS[name]
        plan = make_plan(args.folder, method=method, grid=grid, calibration=calibration, device="cuda")
        planned = estimate(plan).memory[-1].peak - CUDA_CONTEXT
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            report = nearplane.quantize(
                args.folder,
                Path(folder) / "out",
                method=method,
                grid=grid,
                calibration=calibration,
                device="cuda",
                progress=False,
            )
            whole = time.perf_counter() - start
        row = {"method": name, "blocks": args.blocks, "seconds": whole, "GB": torch.cuda.max_memory_allocated() / GB}
        row |= {"planned GB": planned / GB, **{f"{k} s": v for k, v in report.seconds.items()}}
        row |= {"error": report.totals["mean_error"], "rtn": report.totals["mean_rtn_error"]}
        rows.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernel", "quantize"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--methods", nargs="*", default=["gptq", "gptaq", "nearplane"])
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.what == "quantize" and args.folder is None:
        parser.error("quantize needs a FOLDER")
    rows = kernels(args.bits) if args.what == "kernel" else runs(args)
    if args.json:
        record(args.json, rows, torch.get_num_threads())


if __name__ == "__main__":
    main()
