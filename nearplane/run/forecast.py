"""What ``plan`` says: memory, disk and time of a run beside what this machine has, and what to change where it does not fit."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearplane.checkpoint.engines import verdicts
from nearplane.core.errors import SettingError
from nearplane.machine.memory import free_disk
from nearplane.methods.base import rows_independent
from nearplane.run.budget import measuring
from nearplane.run.estimate import Estimate, Memory, estimate, gb, shared, suggestions
from nearplane.run.job import Job
from nearplane.run.mix import JUDGED
from nearplane.run.pace import pace
from nearplane.run.plan import Plan, draft

MOST_RANKS = 4096


@dataclass(frozen=True)
class Forecast:
    """An estimate of a run, and the time it will take."""

    plan: Plan
    estimate: Estimate
    seconds: dict[str, float]
    ranks: int = 1

    def engines(self) -> list[tuple[str, str | None, str | None]]:
        """Each engine, why it does not load such a checkpoint, and on what condition it does."""
        found = []
        for engine, judged in verdicts(self.plan.described()).items():
            no, but = ("; ".join(part) or None for part in (judged.refusals, judged.caveats))
            found.append((engine, no, None if no else but))
        return found

    def lacking(self) -> list[str]:
        """Why the run does not fit here; empty if it does."""
        return self.estimate.lacking(Path.cwd())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plan, found = self.plan, self.estimate
        return {
            "model": plan.source.name,
            **{key: value for key, value in plan.settings.items() if key != "calibration"},
            **found.as_dict(),
            "free_disk": free_disk(Path.cwd()),
            "seconds": self.seconds | {"total": sum(self.seconds.values())},
            "lacking": self.lacking(),
            "suggestions": suggestions(plan, found, Path.cwd(), self.ranks),
            "engines": {engine: {"refusal": no, "caveat": but} for engine, no, but in self.engines()},
        }

    def __str__(self) -> str:
        plan, found = self.plan, self.estimate
        windows, seqlen = found.windows
        data = f", {windows} x {seqlen} tokens" if windows else ", no data"
        sites = sum(len(block.sites) for block in plan.blocks)
        bits = plan.grid.bits if plan.job.budget is None else f"on average {plan.job.budget:g}"
        grid = f"{bits} bits, group {plan.grid.group_size}"
        lines = [
            f"{plan.source.name}: {sites} linears in {len(plan.blocks)} blocks; {type(plan.method).__name__}, {grid}{data}",
            f"largest stage {found.largest}, {found.largest_shape[0]} x {found.largest_shape[1]}",
        ]
        if found.ranks > 1:
            lines.append(f"{found.ranks} ranks share the samples; of each, if every one has cores or a GPU of its own:")
        for memory in found.memory:
            lines += _table(memory, found.available(memory))
        kept = "" if found.kept or not windows else "; too many tokens to let forwards wait, each stage is reached anew"
        if windows:
            lines.append(f"{('one stream', 'two streams')[found.streams - 1]} of hidden states{kept}")
        free = free_disk(Path.cwd())
        wanted = ", ".join(f"{name} {gb(size)}" for name, size in found.disk.items() if size >= 1e5)
        have = "" if free is None else f"; {gb(free)} are free here"
        lines.append(f"disk    {gb(sum(found.disk.values()))}{': ' if wanted else ''}{wanted}{have}")
        if found.offload is not None:
            lines.append(f"        {gb(found.offloaded)} of hidden states in {found.offload} meanwhile")
        spent = ", ".join(f"{name} {clock(value)}" for name, value in self.seconds.items() if value >= 0.05)
        lines.append(f"time    {clock(sum(self.seconds.values()))} at the rates measured now: {spent}")
        for engine, no, but in self.engines():
            verdict = f"does not load it: {no}" if no else f"loads it: {but}" if but else "loads it"
            lines.append(f"{engine:<12} {verdict}")
        lacks = self.lacking()
        lines += [f"does not fit: {lack}" for lack in lacks] or ["fits"]
        lines += [f"try: {tip}" for tip in suggestions(plan, found, Path.cwd(), self.ranks)]
        lines += [f"note: {note}" for note in plan.warnings()]
        return "\n".join(lines)

    __repr__ = __str__


def forecast(model: str | Path, job: Job | None = None, *, ranks: int = 1, **settings: Any) -> Forecast:
    """Say what ``quantize`` with these settings will need; no weight is read, and a folder with a config.json will do.

    Args:
        settings: as ``Job.of`` takes them.
        ranks: processes of this machine that share the run; memory is each one's.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise SettingError(f"ranks must be from 1 to {MOST_RANKS}; got {ranks}.")
    start = time.perf_counter()
    plan = draft(model, Job.of(job, settings))
    scratch = plan.job.offload
    found = shared(plan, scratch, ranks, ranks)
    spent = pace(plan, found, time.perf_counter() - start)
    if rows_independent(plan.method):
        spent |= {phase: spent[phase] / ranks for phase in ("solve", "measure")}
    if plan.undecided:
        walk = measuring(plan)
        first = pace(walk, estimate(walk, scratch), 0.0)
        widths = max((len(unit.widths) for unit in plan.units), default=0)
        spent["budget"] = sum(first[phase] for phase in ("forward", "observe", "prepare")) + first["solve"] * widths
        if walk.method.needs:  # each width of each unit of a block is judged by forwards
            spent["budget"] += first["forward"] * widths * len(plan.units) / (len(plan.blocks) * JUDGED)
    return Forecast(plan, found, spent, ranks)


def _table(memory: Memory, available: int | None) -> list[str]:
    have = "" if available is None else f"; {gb(memory.need)} beyond what it holds now, {gb(available)} are available"
    lines = [f"memory  {gb(memory.peak)} on {memory.device} at {memory.where}{have}"]
    lines += [f"    {name:<9} {gb(size):>9}" for name, size in memory.parts.items() if size >= 1e5]
    return lines


def clock(seconds: float) -> str:
    """A duration in words."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return (
                f"{seconds / unit:.0f} {name}" if unit == 60 or seconds >= 20 * unit else f"{seconds / unit:.1f} {name}"
            )
    return f"{seconds:.1f} s"
