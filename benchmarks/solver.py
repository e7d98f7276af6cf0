"""The whole solver, beside its arithmetic floor: GPTQ (Hessian, factor, sweep) and NearPlane (target, sweep, refinement).

    python benchmarks/solver.py [--threads 1] [--shapes 1024x1024 2048x5632 4096x4096] [--methods GPTQ NearPlane]
        [--rounds 3] [--parts] [--growth] [--scaling] [--json solver.json]

One linear, 4 bits, static groups of 128, min-max fit (the search for scales is no part of the floor), 4096 tokens. The
floor of GPTQ in multiply-adds, at the rate of a 2048-cube float32 GEMM measured in the same run: tokens·in²/2 for the
Hessian (it is symmetric), in³/6 for the factor, out·in²/2 for the sweep. Times are process CPU seconds, medians of the
rounds. Memory is the peak of what the solver allocates beyond its inputs (weight and moments), counted tensor by tensor.

``--parts`` prints what each part of a solver takes: CPU seconds, FLOPs, and the rate that it reaches beside the GEMM's.
``--growth`` solves square linears of 512 to 4096 inputs, and prints the exponents that fit their cost and memory.
``--scaling`` measures one thread against two instead: wall time of prepare and solve, in turn, on an idle machine.
"""

import argparse
import math
import os
import statistics
import time
import weakref
from typing import Any

import parts
import torch
from sweep import gemm_rate, record, seconds
from torch.utils._python_dispatch import TorchDispatchMode

from nearplane import GPTAQ, GPTQ, Grid, Method, Moments, NearPlane

GRID = Grid(bits=4, group_size=128, sym=False, fit="minmax")
TOKENS, BATCH = 4096, 2048
METHODS: dict[str, Method] = {
    "GPTQ": GPTQ(),
    "GPTAQ": GPTAQ(),
    "NearPlane, 1 round": NearPlane(rounds=1),
    "NearPlane": NearPlane(),  # of a linear that adds to the residual stream
    "NearPlane, no residual": NearPlane(residual=False),  # of any other
}


class Peak(TorchDispatchMode):
    """Counts the bytes of live tensor storages made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in [*args, *(kwargs or {}).values()] if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def calibration(out: int, columns: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """A weight, and batches of X̂, X and r - r̂ + W X (drift of the stream, the reference's output); features correlate."""
    torch.manual_seed(0)
    mix, weight = torch.randn(columns // 8, columns), torch.randn(out, columns)
    batches = []
    for _ in range(TOKENS // BATCH):
        x = torch.randn(BATCH, columns // 8) @ mix + torch.randn(BATCH, columns)
        shift = 0.1 * torch.randn(BATCH, out)
        batches.append((x + 0.1 * torch.randn(BATCH, columns), x, torch.addmm(shift, x, weight.T)))
    return weight, batches


def observe(
    method: Method, weight: torch.Tensor, batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> Moments:
    """The moments that a method asks for, the second batch held out where it wants that."""
    out, columns = weight.shape
    residual = out if "R" in method.needs else None
    drift = "D" in method.needs and residual is None  # as in the walk: where there is R it stands in for D
    made = [Moments.zeros(columns, drift=drift, residual=residual) for _ in batches]
    for part, (xhat, x, behind) in zip(made, batches, strict=True):
        part.add(xhat, x if drift else None, None if residual is None else behind)
        if part.R is not None:
            part.R.addmm_(weight, part.H, alpha=-1)  # as the walk does it
    return made[0].join(made[1]) if "held_out" in method.needs else made[0].merge(made[1])


def measure(
    method: Method, weight: torch.Tensor, batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """CPU seconds of moments, prepare and solve, and the solver's peak memory in bytes."""
    time_moments, _, moments = seconds(lambda: observe(method, weight, batches))
    time_prepare, _, state = seconds(lambda: method.prepare(moments))
    time_solve, _, _ = seconds(lambda: method.solve(weight, state, GRID))
    del state
    with Peak() as peak:
        method.solve(weight, method.prepare(moments), GRID)
    return {"moments": time_moments, "prepare": time_prepare, "solve": time_solve, "peak": float(peak.most)}


def compare(out: int, columns: int, methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """One shape, the methods in turn, ``rounds`` times; the first is what the others are compared with."""
    weight, batches = calibration(out, columns)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    rates = []
    for _ in range(rounds):
        rates.append(gemm_rate())
        for name in methods:
            runs[name].append(measure(METHODS[name], weight, batches))
    floor = (TOKENS * columns**2 / 2 + columns**3 / 6 + out * columns**2 / 2) / statistics.median(rates)
    rows = []
    for name, values in runs.items():
        row: dict[str, Any] = {key: statistics.median(value[key] for value in values) for key in values[0]}
        row |= {"method": name, "out": out, "in": columns, "floor": floor}
        row["total"] = row["moments"] + row["prepare"] + row["solve"]
        rows.append(row)
    for row in rows:
        row["solver / first"] = (row["prepare"] + row["solve"]) / (rows[0]["prepare"] + rows[0]["solve"])
        row["total / first"] = row["total"] / rows[0]["total"]
        row["total / floor"] = row["total"] / floor
    return rows


def print_parts(shapes: list[tuple[int, int]], methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """Print and return what each part takes, in the share of the first method's whole solver, too."""
    print("| out x in | method | part | ms | of the first | GFLOP | GFLOP/s | of a GEMM |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for out, columns in shapes:
        weight, batches = calibration(out, columns)
        first = 0.0
        for name in methods:
            method, rate = METHODS[name], 2 * gemm_rate()
            moments = observe(method, weight, batches)
            found = parts.measure(lambda w=weight, m=method, given=moments: m.solve(w, m.prepare(given), GRID), rounds)
            whole = sum(spent for spent, _ in found.values())
            first = first or whole
            for part, (spent, flops) in [*found.items(), ("whole", (whole, sum(f for _, f in found.values())))]:
                rows.append({"out": out, "in": columns, "method": name, "part": part, "seconds": spent, "flops": flops})
                rows[-1] |= {"gemm": rate, "of the first": spent / first, "load": os.getloadavg()[0]}
                print(f"| {out} x {columns} | {name} | {part} | {1e3 * spent:.1f} | {spent / first:.2f} | {flops / 1e9:.2f} | "
                      f"{flops / 1e9 / max(spent, 1e-9):.0f} | {flops / max(spent, 1e-9) / rate:.2f} |", flush=True)  # fmt: skip
    return rows


def print_growth(widths: list[int], methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """Print and return cost and peak memory of square linears, and the slopes of their logarithms."""
    rows = [row for width in widths for row in compare(width, width, methods, rounds)]
    print(f"exponents of the width over {', '.join(map(str, widths))}; theory: 3 for seconds, 2 for memory")
    print("| method | seconds | exponent | the last doubling | peak, MB | exponent |")
    print("|---|---|---|---|---|---|")
    for name in methods:
        mine = [row for row in rows if row["method"] == name]
        spent, peak = [row["prepare"] + row["solve"] for row in mine], [row["peak"] for row in mine]
        cells = [
            ", ".join(f"{s:.3f}" for s in spent),
            f"{slope(widths, spent):.2f}",
            f"{slope(widths[-2:], spent[-2:]):.2f}",
        ]
        cells += [", ".join(f"{p / 1e6:.0f}" for p in peak), f"{slope(widths, peak):.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return rows


def print_scaling(shapes: list[tuple[int, int]], methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """Print and return the wall seconds of a solver with one thread and with two, in turn; the machine must be idle."""
    print("| out x in | method | one thread, wall s | two | times faster | load |")
    print("|---|---|---|---|---|---|")
    rows = []
    for out, columns in shapes:
        weight, batches = calibration(out, columns)
        for name in methods:
            method, spent = METHODS[name], {1: list[float](), 2: list[float]()}
            moments = observe(method, weight, batches)
            for _ in range(rounds):
                for threads, times in spent.items():
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    method.solve(weight, method.prepare(moments), GRID)
                    times.append(time.perf_counter() - start)
            one, two = (statistics.median(times) for times in spent.values())
            rows.append({"out": out, "in": columns, "method": name, "one": one, "two": two, "load": os.getloadavg()[0]})
            print(
                f"| {out} x {columns} | {name} | {one:.2f} | {two:.2f} | {one / two:.2f} | {os.getloadavg()[0]:.1f} |"
            )
    return rows


def slope(widths: list[int], values: list[float]) -> float:
    """The exponent of the power of the width that fits the values best, by least squares of logarithms."""
    x, y = [math.log(w) for w in widths], [math.log(v) for v in values]
    middle = statistics.fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


SHAPES, GROWTH = ("1024x1024", "2048x5632", "4096x4096"), ("512x512", "1024x1024", "2048x2048", "4096x4096")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="of --growth, square ones")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="what each part takes")
    parser.add_argument("--growth", action="store_true", help="square linears of 512, 1024, 2048 and 4096 inputs")
    parser.add_argument("--scaling", action="store_true", help="one thread against two")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.shapes = args.shapes or (GROWTH if args.growth else SHAPES)
    torch.set_num_threads(args.threads)
    if args.parts or args.growth or args.scaling:
        shapes = [(int(out), int(columns)) for out, columns in (shape.split("x") for shape in args.shapes)]
        if args.growth and any(out != columns for out, columns in shapes):
            parser.error("--growth takes square --shapes, such as 512x512")
        if args.growth:
            rows = print_growth([columns for _, columns in shapes], args.methods, args.rounds)
        else:
            rows = (print_parts if args.parts else print_scaling)(shapes, args.methods, args.rounds)
        if args.json:
            record(args.json, rows, [1, 2] if args.scaling else args.threads)
        return
    print(f"{args.threads} thread(s), CPU seconds, median of {args.rounds}; peak memory beyond weight and moments")
    print(
        "| out x in | method | moments | prepare | solve | / GPTQ floor | solver / first | all / first | peak in×in | or out×in |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in args.shapes:
        for r in compare(*map(int, shape.split("x")), args.methods, args.rounds):
            rows.append(r)
            cells = [
                f"{r[k]:.2f}"
                for k in ("moments", "prepare", "solve", "total / floor", "solver / first", "total / first")
            ]
            cells += [f"{r['peak'] / 4 / r['in'] ** 2:.1f}", f"{r['peak'] / 4 / r['in'] / r['out']:.1f}"]
            print(f"| {r['out']} x {r['in']} | {r['method']} | " + " | ".join(cells) + " |", flush=True)
    if args.json:
        record(args.json, rows, args.threads)


if __name__ == "__main__":
    main()
