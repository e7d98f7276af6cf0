"""What ``plan`` says: memory, disk and time of a run beside what this machine has, and what to change where it does not fit.

Time is counted work at rates that are measured in a few seconds. Per token of each stream, a block's forward takes 2 FLOPs
a weight and 2 seqlen x hidden for causal attention; H takes n² (half of it is mirrored), D 2 n², R 4 m n. The report takes
6 m n² for each stage, and 2 m n² for the drift. ``prepare`` and ``solve`` are probed (``run/probe.py``). The rest goes by the
number: reading and widening a weight, activations, packing, writing. A run opens the model as the plan did, which is timed.
Files are not read ahead: a checkpoint on a slow disk takes longer to read than is said here.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nearplane.checkpoint.engines import Verdict, verdicts
from nearplane.core.attention import fast_forwards
from nearplane.core.dense import coarse
from nearplane.core.errors import SettingError
from nearplane.core.moments import all_finite
from nearplane.data.own import own_memory, wanted
from nearplane.data.shares import WORDS
from nearplane.data.text import tokenize
from nearplane.machine.memory import free_disk, gb
from nearplane.machine.ranks import Ranks
from nearplane.methods.base import Need, rows_independent
from nearplane.models.inputs import vocabulary
from nearplane.run.budget import measuring
from nearplane.run.check import STREAMS, checked_tokens, predicts
from nearplane.run.estimate import (
    Estimate,
    Memory,
    ample,
    estimate,
    probe_of,
    shared,
    short,
    size_of,
    solver_dtype,
    suggestions,
)
from nearplane.run.job import Job
from nearplane.run.measure import Knowledge, measure, measured_rows
from nearplane.run.mix import JUDGED
from nearplane.run.observe import Measuring
from nearplane.run.plan import Plan, draft
from nearplane.run.probe import Ample, Products, Size, made_up, median_seconds
from nearplane.run.scale import searching
from nearplane.run.stream import BATCH_TOKENS, batch_rows
from nearplane.run.student import written_fresh
from nearplane.run.tune import forwards, refuse_ranks

MOST_RANKS = 4096
PHASES = ("start", "forward", "observe", "prepare", "solve", "measure", "write")
# This machine is measured by a problem (out, in) and its tokens, one of few inputs for the report, whose products count
# apart, a file of so many bytes, so many characters of the text.
PROBLEM, TOKENS, MEASURED = (512, 1024), 1024, (512, 256)
# What small operations cost, in units of reading and writing a number: between the linears of a stage each of its inputs,
# its outputs and twice the stream, and in a check each logit. Measured on SmolLM2.
PASSES, LOGIT_PASSES = 44, 250
# Inputs of an attention head, of which the time of attention depends little.
HEAD = 64
DISK_BYTES = 32 << 20
SAMPLE = 100_000
# Products of a few dozen tokens take so many times as long a FLOP as those of many.
THIN = 3


@dataclass(frozen=True)
class Forecast:
    """An estimate of a run, and the time it will take."""

    plan: Plan
    estimate: Estimate
    seconds: dict[str, float]
    ranks: int = 1

    def engines(self) -> dict[str, Verdict]:
        """Give what each engine makes of such a checkpoint."""
        return verdicts(self.plan.described())

    @property
    def plenty(self) -> bool:
        """Whether even a generous guess of the memory fits, so that freed blocks stay in the process."""
        return not short(shared(self.plan, self.estimate.offload, self.ranks, self.ranks, ample(self.plan)))

    def lacking(self) -> list[str]:
        """Return why the run does not fit here; nothing if it does."""
        return self.estimate.lacking(Path.cwd())

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast for JSON."""
        plan, found = self.plan, self.estimate
        return {
            "model": plan.source.name,
            **{key: value for key, value in plan.settings.items() if key != "calibration"},
            **found.as_dict(),
            "sources": self.sources,
            "plenty": self.plenty,
            "free_disk": free_disk(Path.cwd()),
            "seconds": self.seconds | {"total": sum(self.seconds.values())},
            "lacking": self.lacking(),
            "suggestions": suggestions(plan, found, Path.cwd(), self.ranks),
            "engines": {engine: judged.as_dict() for engine, judged in self.engines().items()},
        }

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources of the calibration data, with weight, windows and seed; none where the method reads no data."""
        shares = self.plan.calibration.shares if self.plan.job.reads_data else ()
        return [{"source": s.name, "weight": s.weight, "windows": count, "seed": seed} for s, count, seed in shares]

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
        if len(self.sources) > 1:
            mix = (f"{row['windows']} of {row['source']} (weight {row['weight']:g})" for row in self.sources)
            lines.append(f"samples {', '.join(mix)}")
        if found.ranks > 1:
            lines.append(f"{found.ranks} ranks share the samples; of each, if every one has cores or a GPU of its own:")
        for memory in found.memory:
            lines += _table(memory, found.available(memory))
        lines += [
            "        plenty is free: with glibc, freed blocks below 32 MiB stay, and up to a third more is held"
        ] * self.plenty
        kept = "" if found.kept or not windows else "; too many tokens to let forwards wait, each stage is reached anew"
        if windows:
            lines.append(f"{('one stream', 'two streams')[found.streams == 2]} of hidden states{kept}")
        free = free_disk(Path.cwd())
        wanted = ", ".join(f"{name} {gb(size)}" for name, size in found.disk.items() if size >= 1e5)
        have = "" if free is None else f"; {gb(free)} are free here"
        lines.append(f"disk    {gb(sum(found.disk.values()))}{': ' if wanted else ''}{wanted}{have}")
        if found.offload is not None:
            lines.append(f"        {gb(found.offloaded)} of hidden states in {found.offload} meanwhile")
        spent = ", ".join(f"{name} {clock(value)}" for name, value in self.seconds.items() if value >= 0.05)
        lines.append(f"time    {clock(sum(self.seconds.values()))} at the rates measured now: {spent}")
        lines += [f"{engine:<12} {judged}" for engine, judged in self.engines().items() if not judged.foreign]
        foreign = [engine for engine, judged in self.engines().items() if judged.foreign]
        if foreign:
            does = "does" if len(foreign) == 1 else "do"
            lines.append(f"{', '.join(foreign)} {does} not know the format {plan.format.name}")
        lines += [f"note: {note}" for note in plan.warnings()]
        return "\n".join([*lines, self.verdict()])

    __repr__ = __str__

    def verdict(self) -> str:
        """Return whether the run fits, and what to do if it does not, in a sentence or two."""
        lacks = self.lacking()
        if lacks:
            tips = suggestions(self.plan, self.estimate, Path.cwd(), self.ranks)
            return f"This run does not fit: it {'; it '.join(lacks)}. Try: {'; '.join(tips or ['--force'])}."
        needs = []
        for memory in self.estimate.memory:
            have, where = self.estimate.available(memory), "" if memory.device == "cpu" else f" on {memory.device}"
            needs.append(f"{gb(memory.need)}{'' if have is None else f' of {gb(have)}'} memory{where}")
        free, wanted = free_disk(Path.cwd()), sum(self.estimate.disk.values())
        needs.append(f"{gb(wanted)}{'' if free is None else f' of {gb(free)}'} disk")
        spent = clock(sum(self.seconds.values()))
        return f"This run fits: it needs {', '.join(needs[:-1])} and {needs[-1]}, and takes about {spent}."


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
    refuse_ranks(plan.job.tune, ranks)
    opening = time.perf_counter() - start
    scratch = plan.job.offload
    plan = without_check(plan, scratch, ranks, ranks)
    found = shared(plan, scratch, ranks, ranks)
    measured = rates(plan, found)
    spent = seconds(plan, found, measured)
    spent["start"] += opening + (reading(plan) if plan.job.reads_data else 0.0)
    if (plan.job.reads_data or plan.job.tune) and wanted(plan.calibration) is not None:
        spent["samples"] = writing(plan, measured)
    if rows_independent(plan.method):
        spent |= {phase: spent[phase] / ranks for phase in ("solve", "measure")}
    if plan.job.scales_channels:
        spent["scale"] = scaling(plan, scratch)
    if plan.undecided:
        walk = measuring(plan)
        judged = estimate(walk, scratch)
        first = seconds(walk, judged, rates(walk, judged))
        widths = max((len(unit.widths) for unit in plan.units), default=0)
        spent["budget"] = sum(first[phase] for phase in ("forward", "observe", "prepare")) + first["solve"] * widths
        if walk.method.needs:  # each width of each unit of a block is judged by forwards
            spent["budget"] += first["forward"] * widths * len(plan.units) / (len(plan.blocks) * JUDGED)
    return Forecast(plan, found, spent, ranks)


def scaling(plan: Plan, offload: Path | None) -> float:
    """Return the seconds of the walk that searches for scales, and of its proof, which reads the model twice."""
    walk = searching(plan)
    found = estimate(walk, offload)
    measured = rates(walk, found)
    spent = seconds(walk, found, measured)
    stored = sum(plan.source.store.nbytes(name) for name in plan.source.store.names) / plan.source.dtype.itemsize
    return sum(spent[phase] for phase in ("forward", "observe", "prepare", "solve")) + 2 * measured.load * stored


def without_check(plan: Plan, offload: Path | None, world: int = 1, machine: int = 1) -> Plan:
    """Return the plan without its check where memory does not suffice for that, else as it is."""
    if not plan.job.check or not short(shared(plan, offload, world, machine, ample(plan))):
        return plan
    found = shared(plan, offload, world, machine)
    if not short(found):
        return plan
    need = max(memory.need for memory in found.memory)
    why = (
        f"the run is not checked on held-out windows: memory does not suffice for a run that needs {gb(need)} with that"
    )
    return replace(plan.changed(check=False), unchecked=why)


def refuse(plan: Plan, out: Path, offload: Path | None = None, ranks: Ranks | None = None) -> dict[str, Any]:
    """Raise SettingError, with the numbers, where a run does not fit into memory or onto the disk of ``out``.

    Several ``ranks`` hold some of the samples each, and those of one machine share its memory. The method is probed only if
    a generous guess (``Ample``) does not fit.

    Returns:
        For the report: bytes of the CPU's memory that were counted on (planned) and that there were (available), and
        whether the method was probed for them (close).
    """
    world, machine = (1, 1) if ranks is None else (ranks.world, ranks.machine)
    found = shared(plan, offload, world, machine, ample(plan))
    if found.lacking(out):
        found = shared(plan, offload, world, machine)
        lacks = found.lacking(out)
        if lacks:
            advice = "; ".join(suggestions(plan, found, out, world))
            raise SettingError(f"{'; '.join(lacks)}; {advice + '; ' if advice else ''}--force runs anyway.")
    memory = found.memory[0]
    have = found.available(memory)
    close = not isinstance(found.probe, Ample)
    return {"planned": memory.peak, "close": close, "available": None if have is None else have + memory.base}


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work."""

    flop: float  # of a matrix product in the compute dtype, in ``full_width``
    solver: Products  # of one in the solver's dtype: as torch does it, in ``full_width``, coarse
    attention: float  # a position that a token looks at, a number of the hidden size
    element: float  # a number of a batch's hidden state, once read and written
    load: float  # a stored number, checked and widened
    gram: float  # of H, a token and an entry of H: by its symmetry a FLOP and more
    measure: float  # a weight, for the report
    pack: float  # a weight
    disk: float  # a byte
    call: float  # an operation of the method
    number: float  # a number that an operation of the method reads or writes


def seconds(plan: Plan, found: Estimate, rates: Rates) -> dict[str, float]:
    """Return the seconds of each phase at these rates."""
    needs, probe = plan.needs, found.probe or probe_of(plan)
    windows, seqlen = found.windows
    hidden, tokens = plan.hidden, float(windows * seqlen)
    phases = dict.fromkeys(PHASES, 0.0)
    stored = sum(plan.source.store.nbytes(name) for name in plan.source.store.names) / plan.source.dtype.itemsize
    inside = float(sum(s.shape[0] * s.shape[1] for b in plan.blocks for s in b.sites))
    phases["start"] = rates.load * (2 * (stored - inside) + inside / len(plan.blocks))
    phases["forward"] = rates.load * inside
    for number, block in enumerate(plan.walked):
        sizes = [size_of(stage, needs) for stage in block.stages]
        for flop in (rates.flop, linears(plan, rates))[: found.streams]:
            reached, costs = 0.0, []  # seconds of a token's forward up to each stage
            for place, (m, n, _) in enumerate(sizes):
                if place == 1:
                    reached += rates.attention * seqlen * hidden
                costs.append(reached)
                reached += flop * 2 * m * n + rates.element * between(m, n, hidden)
            behind = 0.0 if number == len(plan.walked) - 1 else reached
            phases["forward"] += tokens * (max([behind, *costs]) if found.kept else behind + sum(costs))
        for stage, size in zip(block.stages, sizes, strict=True):
            for phase, work in zip(("prepare", "solve"), probe.work(size), strict=True):
                phases[phase] += work.seconds(rates.call, rates.number, rates.solver)
            phases["observe"] += tokens * observing(rates, needs, size, plan.compute == solver_dtype(plan))
            judged = sum(len(range(site.shape[0])[measured_rows(site.shape[0])]) for site in stage) if needs else 0
            phases["measure"] += rates.measure * size.m * size.n
            phases["measure"] += judging(rates.solver, "D" in needs and not size.adds) * judged * size.n**2
            phases["write"] += rates.pack * size.m * size.n
    phases["write"] += rates.disk * sum(found.disk.values())
    if plan.job.check:
        phases["check"] = checked_tokens(plan) * checking(plan, rates) + rates.measure * inside
    return phases | ({"tune": rates.flop * forwards(plan) * 2 * stored} if plan.job.tune else {})


def between(m: int, n: int, hidden: int) -> float:
    """Return the numbers that pass between the linears of a stage, per token: norms, rotation, activation, sums."""
    return PASSES * (m + n + 2 * hidden)


def checking(plan: Plan, rates: Rates) -> float:
    """Return the seconds of the check, per token of its windows: its streams through all blocks, and two heads' logits."""
    sizes = [size_of(stage, plan.method.needs) for block in plan.walked for stage in block.stages]
    logits = (vocabulary(plan.source.model.config) or 0) if predicts(plan.source.model) else 0
    through = sum(rates.flop * 2 * m * n + rates.element * between(m, n, plan.hidden) for m, n, _ in sizes)
    return STREAMS * through + (rates.flop * 2 * 2 * plan.hidden + rates.element * LOGIT_PASSES) * logits


def writing(plan: Plan, rates: Rates) -> float:
    """Return the seconds in which the model writes its own samples, a token of each window at a time."""
    asked, fresh = wanted(plan.calibration), written_fresh(plan)
    if asked is None:
        return 0.0
    weights, _ = own_memory(plan.source, plan.calibration, 1)
    drafts = [asked[0]] * plan.job.reads_data + [fresh] * bool(fresh)  # the model is loaded for each
    tokens = sum(drafts) * (plan.windows[1] or plan.calibration.seqlen)
    return rates.load * weights * len(drafts) + THIN * rates.flop * 2 * weights * tokens


def judging(flop: Products, drifts: bool) -> float:
    """Return the seconds of the report's products, for each measured row and n²: three, and a coarse one of the drift."""
    return 2 * (3 * flop.wide + drifts * flop.coarse)


def observing(rates: Rates, needs: frozenset[Need], size: Size, same: bool) -> float:
    """Return the seconds of the moments, per token; R takes a product more where forwards are not in the solver's dtype."""
    m, n, adds = size
    drift = (rates.solver.coarse if "coarse" in needs else rates.solver.wide) * 2 * n**2 if "D" in needs else 0.0
    return rates.gram * n**2 + (rates.solver.wide * (2 if same else 4) * m * n if adds else drift)


def linears(plan: Plan, rates: Rates) -> float:
    """Return the seconds of a FLOP of the reference stream's linears."""
    rough = "coarse" in plan.needs and plan.device.type == "cpu" and plan.compute == torch.float32
    return rates.solver.coarse if rough else rates.flop


def rates(plan: Plan, found: Estimate) -> Rates:
    """Measure this machine, and the method on the stages that the estimate has probed, in a few seconds."""
    device, dtype, method, grid = plan.device, solver_dtype(plan), plan.method, plan.grid
    probe, needs = found.probe or probe_of(plan), plan.method.needs - {"R"}
    timed = partial(median_seconds, device)
    m, n, _ = problem = Size(*PROBLEM)
    for size in {size_of(stage, method.needs) for stage in plan.blocks[0].stages}:
        probe.work(size)
    weight, _ = made_up(needs, problem, dtype, device)
    x, y = (torch.ones(TOKENS, n, device=device, dtype=kind) for kind in (plan.compute, dtype))
    observed = Measuring(needs - {"D"}, n, None, y, 8)
    judged, few = made_up(needs, Size(*MEASURED), dtype, device)
    solved = method.solve(judged, method.prepare(few) if needs else None, grid)
    plain = timed(lambda: y @ weight.T)
    with fast_forwards(device):  # as a walk runs its forwards, its moments and its report
        flop, wide = timed(lambda: x @ weight.T.to(plan.compute)), timed(lambda: y @ weight.T)
        gram = timed(lambda: observed.add(torch.Size([8, TOKENS // 8]), 0, y, None, None))
        taken = timed(lambda: measure("", judged, solved, grid, Knowledge(few)))
        attention = attending(plan, timed)
    rough = timed(partial(torch.matmul, coarse(y), coarse(weight).T))
    solver = Products(*(seconds / (2 * TOKENS * m * n) for seconds in (plain, wide, rough)))
    taken -= judging(solver, "D" in needs) * MEASURED[0] * MEASURED[1] ** 2 if needs else 0.0
    stored = torch.zeros(1 << 22, dtype=plan.source.dtype)
    batch = torch.ones(BATCH_TOKENS, plan.hidden, device=device, dtype=plan.compute)
    call, number = probe.rates(timed, solver, device)
    return Rates(
        flop=flop / (2 * TOKENS * m * n),
        solver=solver,
        attention=attention,
        element=timed(lambda: torch.mul(batch, batch, out=batch)) / batch.numel(),
        load=timed(lambda: all_finite(stored) and stored.to(device, plan.compute)) / stored.numel(),
        gram=gram / (TOKENS * n**2),
        measure=max(0.0, taken) / judged.numel(),
        pack=timed(lambda: plan.format.pack("x", solved, grid)) / judged.numel(),
        disk=_disk(),
        call=call,
        number=number,
    )


def attending(plan: Plan, timed: Callable[[Callable[[], Any]], float]) -> float:
    """Return the seconds of causal attention over a window, by token, position and number of the hidden size."""
    heads, positions = max(1, plan.hidden // HEAD), max(1, min(plan.windows[1], BATCH_TOKENS))
    q = torch.ones(batch_rows(positions), heads, positions, HEAD, device=plan.device, dtype=plan.compute)
    spent = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    return spent / (q.numel() * positions)


def reading(plan: Plan) -> float:
    """Return the seconds to load the tokenizer and tokenize the calibration text, from its first SAMPLE characters.

    0 where there is no tokenizer yet, or the text would have to be downloaded.
    """
    start, shares = time.perf_counter(), [share for share, _, _ in plan.calibration.shares]
    there = all(not isinstance(name, str) or name in WORDS or Path(name).expanduser().is_file() for name, _ in shares)
    if not there or not (plan.source.folder / "tokenizer_config.json").exists():
        return 0.0
    tokenizer = plan.source.tokenizer
    texts = plan.calibration.texts(tokenizer)
    loaded = spent = time.perf_counter()
    for text in texts:
        if not text.ids:
            began = time.perf_counter()
            tokenize(tokenizer, text._replace(content=text.content[:SAMPLE]))
            spent += max(1.0, len(text.content) / SAMPLE) * (time.perf_counter() - began)
    return loaded - start + spent - loaded


def _disk() -> float:
    """Return the seconds per byte of a file that is written and forced to disk, in the working folder if possible."""
    folder = Path.cwd() if os.access(Path.cwd(), os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(bytes(DISK_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - start) / DISK_BYTES


def _table(memory: Memory, available: int | None) -> list[str]:
    have = "" if available is None else f"; {gb(memory.need)} beyond what it holds now, {gb(available)} are available"
    lines = [f"memory  {gb(memory.peak)} on {memory.device} at {memory.where}{have}"]
    lines += [f"    {name:<9} {gb(size):>9}" for name, size in memory.parts.items() if size >= 1e5]
    return lines


def clock(seconds: float) -> str:
    """Return a duration in words."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return (
                f"{seconds / unit:.0f} {name}" if unit == 60 or seconds >= 20 * unit else f"{seconds / unit:.1f} {name}"
            )
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
