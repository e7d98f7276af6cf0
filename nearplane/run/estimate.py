"""What a run will need in memory and on disk, computed from shapes alone before anything is computed.

Memory is the most over all moments of a run, on each device. At every moment there are the modules outside the blocks
(but an output head of its own) and the packed weights of the open block, which are written when it is done; at the end
dense tensors, at most a shard of 4 GiB. While a block is open there are also

    block    its parameters in the compute dtype, its linears twice where there is a reference stream
    streams  tokens x hidden size for each of one or two streams; of one batch where they are offloaded
    paused   what forwards hold that wait at a stage of n inputs: tokens x (n + 2 hidden) per stream, and the
             outputs of the block's first stage (q, k, v) until its second; of one batch only where nothing is kept
             (``stream.kept``)
    moments  H n², D n² or R m n, the same again of held-out tokens
    factor   what ``prepare`` leaves behind
    solver   the stage's weight as one matrix m n, and the work arrays (``planning/workspace.py``)

The peak is the largest sum over the steps of all stages. ``docs/large_models.md`` has the formulas and a table.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from nearplane.core.errors import SettingError
from nearplane.formats.parts import SHARD_BYTES
from nearplane.machine.memory import available_memory, cuda_memory, free_disk, resident
from nearplane.machine.ranks import Ranks
from nearplane.methods import GPTQ
from nearplane.models.discover import Block, Stage, embedding_name, head_name
from nearplane.models.inputs import PROBE_TOKENS
from nearplane.run import workspace
from nearplane.run.mix import JUDGED
from nearplane.run.plan import Plan
from nearplane.run.stream import batch_rows, kept
from nearplane.run.workspace import BYTE, Shape, stage_shape

# Beside what this process holds already: tokenizer and text, the buffers of kernels, what the allocator does not give
# back. Measured on the demo model (benchmarks/plan.py).
LATER = 80 << 20
# What a CUDA context takes.
CUDA_CONTEXT = 500 << 20


@dataclass(frozen=True)
class Memory:
    """The peak on one device."""

    device: str
    where: str  # the stage or step that reaches it
    parts: dict[str, int]  # bytes at that moment
    base: int  # of them, what the process holds before it does anything

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def need(self) -> int:
        """What must be available yet."""
        return self.peak - self.base


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

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

    def lacking(self, out: Path) -> list[str]:
        """Sentences about what does not fit; none if all does, or if nothing is known of the machine."""
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
        """What the machine has for it now; None where it cannot be told."""
        if memory.device != "cpu":
            return cuda_memory(memory.device)
        have = available_memory()
        return None if have is None else have // self.ranks

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        memory = [asdict(m) | {"peak": m.peak, "need": m.need, "available": self.available(m)} for m in self.memory]
        return {k: v for k, v in asdict(self).items() if k not in ("ranks", "offload")} | {"memory": memory}


def estimate(plan: Plan, offload: Path | None = None) -> Estimate:
    """Memory and disk of a run of ``plan``; ``offload``: where its hidden states are, if not in memory."""
    walk = _Walk(plan, offload is not None)
    where, parts = max(walk.moments(), key=lambda moment: sum(moment[1].values()))
    base, memory = resident(), []
    if plan.device.type == "cpu":
        memory.append(Memory("cpu", where, {"base": base + LATER} | parts, base))
    else:
        start, held = max(walk.beside(), key=lambda moment: sum(moment[1].values()))
        memory.append(Memory("cpu", start, {"base": base + LATER} | held, base))
        parts.pop("pending")
        memory.append(Memory(str(plan.device), where, {"base": CUDA_CONTEXT} | parts, 0))
    stage = max((s for b in plan.blocks for s in b.stages), key=lambda s: stage_shape(s, False).m * s[0].shape[1])
    shape = stage_shape(stage, False)
    disk = {"quantized": walk.quantized, "dense": walk.dense, "other files": walk.files}
    offloaded = 0 if offload is None else walk.size * walk.tokens * walk.hidden * walk.streams
    streams, windows = walk.streams, plan.windows
    return Estimate(memory, disk, _names(stage), (shape.m, shape.n), streams, walk.kept, windows, offloaded, offload)


class _Walk:
    """The moments of a run, and what is held at each."""

    def __init__(self, plan: Plan, offload: bool = False) -> None:
        self.plan, source, store = plan, plan.source, plan.source.store
        self.needs = plan.method.needs
        self.size = plan.compute.itemsize
        self.streams = 0 if not self.needs else 2 if self.needs & {"D", "R"} else 1
        windows, seqlen = plan.windows
        self.tokens = windows * seqlen
        self.batch = min(windows, batch_rows(seqlen)) * seqlen if windows else 0
        self.kept = kept(plan.blocks, self.tokens, plan.compute, self.streams)
        self.waiting = self.batch if offload else self.tokens  # of each stream, in memory
        # What blocks make of the batches that a budget's widths are judged by.
        judging = plan.undecided and self.batch > 0
        self.judged = min(self.tokens, -(-self.tokens // (JUDGED * self.batch)) * self.batch) if judging else 0
        self.hidden = plan.hidden
        numbers = {name: prod(store.shape(disk)) for name, disk in source.names.items()}
        names = [block.name + "." for block in plan.blocks]
        head = head_name(source)
        inside = {name: prefix for name in numbers for prefix in [_prefix(name, names)] if prefix}
        self.blocks = dict.fromkeys(names, 0)
        for name, prefix in inside.items():
            self.blocks[prefix] += numbers[name]
        apart = [name for name in numbers if name not in inside and not (head and name.startswith(head + "."))]
        self.largest_linear = max((store.nbytes(source.names[s.name + ".weight"]) for s in plan.sites), default=0)
        table = embedding_name(source)
        rows, width = store.shape(source.names[table]) if table is not None and table in apart else (0, 0)
        beside = sum(numbers[name] for name in apart if name != table)
        self.probed = beside + min(rows, PROBE_TOKENS) * width
        # On a CPU, of the input embedding the rows of the tokens that run are there.
        rows = min(rows, self.tokens) if plan.device.type == "cpu" else rows
        self.outside = beside + rows * width if self.needs else self.probed
        sites = {source.names[s.name + ".weight"]: s for b in plan.blocks for s in b.sites}
        self.quantized = plan.nbytes(list(sites.values()))
        rest = [name for name in store.names if name not in sites]
        self.dense = sum(_stored(plan, name) for name in rest)
        self.largest_dense = max((store.nbytes(name) for name in rest), default=0)
        self.files = sum(p.stat().st_size for p in source.folder.glob("*") if p.is_file() and _companion(p))

    def moments(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Where, and the bytes of each part there: on the device that computes, and what is pending on the CPU."""
        if self.plan.device.type == "cpu":
            yield from self.beside()
        seen = set()
        for block in self.plan.blocks:
            kind = (self.blocks[block.name + "."], tuple(tuple(s.shape for s in stage) for stage in block.stages))
            if kind not in seen:
                seen.add(kind)
                yield from self._block(block)

    def beside(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Before and after the walk: the probe runs one block in float32, and dense tensors are checked and copied."""
        outside, pending = 4 * self.probed, min(self.dense, SHARD_BYTES)
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
            "streams": self.size * self.hidden * (self.waiting * self.streams + self.judged),
        }
        pending = min(self.plan.nbytes(block.sites), SHARD_BYTES)
        shapes = [stage_shape(stage, self.streams == 2) for stage in block.stages]
        for number, (stage, shape) in enumerate(zip(block.stages, shapes, strict=True)):
            waiting = (self.tokens if self.kept else self.batch) * self.streams
            turned = getattr(self.plan.format, "online", False) and stage[0].adds_to is not None
            copies = (self.plan.activations is not None) + turned  # beside what was rounded, and what was turned
            wide = shape.n * (1 + copies) + 2 * self.hidden + (first if number == 1 else 0)
            paused = int(self.size * waiting * wide)
            # While a batch runs on from the stage before: its outputs, activated and multiplied, and their product.
            before = shapes[max(0, number - 1)].m + shape.n * (4 if turned else 1)
            running = self.size * self.batch * before
            for moments, factor, solver in self._steps(shape, running):
                yield (
                    _names(stage),
                    always
                    | {
                        "paused": paused if self.kept else 0,
                        "moments": moments,
                        "factor": factor,
                        "solver": solver + (0 if self.kept else paused),
                        "pending": pending,
                    },
                )

    def _steps(self, shape: Shape, running: int) -> Iterator[tuple[int, int, int]]:
        """Bytes of moments, factor and solver at each step of a stage: observe, prepare, solve, measure."""
        number = 8 if self.plan.compute == torch.float64 else 4
        work = workspace.work(self.plan.method, shape)
        moments = number * int(workspace.moments(self.needs, shape))
        observing = number * int(workspace.observing(self.needs, shape, self.batch))
        weight, state = shape.m * shape.n, number * int(work.state)
        if self.needs:
            yield moments, 0, running + observing
            yield moments, 0, number * int(work.prepare)
        codes = BYTE * weight * len(self.plan.job.widths) if self.plan.undecided else 0  # of the widths solved before
        yield moments, state, number * int(weight + work.solve + codes)
        yield moments, state, number * int(weight + work.result + work.measure)


def written(out: Path) -> int:
    """Bytes that an earlier run has left in ``out``."""
    return sum(path.stat().st_size for path in out.glob("*") if path.is_file())


def _names(stage: Stage) -> str:
    first = stage[0].name
    return "+".join([first, *(site.name.rpartition(".")[2] for site in stage[1:])])


def _prefix(name: str, blocks: list[str]) -> str | None:
    return next((prefix for prefix in blocks if name.startswith(prefix)), None)


def _stored(plan: Plan, name: str) -> int:
    """Bytes of a dense tensor as it will be written."""
    store = plan.source.store
    dtype = store.dtype(name)
    return prod(store.shape(name)) * (plan.stored if dtype.is_floating_point else dtype).itemsize


def _companion(path: Path) -> bool:
    return path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def gb(size: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit or unit == 1e9 else f"{size / unit:.0f} {name}"
    return f"{size / 1e3:.0f} kB"


def refuse(plan: Plan, out: Path, offload: Path | None = None, ranks: Ranks | None = None) -> None:
    """SettingError, with the numbers, where the run cannot fit into this machine's memory or the disk of ``out``.

    Several ``ranks`` hold some of the samples each, and those of one machine have its memory between them.
    """
    found = estimate(plan, offload) if ranks is None else shared(plan, offload, ranks.world, ranks.machine)
    lacks = found.lacking(out)
    if lacks:
        advice = "; ".join(suggestions(plan, found, out, 1 if ranks is None else ranks.world))
        raise SettingError(f"{'; '.join(lacks)}; {advice + '; ' if advice else ''}--force runs anyway.")


def shared(plan: Plan, offload: Path | None, world: int, machine: int) -> Estimate:
    """The estimate of one rank of ``world``, ``machine`` of them on this machine."""
    return replace(estimate(_with_samples(plan, -(-plan.calibration.nsamples // world)), offload), ranks=machine)


def suggestions(plan: Plan, found: Estimate, out: Path, world: int = 1) -> list[str]:
    """Flags with which the run would fit into memory, each set tried; and what to do about the disk. ``found`` is of one
    rank of ``world``."""
    tips = []
    if _short(found):
        tips.append(_smallest_change(plan, found, world))
        if plan.device.type == "cuda":
            tips.append("--device cpu uses the machine's memory")
    free = free_disk(out)
    if free is not None and sum(found.disk.values()) > free:
        tips.append("another disk, or fewer --bits")
    return tips


def _short(found: Estimate) -> bool:
    """Whether memory does not suffice somewhere."""
    return any((have := found.available(m)) is not None and m.need > have for m in found.memory)


def _with_samples(plan: Plan, nsamples: int) -> Plan:
    """The plan with another number of samples, those that may have been read left out."""
    return replace(plan.changed(calibration=replace(plan.calibration, nsamples=nsamples)), samples=None)


def _smallest_change(plan: Plan, found: Estimate, world: int) -> str:
    """The first set of flags that fits, milder ones first; or that none does."""
    tried = list(_changes(plan, found, world))
    for flags, need, short in tried:
        if not short:
            return f"{flags} fits, needing {gb(need)}"
    flags, need, _ = min(tried, key=lambda change: change[1], default=("", 0, True))
    return f"no flags make it fit here; {flags} needs least, {gb(need)}" if flags else "no flags make it fit here"


def _changes(plan: Plan, found: Estimate, world: int) -> Iterator[tuple[str, int, bool]]:
    """Flags, the memory that the run would take with them, and whether that is too much."""
    data = plan.calibration
    counts = [n for n in (data.nsamples, data.nsamples // 2, data.nsamples // 4) if n >= min(8, data.nsamples)]
    methods = {"": plan.method} | ({"--method gptq": GPTQ()} if found.streams == 2 else {})
    places = {"": found.offload} | ({"--offload DIR": Path()} if found.streams and found.offload is None else {})
    for (word, method), count, (place, offload) in product(methods.items(), counts, places.items()):
        flags = " ".join(filter(None, [word, f"--nsamples {count}" * (count != data.nsamples), place]))
        if flags and found.streams:
            then = shared(_with_samples(plan.changed(method=method), count), offload, world, found.ranks)
            yield flags, max(memory.need for memory in then.memory), _short(then)
