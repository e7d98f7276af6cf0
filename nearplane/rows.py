"""Which rank solves which rows of a stage: some each where they are independent, else one rank all, in turn.

What is solved is sent to all ranks, and an error is raised by all.
"""

from typing import Any

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.grid import Certificate, Grid, Quantized
from nearplane.methods.base import Method, rows_independent
from nearplane.ranks import Ranks


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
