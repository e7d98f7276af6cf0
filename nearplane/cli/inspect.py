"""``nearplane inspect``: what is in a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearplane.machine.progress import printed
from nearplane.page.words import check_lines, tuning_line

SETTINGS = {"nearplane.core.grid:Grid": None}


@dataclass(frozen=True)
class Options:
    """Blocks, stages, shapes and sizes of a model; for a quantized checkpoint, the grids of its layers, and its run's check.

    Quantizes nothing: it reads one block of each kind and runs 8 tokens through it.
    """

    model: str
    """A transformers folder, a hub id, or "demo"."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; MODEL@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Print the anatomy, and of a quantized checkpoint what its report says of the whole model."""
    from nearplane.api import inspect

    asked: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    found = inspect(options.model, **asked, **settings)
    printed(found)
    if found.quantized:
        for line in _told(Path(options.model)):
            printed(line)
    return 0


def _told(folder: Path) -> list[str]:
    """Lines on the check and the tuning of the run that wrote a folder; none where no report is beside it."""
    from nearplane.formats.store import REPORT
    from nearplane.run.report import Report

    if not (folder / REPORT).is_file():  # another tool's, or one on the hub
        return []
    report = Report.read(folder)
    lines = [] if report.check is None else check_lines(report.check)
    return lines if report.tuning is None or not report.tuning["kept"] else [*lines, tuning_line(report.tuning)]
