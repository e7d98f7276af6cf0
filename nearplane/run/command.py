"""The words of the command line that repeat a job: what the report and the model card say of how a checkpoint was made.

A word is written for each setting that was given; of a job that was made from whole objects, for each that is not the
default. Where a run writes, what it keeps on disk and whether it goes on with an earlier one decide nothing, and are left
out. So a resumed run has the words of an uninterrupted one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from nearplane.core.activations import TokenGrid
from nearplane.core.grid import Grid
from nearplane.methods import METHODS
from nearplane.run.job import ACTIVATIONS, Job, Override

# Settings that decide nothing of the result.
SILENT = ("offload", "resume", "force", "given")
# Set by the run.
NO_WORDS = ("scale_dtype",)
PARTS = ("grid", "calibration", "method", "activations")
# Options that take several words, and those that are given once for each value; others are joined by commas.
SEVERAL, REPEATED = ("widths",), ("override", "ignore")


def options_of(job: Job) -> tuple[list[str], list[str]]:
    """Write a job's settings as options of ``nearplane quantize``.

    Returns:
        The words, and the names of settings that no word can say: objects of Python.
    """
    words, unsaid = list[str](), list[str]()
    for name, value in _settings(job):
        said = _said(name, value)
        if said is None:
            unsaid.append(name)
        else:
            words += said
    return words, unsaid


def _settings(job: Job) -> Iterator[tuple[str, Any]]:
    """Yield the settings to be written, by the names that a user gives them."""
    method = type(job.method)
    for field in fields(job):
        name, value = field.name, getattr(job, field.name)
        if name in SILENT:
            continue
        if name not in PARTS:
            if _wanted(job, name, value, field):
                yield name, value
        elif name == "method":
            if _wanted(job, name, value, field) or method is not type(Job().method):
                yield name, method if is_dataclass(method) else value
            yield from _part(job, name, value)
        elif name == "grid" and type(value) is not Grid and (job.given is None or name in job.given):
            yield name, value  # otherwise a GGUF type has decided it
        elif value is not None:
            yield from _part(job, name, value)


def _part(job: Job, part: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a part of the job: the grid, the calibration, the method, the rounding of activations."""
    words = {inner: word for word, inner in ACTIVATIONS.items()} if isinstance(value, TokenGrid) else {}
    for field in fields(value) if is_dataclass(value) else ():
        name, own = words.get(field.name, field.name), getattr(value, field.name)
        whole = job.given is not None and part in job.given
        bits = name == "act_bits"  # without it nothing is rounded
        if field.name not in NO_WORDS and (bits or _wanted(job, name, own, field, whole=whole)):
            yield name, own


def _wanted(job: Job, name: str, value: Any, field: "Field[Any]", *, whole: bool = False) -> bool:
    """Tell whether a setting is written; ``whole``: its part was given as one object."""
    if job.given is not None and not whole:
        return name in job.given and value is not None
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(value != default)


def _said(name: str, value: Any) -> list[str] | None:
    """Write one setting; None where no word can say it."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, type):
        short = next((short for short, kind in METHODS.items() if kind is value), None)
        return [flag, short or f"{value.__module__}:{value.__qualname__}"]
    if isinstance(value, tuple) and all(isinstance(part, str | int | Override) for part in value) and value:
        return _several(flag, name, value)
    return [flag, str(value)] if isinstance(value, str | int | float | Path) else None


def _several(flag: str, name: str, values: Sequence[Any]) -> list[str]:
    """Write a setting of several values."""
    said = [_override(value) if isinstance(value, Override) else str(value) for value in values]
    if name in REPEATED:
        return [word for value in said for word in (f"{flag}={value}",)]
    return [flag, *said] if name in SEVERAL else [flag, ",".join(said)]


def _override(override: Override) -> str:
    """Write an override as ``Override.parse`` reads it."""
    given = (f"{name}={str(value).lower() if value is True or value is False else value}"
             for name, value in override.fields.items())  # fmt: skip
    return f"{override.pattern}={','.join(given)}"
