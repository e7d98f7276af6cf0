"""What ``make demo`` runs: SmolLM2-135M-Instruct to 3 bits, group 64, by rounding, by GPTQ and by our own method.

    python examples/demo.py [OUT]      (default: demo-out)

Calibrates on the embedded text and measures perplexity on its held-out part.
"""

import shutil
import sys
from pathlib import Path

from rich.table import Table

from nearplane import GPTQ, RTN, Calibration, Grid, Method, NearPlane, NearplaneError, Report, evaluate, quantize
from nearplane.cli.terminal import Terminal
from nearplane.machine.progress import console

GRID = Grid(bits=3, group_size=64, sym=False)
CALIBRATION = Calibration(nsamples=16, seqlen=512)
METHODS: dict[str, Method] = {"rtn": RTN(), "gptq": GPTQ(), "nearplane": NearPlane()}
SEQLEN, WINDOWS = 1024, 8


def main(out: Path) -> None:
    """Quantize three times, measure four, print one table."""
    for name in METHODS:
        shutil.rmtree(out / name, ignore_errors=True)  # an earlier demo's
    console().rule("original: perplexity")
    original = evaluate("demo", seqlen=SEQLEN, windows=WINDOWS, progress=True)
    table = Table("model", "perplexity", "size", "bits per weight", "time by stage")
    rows: list[tuple[str, float, Report]] = []
    for name, method in METHODS.items():
        console().rule(f"{name}: quantize to {GRID.bits} bits, group_size {GRID.group_size}")
        with Terminal() as show:
            report = quantize("demo", out / name, method=method, grid=GRID, calibration=CALIBRATION, show=show)
        result = evaluate(out / name, seqlen=SEQLEN, windows=WINDOWS, progress=True)
        rows.append((name, result.perplexity, report))
    table.add_row(
        "original, 16 bits", f"{original.perplexity:.2f}", f"{rows[0][2].bytes['before'] / 1e6:.0f} MB", "16", ""
    )
    for name, perplexity, report in rows:
        times = ", ".join(f"{phase} {seconds:.0f}s" for phase, seconds in report.seconds.items() if seconds >= 0.5)
        bits = f"{report.totals['bits_per_weight']:.2f}"
        table.add_row(name, f"{perplexity:.2f}", f"{report.bytes['after'] / 1e6:.0f} MB", bits, times)
    console().print(table)
    console().print(f"protocol: {original.protocol}")
    for name in METHODS:
        console().print(f"checkpoint: {(out / name).resolve()}  (report.json beside it)")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
    except NearplaneError as error:
        sys.exit(f"nearplane: {error}")
