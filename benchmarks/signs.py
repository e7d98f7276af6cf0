"""What negative scales are worth: held-out error of single linears with scales of either sign over that with scales above 0.

    python benchmarks/signs.py [--blocks 6 22] [--calibration VALID.txt --test TEST.txt] [--tokens 8192]

Needs the demo model in its cache (``nearplane quantize demo OUT`` puts it there). Of each block q_proj, v_proj, o_proj, up_proj
and down_proj. Inputs come from forwards of the float model, so no method sees the error of another linear. H is of
``--tokens`` tokens of one text. The error is on half as many of another text. Without files: the package's calibration and
held-out texts. A column is the mean over linears of tr(E H E^T) over the same without negative scales, and the seconds of
all solves over the same. Stored bits are equal. The demo's weights came from a Q4_1 file, so 4 bits say less than the rest.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from kquants import TEXTS, inputs

from nearplane.core.grid import Grid, dequantize, fit_groups
from nearplane.methods import GPTQ, RTN, NearPlane

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
GRIDS = ((4, 32), (4, 128), (4, -1), (3, 64), (2, 64), (8, -1))
METHODS = {"rtn": RTN(), "gptq": GPTQ(), "nearplane": NearPlane(target=False)}


def main() -> None:
    """Print one line per grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="*", type=int, default=[6, 22])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=Path, default=TEXTS / "calibration.txt")
    parser.add_argument("--test", type=Path, default=TEXTS / "held_out.txt")
    options = parser.parse_args()
    names = [f"model.layers.{k}.{kind}" for k in options.blocks for kind in KINDS]
    linears = list(inputs(names, options.tokens, [options.calibration, options.test]).values())
    print(
        f"{len(linears)} linears, {options.tokens} tokens; held-out error, and seconds, over those with scales above 0"
    )
    print("bits group " + " ".join(f"{name:>16}" for name in ("fit alone", *METHODS)))
    for bits, size in GRIDS:
        either = Grid(bits, size, scale_dtype="float16")
        cells = []
        grids = (either, replace(either, negative_scales=False))
        spent = [0.0, 0.0]
        for weight, moments, _ in linears:
            for k, grid in enumerate(grids):
                start = time.perf_counter()
                fit_groups(weight, grid, moments.H.diagonal())
                spent[k] += time.perf_counter() - start
        cells.append(f"{'':>6} {spent[0] / spent[1]:>5.2f} x t")
        for method in METHODS.values():
            ratios, spent = [], [0.0, 0.0]
            for weight, moments, H in linears:
                lost = []
                for k, grid in enumerate(grids):
                    start = time.perf_counter()
                    solved = method.solve(weight, method.prepare(moments), grid)
                    spent[k] += time.perf_counter() - start
                    error = (dequantize(solved, grid) - weight).double()
                    lost.append(float((error @ H.double() * error).sum()))
                ratios.append(lost[0] / lost[1])
            cells.append(f"{torch.tensor(ratios).mean():>6.3f} {spent[0] / spent[1]:>5.2f} x t")
        print(f"{bits:>4} {size:>5} " + " ".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
