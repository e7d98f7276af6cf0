"""What a run needs in memory and on disk, before anything is computed: from sizes, and from a probe of the method.

The peak of memory is the largest sum of these parts over the steps of all stages, on each device:

    outside  modules outside the blocks, without an output head of its own
    block    parameters of the open block in the compute dtype, its linears twice with a reference stream
    streams  tokens x hidden size for each of one or two streams; of one batch where they are offloaded
    paused   forwards that wait at a stage of n inputs: tokens x (n + 2 hidden) per stream, behind the first block the
             model's own embeddings, too, and the outputs of the block's first stage (q, k, v) until its second; of one
             batch only where nothing is kept (``stream.kept``)
    moments  H n², D n² or R m n, the same again of held-out tokens
    factor   the state that ``prepare`` leaves (``run/probe.py``)
    solver   the stage's weight as one matrix m n, and the arrays of ``prepare``, ``solve`` and the report
    pending  packed weights of the open block; at the end dense tensors, at most a shard of 4 GiB

A tuning holds the whole model at once (``student.needed``). A check adds three streams of a few windows to ``streams``, and
at the end holds the whole of what is outside the blocks, and logits (``check.needed``).

``docs/large_models.md`` has the formulas and a table.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from nearplane.checkpoint.export import copied_bytes
from nearplane.checkpoint.gguf import dense_bytes
from nearplane.data.own import own_memory
from nearplane.data.shares import shares_of
from nearplane.formats.companions import companions
from nearplane.formats.gguf.format import GGUF
from nearplane.formats.journal import STATE
from nearplane.formats.parts import SHARD_BYTES
from nearplane.machine.memory import available_memory, cuda_memory, free_disk, gb, resident
from nearplane.methods import METHODS
from nearplane.methods.base import Need
from nearplane.models.discover import Block, Stage, embedding_name, head_name, point_of
from nearplane.models.inputs import PROBE_TOKENS
from nearplane.run import check
from nearplane.run.measure import MEASURED_AT_ONCE
from nearplane.run.mix import JUDGED
from nearplane.run.plan import Plan
from nearplane.run.probe import Ample, Probe, Size
from nearplane.run.scale import searching
from nearplane.run.stream import batch_rows, kept
from nearplane.run.student import moving, needed, written_fresh

# Tokenizer and text, buffers of kernels, and memory that the allocator keeps, measured on the demo model
# (benchmarks/plan.py).
LATER = 80 << 20
# The same of a method with two streams, beyond that: its products have more shapes, and oneDNN keeps a kernel of some 0.1 MB
# for each.
LATER_SECOND = 64 << 20
# The method that is suggested where two streams do not fit.
ONE_STREAM = "gptq"
# The step in which a model writes samples itself.
OWN = "writing its own samples (dataset self), for which the whole model is loaded"
# Bytes of a CUDA context.
CUDA_CONTEXT = 500 << 20
# Numbers that the report holds for each number of a weight that it measures: with moments, and without. The error of the
# codes, then scale, zero, code, difference and product of rounding to nearest.
MEASURING, MEASURING_ROUNDED = 6.0, 5.25


def size_of(stage: Stage, needs: frozenset[Need]) -> Size:
    """Return the size of a stage, and whether R stands in for D: in a lone linear that adds to the residual stream."""
    return Size(sum(site.shape[0] for site in stage), stage[0].shape[1], point_of(stage, needs) is not None)


def solver_dtype(plan: Plan) -> torch.dtype:
    """Return the dtype that stages are solved in."""
    return torch.float64 if plan.compute == torch.float64 else torch.float32


def probe_of(plan: Plan) -> Probe:
    """Return the probe of a plan's method."""
    return Probe(plan.method, plan.grid, solver_dtype(plan))


@dataclass(frozen=True)
class Memory:
    """The peak of memory on one device."""

    device: str
    where: str  # the stage or step that reaches it
    parts: dict[str, int]  # bytes at that moment
    base: int  # of them, bytes that the process holds before the run

    @property
    def peak(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.parts.values())

    @property
    def need(self) -> int:
        """Return the bytes that must be available yet."""
        return self.peak - self.base


@dataclass(frozen=True)
class Estimate:
    """The memory and disk of a run."""

    memory: list[Memory]  # the CPU first, then the GPU where there is one
    disk: dict[str, int]  # bytes to be written
    largest: str  # the stage with most weights
    largest_shape: tuple[int, int]  # (out, in) of its rows together
    streams: int
    kept: bool  # paused forwards are kept: one forward per block
    windows: tuple[int, int]
    offloaded: int = 0  # bytes of hidden states on disk
    offload: Path | None = None  # where hidden states are meanwhile
    ranks: int = field(default=1, repr=False)  # of this run on this machine
    probe: Probe | None = field(default=None, repr=False, compare=False)  # of the run's method

    def lacking(self, out: Path) -> list[str]:
        """Return what does not fit, a clause each; nothing if all fits, or the machine's memory and disk are unknown."""
        lacks = []
        for memory in self.memory:
            have = self.available(memory)
            if have is not None and memory.need > have:
                where = "" if memory.device == "cpu" else f" on {memory.device}"
                lacks.append(f"needs {gb(memory.need)}{where} at {memory.where}, {gb(have)} are available")
        free, wanted = free_disk(out), sum(self.disk.values()) - written(out)
        if free is not None and wanted > free:
            lacks.append(f"needs {gb(wanted)} of disk, {gb(free)} are free")
        free = None if self.offload is None else free_disk(self.offload)
        if free is not None and self.offloaded > free:
            lacks.append(f"needs {gb(self.offloaded)} for hidden states in {self.offload}, {gb(free)} are free")
        return lacks

    def available(self, memory: Memory) -> int | None:
        """Return the bytes that the device has left for each rank; None where the system does not say."""
        if memory.device != "cpu":
            return cuda_memory(memory.device)
        have = available_memory()
        return None if have is None else have // self.ranks

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON."""
        memory = [asdict(m) | {"peak": m.peak, "need": m.need, "available": self.available(m)} for m in self.memory]
        hidden = ("ranks", "offload", "probe", "memory")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden} | {"memory": memory}


def estimate(plan: Plan, offload: Path | None = None, probe: Probe | None = None) -> Estimate:
    """Estimate memory and disk of a run.

    Args:
        offload: the folder of its hidden states, if they are not in memory.
        probe: of the plan's method, if there is one already.
    """
    walk = _Walk(plan, offload is not None, probe)
    where, parts = max(walk.moments(), key=lambda moment: sum(moment[1].values()))
    base, memory = resident(), []
    start_with = base + LATER + (walk.streams == 2) * LATER_SECOND
    if plan.device.type == "cpu":
        memory.append(Memory("cpu", where, {"base": start_with} | parts, base))
    else:
        start, held = max(walk.beside(), key=lambda moment: sum(moment[1].values()))
        memory.append(Memory("cpu", start, {"base": start_with} | held, base))
        parts.pop("pending")
        memory.append(Memory(str(plan.device), where, {"base": CUDA_CONTEXT} | parts, 0))
    stage = max((s for b in plan.blocks for s in b.stages), key=lambda s: prod(size_of(s, walk.needs)[:2]))
    largest = size_of(stage, walk.needs)
    return Estimate(
        memory=memory,
        disk=walk.disk(),
        largest=_names(stage),
        largest_shape=(largest.m, largest.n),
        streams=walk.streams,
        kept=walk.kept,
        windows=plan.windows,
        offloaded=0 if offload is None else walk.size * walk.tokens * (walk.hidden + walk.handed) * walk.streams,
        offload=offload,
        probe=walk.probe,
    )


class _Walk:
    """The moments of a run, and the bytes of each part at each."""

    def __init__(self, plan: Plan, offload: bool = False, probe: Probe | None = None) -> None:
        self.plan, source, store, self.offload = plan, plan.source, plan.source.store, offload
        self.probe = probe or probe_of(plan)
        self.needs = plan.needs
        self.size = plan.compute.itemsize
        self.streams = 0 if not self.needs else 2 if self.needs & {"D", "R"} else 1
        windows, seqlen = plan.windows if self.needs else (0, 0)
        self.tokens = windows * seqlen
        self.batch = min(windows, batch_rows(seqlen)) * seqlen if windows else 0
        self.kept = kept(plan.blocks, self.tokens, plan.compute, self.streams)
        self.waiting = self.batch if offload else self.tokens  # of each stream, in memory
        # Tokens of the block outputs that a budget's widths are judged by.
        judging = plan.undecided and self.batch > 0
        self.judged = min(self.tokens, -(-self.tokens // (JUDGED * self.batch)) * self.batch) if judging else 0
        self.hidden, self.handed = plan.hidden, plan.handed
        self.checked = check.needed(plan) if plan.job.check else {"streams": 0, "logits": 0}
        numbers = {name: prod(store.shape(disk)) for name, disk in source.names.items()}
        names = [block.name + "." for block in plan.blocks]
        head = head_name(source)
        inside = {name: prefix for name in numbers for prefix in [_prefix(name, names)] if prefix}
        self.blocks = dict.fromkeys(names, 0)
        for name, prefix in inside.items():
            self.blocks[prefix] += numbers[name]
        self.whole = sum(count for name, count in numbers.items() if name not in inside)
        apart = [name for name in numbers if name not in inside and not (head and name.startswith(head + "."))]
        self.largest_linear = max((store.reading(source.names[s.name + ".weight"]) for s in plan.sites), default=0)
        table = embedding_name(source)
        rows, width = store.shape(source.names[table]) if table is not None and table in apart else (0, 0)
        beside = sum(numbers[name] for name in apart if name != table)
        self.probed = beside + min(rows, PROBE_TOKENS) * width
        # On a CPU, of the input embedding the rows of the tokens that run are there.
        tokens = self.tokens + (check.checked_tokens(plan) if plan.job.check else 0)
        rows = min(rows, tokens) if plan.device.type == "cpu" else rows
        self.outside = beside + rows * width if self.needs or plan.job.check else self.probed
        sites = {source.names[s.name + ".weight"]: s for b in plan.blocks for s in b.sites}
        self.quantized = plan.nbytes(list(sites.values()))
        rest = [name for name in store.names if name not in sites]
        self.dense, self.header = _dense(plan, rest, head)
        self.largest_dense = max((store.reading(name) for name in rest), default=0)
        self.files = sum((source.folder / name).stat().st_size for name in companions(source.folder).copied)

    def disk(self) -> dict[str, int]:
        """Return the bytes that are written; solved weights lie there twice while the export packs them."""
        plan = self.plan
        found = {"quantized": self.quantized, "dense": self.dense, "other files": self.files + self.header}
        parts = copied_bytes((site.shape, plan.grid_of(site)) for site in plan.sites)
        tuning = {"state of the tuning": 16 * moving(plan)} if plan.job.tune else {}
        return found | ({"parts until the export": parts} if parts else {}) | tuning

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield each stage's name and bytes: on the device that computes, and of pending weights on the CPU."""
        if self.plan.device.type == "cpu":
            yield from self.beside()
        weights, beside = own_memory(self.plan.source, self.plan.calibration, self.size, written_fresh(self.plan))
        if weights and (self.needs or self.plan.job.tune):  # the whole model, before the walk
            quiet = dict.fromkeys(("block", "paused", "moments", "factor", "solver", "pending"), 0)
            yield OWN, {"outside": weights, "streams": beside, **quiet}
        if self.plan.job.scales_channels:
            walk = searching(self.plan)
            probe = type(self.probe)(walk.method, walk.grid, solver_dtype(walk))
            for where, parts in _Walk(walk, self.offload, probe).moments():
                yield f"the search for scales, {where}", parts
        if self.plan.job.tune:
            yield "the tuning", needed(self.plan)
        if self.plan.job.check:
            yield from self._check()
        seen = set()
        for block in self.plan.walked:
            kind = (self.blocks[block.name + "."], tuple(tuple(s.shape for s in stage) for stage in block.stages))
            if kind not in seen:
                seen.add(kind)
                yield from self._block(block)

    def _check(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield the check where a block was opened, and where logits are compared: then the embedding and the head are whole."""
        blocks = self.plan.walked or self.plan.blocks
        wide = max(blocks, key=lambda block: self.blocks[block.name + "."])
        linears = sum(prod(site.shape) for site in wide.sites)
        parts = {"outside": self.size * self.outside, "block": self.size * (self.blocks[wide.name + "."] + linears)}
        parts |= {"streams": self._streams(), "paused": 0, "moments": 0, "factor": 0, "pending": 0}
        rounded = min(max((prod(s.shape) for s in wide.sites), default=0), check.ROUNDED_AT_ONCE)
        yield "the check", parts | {"solver": int(solver_dtype(self.plan).itemsize * MEASURING_ROUNDED * rounded)}
        logits = self.checked["logits"]
        whole = self.size * (self.whole if logits else self.outside)
        yield "the check", parts | {"outside": whole, "solver": logits}

    def _streams(self) -> int:
        """Return the bytes of all hidden states that wait in memory."""
        streams = self.size * (self.hidden + self.handed) * self.waiting * self.streams
        return streams + self.size * self.hidden * self.judged + self.checked["streams"]

    def beside(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield the start, where the probe runs one block in float32, and the end, where dense tensors are copied."""
        outside, pending = 4 * self.probed, min(self.quantized + self.dense, SHARD_BYTES)
        block = 4 * max(self.blocks.values())
        quiet = dict.fromkeys(("streams", "paused", "moments", "factor"), 0)
        probing = {"outside": outside, "block": block, **quiet, "solver": self.largest_linear, "pending": 0}
        yield "the start", probing
        yield "the start", probing | {"block": 0, "solver": self.largest_dense}
        on_cpu = 4 * self.outside if self.plan.device.type == "cpu" else 0
        # On a GPU a stage's codes, scales and zeros come over to be packed; nothing else of the walk is here.
        yield "the end", {"outside": on_cpu, "block": 0, **quiet, "solver": self.largest_dense, "pending": pending}

    def _block(self, block: Block) -> Iterator[tuple[str, dict[str, int]]]:
        first = sum(site.shape[0] for site in block.stages[0]) if block.stages else 0
        linears = sum(prod(site.shape) for site in block.sites)
        always = {
            "outside": self.size * self.outside,
            "block": self.size * (self.blocks[block.name + "."] + linears * (self.streams == 2)),
            "streams": self._streams(),
        }
        pending = min(self.plan.nbytes(block.sites), SHARD_BYTES)
        sizes = [size_of(stage, self.needs) for stage in block.stages]
        for number, (stage, size) in enumerate(zip(block.stages, sizes, strict=True)):
            turned = getattr(self.plan.format, "online", False) and stage[0].adds_to is not None
            copies = (self.plan.activations is not None) + turned  # beside what was rounded, and what was turned
            # The state, the residual, and behind the first block what the model began with.
            held = self.hidden * (3 if len(self.plan.walked) > 1 else 2)
            wide = size.n * (1 + copies) + held + (first if number == 1 else 0)
            paused = int(self.size * (self.tokens if self.kept else self.batch) * self.streams * wide)
            # While a batch runs on from the stage before: its outputs, activated and multiplied, and their product.
            before = sizes[max(0, number - 1)].m + size.n * (4 if turned else 1)
            for moments, factor, solver in self._steps(stage, size, self.size * self.batch * before):
                waiting, working = (paused, solver) if self.kept else (0, solver + paused)
                yield (
                    _names(stage),
                    always
                    | {"paused": waiting, "moments": moments, "factor": factor, "solver": working, "pending": pending},
                )

    def _steps(self, stage: Stage, size: Size, running: int) -> Iterator[tuple[int, int, int]]:
        """Yield the bytes of moments, factor and solver at each step of a stage: observe, prepare, solve, measure."""
        number, (m, n, adds), needs = solver_dtype(self.plan).itemsize, size, self.needs
        held = self.probe.memory(size)
        drift = m * n if adds else n**2 if "D" in needs else 0
        parts = 1 + ("held_out" in needs) * (
            1 + (texts if (texts := len(shares_of(self.plan.calibration.dataset))) > 1 else 0)
        )
        moments = number * (n**2 + drift) * parts if needs else 0
        weight, state = number * m * n, int(held.state)
        if needs:
            # The rows of a batch, split for the held-out tokens; the difference of streams; the drift behind the linear. Of
            # coarse products two factors in half the bytes, and the product; and a copy of the original weight.
            coarse = "coarse" in needs
            rough = coarse and not adds
            rows = n * (2 * bool(needs & {"D", "R"}) + ("held_out" in needs) + rough) + 3 * m * adds
            copied = coarse * max(site.shape[0] for site in stage) * n // 2
            yield moments, 0, running + number * (self.batch * rows + rough * n**2 * 3 // 2 + copied)
            yield moments, 0, int(held.prepare)
        codes = m * n * len(self.plan.job.widths) if self.plan.undecided else 0  # of the widths solved before
        yield moments, state, weight + int(held.solve) + codes
        measured = min(max(site.shape[0] for site in stage) * n, max(n, MEASURED_AT_ONCE))
        measuring = number * (MEASURING if needs else MEASURING_ROUNDED) * measured
        yield moments, state, weight + int(held.result + measuring)


def written(out: Path) -> int:
    """Return the bytes that an earlier run has left in ``out``."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and STATE not in path.parts)


def _names(stage: Stage) -> str:
    first = stage[0].name
    return "+".join([first, *(site.name.rpartition(".")[2] for site in stage[1:])])


def _prefix(name: str, blocks: list[str]) -> str | None:
    return next((prefix for prefix in blocks if name.startswith(prefix)), None)


def _dense(plan: Plan, rest: list[str], head: str | None) -> tuple[int, int]:
    """Return the bytes of dense tensors as they will be written, and of a GGUF file's header.

    ``rest``: what is not quantized, by name on disk. A GGUF file holds the matrices, in its template's types.
    """
    if plan.template is None or not isinstance(plan.format, GGUF):
        return sum(_stored(plan, name) for name in rest), 0
    shapes = [site.shape for site in plan.sites]
    inside, header = dense_bytes(plan.template, plan.format, shapes, head in {site.name for site in plan.sites})
    return inside + sum(_stored(plan, name) for name in rest if len(plan.source.store.shape(name)) != 2), header


def _stored(plan: Plan, name: str) -> int:
    """Return the bytes of a dense tensor as it will be written."""
    store = plan.source.store
    return prod(store.shape(name)) * plan.source.written(name, plan.dense).itemsize


def ample(plan: Plan) -> Probe:
    """Return a generous guess of what the method takes, which costs nothing."""
    return Ample(plan.method, plan.grid, solver_dtype(plan))


def shared(plan: Plan, offload: Path | None, world: int, machine: int, probe: Probe | None = None) -> Estimate:
    """Estimate one rank of ``world``, ``machine`` of them on this machine."""
    part = plan if world == 1 else _with_samples(plan, -(-plan.calibration.nsamples // world))
    return replace(estimate(part, offload, probe), ranks=machine)


def suggestions(plan: Plan, found: Estimate, out: Path, world: int = 1) -> list[str]:
    """Return flags with which the run would fit into memory, each set estimated, and advice about the disk.

    ``found`` is of one rank of ``world``.
    """
    tips = []
    if short(found) and plan.job.check:  # which a run leaves out by itself
        plan = plan.changed(check=False)
        found = shared(plan, found.offload, world, found.ranks, found.probe)
    if short(found) and plan.job.tune:
        plan = plan.changed(tune=0)
        found = shared(plan, found.offload, world, found.ranks, found.probe)
        least = max(memory.need for memory in found.memory)
        tips.append(f"without --tune it {'needs' if short(found) else 'fits, needing'} {gb(least)}")
    if short(found):
        own = any(some.where == OWN for some in found.memory)
        tips.append("--dataset without self" if own else _smallest_change(plan, found, world))
        if plan.device.type == "cuda":
            tips.append("--device cpu uses the machine's memory")
    free = free_disk(out)
    if free is not None and sum(found.disk.values()) > free:
        tips.append("another disk, or fewer --bits")
    return tips


def short(found: Estimate) -> bool:
    """Return whether memory does not suffice somewhere."""
    return any((have := found.available(m)) is not None and m.need > have for m in found.memory)


def _with_samples(plan: Plan, nsamples: int) -> Plan:
    """Return the plan with another number of samples, without those that may have been read."""
    return replace(plan.changed(calibration=replace(plan.calibration, nsamples=nsamples)), samples=None)


def _smallest_change(plan: Plan, found: Estimate, world: int) -> str:
    """Return the first set of flags that fits, milder ones first; or that none does."""
    tried = list(_changes(plan, found, world))
    for flags, need, short in tried:
        if not short:
            return f"{flags} fits, needing {gb(need)}"
    flags, need, _ = min(tried, key=lambda change: change[1], default=("", 0, True))
    return f"no flags make it fit here; {flags} needs least, {gb(need)}" if flags else "no flags make it fit here"


def _changes(plan: Plan, found: Estimate, world: int) -> Iterator[tuple[str, int, bool]]:
    """Yield flags, the memory that the run would take with them, and whether that is too much."""
    data = plan.calibration
    counts = [n for n in (data.nsamples, data.nsamples // 2, data.nsamples // 4) if n >= min(8, data.nsamples)]
    methods = {"": (plan, found.probe)}
    if found.streams == 2:  # one stream takes less
        other = plan.changed(method=METHODS[ONE_STREAM]())
        methods[f"--method {ONE_STREAM}"] = other, probe_of(other)
    places = {"": found.offload} | ({"--offload DIR": Path()} if found.streams and found.offload is None else {})
    for (word, (changed, probe)), count, (place, offload) in product(methods.items(), counts, places.items()):
        flags = " ".join(filter(None, [word, f"--nsamples {count}" * (count != data.nsamples), place]))
        if flags and found.streams:
            then = shared(_with_samples(changed, count), offload, world, found.ranks, probe)
            yield flags, max(memory.need for memory in then.memory), short(then)
