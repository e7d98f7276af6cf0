"""What a budget chooses between: which linears get their bits together, from which widths, and how many bytes there are.

Linears of one stage are solved together and engines fuse some of them, so a stage gets one width; experts that engines
fuse get one for all of them. A linear whose bits an override gives is no part of the choice, but its bytes count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nearplane.core.allocation import allocate
from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid
from nearplane.formats.base import Format
from nearplane.formats.engines import fused
from nearplane.mix.overrides import Mix
from nearplane.models.discover import Block, Site

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
    mix: Mix,
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
    return [Unit(tuple(sites), _widths(sites, grids, mix, format)) for sites in found.values()]


def check_budget(free: Sequence[Unit], sites: list[Site], grids: Mapping[str, Grid], mix: Mix, format: Format) -> None:
    """SettingError for a budget that the fewest bits exceed."""
    assert mix.budget is not None
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    least = sum(size(format, unit, grids, unit.widths[0]) for unit in free) + _rest(free, sites, grids, format)
    if least > allowed(sites, mix):
        raise SettingError(
            f"budget {mix.budget:g} is less than the {8 * least / weights:.4g} bits per weight that the fewest bits take here, "
            "scales and zeros counted; raise it, or --group-size."
        )


def allowed(sites: list[Site], mix: Mix) -> int:
    """Bytes that all quantized weights together may take."""
    return int((mix.budget or 0.0) * sum(site.shape[0] * site.shape[1] for site in sites) / 8)


def size(format: Format, unit: Unit, grids: Mapping[str, Grid], bits: int) -> int:
    """Bytes of a unit at this width."""
    return sum(format.nbytes(site.shape, replace(grids[site.name], bits=bits)) for site in unit.sites)


def choose(
    free: Sequence[Unit],
    errors: Sequence[Mapping[int, float]],
    sites: list[Site],
    grids: Mapping[str, Grid],
    mix: Mix,
    format: Format,
) -> list[dict[str, Any]]:
    """The table: per unit its linears, the bits that make the sum of errors least within the budget, and all errors."""
    costs = [[size(format, unit, grids, bits) for bits in unit.widths] for unit in free]
    listed = [[error[bits] for bits in unit.widths] for unit, error in zip(free, errors, strict=True)]
    picks = allocate(costs, listed, allowed(sites, mix) - _rest(free, sites, grids, format))
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


def _widths(sites: list[Site], grids: Mapping[str, Grid], mix: Mix, format: Format) -> tuple[int, ...]:
    reasons = {
        bits: next(filter(None, (format.supports(replace(grids[s.name], bits=bits), s.shape) for s in sites)), None)
        for bits in sorted(set(mix.widths))
    }
    held = tuple(bits for bits, reason in reasons.items() if reason is None)
    if not held:
        raise SettingError(f"{sites[0].name}: {next(iter(reasons.values()))}.")
    return held
