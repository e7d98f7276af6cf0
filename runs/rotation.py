"""Perplexity with and without rotation, weights only.

    python runs/rotation.py [--model demo] [--bits 3] [--group-size -1] [--methods rtn gptq] [--nsamples 32] [--windows 8]

One row per method, one column per set of rotations; every grid asymmetric, min-max. Prints each figure as it comes.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nearplane
from nearplane import Calibration, Grid
from nearplane.methods import METHODS

KINDS = ("", "r1", "r1,r2")


def perplexity(args: argparse.Namespace, method: str, rotate: str) -> float:
    """Of a checkpoint made for the purpose."""
    grid = Grid(bits=args.bits, group_size=args.group_size, sym=False, fit="minmax")
    calibration = Calibration(dataset=args.dataset, nsamples=args.nsamples, seqlen=args.seqlen)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        settings: dict[str, Any] = {"grid": grid, "calibration": calibration, "progress": False}
        nearplane.quantize(args.model, out, method=METHODS[method](), rotate=rotate, **settings)
        return nearplane.evaluate(
            out, dataset=args.test, seqlen=args.seqlen, windows=args.windows, packed=False
        ).perplexity


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--dataset", default=Calibration().dataset)
    parser.add_argument("--test", default=None, help="text that is scored; none: the embedded text's held-out part")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    original = nearplane.evaluate(args.model, dataset=args.test, seqlen=args.seqlen, windows=args.windows).perplexity
    print(f"original {original:.2f}", flush=True)
    for method in args.methods:
        for kinds in args.kinds:
            print(f"{method} {kinds or 'as it is'} {perplexity(args, method, kinds):.2f}", flush=True)


if __name__ == "__main__":
    main()
