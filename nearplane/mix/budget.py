"""Bits by a budget: what every width would cost each linear's output, measured on the original model before the run.

One walk, one stream, nothing rounded: every stage is observed once and solved by GPTQ at every width, with the damping
of the run's method. The error of a linear is ‖(Q-W)X‖²/‖WX‖², and the choice makes the sum over all linears least. It is a
stand-in: errors of earlier blocks are not in X, and every linear weighs the same whatever the model makes of its output.
Where the method reads no data the choice reads none either: linears are rounded to nearest, and the error is ‖Q-W‖²/‖W‖².
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import dequantize
from nearplane.methods import GPTQ, RTN
from nearplane.mix.choices import choose
from nearplane.models.discover import Stage
from nearplane.plan import Plan
from nearplane.ranks import Ranks
from nearplane.report import energy
from nearplane.stream import OpenBlock


def decide(
    plan: Plan, records: Sequence[dict[str, Any]], ranks: Ranks, offload: Path | None, tick: Callable[[], None]
) -> Plan:
    """The plan with its bits chosen: as the finished blocks of an earlier run have them, or measured now.

    ``records``: what rank 0 knows of that run. ``tick`` is called after every stage, by all ranks.
    """
    if not plan.undecided:
        return plan
    known = ranks.tell([record["run"].get("choices") for record in records[:1]])
    if known:  # of a run without a budget none: resuming refuses it
        return plan if known[0] is None else plan.decided(known[0])
    errors = _measure(plan, ranks, offload, tick)
    by_unit = [
        {bits: sum(errors[site.name][bits] for site in unit.sites) for bits in unit.widths} for unit in plan.units
    ]
    return plan.decided(ranks.tell(choose(plan.units, by_unit, plan.sites, plan.grids, plan.mix, plan.format)))


def measuring(plan: Plan) -> Plan:
    """The plan of the walk that measures."""
    damp = getattr(plan.method, "damp_percent", GPTQ().damp_percent)
    return replace(plan, method=GPTQ(damp_percent=damp) if plan.method.needs else RTN())


def _measure(plan: Plan, ranks: Ranks, offload: Path | None, tick: Callable[[], None]) -> dict[str, dict[int, float]]:
    """The error of each linear at each width."""
    widths = {site.name: unit.widths for unit in plan.units for site in unit.sites}
    walk, errors = measuring(plan), dict[str, dict[int, float]]()
    for block in walk.stream(offload, ranks):
        for stage in block.stages:
            ranks.at(stage[0].name)
            free = [site for site in stage if site.name in widths]
            try:
                if free:
                    errors |= _measure_stage(walk, block, stage, free, widths[free[0].name], ranks)
            except (NumericalError, SettingError) as error:
                raise type(error)(f"{stage[0].name}: {error}") from error
            tick()
    return errors


def _measure_stage(
    walk: Plan, block: OpenBlock, stage: Stage, free: Stage, widths: tuple[int, ...], ranks: Ranks
) -> dict[str, dict[int, float]]:
    """Of each free linear; both methods solve rows independently, so that every rank solves and measures some."""
    state, H = None, None
    if walk.method.needs:
        moments = block.observe(stage, walk.method.needs)
        moments.rescale()
        moments.check()
        state, H = walk.method.prepare(moments), moments.H
    weights = {site.name: block.weight(site)[ranks.part(site.shape[0])] for site in free}
    powers = torch.zeros(len(free), 1 + len(widths), dtype=torch.float64)  # of each weight, and its error at each width
    for i, site in enumerate(free):
        powers[i, 0] = _power(weights[site.name], H)
    for grid, sites in walk.parts(free):
        stacked = torch.cat([weights[site.name] for site in sites])
        for j, bits in enumerate(widths if len(stacked) else (), 1):
            chosen, done = replace(grid, bits=bits), 0
            solved = walk.method.solve(stacked, state, chosen)
            for site in sites:
                weight = weights[site.name]
                delta = dequantize(solved.rows(slice(done, done := done + len(weight))), chosen).sub_(weight)
                powers[free.index(site), j] = _power(delta, H)
    found = ranks.total(powers).tolist()
    return {
        site.name: {bits: error / power if power > 0 else 0.0 for bits, error in zip(widths, row, strict=True)}
        for site, (power, *row) in zip(free, found, strict=True)
    }


def _power(weight: Tensor, H: Tensor | None) -> float:
    return float(weight.square().sum()) if H is None else energy(weight, H)
