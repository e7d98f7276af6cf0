"""``nearplane plan``: what a run will need, before any compute."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nearplane.cli import quantize
from nearplane.cli.options import JOB
from nearplane.machine.progress import printed, waiting

SETTINGS = {JOB: None}
WITHOUT = ("resume", "force")  # accepted, so that the words of quantize do, and not shown: they change nothing here
GROUPS = quantize.GROUPS
EPILOG = quantize.EPILOG


@dataclass(frozen=True)
class Options:
    """Say what quantize will need with the same flags, before any compute: memory, disk, time, and whether it fits here.

    Reads no weight: MODEL may be a folder that holds nothing but config.json. The time comes from about ten
    seconds of measuring this machine. Exit status: 0 if the run fits, 1 if it does not.
    """

    model: str
    """A local transformers folder, a hub id, or "demo"."""
    ranks: int = 1
    """Plan for so many processes of this machine, as torchrun starts them: memory and time of each."""
    json: bool = False
    """Print one JSON object and nothing else on standard output."""
    config: Path | None = None
    """A JSON or YAML file of settings: your own, another toolkit's quantize_config.json, or the report.json of a run, which
    repeats the run. Options that are given count before the file's."""


def run(options: Options, settings: dict[str, Any]) -> int:
    """Print the forecast; returns 1 where the run does not fit."""
    with waiting("measuring this machine, about ten seconds"):
        start = time.perf_counter()
        from nearplane.api import plan

        loading = time.perf_counter() - start  # of libraries, which quantize loads, too
        found = plan(options.model, ranks=options.ranks, **settings)
        found = replace(found, seconds=found.seconds | {"start": found.seconds["start"] + loading})
    printed(found) if not options.json else print(json.dumps(found.as_dict()))
    return 1 if found.lacking() else 0
