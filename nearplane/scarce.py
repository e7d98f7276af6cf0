"""Experts that few tokens reached: how they are solved, and what is told of it.

Decides what stands in for a Hessian that is hardly known. An expert shown fewer tokens than it has inputs has a singular
one, whose directions are as uncertain as tokens are missing: its damping is ``damp_percent`` times inputs over tokens, at
most 1. One that no token reached, or only zeros, is rounded to nearest. Both are named, in one line for each layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

from nearplane.core.grid import Grid
from nearplane.core.moments import Moments
from nearplane.methods import RTN
from nearplane.methods.base import Method
from nearplane.models.discover import Stage
from nearplane.models.experts import EXPERT
from nearplane.report import LinearRow

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
