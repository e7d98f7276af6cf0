"""Going on with an unfinished run: what must be as it was, what may change, and how finished blocks are put back.

Hidden states are not stored: the streams run once more through the finished blocks, with the codes read back from their
shards, so that a resumed run sees what an uninterrupted one sees, bit for bit.
"""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nearplane.core.errors import SettingError
from nearplane.core.grid import Quantized
from nearplane.formats.read import read_tensors
from nearplane.formats.store import Store
from nearplane.formats.write import Writer
from nearplane.plan import Plan
from nearplane.report import Mark, Report
from nearplane.stream import OpenBlock

# What may be another for the blocks not yet done; the report says per linear what was used.
FREE = ("method.damp_percent", "calibration.nsamples")


def restore(plan: Plan, writer: Writer, report: Report) -> list[list[Path]]:
    """Take over what ``writer`` found, and return the shards of each block that is done. SettingError for a changed
    setting, by name."""
    now = _identity(plan)
    for record, block in zip(writer.records, plan.blocks, strict=False):
        changed = _changed(record["run"], now)
        bound = [key for key in changed if key not in FREE and not key.startswith("data.")]
        if record["block"] != block.name or bound:
            name = bound[0] if bound else "block"
            was, value = changed.get(name, (record["block"], block.name))
            raise SettingError(
                f"{name} was {was!r} when {writer.out} was begun and is {value!r} now; resume with what it was, or "
                "begin in another folder."
            )
        if "calibration.nsamples" not in changed and any(key.startswith("data.") for key in changed):
            raise SettingError(
                f"the calibration text is not the one that {writer.out} was begun with; resume with that one, or begin "
                "in another folder."
            )
    if writer.lost:
        report.events.append(f"resumed after block {len(writer.records)}: of what comes next {writer.lost}")
    if writer.records:
        # Also what an earlier resume changed: the report is that of all sessions.
        states = [{**record["run"], **record["versions"]} for record in writer.records] + [{**now, **report.versions}]
        names = [*(record["block"] for record in writer.records), _next(plan, writer)]
        report.events += [
            f"{key} was {was!r} in the blocks before {name} and is {value!r} from there on"
            for (before, after), name in zip(pairwise(states), names[1:], strict=True)
            for key, (was, value) in _changed(before, after).items()
            if not key.startswith("data.")
        ]
    for record in writer.records:
        report.extend(record["report"])
    report.resumed += bool(writer.resume)
    return [[writer.out / name for name in record["shards"]] for record in writer.records]


def seal(plan: Plan, writer: Writer, report: Report, block: OpenBlock, mark: Mark) -> None:
    """Make a finished block durable."""
    record = {"block": block.block.name, "run": _identity(plan), "versions": report.versions}
    writer.seal({**record, "report": report.since(mark)})


def replay(plan: Plan, shards: list[Path], block: OpenBlock) -> None:
    """Put the codes of a finished block, from its shards, back into the model, so that the streams can run through it."""
    if not block.block.sites:
        return
    store = Store.of(shards)
    checkpoint = read_tensors(store, {}, plan.quantization(ignore=[], settings={}))
    for site in block.block.sites:
        codes, scale, zero = checkpoint.quantized(plan.disk_name(site.name))[:3]
        scale = scale.to(plan.device, block.walk.solve_dtype)
        block.replace(site, Quantized(codes.to(plan.device), scale, zero.to(plan.device)), plan.grid_of(site))


def _next(plan: Plan, writer: Writer) -> str:
    done = len(writer.records)
    return plan.blocks[done].name if done < len(plan.blocks) else "the end"


def _identity(plan: Plan) -> dict[str, Any]:
    """Everything that decides the result, by dotted name."""
    source = {"config": plan.source.raw_config(), "tensors": _tensors(plan)}
    found = _flat({"source": source, **plan.settings, "data": plan.data})
    return {key: value for key, value in found.items() if key != "grid.scale_dtype"}  # follows from format and dtype


def _tensors(plan: Plan) -> str:
    """A hash of the names, shapes and dtypes in the source. Values are not read: that would take as long as the run."""
    store = plan.source.original
    described = [(name, store.shape(name), str(store.dtype(name))) for name in sorted(store.names)]
    return hashlib.sha256(repr(described).encode()).hexdigest()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}".lstrip(".")).items()}
    return {name: str(value) if isinstance(value, torch.dtype) else value}


def _changed(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, old and new."""
    keys = list(dict.fromkeys([*was, *now]))
    return {key: (was.get(key), now.get(key)) for key in keys if _plain(was.get(key)) != _plain(now.get(key))}


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value
