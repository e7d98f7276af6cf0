"""What the studies of other models share: the methods compared, one kept line per finished cell, a table over draws."""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from quality import ROWS, commit

from nearplane import Calibration, Grid, quantize

METHODS = {
    name.rpartition("= ")[2]: ROWS[name] for name in ("RTN", "GPTQ", "GPTAQ", "ResComp", "+ refinement = NearPlane")
}
Found = dict[str, Any]


class Kept:
    """Finished cells, a JSON line each. A cell that is kept is not run again; delete its line for that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.cells: dict[str, Found] = {record.pop("cell"): record for record in map(json.loads, lines)}

    def keep(self, key: str, found: Found) -> None:
        """Write one down."""
        self.cells[key] = found
        with self.path.open("a") as file:
            file.write(json.dumps({"cell": key, **found}) + "\n")
        print(key, found, flush=True)

    def draws(self, *key: str) -> list[Found]:
        """What one row has, over the seeds."""
        start = "|".join(key) + "|"
        return [cell for name, cell in self.cells.items() if name.startswith(start) and "|" not in name[len(start) :]]


def quantized(model: Path, row: str, bits: int, group: int, draw: Calibration, out: Path) -> Found:
    """A checkpoint by one method, asymmetric, and what its run says of it."""
    method, fit = METHODS[row]
    grid = Grid(bits=bits, group_size=group, sym=False, fit=fit)  # type: ignore[arg-type]
    report = quantize(model, out, method=method, grid=grid, calibration=draw, progress=False)
    totals = report.totals
    return {
        "mean_error": totals["mean_error"],
        **{name: report.data[name] for name in ("windows", "tokens") if name in report.data},
        "events": len(report.events),
        "seconds": {phase: round(spent, 1) for phase, spent in report.seconds.items()},
        "commit": commit(),
    }


def table(kept: Kept, model: str, columns: dict[str, tuple[str, int]], bits: list[int], group: int) -> str:
    """Markdown: a row per width and method; each figure the mean over draws ± half their range."""
    lines = ["| bits | method | draws | " + " | ".join(columns) + " |", "|" + "---|" * (3 + len(columns))]
    for width in bits:
        for row in METHODS:
            draws = kept.draws(model, str(width), str(group), row)
            figures = [
                spread([draw[name] for draw in draws if name in draw], digits) for name, digits in columns.values()
            ]
            lines += [f"| {width} | {row} | {len(draws)} | " + " | ".join(figures) + " |"] if draws else []
    return "\n".join(lines) + "\n"


def spread(found: list[float], digits: int) -> str:
    """Mean ± half the range."""
    if not found:
        return ""
    half = f" ± {(max(found) - min(found)) / 2:.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{half}"


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for one checkpoint."""
    return tempfile.TemporaryDirectory(prefix="nearplane-")
