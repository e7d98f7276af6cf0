"""What normalised error is usual: the spread over the 210 linears of SmolLM2-135M-Instruct under GPTQ.

    python runs/usual_error.py        (group 64, asymmetric, min-max; 8 x 256 tokens of the embedded text; about 4 minutes)

nearplane/page/words.py quotes the 10th and 90th percentiles.
"""

import argparse
import tempfile
from pathlib import Path

from nearplane import GPTQ, Calibration, Grid, quantize

CALIBRATION = Calibration(nsamples=8, seqlen=256)


def percentiles(values: list[float]) -> str:
    ranked = sorted(values)
    return " / ".join(f"{ranked[int(len(ranked) * share)]:.2g}" for share in (0.1, 0.5, 0.9))


def main() -> None:
    print("| bits | GPTQ, 10th / 50th / 90th percentile | rounding to nearest |\n|---|---|---|")
    for bits in (2, 3, 4, 8):
        grid = Grid(bits=bits, group_size=64, sym=False, fit="minmax")
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(
                "demo", Path(folder) / "out", method=GPTQ(), grid=grid, calibration=CALIBRATION, progress=False
            )
        errors = [row.error for row in report.linears if row.error is not None]
        rounded = [row.rtn_error for row in report.linears if row.rtn_error is not None]
        print(f"| {bits} | {percentiles(errors)} | {percentiles(rounded)} |", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
