"""Which linear gets which grid: overrides by name, linears left dense, and what a budget leaves open.

A pattern is a regular expression that is searched (``re.search``) in a linear's name on disk, so that "down_proj" means
every one of them and "layers\\.0\\." a block. One that is found in no such name is searched in names in the model. Patterns
in other tools' forms, as "re:...", match from the start (``job.compiled``). Overrides are applied in the order in which they
are given: of two that match a linear the later one wins, field by field. What is left out is left out whatever an
override says. Rules of GPTQModel's ``dynamic`` exclude those before them (``names.parts_of``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nearplane.core.errors import NumericalError, SettingError, some_of
from nearplane.core.grid import Grid
from nearplane.formats.base import Format, grid_name
from nearplane.formats.fused import fused
from nearplane.models.discover import Block, Site
from nearplane.models.towers import chosen_towers
from nearplane.run.job import Job, compiled
from nearplane.run.names import parts_of

# Of a run that is given no group size, the largest that divides the inputs of all linears.
GROUP_SIZES = (128, 64, 32)


def leave_out(
    blocks: list[Block], job: Job, disk: Callable[[str], str], others: Iterable[str], dense: Iterable[str] = ()
) -> tuple[list[Block], dict[str, str]]:
    """The blocks without the linears that are left dense, and those, by name on disk, with the reason.

    ``others``: linears that stay dense anyway, and ``dense``: names of all else that does, such as routers and embeddings; a
    pattern may name them. SettingError for one that is found nowhere.
    """
    ignored: dict[str, str] = {}
    if job.towers:
        chosen = chosen_towers(job.towers, list(dict.fromkeys(block.tower for block in blocks)), others)
        rest = [site.name for block in blocks if block.tower not in chosen for site in block.sites]
        ignored = {disk(name): f"towers {', '.join(job.towers)}" for name in rest}
    sites = {disk(site.name): site.name for block in blocks for site in block.sites}
    for pattern in job.ignore:
        for name in _found("ignore", pattern, sites, (*others, *dense)):
            ignored.setdefault(name, f"ignore {pattern!r}")
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


def wants_head(job: Job, head: str, linears: Iterable[str]) -> bool:
    """Tell whether a job quantizes the output head: by ``head_bits``, or by an override that is found in its name alone.

    Args:
        head: name of the head.
        linears: names on disk of the blocks' linears.

    Raises:
        SettingError: the head is both asked for and left out.
    """
    linears = list(linears)
    found = {some.pattern: compiled("override", some.pattern) for some in job.override}
    alone = [pattern for pattern, finds in found.items() if finds(head) and not any(map(finds, linears))]
    wanted = job.head_bits is not None or bool(alone)
    twice = [some for some in job.override if some.pattern in alone and some.bits is not None]
    if job.head_bits is not None and twice:
        raise SettingError(
            f"head_bits={job.head_bits} and override {twice[0]} both give the bits of the output head {head}; give one of them."
        )
    left = next((pattern for pattern in job.ignore if compiled("ignore", pattern)(head)), None)
    if wanted and left is not None:
        asked = "head_bits" if job.head_bits is not None else f"override {alone[0]!r}"
        raise SettingError(
            f"{asked} quantizes the output head {head}, and ignore {left!r} leaves it dense; give one of them."
        )
    if wanted and job.activations is not None:
        raise SettingError(
            f"no engine rounds what goes into an output head; quantize {head} without --act-bits, or not at all."
        )
    return wanted


def fitting(job: Job, inputs: Mapping[str, int]) -> Grid:
    """Return the job's grid; where no group size was given, with the largest usual one that divides every linear's inputs.

    A smaller last group loads nowhere else. Where none of the usual sizes divides all, the default stays.

    Args:
        inputs: input columns of each linear by its name on disk.
    """
    if job.was_given("group_size") or job.grid.group_size != Grid().group_size:  # a format may decide, too
        return job.grid
    own = [compiled("override", some.pattern) for some in job.override if some.group_size is not None]
    widths = {width for name, width in inputs.items() if not any(found(name) for found in own)}
    sizes = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return replace(job.grid, group_size=next(sizes, job.grid.group_size))


def assign(
    names: Mapping[str, str], grid: Grid, job: Job, left: Iterable[str] = ()
) -> tuple[dict[str, Grid], frozenset[str]]:
    """The grid of each linear by its name on disk, and those whose bits an override gives.

    ``names``: in the model, by name on disk. ``left``: linears that are left out, in which an override may be found if it is a
    rule behind others. SettingError for an override whose pattern is found in no name.
    """
    grids, fixed = dict.fromkeys(names, grid), set()
    for override in job.override:
        for name in _found("override", override.pattern, names, left if parts_of(override.pattern)[1:] else ()):
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
    finders = [(what, pattern, compiled(what, pattern)) for what, pattern in patterns]
    for names in fused([*grids, *ignored]):
        kinds: dict[str, str] = {}
        for name in names:
            kinds.setdefault(kind(name), name)
        if len(kinds) == 1:
            continue
        (first, a), (second, b) = list(kinds.items())[:2]
        partial = (f"{what} {p!r}" for what, p, found in finders if 0 < sum(bool(found(n)) for n in names) < len(names))
        raise SettingError(
            f"{a} {first} and {b} {second}, but engines fuse {some_of(names)}, which must be alike; "
            f"widen {next(partial, 'the patterns')} to match all of them."
        )


def _found(what: str, pattern: str, names: Mapping[str, str], others: Iterable[str] = ()) -> list[str]:
    """The linears whose names a pattern is found in, by name on disk: without those of the rules that came before it.

    ``names``: in the model, by name on disk. ``others``: where it may be found, too. SettingError for one that is found nowhere.
    """
    own, *before = (_matched(compiled("", each), names) for each in parts_of(pattern))
    if not own and not any(map(compiled("", parts_of(pattern)[0]), others)):
        raise SettingError(_nowhere(what, pattern, list(names)))
    return [name for name in own if not any(name in some for some in before)]


def _matched(found: Callable[[str], object], names: Mapping[str, str]) -> list[str]:
    return [name for name in names if found(name)] or [name for name, inner in names.items() if found(inner)]


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


def counted(blocks: list[Block], free: Sequence[Unit]) -> list[Site]:
    """The linears that a budget counts: all but an output head whose bits are given."""
    open_sites = {site.name for unit in free for site in unit.sites}
    return [site for block in blocks for site in block.sites if site.name != block.name or site.name in open_sites]


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


# The largest difference of errors as the solver sees it; two sums that differ by less than 1e-6 are equal to the solver.
ERROR_SCALE = 1e4


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Choose one candidate of each item: the least sum of errors whose costs stay within the budget.

    A multiple-choice knapsack, solved by branch and bound until no gap is left (``scipy.optimize.milp``).

    Raises:
        ValueError: even the cheapest candidates together cost more than the budget.
    """
    useful = [_useful(cost, error) for cost, error in zip(costs, errors, strict=True)]
    room = budget - sum(cost[some[0]] for cost, some in zip(costs, useful, strict=True))
    if room < 0:
        raise ValueError(f"the cheapest choice costs {budget - room}, more than {budget}.")
    ruled_out: list[list[int]] = []
    while True:
        picks = _solve(costs, errors, useful, room, ruled_out)
        if sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= budget:
            return picks
        ruled_out.append(picks)  # within the solver's tolerance of the budget, but beyond it


def _useful(cost: Sequence[int], error: Sequence[float]) -> list[int]:
    """Return the candidates that no other one beats in both, by rising cost and falling error."""
    kept: list[int] = []
    for k in sorted(range(len(cost)), key=lambda k: (cost[k], error[k])):
        if not kept or error[k] < error[kept[-1]]:
            kept.append(k)
    return kept


def _solve(
    costs: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    useful: list[list[int]],
    room: int,
    ruled_out: list[list[int]],
) -> list[int]:
    """Choose among the ``useful`` candidates by integer programming; ``room`` is what the cheapest leave of the budget.

    Costs and errors count from each item's cheapest and best candidate. Both are scaled, because the solver's tolerances
    are absolute.
    """
    import numpy as np
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    open_items = [i for i, some in enumerate(useful) if len(some) > 1]
    picks = [some[0] for some in useful]
    if not open_items or room == 0:
        return picks
    flat = [(i, k) for i in open_items for k in useful[i]]
    dearer = np.array([(costs[i][k] - costs[i][useful[i][0]]) / room for i, k in flat])
    worse = np.array([errors[i][k] - errors[i][useful[i][-1]] for i, k in flat])
    row = {item: number for number, item in enumerate(open_items)}
    one_each = csr_array((np.ones(len(flat)), ([row[i] for i, _ in flat], range(len(flat)))))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(dearer[None], -np.inf, 1)]
    for former in ruled_out:
        same = np.array([[former[i] == k for i, k in flat]], dtype=float)
        constraints.append(LinearConstraint(same, -np.inf, len(open_items) - 1))
    found = milp(
        worse / worse.max() * ERROR_SCALE,
        integrality=np.ones(len(flat)),
        bounds=(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise NumericalError(
            f"the budget's integer program was not solved ({found.message}); try other --widths or another --budget."
        )
    for (i, k), chosen in zip(flat, found.x, strict=True):
        if chosen > 0.5:
            picks[i] = k
    return picks
