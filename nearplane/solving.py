"""One stage: its input observed, the method prepared once, the rows of its weights solved, put in place, measured, written."""

import time
from typing import Any

import torch

from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import Grid
from nearplane.core.moments import Moments
from nearplane.formats.write import Writer
from nearplane.methods import Method
from nearplane.models.discover import Stage
from nearplane.plan import Plan
from nearplane.ranks import Ranks
from nearplane.report import LinearRow, Report, observed
from nearplane.rows import solve
from nearplane.scarce import damped, rounding, unseen
from nearplane.stream import OpenBlock


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
            tensors = plan.format.tensors(plan.disk_name(site.name), quantized, grid)
            report.bytes["quantized"] += sum(tensor.nbytes for tensor in tensors.values())
            writer.put(tensors)
    report.settle(sites[0].name, solved.course, rows[0])
    return rows
