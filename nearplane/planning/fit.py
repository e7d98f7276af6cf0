"""Whether a run fits into this machine, and with which flags it would."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from nearplane.core.errors import SettingError
from nearplane.methods import GPTQ
from nearplane.plan import Plan
from nearplane.planning.estimate import Estimate, estimate, gb
from nearplane.planning.machine import free_disk
from nearplane.ranks import Ranks


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
    return replace(plan, calibration=replace(plan.calibration, nsamples=nsamples), samples=None)


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
            then = shared(_with_samples(replace(plan, method=method), count), offload, world, found.ranks)
            yield flags, max(memory.need for memory in then.memory), _short(then)
