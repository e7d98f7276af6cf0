"""Our factor and sweep against the published algorithm's straightforward torch form, with the arithmetic floor beside it.

    python benchmarks/sweep.py [--threads 1] [--shapes 2048x4096 4096x4096] [--rounds 3] [--json sweep.json]

Both get the same weight, Hessian, 4-bit grid with static groups of 128 and natural order, on the same threads in one run,
in turn; the median of the rounds counts. The floor is in³/6 multiply-adds (in³/3 FLOPs) for the Cholesky factor and
out·in²/2 (out·in² FLOPs) for the sweep, which looks back at all earlier columns, at the rate of a GEMM measured in the run.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearplane.core.factor import factorize
from nearplane.core.grid import Grid, decode, encode, fit_groups
from nearplane.core.sweep import sweep

GRID = Grid(bits=4, group_size=128, sym=False, fit="minmax")


def published_factor(H: Tensor, damp_percent: float = 0.01) -> Tensor:
    """GPTQ's three factorisations: Cholesky, inverse, Cholesky of the inverse."""
    H = H.clone()
    H.diagonal().add_(damp_percent * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def published_sweep(weight: Tensor, U: Tensor, scale: Tensor, zero: Tensor, block: int = 128) -> Tensor:
    """GPTQ's loop, right-looking in blocks: every rounded column updates the rest of its block, every block the rest."""
    W, n = weight.clone(), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for a in range(0, n, block):
        b = min(a + block, n)
        part, errors = W[:, a:b].clone(), torch.empty(len(W), b - a)
        for i in range(b - a):
            w, g = part[:, i], (a + i) // GRID.group_size
            code = encode(w, scale[:, g], zero[:, g], GRID)
            codes[:, a + i] = code
            error = (w - decode(code, scale[:, g], zero[:, g])) / U[a + i, a + i]
            part[:, i:] -= error[:, None] @ U[None, a + i, a + i : b]
            errors[:, i] = error
        W[:, b:] -= errors @ U[a:b, b:]
    return codes


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Process CPU and wall seconds of one call, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def gemm_rate() -> float:
    """Multiply-adds per wall second of a 2048-cube float32 GEMM."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    return 2048**3 / statistics.median(seconds(lambda: a @ b)[1] for _ in range(7))


def compare(out: int, columns: int, rounds: int) -> dict[str, Any]:
    """One shape."""
    torch.manual_seed(0)
    weight = torch.randn(out, columns)
    x = torch.randn(columns, columns // 8) @ torch.randn(columns // 8, 2 * columns) + torch.randn(columns, 2 * columns)
    H = x @ x.T / x.shape[1]
    scale, zero = fit_groups(weight, GRID)
    times: dict[str, list[float]] = {
        name: [] for name in ("factor", "sweep", "published factor", "published sweep", "rate")
    }
    mismatch = 0.0
    for _ in range(rounds):
        times["rate"].append(gemm_rate())
        _, t, factor = seconds(lambda: factorize(H))
        times["factor"].append(t)
        _, t, ours = seconds(lambda factor=factor: sweep(weight, factor, GRID, (scale, zero)))
        times["sweep"].append(t)
        _, t, U = seconds(lambda: published_factor(H))
        times["published factor"].append(t)
        _, t, theirs = seconds(lambda U=U: published_sweep(weight, U, scale, zero))
        times["published sweep"].append(t)
        mismatch = float((ours.codes != theirs).float().mean())
    median = {name: statistics.median(values) for name, values in times.items()}
    total, published = median["factor"] + median["sweep"], median["published factor"] + median["published sweep"]
    floor = (columns**3 / 6 + out * columns**2 / 2) / median["rate"]
    return {"out": out, "in": columns, **median, "total": total, "published total": published, "floor": floor,
            "times faster": published / total, "times floor": total / floor, "differing codes": mismatch}  # fmt: skip


def record(path: str, rows: list[dict[str, Any]], threads: int | list[int], **more: Any) -> None:
    """Write the rows with what they depend on, and more of it."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {"rows": rows, "commit": commit.stdout.strip(), "machine": platform.platform(), "threads": threads, **more}
    Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["2048x4096", "4096x4096"], metavar="OUTxIN")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [compare(*map(int, shape.split("x")), args.rounds) for shape in args.shapes]
    print(f"{args.threads} thread(s), wall seconds, median of {args.rounds} rounds; 4 bits, group 128, float32")
    print(
        "| out x in | factor | sweep | total | published factor | sweep | total | times faster | floor | total / floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [
            f"{r[k]:.2f}"
            for k in ("factor", "sweep", "total", "published factor", "published sweep", "published total")
        ]
        cells += [f"{r['times faster']:.2f}", f"{r['floor']:.2f}", f"{r['times floor']:.2f}"]
        print(f"| {r['out']} x {r['in']} | " + " | ".join(cells) + " |")
        print(f"  codes that differ (float32 rounding): {100 * r['differing codes']:.3f}%")
    if args.json:
        record(args.json, rows, args.threads)


if __name__ == "__main__":
    main()
