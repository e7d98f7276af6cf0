"""Which linear gets which grid: overrides by name, linears left dense, and what a budget leaves open.

A pattern is a regular expression that is searched (``re.search``) in a linear's name on disk, so that "down_proj" means
every one of them and "layers\\.0\\." a block. Overrides are applied in the order in which they are given: of two that
match a linear the later one wins, field by field. What is left out is left out whatever an override says.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nearplane.core.errors import SettingError, some_of
from nearplane.core.grid import Grid
from nearplane.formats.base import Format, fused, grid_name
from nearplane.models.discover import Block, Site
from nearplane.models.towers import chosen_towers
from nearplane.run.job import Job


def leave_out(
    blocks: list[Block], job: Job, disk: Callable[[str], str], others: Iterable[str]
) -> tuple[list[Block], dict[str, str]]:
    """The blocks without the linears that are left dense, and those, by name on disk, with the reason.

    ``others``: linears that stay dense anyway; a pattern may name them. SettingError for one that is found nowhere.
    """
    ignored: dict[str, str] = {}
    if job.towers:
        chosen = chosen_towers(job.towers, list(dict.fromkeys(block.tower for block in blocks)), others)
        rest = [site.name for block in blocks if block.tower not in chosen for site in block.sites]
        ignored = {disk(name): f"towers {', '.join(job.towers)}" for name in rest}
    sites = [site.name for block in blocks for site in block.sites]
    for pattern in job.ignore:
        matched = [name for name in sites if re.search(pattern, disk(name))]
        if not matched and not any(re.search(pattern, name) for name in others):
            raise SettingError(_nowhere("ignore", pattern, [disk(name) for name in sites]))
        for name in matched:
            ignored.setdefault(disk(name), f"ignore {pattern!r}")
    if not ignored:
        return blocks, ignored
    kept = []
    for block in blocks:
        stages = [[site for site in stage if disk(site.name) not in ignored] for stage in block.stages]
        kept.append(replace(block, stages=[stage for stage in stages if stage]))
    if not any(block.stages for block in kept):
        raise SettingError(
            f"{'ignore' if job.ignore else 'towers'} leaves every linear out; there is nothing to quantize."
        )
    return kept, ignored


def assign(names: Iterable[str], grid: Grid, job: Job) -> tuple[dict[str, Grid], frozenset[str]]:
    """The grid of each linear by its name on disk, and those whose bits an override gives.

    SettingError for an override whose pattern is found in no name.
    """
    grids, fixed = dict.fromkeys(names, grid), set()
    for override in job.override:
        matched = [name for name in grids if re.search(override.pattern, name)]
        if not matched:
            raise SettingError(_nowhere("override", override.pattern, list(grids)))
        for name in matched:
            grids[name] = override.apply(grids[name])
            if override.bits is not None:
                fixed.add(name)
    return grids, frozenset(fixed)


def refuse_split(grids: Mapping[str, Grid], ignored: Mapping[str, str], job: Job, fixed: frozenset[str]) -> None:
    """SettingError where linears that engines fuse into one would differ, with the pattern to widen."""

    def kind(name: str) -> str:
        if name in ignored:
            return "stays dense"
        bits, _, rest = grid_name(grids[name]).partition(" in ")
        if job.budget is not None and name not in fixed:
            bits = "bits by the budget"
        return f"gets {bits} in {rest}"

    if not job.override and not ignored:
        return
    patterns = [("override", some.pattern) for some in job.override] + [("ignore", some) for some in job.ignore]
    for names in fused([*grids, *ignored]):
        kinds: dict[str, str] = {}
        for name in names:
            kinds.setdefault(kind(name), name)
        if len(kinds) == 1:
            continue
        (first, a), (second, b) = list(kinds.items())[:2]
        partial = (
            f"{what} {p!r}" for what, p in patterns if 0 < sum(bool(re.search(p, n)) for n in names) < len(names)
        )
        raise SettingError(
            f"{a} {first} and {b} {second}, but engines fuse {some_of(names)}, which must be alike; "
            f"widen {next(partial, 'the patterns')} to match all of them."
        )


def _nowhere(what: str, pattern: str, names: list[str]) -> str:
    example = f", such as {names[0]}" if names else ""
    return (
        f"{what} {pattern!r} matches no linear that would be quantized{example}; nearplane inspect lists their names."
    )


# One in so many batches is what widths are judged by: each takes a forward of the block per unit and width.
JUDGED = 4


@dataclass(frozen=True)
class Unit:
    """Linears that get the same bits."""

    sites: tuple[Site, ...]
    widths: tuple[int, ...]
    """Those that the format holds."""


def units(
    blocks: list[Block],
    disk: Callable[[str], str],
    grids: Mapping[str, Grid],
    fixed: frozenset[str],
    job: Job,
    format: Format,
) -> list[Unit]:
    """What is open, in order. SettingError for linears of which the format holds no width."""
    stages = [[site for site in stage if site.name not in fixed] for block in blocks for stage in block.stages]
    joined = {site.name: stage for stage in stages for site in stage}
    names = {disk(site.name): site.name for stage in stages for site in stage}
    for group in fused(names):
        first = joined[names[group[0]]]
        for name in group[1:]:
            other = joined[names[name]]
            if other is not first:
                first += other
                joined.update((site.name, first) for site in other)
    found = {id(sites): sites for sites in joined.values()}
    return [Unit(tuple(sites), _widths(sites, grids, job, format)) for sites in found.values()]


def check_budget(free: Sequence[Unit], sites: list[Site], grids: Mapping[str, Grid], job: Job, format: Format) -> None:
    """SettingError for a budget that the fewest bits exceed."""
    assert job.budget is not None
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    least = sum(size(format, unit, grids, unit.widths[0]) for unit in free) + _rest(free, sites, grids, format)
    if least > allowed(sites, job):
        raise SettingError(
            f"budget {job.budget:g} is less than the {8 * least / weights:.4g} bits per weight that the fewest bits take here, "
            "scales and zeros counted; raise it, or --group-size."
        )


def allowed(sites: list[Site], job: Job) -> int:
    """Bytes that all quantized weights together may take."""
    return int((job.budget or 0.0) * sum(site.shape[0] * site.shape[1] for site in sites) / 8)


def size(format: Format, unit: Unit, grids: Mapping[str, Grid], bits: int) -> int:
    """Bytes of a unit at this width."""
    return sum(format.nbytes(site.shape, replace(grids[site.name], bits=bits)) for site in unit.sites)


def choose(
    free: Sequence[Unit],
    errors: Sequence[Mapping[int, float]],
    sites: list[Site],
    grids: Mapping[str, Grid],
    job: Job,
    format: Format,
) -> list[dict[str, Any]]:
    """The table: per unit its linears, the bits that make the sum of errors least within the budget, and all errors."""
    costs = [[size(format, unit, grids, bits) for bits in unit.widths] for unit in free]
    listed = [[error[bits] for bits in unit.widths] for unit, error in zip(free, errors, strict=True)]
    picks = allocate(costs, listed, allowed(sites, job) - _rest(free, sites, grids, format))
    return [
        {
            "linears": [site.name for site in unit.sites],
            "bits": unit.widths[pick],
            "bytes": cost[pick],
            "errors": {str(bits): error[bits] for bits in unit.widths},
        }
        for unit, error, cost, pick in zip(free, errors, costs, picks, strict=True)
    ]


def _rest(free: Sequence[Unit], sites: list[Site], grids: Mapping[str, Grid], format: Format) -> int:
    """Bytes of the linears whose bits are given."""
    open_sites = {site.name for unit in free for site in unit.sites}
    return sum(format.nbytes(site.shape, grids[site.name]) for site in sites if site.name not in open_sites)


def _widths(sites: list[Site], grids: Mapping[str, Grid], job: Job, format: Format) -> tuple[int, ...]:
    reasons = {
        bits: next(filter(None, (format.supports(replace(grids[s.name], bits=bits), s.shape) for s in sites)), None)
        for bits in sorted(set(job.widths))
    }
    held = tuple(bits for bits, reason in reasons.items() if reason is None)
    if not held:
        raise SettingError(f"{sites[0].name}: {next(iter(reasons.values()))}.")
    return held


# The price is found up to this share of it; any price gives a bound, so that no answer depends on it.
NEAR = 1e-9
# Where errors are all equal it has no end at which to stop, and must stay a number that can be multiplied without loss.
HALVINGS = 100
# Of the largest number in a bound: what rounding may add to it.
SLACK = 1e-9


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The candidate of each item. ValueError where even the cheapest together cost more than the budget."""
    cost = [torch.tensor(some, dtype=torch.int64) for some in costs]
    error = [torch.tensor(some, dtype=torch.float64) for some in errors]
    cheapest = [int(some.min()) for some in cost]
    if sum(cheapest) > budget:
        raise ValueError(f"the cheapest choice costs {sum(cheapest)}, more than {budget}.")
    price, known = _price(cost, error, budget)
    # What the items from number i on cost at least, and what they add at least to error + price * cost.
    least, bound = [0], [0.0]
    for c, e, low in zip(reversed(cost), reversed(error), reversed(cheapest), strict=True):
        least.insert(0, least[0] + low)
        bound.insert(0, bound[0] + float((e + price * c.double()).min()))
    limit = known + SLACK * (abs(known) + price * budget)
    total, wrong = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    path: list[tuple[Tensor, Tensor]] = []  # per item: the state before, and the candidate, of every state
    for i, (c, e) in enumerate(zip(cost, error, strict=True)):
        before, which = (
            part.flatten() for part in torch.meshgrid(torch.arange(len(total)), torch.arange(len(c)), indexing="ij")
        )
        new, off = total[before] + c[which], wrong[before] + e[which]
        hope = off + price * (new - budget).double() + bound[i + 1]
        keep = ((new + least[i + 1] <= budget) & (hope <= limit)).nonzero().flatten()
        keep = keep[_undominated(new[keep], off[keep])]
        total, wrong = new[keep], off[keep]
        path.append((before[keep], which[keep]))
    state, chosen = int(wrong.argmin()), []
    for before, which in reversed(path):
        chosen.append(int(which[state]))
        state = int(before[state])
    return chosen[::-1]


def _price(cost: list[Tensor], error: list[Tensor], budget: int) -> tuple[float, float]:
    """A price per unit of cost at which each item's best candidate fits the budget together, and their error.

    The least such price, nearly: there the bound that it gives is closest to the best choice.
    """

    most = max((len(c) for c in cost), default=1)
    pad = [torch.arange(most).clamp(max=len(c) - 1) for c in cost]  # the last candidate again
    costs = (
        torch.stack([c[k] for c, k in zip(cost, pad, strict=True)]) if cost else torch.zeros(0, 1, dtype=torch.int64)
    )
    errors = (
        torch.stack([e[k] for e, k in zip(error, pad, strict=True)])
        if error
        else torch.zeros(0, 1, dtype=torch.float64)
    )

    def best(price: float) -> tuple[int, float]:
        picks = (errors + price * costs.double()).argmin(1, keepdim=True)
        return int(costs.gather(1, picks).sum()), float(errors.gather(1, picks).sum())

    spent, wrong = best(0.0)
    if spent <= budget:
        return 0.0, wrong
    # At this price no candidate dearer than the cheapest pays: costs are whole numbers.
    low, high = 0.0, 1.0 + float((errors.amax(1) - errors.amin(1)).max())
    known = float(errors.gather(1, costs.argmin(1, keepdim=True)).sum())
    for _ in range(HALVINGS):
        if high - low <= NEAR * high:
            break
        middle = (low + high) / 2
        spent, wrong = best(middle)
        if spent <= budget:
            high, known = middle, min(known, wrong)
        else:
            low = middle
    return high, known


def _undominated(cost: Tensor, error: Tensor) -> Tensor:
    """Which states no other one beats in both, by rising cost; the first of equal ones."""
    order = error.argsort(stable=True)
    order = order[cost[order].argsort(stable=True)]
    ranked = error[order]
    before = torch.cat([ranked.new_full((1,), torch.inf), ranked.cummin(0).values[:-1]]) if len(ranked) else ranked
    return order[ranked < before]
