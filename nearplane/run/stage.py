"""One stage: observe its input, prepare the method once, solve the rows of its weights, put them in place, measure them.

Rows are split over the ranks where they are independent. An expert shown fewer tokens than it has inputs has a singular
Hessian, whose directions are as uncertain as tokens are missing: its damping is ``damp_percent`` times inputs over tokens,
at most 1. A linear that no token reached, or only zeros, is rounded to nearest. Both are named, experts in one line a layer.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearplane.core.dense import full_width
from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.grid import Certificate, Course, Grid, Quantized
from nearplane.core.moments import MOST_DROPPED, Moments
from nearplane.machine.ranks import Ranks
from nearplane.methods import RTN
from nearplane.methods.base import Method, rows_independent
from nearplane.models.discover import Stage
from nearplane.models.experts import EXPERT
from nearplane.run.events import Event, Noted, Solved, StageDone
from nearplane.run.measure import Clock, Knowledge, LinearRow, measure, observed
from nearplane.run.plan import Plan
from nearplane.run.stream import OpenBlock


def solve_stage(plan: Plan, block: OpenBlock, stage: Stage, ranks: Ranks, clock: Clock) -> Iterator[Event]:
    """Observe one stage's input, prepare once on every rank, solve the rows of all its weights on one grid together.

    Every rank puts the result in place and measures some of its rows.

    Args:
        block: whose stage it is.
        clock: what the time is added to.

    Yields:
        Noted and Solved, in order, and StageDone.

    Raises:
        NumericalError, SettingError: beginning with the name of the linear.
    """
    where, rows, courses = stage[0].name, list[LinearRow](), list[Course]()
    ranks.at(where)
    number = block.k * len(block.stages) + block.stages.index(stage)
    try:
        ready = prepare_stage(plan, block, stage, clock)
        if ready.known.moments is not None:
            yield from map(Noted, observed(where, ready.known.moments, ready.power))
        for own, part in plan.parts(stage):
            where = part[0].name
            method, grid = ready.on(own)
            start = time.perf_counter()
            with clock("solve"):
                stacked = torch.cat([block.weight(site) for site in part])
                solved = solve(ranks, method, stacked, ready.state, grid, number)
            seconds, done = (time.perf_counter() - start) / len(stacked), 0
            for site in part:
                some = slice(done, done := done + site.shape[0])
                weight, quantized = stacked[some], solved.rows(some)
                block.replace(site, quantized, grid)
                with clock("measure"), full_width(plan.device):
                    spent = seconds * len(weight)
                    row, notes = measure(site.name, weight, quantized, grid, ready.known, seconds=spent, ranks=ranks)
                rows.append(row)
                yield from map(Noted, notes)
                yield Solved(site, quantized, grid, row, plan.format.nbytes(site.shape, grid))
            courses += [solved.course] if solved.course else []
            first = rows[-len(part)]
            if first.damp_raised:
                yield Noted(f"{where}: damping raised {first.damp_raised} times, to {first.damp_percent:g}")
    except (NumericalError, SettingError) as error:
        raise type(error)(f"{where}: {error}") from error
    yield StageDone(block.block, stage, rows, tuple(courses), last=stage is block.stages[-1])


class Ready(NamedTuple):
    """A stage before its weights are solved."""

    method: Method
    state: Any
    known: Knowledge
    power: int = 0
    """Of 2, by which the moments were scaled."""

    def on(self, grid: Grid) -> tuple[Method, Grid]:
        """Return the method and the grid to solve with: RTN, its ranges fitted without a Hessian, where no token arrived."""
        if not self.known.rounded:
            return self.method, grid
        return RTN(), replace(grid, fit="mse") if grid.fit == "hessian" else grid


def prepare_stage(plan: Plan, block: OpenBlock, stage: Stage, clock: Clock) -> Ready:
    """Observe a stage's input and prepare the method; linears that no token reached are to be rounded to nearest."""
    method = plan.method
    if not method.needs:
        return Ready(method, None, Knowledge())
    with clock("observe"):
        moments = block.observe(stage, plan.needs)
    if unseen(moments):
        return Ready(method, None, Knowledge(rounded=True))
    power = moments.rescale()
    moments.check()
    method = damped(method, stage, moments)
    with clock("prepare"):
        state = method.prepare(moments)
    return Ready(method, state, Knowledge(moments, getattr(state, "factor", None)), power)


def solve(ranks: Ranks, method: Method, weight: Tensor, state: Any, grid: Grid, number: int) -> Quantized:
    """Solve stage ``number`` of a run: split its rows over the ranks where they are independent, else let one rank solve it."""
    if rows_independent(method):
        parts = {r: ranks.part(len(weight), r) for r in range(ranks.world)}
    else:
        parts = {number % ranks.world: slice(0, len(weight))}
    parts = {r: rows for r, rows in parts.items() if rows.stop > rows.start}
    mine: Quantized | NearplaneError | None = None
    if ranks.rank in parts:
        part = weight[parts[ranks.rank]]
        try:
            mine = method.solve(part, state, grid)
            if mine.codes.shape != part.shape:
                given, wanted = list(mine.codes.shape), list(part.shape)
                raise SettingError(f"{type(method).__name__} returned codes of shape {given} for a weight of {wanted}")
        except (NumericalError, SettingError) as error:
            if ranks.world == 1:
                raise
            mine = error
    if isinstance(mine, Quantized) and ranks.world == 1:
        return mine
    found = [ranks.share(mine if r == ranks.rank else None, r, weight.device) for r in parts]
    if len(found) == 1:
        return found[0]
    codes, scale, zero = (torch.cat(tensors) for tensors in zip(*(part[:3] for part in found), strict=True))
    known = [part.certificate for part in found if part.certificate is not None]
    certificate = Certificate(*(torch.cat(rows) for rows in zip(*known, strict=True))) if known else None
    return Quantized(codes, scale, zero, certificate, found[0].course)


# Experts that a line names.
NAMED = 8
MOST_DAMPING = 1.0


def is_expert(stage: Stage) -> bool:
    """Tell whether a stage holds experts only, which may see few tokens or none."""
    return all(EXPERT.fullmatch(site.name) for site in stage)


def unseen(moments: Moments) -> bool:
    """Tell whether no token reached a linear, or only zeros (or values whose squares are zero)."""
    if moments.tokens == 0:
        return moments.dropped == 0
    few = moments.dropped <= MOST_DROPPED * (moments.tokens + moments.dropped)
    return few and not bool(moments.H.diagonal().any())


def damped(method: Method, stage: Stage, moments: Moments) -> Method:
    """Return the method for a stage, damped by count where an expert was shown fewer tokens than it has inputs."""
    inputs, damp = stage[0].shape[1], getattr(method, "damp_percent", None)
    if not is_expert(stage) or not 0 < moments.tokens < inputs or damp is None or not is_dataclass(method):
        return method
    options: Any = {"damp_percent": max(damp, min(MOST_DAMPING, damp * inputs / moments.tokens))}
    return replace(method, **options)


def by_layer(rows: Iterable[LinearRow]) -> dict[str, dict[str, list[LinearRow]]]:
    """Group the rows of experts by layer and expert."""
    layers: dict[str, dict[str, list[LinearRow]]] = {}
    for row in rows:
        match = EXPERT.fullmatch(row.name)
        if match is not None:
            layers.setdefault(match[1], {}).setdefault(match[2], []).append(row)
    return layers


def told(rows: Iterable[LinearRow]) -> list[str]:
    """List sentences about linears of one block that no token reached, and experts that few did."""
    rows, events = list(rows), []
    why = "reached by no token, or by zeros only, and rounded to nearest"
    events += [f"{row.name} was {why}" for row in rows if row.rounded and EXPERT.fullmatch(row.name) is None]
    for layer, experts in by_layer(rows).items():
        rounded = {e: e for e, of in experts.items() if any(row.rounded for row in of)}
        few = {
            e: f"{e} ({min(row.tokens for row in of)})"
            for e, of in experts.items()
            if e not in rounded and any(0 < row.tokens < row.shape[1] for row in of)
        }
        if rounded:
            events.append(f"{layer}: {_some(rounded, experts, why)}")
        if few:
            why = "shown fewer tokens than they have inputs, and damped by count"
            events.append(f"{layer}: {_some(few, experts, why)} (tokens)")
    return events


def _some(named: dict[str, str], experts: dict[str, list[LinearRow]], why: str) -> str:
    words: Sequence[str] = list(named.values())
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return f"{len(words)} of {len(experts)} experts were {why}: {', '.join(words[:NAMED])}{more}"
