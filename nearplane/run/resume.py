"""Going on with an unfinished run: what must be as it was, what may change, and how finished blocks are put back.

Hidden states are not stored: the streams run once more through the finished blocks, with the codes read back from their
shards, so that a resumed run sees what an uninterrupted one sees, bit for bit.
"""

import hashlib
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from nearplane.core.errors import SettingError, some_of
from nearplane.core.grid import Quantized
from nearplane.formats.parts import Part, Writer
from nearplane.models.discover import Block
from nearplane.run.events import BlockDone, Event, Solved
from nearplane.run.plan import Plan
from nearplane.run.report import Report
from nearplane.run.stream import OpenBlock

# What may be another for the blocks not yet done; the report says per linear what was used.
FREE = ("method.damp_percent", "calibration.nsamples")
# What comes after the last block.
END = "the end"


class Done(NamedTuple):
    """A finished block."""

    part: Part
    sums: dict[str, str] | None
    """Hashes of the source's parameters that it was made of; None: an earlier version made it."""


def restore(plan: Plan, writer: Writer, report: Report, world: int) -> list[Done]:
    """Take over what ``writer`` found, and return each block that is done. SettingError for a changed setting, by name.

    ``world``: how many ranks go on.
    """
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
        if record.get("copied", _copied(plan)) != _copied(plan):
            raise SettingError(
                f"what is copied from {plan.source.name} (embeddings, norms and the like) differs from what {writer.out} was "
                "begun with; resume with that model, or begin in another folder."
            )
    done = [Done(writer.part(record), record.get("source")) for record in writer.records]
    if len(done) == len(plan.blocks):  # no block will be opened again: a tensor of each has to do
        for block, each in zip(plan.blocks, done, strict=True):
            for site in sorted(block.sites, key=lambda site: prod(site.shape))[:1]:
                plan.source.tensor(site.name + ".weight")
            _same_source(plan, block, each)
    report.events += _told(plan, writer, report, world)
    for record in writer.records:
        report.extend(record["report"])
    report.resumed += bool(writer.resume)
    return done


def _told(plan: Plan, writer: Writer, report: Report, world: int) -> list[str]:
    """Events: what is lost of the earlier run, and in what its sessions differ. Also an earlier resume's changes are
    among them: the report is that of all sessions."""
    events = []
    if writer.lost:
        events.append(f"resumed after block {len(writer.records)}: of what comes next {writer.lost}")
    if writer.records:
        now = _identity(plan)
        states = [{**record["run"], **record["versions"]} for record in writer.records] + [{**now, **report.versions}]
        names = [*(record["block"] for record in writer.records), _next(plan, writer)]
        events += [
            f"{key} was {was!r} in the blocks before {name} and is {value!r} from there on"
            for (before, after), name in zip(pairwise(states), names[1:], strict=True)
            for key, (was, value) in _changed(before, after).items()
            if not key.startswith("data.")
        ]
        worlds = [*(record.get("ranks") for record in writer.records), world]
        steps = zip(pairwise(worlds), names[1:], strict=True)
        for (before, after), name in steps if plan.method.needs and plan.compute != torch.float64 else ():
            if before not in (None, after) and name != END:
                events.append(
                    f"the number of ranks was {before} in the blocks before {name} and is {after} from there on: sums differ "
                    "in their last digits, so that codes may be others than an uninterrupted run's"
                )
    if any("source" not in record for record in writer.records):
        events.append(
            f"an earlier version began this run and noted no hash of its weights: whether {plan.source.name} still holds the "
            "same was not checked"
        )
    return events


class Saver:
    """Writes what a walk says into the parts of a checkpoint, and seals every finished block."""

    def __init__(self, plan: Plan, writer: Writer, report: Report, world: int) -> None:
        self.plan, self.writer, self.report, self.world = plan, writer, report, world
        self.mark = report.mark()

    def take(self, event: Event) -> None:
        """Put a solved weight; make a finished block durable. The report has taken the event before."""
        if isinstance(event, Solved):
            self.writer.put_quantized(self.plan.disk_name(event.site.name), event.quantized, event.grid)
        elif isinstance(event, BlockDone) and not event.replayed:
            self.writer.seal(self._record(event.block))
            self.mark = self.report.mark()

    def _record(self, block: Block) -> dict[str, Any]:
        """What a resumed run must know of a finished block."""
        return {
            "block": block.name,
            "run": _identity(self.plan),
            "versions": self.report.versions,
            "ranks": self.world,
            "source": _read(self.plan, block),
            "copied": _copied(self.plan),
            "report": self.report.since(self.mark),
        }


def replay(plan: Plan, done: Done, block: OpenBlock) -> None:
    """Put the codes of a finished block, from its shards, back into the model, so that the streams can run through it.

    SettingError where the source's weights are not those that it was made of.
    """
    _same_source(plan, block.block, done)
    checkpoint = done.part.open()
    if checkpoint is None:
        return
    for site in block.block.sites:
        codes, scale, zero = checkpoint.quantized(plan.disk_name(site.name))[:3]
        scale = scale.to(plan.device, block.walk.solve_dtype)
        block.replace(site, Quantized(codes.to(plan.device), scale, zero.to(plan.device)), plan.grid_of(site))


def _read(plan: Plan, block: Block) -> dict[str, str]:
    """Hashes of those of a block's parameters that were read."""
    return {name: digest for name, digest in plan.source.sums.items() if name.startswith(block.name + ".")}


def _copied(plan: Plan) -> str:
    return hashlib.sha256(plan.copied.encode()).hexdigest()


def _same_source(plan: Plan, block: Block, done: Done) -> None:
    """SettingError where what was read of a block is not what was noted."""
    found = {} if done.sums is None else _read(plan, block)
    changed = [name for name, digest in found.items() if done.sums and done.sums.get(name) != digest]
    if changed:
        raise SettingError(
            f"weights of {block.name} in {plan.source.name} differ from those the finished block was made of "
            f"({some_of(changed)}); resume with that model, or begin in another folder."
        )


def _next(plan: Plan, writer: Writer) -> str:
    done = len(writer.records)
    return plan.blocks[done].name if done < len(plan.blocks) else END


def _identity(plan: Plan) -> dict[str, Any]:
    """Everything that decides the result, by dotted name."""
    source = {"config": plan.source.raw_config(), "tensors": _tensors(plan)}
    found = _flat({"source": source, **plan.settings, "data": plan.data})
    return {key: value for key, value in found.items() if key != "grid.scale_dtype"}  # follows from format and dtype


def _tensors(plan: Plan) -> str:
    """A hash of the names, shapes and dtypes in the source. Their values are hashed where they are read."""
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
