"""Perplexity with and without rotation: every method, four bits for weights and activations, two bits for weights alone.

    python runs/rotation.py [--model demo] [--settings W2A16 W4A4] [--methods RTN GPTQ GPTAQ ResComp NearPlane]
        [--kinds none r1,r2 r1,r2,r4] [--nsamples 4] [--seqlen 512] [--windows 4] [--out runs/rotation]

Calibrates on the embedded text and scores its held-out part, in float32. Grids are asymmetric, their ranges fitted by the
Hessian, RTN's from the least to the greatest weight. One line of OUT.jsonl per finished cell, with its commit: an
interrupted study goes on where it was, on the same texts. A finished cell is not run again, whatever else has changed since:
delete its line for that. OUT.md is written from whatever is there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nearplane
from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, Method, NearPlane, ResComp
from nearplane.core.activations import TokenGrid
from nearplane.data.text import Part, read_text

METHODS: dict[str, Method] = {
    "RTN": RTN(), "GPTQ": GPTQ(), "GPTAQ": GPTAQ(), "ResComp": ResComp(), "NearPlane": NearPlane(),
}  # fmt: skip
# Bits and group size of weights, and how activations are rounded: QuaRot's 4 bits per token, symmetric, clip 0.9.
SETTINGS: dict[str, tuple[int, int, TokenGrid | None]] = {
    "W2A16": (2, 64, None),
    "W4A4": (4, -1, TokenGrid(bits=4, sym=True, clip=0.9)),
    "W4A16": (4, -1, None),
    "W3A16": (3, -1, None),
}
KINDS = ("none", "r1,r2", "r1,r2,r4")


def commit() -> str:
    """The commit that produced a number."""
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def measured(path: str | Path, args: argparse.Namespace) -> float:
    """Perplexity of the held-out windows."""
    settings: dict[str, Any] = {"dataset": args.test, "seqlen": args.seqlen, "windows": args.windows, "packed": False}
    return nearplane.evaluate(path, **settings).perplexity


def cell(setting: str, method: str, kinds: str, args: argparse.Namespace) -> dict[str, Any]:
    """Make a checkpoint, measure it, forget it."""
    bits, group, activations = SETTINGS[setting]
    fit = args.fit or ("minmax" if method == "RTN" else "auto")
    grid = Grid(bits=bits, group_size=group, sym=False, fit=fit)
    draw = Calibration(dataset=args.dataset, nsamples=args.nsamples, seqlen=args.seqlen)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out, rotate = Path(folder) / "out", "" if kinds == "none" else kinds
        settings: dict[str, Any] = {"grid": grid, "calibration": draw, "activations": activations, "progress": False}
        report = nearplane.quantize(args.model, out, method=METHODS[method], rotate=rotate, **settings)
        perplexity = measured(out, args)
    seconds = {**report.seconds, "all": time.perf_counter() - start}
    return {"perplexity": perplexity, "seconds": {name: round(value, 1) for name, value in seconds.items()}}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: methods by settings and rotations, as far as they are there."""
    names = [name.split("|") for name in rows if name.count("|") == 2]
    settings = [s for s in SETTINGS if any(name[0] == s for name in names)]
    columns = [(s, k) for s in settings for k in dict.fromkeys((*KINDS, *(n[2] for n in names if n[0] == s)))]
    columns = [(s, k) for s, k in columns if any(name[0] == s and name[2] == k for name in names)]
    lines = [
        "| method | " + " | ".join(f"{s}, {k}" for s, k in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for method in [m for m in METHODS if any(name[1] == m for name in names)]:
        found = [rows.get(f"{s}|{method}|{k}", {}).get("perplexity") for s, k in columns]
        lines.append(f"| {method} | " + " | ".join("" if p is None else f"{p:.2f}" for p in found) + " |")
    return f"Original: {rows['original']['perplexity']:.2f}.\n\n" + "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--settings", nargs="+", default=["W2A16", "W4A4"], choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="none: as it is")
    parser.add_argument("--fit", default=None, help="of every grid, instead of each method's own")
    parser.add_argument("--dataset", default=Calibration().dataset)
    parser.add_argument("--test", default=None, help="text that is scored; none: the embedded text's held-out part")
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "rotation")
    args = parser.parse_args(words)
    store = args.out.with_suffix(".jsonl")
    found = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    rows = {row["cell"]: row for row in found}
    parts: tuple[tuple[str | None, Part], ...] = ((args.dataset, "calibration"), (args.test, "evaluation"))
    text = ", ".join(name or read_text(None, part).origin for name, part in parts)
    others = {row["text"] for row in found} - {text}
    if others:
        sys.exit(f"{store} has cells of {' and '.join(sorted(others))}, not of {text}; give another --out.")
    protocol = {"tokens": args.nsamples * args.seqlen, "windows": args.windows, "seqlen": args.seqlen, "text": text}

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = {"cell": name, **row, **protocol, "commit": commit()}
        with store.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        args.out.with_suffix(".md").write_text(table(rows))
        print(f"{name} {row['perplexity']:.2f}", flush=True)

    if "original" not in rows:
        keep("original", {"perplexity": measured(args.model, args)})
    for kinds in args.kinds:
        for setting in args.settings:
            for method in args.methods:
                name = f"{setting}|{method}|{kinds}"
                if name not in rows:
                    keep(name, cell(setting, method, kinds, args))


if __name__ == "__main__":
    main()
