"""Bits chosen by a budget: the cost of every width is measured on the original model before the run.

One walk, one stream: every stage is observed once and solved by GPTQ at every width, with the damping of the run's
method. Each answer is put in place by itself, some batches run through the block, and its error is what the residual stream
behind the block loses, relative to the stream: ‖ĥ-h‖²/‖h‖², the mean over tokens. The choice makes the sum over all
units least. It is a stand-in: errors of other units are not in it, nor what later blocks make of this one. The error
of a linear's own output would not do: it says nothing of how much of the stream that output is, and summed over tokens
it is that of a few attention sinks. Where the method reads no data the choice reads none either: linears are rounded to
nearest, and the error is ‖Q-W‖²/‖W‖².
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nearplane.core.errors import NumericalError, SettingError
from nearplane.core.grid import Grid, Quantized
from nearplane.machine.ranks import Ranks
from nearplane.methods import GPTQ, RTN
from nearplane.models.discover import Site, Stage
from nearplane.run.measure import Clock
from nearplane.run.mix import JUDGED, choose
from nearplane.run.plan import Plan
from nearplane.run.stage import prepare_stage, solve
from nearplane.run.stream import OpenBlock, batch_rows


def decide(plan: Plan, records: Sequence[dict[str, Any]], ranks: Ranks, tick: Callable[[], None]) -> Plan:
    """Return the plan with its bits chosen: taken from the finished blocks of an earlier run, or measured now.

    ``records``: what rank 0 knows of that run. ``tick`` is called after every stage, by all ranks.
    """
    if not plan.undecided:
        return plan
    known = ranks.tell([record["run"].get("choices") for record in records[:1]])
    if known:  # of a run without a budget none: resuming refuses it
        return plan if known[0] is None else plan.decided(known[0])
    costs = _measure(plan, ranks, tick)
    return plan.decided(ranks.tell(choose(plan.units, costs, plan.counted, plan.grids, plan.job, plan.format)))


def measuring(plan: Plan) -> Plan:
    """Return the plan of the walk that measures: GPTQ, or RTN without data."""
    damp = getattr(plan.method, "damp_percent", GPTQ().damp_percent)
    return plan.changed(method=GPTQ(damp_percent=damp) if plan.method.needs else RTN())


class Candidate(NamedTuple):
    """A linear, solved on one grid."""

    site: Site
    grid: Grid
    quantized: Quantized


def _measure(plan: Plan, ranks: Ranks, tick: Callable[[], None]) -> list[dict[int, float]]:
    """Measure the cost of every width for each unit."""
    walk, costs = measuring(plan), [dict[int, float]() for _ in plan.units]
    unit_of = {site.name: i for i, unit in enumerate(plan.units) for site in unit.sites}
    for block in walk.stream(ranks):
        before, found = outputs(block), dict[int, dict[int, list[Candidate]]]()
        for stage in block.stages:
            ranks.at(stage[0].name)
            free = [site for site in stage if site.name in unit_of]
            if free:
                i = unit_of[free[0].name]
                unit, candidates = plan.units[i], found.setdefault(i, {})
                try:
                    solve_widths(walk, block, stage, free, unit.widths, candidates, ranks)
                except (NumericalError, SettingError) as error:
                    raise type(error)(f"{stage[0].name}: {error}") from error
                if len(candidates[unit.widths[0]]) == len(unit.sites):
                    costs[i] = _judge(block, found.pop(i), before, ranks)
            tick()
    return costs


def solve_widths(
    walk: Plan,
    block: OpenBlock,
    stage: Stage,
    free: Stage,
    widths: tuple[int, ...],
    candidates: dict[int, list[Candidate]],
    ranks: Ranks,
) -> None:
    """Add the free linears of a stage, solved at each width, to the ``candidates``."""
    ready = prepare_stage(walk, block, stage, Clock())
    for own, sites in walk.parts(free):
        solver, grid = ready.on(own)
        stacked = torch.cat([block.weight(site) for site in sites])
        for bits in widths:
            chosen, done = replace(grid, bits=bits), 0
            solved = solve(ranks, solver, stacked, ready.state, chosen, number=0)
            for site in sites:
                part = solved.rows(slice(done, done := done + site.shape[0]))
                candidates.setdefault(bits, []).append(Candidate(site, chosen, part))


def _judge(
    block: OpenBlock, candidates: dict[int, list[Candidate]], before: dict[int, Tensor], ranks: Ranks
) -> dict[int, float]:
    """Measure the cost of each width; the weights are left as they were."""
    originals = [(some.site, block.weight(some.site).clone()) for some in next(iter(candidates.values()))]
    costs = {}
    for bits, chosen in candidates.items():
        for some in chosen:
            block.replace(some.site, some.quantized, some.grid)
        costs[bits] = lost(block, before, ranks) if block.walk.streams else _moved(block, originals)
        for site, weight in originals:
            site.weight(block.walk.source.model).copy_(weight)
    return costs


def outputs(block: OpenBlock) -> dict[int, Tensor]:
    """Run every fourth batch through the block; return its hidden states by batch."""
    walk = block.walk
    step = batch_rows(walk.positions) if walk.batches else 1
    return {i: block.output(i) for i, first in enumerate(walk.firsts) if first // step % JUDGED == 0}


def lost(block: OpenBlock, before: dict[int, Tensor], ranks: Ranks) -> float:
    """Return ``‖ĥ-h‖²/‖h‖²`` of the stream behind the block, the mean over tokens whose share is finite."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch, h in before.items():
        energy, moved = h.double().square().sum(-1), (block.output(batch) - h).double().square().sum(-1)
        shares = moved / energy
        shares = shares[shares.isfinite()]
        total += torch.tensor([float(shares.sum()), shares.numel()], dtype=torch.float64)
    whole, tokens = ranks.total(total).tolist()
    return whole / tokens if tokens else 0.0


def _moved(block: OpenBlock, originals: list[tuple[Site, Tensor]]) -> float:
    """Return ``‖Q-W‖²/‖W‖²``, summed over the linears."""
    pairs = [(block.weight(site) - weight, weight) for site, weight in originals]
    energies = [(float(delta.square().sum()), float(weight.square().sum())) for delta, weight in pairs]
    return sum(delta / weight if weight > 0 else 0.0 for delta, weight in energies)
