"""The search for the range of a group: which scale and zero lose least, before any code is chosen.

Every function takes many groups at once, one per row, and rounds a scale as it will be stored before a weight is rounded
to it. ``core/grid.py`` says which groups there are and which measure is meant.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core import columns
from nearplane.core.levels import Levels
from nearplane.core.line import Line
from nearplane.core.scales import Scales

PerRow = Float[Tensor, "rows"]

# The search of the published GPTQ code (arXiv 2210.17323, "--mse"): shrink the range to 1 - i/100, i = 0..79,
# keep the least sum of |error|**2.4.
SHRINK_STEPS, SHRINK_GRAIN, MSE_NORM = 80, 100, 2.4
# The weighted search tries the middle of every five of these steps first, then the others of the best five.
COARSE = 5
# Scales tried beside a zero that was rounded the other way: 0.80, 0.88, ... 1.36 of the best scale.
BESIDE, BESIDE_GRAIN = range(20, 35, 2), 25
# Times that a scale, and a free offset beside it, is solved for the codes found.
POLISH = 3


def of_range(low: PerRow, high: PerRow, levels: Levels, scales: Scales, sign: int = 1) -> tuple[PerRow, PerRow]:
    """Return the scale and zero that cover [low, high]; an empty range gets scale 1."""
    scale = levels.scale(low, high)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scales.round(scale if sign > 0 else -scale, -low, levels)


def longer_side(rows: Float[Tensor, "rows n"], scale: PerRow, zero: PerRow, levels: Levels, scales: Scales) -> PerRow:
    """Let the last level of the longer side be each row's larger extreme, where the sum of squared errors is less."""
    low, high = levels.reach(zero)
    extreme = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    other = extreme / torch.where(-low > high, low, high)
    other = scales.nearest(torch.where(other == 0, scale, other))

    def error(scale: Tensor) -> Tensor:
        level = levels.decode(levels.encode_(rows / scale[:, None], zero[:, None]), rows.dtype)
        return level.sub_(zero[:, None]).mul_(scale[:, None]).sub_(rows).square_().sum(1)

    return torch.where(error(other) < error(scale), other, scale)


class _Best:
    """The scale and zero of least error among those considered, and the share of the range they were made of."""

    def __init__(
        self, rows: Tensor, levels: Levels, scales: Scales, importance: Tensor | None, start: tuple[Tensor, Tensor]
    ) -> None:
        self.rows, self.levels, self.scales, self.importance = rows, levels, scales, importance
        self.scale, self.zero = start
        self.error, self.p = torch.full_like(self.scale, torch.inf), torch.ones_like(self.scale)

    def consider(self, p: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take scale and zero where they lose less."""
        error = self._loss(scale, zero)
        better = error < self.error
        for kept, new in ((self.error, error), (self.p, p), (self.scale, scale), (self.zero, zero)):
            torch.where(better, new, kept, out=kept)

    def _loss(self, scale: Tensor, zero: Tensor) -> Tensor:
        if self.importance is not None and columns.fits(self.levels, self.rows):
            return columns.weighted_errors(self.levels, self.rows, scale, zero, self.importance)
        missed = self._level(scale, zero).sub_(zero[:, None]).mul_(scale[:, None]).sub_(self.rows)
        if self.importance is None:  # |error|**2.4, in a third of the time that pow takes
            return missed.abs_().log2_().mul_(MSE_NORM).exp2_().sum(1)
        return missed.square_().mul_(self.importance).sum(1)

    def _level(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the levels of the nearest codes."""
        return self.levels.decode(self.levels.encode_(self.rows / scale[:, None], zero[:, None]), self.rows.dtype)

    def other_zero(self, low: Tensor, high: Tensor) -> None:
        """Try the other integer beside the exact zero, with scales around the best: one side of the range gets more.

        The exact zero is the same for every share of the range, so that shrinking alone never tries the other one.
        """
        exact, start = -low / self.levels.scale(low, high), self.scale.clone()
        other = (self.zero + torch.where(exact > self.zero, 1, -1)).clamp_(*self.levels.code_range)
        for size in BESIDE:
            self.consider(self.p, self.scales.nearest(start * (size / BESIDE_GRAIN)), other)

    def polish(self, low: Tensor, high: Tensor) -> None:
        """Try the range with 0 in it, then solve for scale and free offset by turns with the codes."""
        self.consider(self.p, *of_range(low.clamp(max=0), high.clamp(min=0), self.levels, self.scales))
        weight = torch.ones_like(self.rows) if self.importance is None else self.importance
        for _ in range(POLISH):
            code = self._level(self.scale, self.zero)
            line = Line.of(self.rows - (code - self.zero[:, None]) * self.scale[:, None], code, weight)
            scale = self.scale + line.scale()
            scale = self.scales.nearest(torch.where(scale > 0, scale, self.scale))
            offset = self.scale * self.zero + line.offset(scale - self.scale)
            self.consider(self.p, *self.scales.round(scale, offset, self.levels))

    def refit(self) -> None:
        """Solve for the scale by turns with the codes."""
        for _ in range(POLISH):
            steps = self._level(self.scale, self.zero).sub_(self.zero[:, None])
            wanted = (steps * self.rows).sum(1) / steps.square().sum(1)
            wanted = torch.where(wanted * self.scale > 0, wanted, self.scale)
            self.consider(self.p, self.scales.nearest(wanted), self.zero.clone())


def refit(
    rows: Float[Tensor, "rows n"], low: PerRow, high: PerRow, levels: Levels, scales: Scales
) -> tuple[PerRow, PerRow]:
    """Cover each row's range, and then move the scale, and a free offset, to least squares for the codes found.

    Where no data says which errors cost, a shrunk range loses more by its clipped weights than it gains: docs/method.md.
    """
    scale, zero = of_range(low, high, levels, scales)
    if scales.either_sign:
        scale = longer_side(rows, scale, zero, levels, scales)
    best = _Best(rows, levels, scales, torch.ones_like(rows), (scale, zero))
    best.consider(best.p, scale.clone(), zero.clone())
    if scales.free:
        best.polish(low, high)
    else:
        best.refit()
    return best.scale, best.zero


def search(
    rows: Float[Tensor, "rows n"],
    low: PerRow,
    high: PerRow,
    levels: Levels,
    scales: Scales,
    importance: Float[Tensor, "rows n"] | None,
) -> tuple[PerRow, PerRow]:
    """Shrink each row's range while its error falls; with an importance, look for a better zero, too.

    Args:
        rows: The groups.
        low: Where the range of a group begins.
        high: Where it ends.
        levels: The levels of the grid.
        scales: How scales and offsets are stored.
        importance: Weight of each squared error; None for the published search.

    Returns:
        The best scale and zero of each row.
    """
    best = _Best(rows, levels, scales, importance, of_range(low, high, levels, scales))
    # of the range, what is nearest to 0: the range shrinks to it
    near = low.clamp(min=0) + high.clamp(max=0) if scales.free else torch.zeros_like(low)

    def attempt(p: Tensor) -> None:
        for sign in (1, -1) if scales.either_sign else (1,):
            best.consider(p, *of_range(near + p * (low - near), near + p * (high - near), levels, scales, sign))

    tried: Iterable[int] = range(SHRINK_STEPS)
    if importance is not None:
        tried = (0, *range(COARSE // 2, SHRINK_STEPS, COARSE))
    for i in tried:
        attempt(torch.full_like(low, 1 - i / SHRINK_GRAIN))
    if importance is not None:
        middle = best.p.clone()
        for i in range(1, COARSE // 2 + 1):
            attempt(middle - i / SHRINK_GRAIN)
            attempt((middle + i / SHRINK_GRAIN).clamp_(max=1))
        if not (levels.sym or scales.free):
            best.other_zero(low, high)
    if scales.free:
        best.polish(low, high)
    return best.scale, best.zero
