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
from nearplane.report import energy
from nearplane.scarce import damped, rounding, unseen
from nearplane.stream import OpenBlock


def decide(plan: Plan, records: Sequence[dict[str, Any]], offload: Path | None, tick: Callable[[], None]) -> Plan:
    """The plan with its bits chosen: as the finished blocks of an earlier run have them, or measured now.

    ``tick`` is called after every stage.
    """
    if not plan.undecided:
        return plan
    if records:  # of a run without a budget none: resuming refuses it
        kept = records[0]["run"].get("choices")
        return plan if kept is None else plan.decided(kept)
    errors = _measure(plan, offload, tick)
    by_unit = [
        {bits: sum(errors[site.name][bits] for site in unit.sites) for bits in unit.widths} for unit in plan.units
    ]
    return plan.decided(choose(plan.units, by_unit, plan.sites, plan.grids, plan.mix, plan.format))


def measuring(plan: Plan) -> Plan:
    """The plan of the walk that measures."""
    damp = getattr(plan.method, "damp_percent", GPTQ().damp_percent)
    return replace(plan, method=GPTQ(damp_percent=damp) if plan.method.needs else RTN())


def _measure(plan: Plan, offload: Path | None, tick: Callable[[], None]) -> dict[str, dict[int, float]]:
    """The error of each linear at each width."""
    widths = {site.name: unit.widths for unit in plan.units for site in unit.sites}
    walk, errors = measuring(plan), dict[str, dict[int, float]]()
    for block in walk.stream(offload):
        for stage in block.stages:
            free = [site for site in stage if site.name in widths]
            try:
                if free:
                    _measure_stage(walk, block, stage, free, widths[free[0].name], errors)
            except (NumericalError, SettingError) as error:
                raise type(error)(f"{stage[0].name}: {error}") from error
            tick()
    return errors


def _measure_stage(
    walk: Plan,
    block: OpenBlock,
    stage: Stage,
    free: Stage,
    widths: tuple[int, ...],
    errors: dict[str, dict[int, float]],
) -> None:
    state, H, method = None, None, walk.method
    moments = block.observe(stage, method.needs) if method.needs else None
    if moments and not unseen(stage, moments):
        moments.rescale()
        moments.check()
        method = damped(method, stage, moments)
        state, H = method.prepare(moments), moments.H
    for own, sites in walk.parts(free):
        method, grid = rounding(own) if moments and H is None else (method, own)
        weights = [block.weight(site) for site in sites]
        stacked = torch.cat(weights)
        for bits in widths:
            chosen, done = replace(grid, bits=bits), 0
            solved = method.solve(stacked, state, chosen)
            for site, weight in zip(sites, weights, strict=True):
                delta = dequantize(solved.rows(slice(done, done := done + len(weight))), chosen).sub_(weight)
                power = _power(weight, H)
                errors.setdefault(site.name, {})[bits] = _power(delta, H) / power if power > 0 else 0.0


def _power(weight: Tensor, H: Tensor | None) -> float:
    return float(weight.square().sum()) if H is None else energy(weight, H)
