"""Saving a run and resuming it: finished blocks are sealed, checked against the settings, and put back.

A resumed run must have the settings of the run that it goes on with; damp_percent and nsamples may change. Hidden states
are not stored. The streams run again through the finished blocks, with codes read back from the parts. So a resumed run
sees the same numbers as an uninterrupted run, bit for bit.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearplane.checkpoint.engines import Verdict, verdicts
from nearplane.checkpoint.export import Rest, Written, export, head_names, rest_of, routing
from nearplane.checkpoint.export import Solved as Weight
from nearplane.checkpoint.gguf import Placed, described, file_name, write_gguf
from nearplane.checkpoint.hub.card import Made, card, commonest
from nearplane.checkpoint.hub.card import described as described_source
from nearplane.core.errors import SettingError, some_of
from nearplane.core.grid import Quantized
from nearplane.core.scales import Stored
from nearplane.formats.companions import CARD, kept_card
from nearplane.formats.parts import Part, Writer
from nearplane.machine.memory import peak_resident
from nearplane.models.discover import Block
from nearplane.models.inputs import is_causal
from nearplane.page.html import page_or_reason
from nearplane.run.events import BlockDone, Event, Solved
from nearplane.run.plan import Plan
from nearplane.run.report import Report
from nearplane.run.stream import OpenBlock
from nearplane.run.student import Tuned

# What may be another for the blocks not yet done; the report says per linear what was used.
FREE = ("method.damp_percent", "calibration.nsamples")
# Runs of versions without this setting had scales above 0 only, but for GGUF types, whose scales are their own.
SIGNS = "grid.negative_scales"
# What comes after the last block.
END = "the end"


class Done(NamedTuple):
    """A block that an earlier session finished."""

    part: Part
    sums: dict[str, str]
    """Hashes of the source's parameters that the block was made of."""


def restore(plan: Plan, writer: Writer, report: Report, world: int) -> list[Done]:
    """Take over the sealed blocks and the record of an earlier session.

    Args:
        writer: holds the sealed records.
        report: takes over the earlier session's entries.
        world: how many ranks go on.

    Returns:
        The finished blocks, in order.

    Raises:
        SettingError: a setting, the data or the source differs, by name.
    """
    now = _identity(plan)
    for record, block in zip(writer.records, plan.walked, strict=False):
        changed = _changed(_run(record), now)
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
        if record["copied"] != _copied(plan):
            raise SettingError(
                f"what is copied from {plan.source.name} (embeddings, norms and the like) differs from what {writer.out} was "
                "begun with; resume with that model, or begin in another folder."
            )
    done = [Done(writer.part(record), record["source"]) for record in writer.records]
    if len(done) == len(plan.walked):  # no block will be opened again: a tensor of each has to do
        for block, each in zip(plan.walked, done, strict=True):
            for site in sorted(block.sites, key=lambda site: prod(site.shape))[:1]:
                plan.source.tensor(site.name + ".weight")
            _same_source(plan, block, each)
    report.events += _told(plan, writer, report, world)
    for record in writer.records:
        report.extend(record["report"])
    report.resumed += bool(writer.resume)
    return done


def _told(plan: Plan, writer: Writer, report: Report, world: int) -> list[str]:
    """List sentences on lost blocks and on settings that differ between sessions, those of earlier resumes included."""
    events = []
    if writer.lost:
        events.append(f"resumed after block {len(writer.records)}: of what comes next {writer.lost}")
    if writer.records:
        now = _identity(plan)
        states = [{**_run(record), **record["versions"]} for record in writer.records] + [{**now, **report.versions}]
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

    def finish(self, tuned: Tuned | None = None) -> None:
        """Write everything that was not quantized, the configuration, the tokenizer and the report; the index comes last.

        ``tuned``: what stands in place of the solved scales and of the source's norms.
        """
        plan, report, source = self.plan, self.report, self.plan.source
        settings = {
            "static_groups": getattr(plan.method, "static_groups", True),
            "true_sequential": True,
            "version": report.versions["nearplane"],
        }
        if hasattr(plan.method, "damp_percent"):
            settings["damp_percent"] = plan.method.damp_percent
        grids = {site.name: plan.grid_of(site) for site in plan.sites}
        settings |= head_names(source.model, {site: plan.disk_name(site) for site in grids})
        file = None if plan.placed is None else file_name(source.name, plan.placed.label)
        if plan.placed is not None and file is not None:
            settings["gguf"] = described(plan.placed, file)
        rest = rest_of(source, plan.grid, grids, plan.format, plan.dense, settings)
        report.bytes["before"] = source.original.total
        routes = routing(source.model, source.names)
        unreached = {source.names.get(f"{n}.weight") for b in plan.blocks for n in b.unreached}
        strange = {source.names.get(f"{n}.weight") for b in plan.blocks for n in b.strange}
        for name in rest.dense:
            shape = source.store.shape(name)
            size = prod(shape) * source.written(name, plan.dense).itemsize
            report.bytes["dense"] += size
            if len(shape) >= 2:
                reason = "the probe forward did not reach it" if name in unreached else "not a linear of a block"
                reason = "computes otherwise than nn.Linear" if name in strange else reason
                left = plan.ignored.get(name.removesuffix(".weight"))
                reason = "routes tokens to experts" if name in routes else reason
                reason = reason if left is None else f"left out by {left}"
                report.dense.append({"name": name, "bytes": size, "reason": reason})
        report.bytes["after"] = report.bytes["dense"] + report.bytes["quantized"]
        if plan.placed is not None and file is not None:
            rest = self._in_file(rest, plan.placed, file, tuned)
        engines = verdicts(plan.described())
        rest = replace(rest, card=self._card(engines, file))
        weights = None
        if tuned is not None:
            dense, get = tuned.dense, rest.get
            rest = replace(rest, get=lambda name: dense[name] if name in dense else get(name))
            weights = self._tuned(tuned)
        report.memory["peak"] = peak_resident()  # a tuning included
        judged = {engine: verdict.as_dict() for engine, verdict in engines.items()}
        page, reason = page_or_reason({**report.as_dict(), "engines": judged})
        report.events += [reason] if reason else []
        export(self.writer, plan.format, rest, {**report.as_dict(), "engines": judged}, page, weights)

    def _card(self, engines: Mapping[str, Verdict], file: str | None) -> str:
        """Write the model card; note what of its source cannot be read, and a card of the user's that stays.

        ``file``: the file of a format that has one.
        """
        plan, report, source = self.plan, self.report, self.plan.source
        found, broken = described_source(source.name, source.folder, source.raw_config())
        report.events += [broken] if broken else []
        if kept_card(self.writer.out):
            report.events.append(
                f"{self.writer.out / CARD} is not as nearplane wrote it, and stays: no card is written"
            )
        return card(
            Made(
                model=source.name,
                format=plan.format.name,
                grids=commonest(replace(plan.grid_of(site), fit=plan.grid.fit) for site in plan.sites),
                report=report.as_dict(),
                engines=engines,
                nbytes=report.bytes["after"],
                file=file,
                causal=is_causal(source.model),
                **found,
            )
        )

    def _tuned(self, tuned: Tuned) -> Iterator[Weight]:
        """Read the solved weights back, with the scales that were tuned; shards are written beside their parts."""
        self.writer.repack()
        for record in self.writer.records:
            part = self.writer.part(record).open()
            if part is None:
                continue
            for name, layer in part.layers.items():
                yield Weight(name, tuned.apply(name, part.quantized(name)), layer.grid)

    def _in_file(self, rest: Rest, placed: Placed, file: str, tuned: Tuned | None) -> Rest:
        """Let one file hold the quantized weights, and the dense matrices that it holds anyway; note what was written."""
        self.report.events.append(f"{file}: {placed.describe()}")
        opened = [self.writer.part(record).open() for record in self.writer.records]
        weights = {name: part for part in opened if part is not None for name in part.layers}

        def rows(name: str) -> Tensor:
            name = name.removesuffix(".weight")
            solved = weights[name].quantized(name)
            solved = solved if tuned is None else tuned.apply(name, solved)
            packed = self.plan.format.pack(name, solved, weights[name].layers[name].grid)
            return packed[f"{name}.weight"]

        inside = {name for names in placed.stored.values() for name in names}
        self.report.bytes |= {"after": placed.nbytes, "dense": placed.nbytes - self.report.bytes["quantized"]}
        self.report.dense = [placed.listed(row) for row in self.report.dense]
        dense = [name for name in rest.dense if name not in inside]
        written = Written(file, placed.nbytes, partial(write_gguf, placed=placed, rows=rows), placed.listed)
        return replace(rest, dense=dense, file=written)

    def _record(self, block: Block) -> dict[str, Any]:
        """Return what a resumed run must know of a finished block, for JSON."""
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
    """Put the codes of a finished block back into the model, so that the streams can run through it.

    SettingError where the source's weights are not those that the block was made of.
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
    """Return the hashes of a block's parameters that were read."""
    return {name: digest for name, digest in plan.source.sums.items() if name.startswith(block.name + ".")}


def _copied(plan: Plan) -> str:
    return hashlib.sha256(plan.copied.encode()).hexdigest()


def _same_source(plan: Plan, block: Block, done: Done) -> None:
    """Raise SettingError where parameters of a block differ from those that it was made of."""
    changed = [name for name, digest in _read(plan, block).items() if done.sums.get(name) != digest]
    if changed:
        raise SettingError(
            f"weights of {block.name} in {plan.source.name} differ from those the finished block was made of "
            f"({some_of(changed)}); resume with that model, or begin in another folder."
        )


def _next(plan: Plan, writer: Writer) -> str:
    done = len(writer.records)
    return plan.walked[done].name if done < len(plan.walked) else END


def _identity(plan: Plan) -> dict[str, Any]:
    """Return every setting that decides the result, by dotted name."""
    source = {"config": plan.source.raw_config(), "tensors": _tensors(plan)}
    found = _flat({"source": source, **plan.settings, "data": plan.data})
    plain = [grid.scales for grid in (plan.grid, *plan.grids.values()) if isinstance(grid.scales, Stored)]
    found[SIGNS] = any(scales.signed for scales in plain)
    # The dtype of scales follows from format and dtype; the tuning begins when all blocks are done.
    return {key: value for key, value in found.items() if key not in ("grid.scale_dtype", "tune")}


def _run(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a sealed block, of an earlier version's run, too."""
    return {SIGNS: False, **record["run"]}


def _tensors(plan: Plan) -> str:
    """Hash the names, shapes and dtypes of the source's tensors; values are hashed where they are read."""
    store = plan.source.original
    described = [(name, store.shape(name), str(store.dtype(name))) for name in sorted(store.names)]
    return hashlib.sha256(repr(described).encode()).hexdigest()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}".lstrip(".")).items()}
    return {name: str(value) if isinstance(value, torch.dtype) else value}


def _changed(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, with the old and the new value."""
    keys = list(dict.fromkeys([*was, *now]))
    return {key: (was.get(key), now.get(key)) for key in keys if _plain(was.get(key)) != _plain(now.get(key))}


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value
