"""What ``plan`` says: memory, disk and time of a run beside what this machine has, and what to change where it does not fit."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nearplane.checkpoint.engines import (
    ENGINES,
    caveat,
    mixed_caveat,
    model_caveat,
    model_refusal,
    online_refusal,
    refusal,
    rounding_refusal,
)
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.machine.memory import free_disk
from nearplane.methods.base import rows_independent
from nearplane.run.budget import measuring
from nearplane.run.estimate import Estimate, Memory, estimate, gb, shared, suggestions
from nearplane.run.mix import JUDGED
from nearplane.run.pace import pace
from nearplane.run.plan import Plan, make_plan

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
        plan, shapes = self.plan, dict[Grid, set[tuple[int, int]]]()
        for site in plan.sites:
            for grid in plan.possible(site):
                shapes.setdefault(replace(grid, fit=plan.grid.fit), set()).add(site.shape)
        found, model = [], plan.source.model
        grids = {site.name: plan.grid_of(site) for site in plan.sites}
        for engine in ENGINES:
            each = [(engine, plan.format.name, grid, sorted(some)) for grid, some in shapes.items()]
            reasons = [refusal(*what) or rounding_refusal(engine, what[2], plan.activations) for what in each]
            online = online_refusal(engine, getattr(plan.format, "online", False))
            no = online or next((reason for reason in reasons if reason), None)
            no = no or model_refusal(engine, model, grids, plan.format.name)
            conditions = [caveat(*what) for what in each] + [mixed_caveat(*each[0][:2]) if len(each) > 1 else None]
            conditions += [model_caveat(engine, model, grids)] if plan.format.name == "compressed-tensors" else []
            but = "; ".join(dict.fromkeys(condition for condition in conditions if condition))
            found.append((engine, no, None if no else but or None))
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
        bits = plan.grid.bits if plan.mix.budget is None else f"on average {plan.mix.budget:g}"
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


def forecast(model: str | Path, *, offload: str | Path | None = None, ranks: int = 1, **choices: Any) -> Forecast:
    """What ``quantize`` with these arguments will need; no weight is read, and a folder with a config.json will do.

    ``choices``: what ``make_plan`` takes. ``ranks``: processes of this machine that share the run; memory is each one's.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise SettingError(f"ranks must be from 1 to {MOST_RANKS}; got {ranks}.")
    start = time.perf_counter()
    plan = make_plan(model, **choices, sketch=True)
    scratch = None if offload is None else Path(offload)
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
