"""Choosing the scales of input channels before the run (``--scale awq``): one walk over the original model, one stream.

Every block is opened once. Its folds are found by interventions (``transforms/folds.py``), the first time that a block has this
structure, and one forward proves those of each block. Inputs are measured over all samples: H and the mean of |x|.
The search follows from these and the weights. The scaled model is a view of the source, as a rotated one is, and the run
goes on with that. Factors are kept in OUT until the run is finished, so that a resumed run has the same ones.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.grid import Grid, Quantized, fit_groups, round_to_nearest
from nearplane.core.moments import Moments
from nearplane.formats.journal import STATE, sync
from nearplane.machine.ranks import Ranks
from nearplane.methods.base import Need
from nearplane.models.discover import Site, structure
from nearplane.models.inputs import is_causal
from nearplane.run.plan import Plan
from nearplane.run.stage import unseen
from nearplane.run.stream import OpenBlock
from nearplane.transforms.folds import Fold, Found, Interventions
from nearplane.transforms.roles import Norm, logits
from nearplane.transforms.rotation import prove
from nearplane.transforms.scaling import Scaled, describe, digest, scaled_source, search, stored_exactly

KEPT = "scales.safetensors"
NEEDS: frozenset[Need] = frozenset({"H", "magnitude"})
UNSEEN = "no token reached it, or only zeros"
# Linears that a sentence names one by one.
MOST_NAMED = 6


@dataclass(frozen=True)
class Searching:
    """What the search costs, in the form of a method: ``plan`` probes it as it probes methods."""

    @property
    def needs(self) -> frozenset[Need]:
        return NEEDS

    def prepare(self, moments: Moments) -> Moments:
        return moments

    def solve(self, weight: Tensor, state: Moments, grid: Grid) -> Quantized:
        search(Fold("", None, torch.arange(weight.shape[1]), ()), [(weight, grid)], state)
        return round_to_nearest(weight, *fit_groups(weight, replace(grid, fit="minmax")), grid)


class Scales(NamedTuple):
    """All that was found: the scaled folds, and sentences for the report."""

    found: list[Scaled]
    told: list[str]


def searching(plan: Plan) -> Plan:
    """Return the plan of the walk that measures."""
    return plan.changed(method=Searching(), scale="none", check=False, tune=0, activations=None)


def scale(plan: Plan, out: Path | None, done: bool, ranks: Ranks, tick: Callable[[], None]) -> tuple[Plan, list[str]]:
    """Return the plan of the scaled model, and sentences about what was scaled and what was not.

    Args:
        plan: complete.
        out: the folder that keeps the factors, on rank 0.
        done: whether an earlier session has finished blocks, on rank 0: its factors are read again.
        ranks: the processes that share the run.
        tick: called after every block, by all ranks.

    Raises:
        SettingError: nothing of the model can be scaled.
        NumericalError: the scaled model is another model.
    """
    scales = ranks.tell(kept(out) if out is not None and done else None)
    if scales is not None:
        return replace(plan, source=scaled_source(plan.source, scales.found)), scales.told
    scales = measure(plan, ranks, tick)
    if not scales.found:
        why = next(iter(scales.told), "it has no linears to quantize")
        raise SettingError(f"no input of {plan.source.name} can be scaled ({why}); use --scale none.")
    view = scaled_source(plan.source, scales.found)
    if is_causal(plan.source.model):
        error = prove(view, logits(plan.source, plan.device), plan.device, "with scaled channels", "Use --scale none.")
        scales.told.insert(0, f"channels are scaled (awq); the model's logits and the original's agree to {error:.1e}")
    else:
        kind = type(plan.source.model).__name__
        scales.told.insert(
            0,
            f"channels are scaled (awq); a {kind} has no next-token logits, and no output of the whole model was compared; "
            "each block was tried with inputs scaled by powers of two, and computed the same",
        )
    if out is not None:
        keep(scales, out)
    return replace(plan, source=view), scales.told


def measure(plan: Plan, ranks: Ranks, tick: Callable[[], None]) -> Scales:
    """Walk over the original model, and choose the factors of every fold."""
    kinds: dict[Any, tuple[str, Found]] = {}
    scales = Scales([], [])
    for block in searching(plan).stream(ranks):
        ranks.at(block.block.name)
        found = ranks.tell(_folds(block, kinds, ranks), _owner(block, ranks))
        chosen = [_choose(plan, block, fold, ranks) for fold in found.folds]
        scales.found.extend(scaled for scaled in chosen if scaled is not None and scaled.alpha > 0)
        scales.told.extend(_tell(block, found, chosen))
        tick()
    return scales


def _owner(block: OpenBlock, ranks: Ranks) -> int:
    """Return the first rank that has samples."""
    return next((rank for rank, count in enumerate(ranks.values(len(block.walk.batches))) if count), 0)


def _folds(block: OpenBlock, kinds: dict[Any, tuple[str, Found]], ranks: Ranks) -> Found:
    """Find the folds of a block, on the rank that will tell the others: those of an earlier block of its structure, if exact."""
    if not block.stages or ranks.rank != _owner(block, ranks):
        return Found()
    model, name = block.walk.source.model, block.block.name
    interventions = Interventions(model, block.block, lambda: block.output(0))
    sites = tuple(site.name.removeprefix(name) for site in block.block.sites)
    kind = structure(model.get_submodule(name)), sites, block.block.handed > 0
    if kind in kinds:
        first, known = kinds[kind]
        found = known.below(first, name)
        if interventions.exact(found.folds):
            return found
    found = interventions.find()
    # Each alone is exact; two that share a norm or a linear are not, together.
    while found.folds and not interventions.exact(found.folds):
        last = found.folds.pop()
        found.left[last.readers] = f"{last.source} cannot be divided for it and for others"
    kinds[kind] = name, found
    return found


def _choose(plan: Plan, block: OpenBlock, fold: Fold, ranks: Ranks) -> Scaled | None:
    """Observe an input and choose its factors, on rank 0 for all; None where no token reaches the input."""
    sites = [site for site in block.block.sites if site.name in fold.readers]
    stage = next(stage for stage in block.stages if sites[0] in stage)
    moments = block.observe(stage, NEEDS)
    if unseen(moments):
        return None
    try:
        moments.rescale()
        moments.check()
        weights = [(block.weight(site), _grid(plan, site)) for site in sites]
        scaled = ranks.tell(ranks.first(lambda: search(fold, weights, moments)))
    except (NumericalError, SettingError) as error:
        raise type(error)(f"{sites[0].name}: {error}") from error
    assert scaled is not None
    return stored_exactly(scaled, plan.source, lambda disk: plan.source.written(disk, plan.dense))


def _grid(plan: Plan, site: Site) -> Grid:
    """Return the grid that a site's scales are searched for: of those that a budget may choose, the one nearest to it."""
    wanted = plan.job.budget
    grids = plan.possible(site)
    return grids[0] if wanted is None else min(grids, key=lambda grid: abs(grid.storage_bits - wanted))


def _tell(block: OpenBlock, found: Found, chosen: list[Scaled | None]) -> list[str]:
    """Describe what was done to a block, in a sentence."""
    if not block.stages:
        return []
    within = block.block.name + "."

    def names(some: tuple[str, ...]) -> str:
        return ", ".join(name.removeprefix(within) for name in some)

    done, left = [], dict[str, list[str]]()
    for fold, scaled in zip(found.folds, chosen, strict=True):
        if scaled is None:
            left.setdefault(UNSEEN, []).append(names(fold.readers))
        elif scaled.alpha == 0:
            left.setdefault("best as it is", []).append(names(fold.readers))
        else:
            made = fold.source.removeprefix(within)
            done.append(f"{names(fold.readers)} by alpha {scaled.alpha:g} through {made} (error x {scaled.share:.3f})")
    for readers, why in found.left.items():
        many = len(readers) > MOST_NAMED
        shown = f"{names(readers[:1])} and {len(readers) - 1} more" if many else names(readers)
        left.setdefault(why.replace(within, ""), []).append(shown)
    kept = [f"not scaled: {', '.join(some)} ({why})" for why, some in left.items()]
    return [f"{block.block.name}: {'; '.join((['scaled: ' + ', '.join(done)] if done else []) + kept)}"]


def keep(scales: Scales, out: Path) -> None:
    """Write the factors into the state of an unfinished run. NearplaneError where the disk refuses."""
    path = out / STATE / KEPT
    tensors = {f"{i}.rows": scaled.fold.rows.clone() for i, scaled in enumerate(scales.found)}
    tensors |= {f"{i}.factors": scaled.factors.clone() for i, scaled in enumerate(scales.found)}
    notes = {"folds": json.dumps([describe(scaled) for scaled in scales.found]), "told": json.dumps(scales.told)}
    try:
        save_file(tensors, path.with_suffix(".tmp"), metadata={**notes, "sum": digest(scales.found)})
        sync(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    except (OSError, SafetensorError) as error:
        raise NearplaneError(f"the scales of channels cannot be kept in {path} ({error}).") from error


def kept(out: Path) -> Scales | None:
    """Return the factors that an earlier session has kept; None if there are none, or damaged ones."""
    try:
        with safe_open(out / STATE / KEPT, "pt") as file:
            notes, found = file.metadata() or {}, list[Scaled]()
            for i, one in enumerate(json.loads(notes["folds"])):
                norm = None if one["norm"] is None else Norm(**one["norm"])
                fold = Fold(one["source"], norm, file.get_tensor(f"{i}.rows"), tuple(one["readers"]))
                found.append(Scaled(fold, one["alpha"], file.get_tensor(f"{i}.factors"), one["share"]))
            told = [str(word) for word in json.loads(notes["told"])]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return Scales(found, told) if digest(found) == notes.get("sum") else None
