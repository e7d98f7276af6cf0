"""One stage: its input observed, the method prepared once, the rows of its weights solved, put in place, measured, written."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.grid import Certificate, Grid, Quantized
from nearplane.core.moments import Moments
from nearplane.formats.parts import Writer
from nearplane.machine.ranks import Ranks
from nearplane.methods import RTN
from nearplane.methods.base import Method, rows_independent
from nearplane.models.discover import Stage
from nearplane.models.experts import EXPERT
from nearplane.run.plan import Plan
from nearplane.run.report import LinearRow, Report, observed
from nearplane.run.stream import OpenBlock


def solve_stage(
    plan: Plan, block: OpenBlock, stage: Stage, writer: Writer | None, report: Report, ranks: Ranks
) -> list[LinearRow]:
    """Observe one stage's input, prepare once on every rank, solve the rows of all its weights on one grid together.

    Every rank puts the result in place and measures some of its rows; the one with the writer also writes it.
    """
    moments, state, rows, method = None, None, list[LinearRow](), plan.method
    where = stage[0].name
    ranks.at(where)
    try:
        if plan.method.needs:
            with report.timed("observe"):
                moments = block.observe(stage, plan.method.needs)
            if unseen(stage, moments):
                moments = None
            else:
                power = moments.rescale()
                moments.check()
                report.events += observed(where, moments, power)
                method = damped(method, stage, moments)
                with report.timed("prepare"):
                    state = method.prepare(moments)
        number = block.k * len(block.stages) + block.stages.index(stage)
        for grid, part in plan.parts(stage):
            where = part[0].name
            given = (method, grid) if moments or not plan.method.needs else rounding(grid)
            rows += _solve(plan, block, part, *given, moments, state, number, writer, report, ranks)
    except (NumericalError, SettingError) as error:
        raise type(error)(f"{where}: {error}") from error
    return rows


def _solve(
    plan: Plan,
    block: OpenBlock,
    sites: Stage,
    method: Method,
    grid: Grid,
    moments: Moments | None,
    state: Any,
    number: int,
    writer: Writer | None,
    report: Report,
    ranks: Ranks,
) -> list[LinearRow]:
    """Solve the rows of weights that share an input and a grid as one weight; replace, measure and write each.

    Only the rank with the writer writes.
    """
    start = time.perf_counter()
    with report.timed("solve"):
        stacked = torch.cat([block.weight(site) for site in sites])
        solved = solve(ranks, method, stacked, state, grid, number)
    seconds = (time.perf_counter() - start) / len(stacked)
    rows, done = [], 0
    for site in sites:
        part = slice(done, done := done + site.shape[0])
        weight, quantized = stacked[part], solved.rows(part)
        block.replace(site, quantized, grid)
        factor, spent = getattr(state, "factor", None), seconds * len(weight)
        with report.timed("measure"):
            rounded = bool(plan.method.needs) and moments is None
            rows.append(report.add(site.name, weight, quantized, grid, moments, factor, spent, ranks, rounded))
        if writer is None:
            continue
        with report.timed("write"):
            report.bytes["quantized"] += plan.format.nbytes(site.shape, grid)
            writer.put_quantized(plan.disk_name(site.name), quantized, grid)
    report.settle(sites[0].name, solved.course, rows[0])
    return rows


def solve(ranks: Ranks, method: Method, weight: Tensor, state: Any, grid: Grid, number: int) -> Quantized:
    """Stage ``number`` of a run: its rows split over the ranks where they are independent, else all by one rank, in turn."""
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
    """Whether a stage is of experts only, which may see few tokens or none."""
    return all(EXPERT.fullmatch(site.name) for site in stage)


def unseen(stage: Stage, moments: Moments) -> bool:
    """Whether nothing is known of an expert's input."""
    shown = moments.tokens + moments.dropped
    return is_expert(stage) and (shown == 0 or (moments.dropped == 0 and not bool(moments.H.diagonal().any())))


def damped(method: Method, stage: Stage, moments: Moments) -> Method:
    """The method for a stage, damped by the count of its tokens where an expert was shown fewer than it has inputs."""
    inputs, damp = stage[0].shape[1], getattr(method, "damp_percent", None)
    if not is_expert(stage) or not 0 < moments.tokens < inputs or damp is None or not is_dataclass(method):
        return method
    options: Any = {"damp_percent": max(damp, min(MOST_DAMPING, damp * inputs / moments.tokens))}
    return replace(method, **options)


def rounding(grid: Grid) -> tuple[Method, Grid]:
    """What an unseen expert is solved by: RTN, its ranges fitted without a Hessian."""
    return RTN(), replace(grid, fit="mse") if grid.fit == "hessian" else grid


def by_layer(rows: Iterable[LinearRow]) -> dict[str, dict[str, list[LinearRow]]]:
    """The rows of experts, by layer and expert."""
    layers: dict[str, dict[str, list[LinearRow]]] = {}
    for row in rows:
        match = EXPERT.fullmatch(row.name)
        if match is not None:
            layers.setdefault(match[1], {}).setdefault(match[2], []).append(row)
    return layers


def lines(rows: Iterable[LinearRow]) -> list[str]:
    """One line for the experts of a layer, in place of one for each stage."""
    found = []
    for layer, experts in by_layer(rows).items():
        of = [row for expert in experts.values() for row in expert]
        errors = [(row.error, row.rtn_error or 0.0, row.tokens) for row in of if row.error is not None]
        line = f"{layer} {len(experts)} experts, "
        if errors:
            worst = max(errors)
            line += f"the worst error {worst[0]:.4f} (rtn {worst[1]:.4f}) after {worst[2]} tokens, "
            line += f"{min(row.tokens for row in of)} to {max(row.tokens for row in of)} tokens"
        else:
            line += f"weight error {max(row.weight_error for row in of):.4f}"
        found.append(f"{line}  {sum(row.seconds for row in of):.1f}s")
    return found


def told(rows: Iterable[LinearRow]) -> list[str]:
    """Events about the experts among the rows of one block."""
    events = []
    for layer, experts in by_layer(rows).items():
        rounded = {e: e for e, of in experts.items() if any(row.rounded for row in of)}
        few = {
            e: f"{e} ({min(row.tokens for row in of)})"
            for e, of in experts.items()
            if e not in rounded and any(0 < row.tokens < row.shape[1] for row in of)
        }
        if rounded:
            why = "reached by no token, or by zeros only, and rounded to nearest"
            events.append(f"{layer}: {_some(rounded, experts, why)}")
        if few:
            why = "shown fewer tokens than they have inputs, and damped by count"
            events.append(f"{layer}: {_some(few, experts, why)} (tokens)")
    return events


def _some(named: dict[str, str], experts: dict[str, list[LinearRow]], why: str) -> str:
    words: Sequence[str] = list(named.values())
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return f"{len(words)} of {len(experts)} experts were {why}: {', '.join(words[:NAMED])}{more}"
