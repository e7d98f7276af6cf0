"""From a folder, or the file itself, to the content of ``report.json``; what is no report is refused in one sentence."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nearplane.core.errors import SettingError
from nearplane.formats.journal import unfinished
from nearplane.formats.store import REPORT, read_json


class Found(NamedTuple):
    """A report on disk."""

    path: Path
    folder: Path
    content: Mapping[str, Any]


def read_report(out: Path) -> Found:
    """Read the report of a checkpoint.

    Args:
        out: the folder that a run has written, or its ``report.json``.

    Raises:
        SettingError: there is no report.
        NearplaneError: the report is damaged.
    """
    path = out if out.is_file() else out / REPORT
    if not path.is_file():
        reason = unfinished(out)
        raise SettingError(
            reason
            or f"{out} has no {REPORT}, which nearplane quantize writes; another tool's checkpoint has no report."
        )
    if path.suffix.lower() != ".json":
        raise SettingError(f"{path} is no {REPORT}; give the OUT of nearplane quantize.")
    return Found(path, path.parent, read_json(path))
