"""The best scale and offset of a group whose codes are given: a quadratic in two unknowns, in closed form.

A group's values are ``s level - o``. While the codes stay, the squared error is a quadratic in the changes ``ds`` and
``do`` of scale and offset, whatever the metric: weights of columns while scales are fitted, the Hessian in refinement.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Below this share of its largest value the determinant is rounding error: all codes of the group are equal, or nearly.
SINGULAR = 1e-5


class Line(NamedTuple):
    """``cost(ds, do) = a ds² - 2 b ds do + c do² - 2 p ds + 2 q do``, for each of some groups."""

    a: Float[Tensor, "*groups"]  # <level, level>
    b: Float[Tensor, "*groups"]  # <level, 1>
    c: Float[Tensor, "*groups"]  # <1, 1>
    p: Float[Tensor, "*groups"]  # <error, level>, the error being weight - value
    q: Float[Tensor, "*groups"]  # <error, 1>

    @staticmethod
    def of(error: Tensor, level: Tensor, weight: Tensor) -> "Line":
        """Sum over the last dimension, errors weighted by column.

        Args:
            error: Weights minus values, (..., n).
            level: Level of each code, (..., n).
            weight: Weight of each squared error, broadcast to the others.
        """
        weighted = level * weight
        sums = (weighted * level).sum(-1), weighted.sum(-1), (weighted * error).sum(-1), (error * weight).sum(-1)
        return Line(sums[0], sums[1], weight.sum(-1).expand_as(sums[0]), sums[2], sums[3])

    def cost(self, ds: Tensor, do: Tensor) -> Tensor:
        """Return the change of the squared error."""
        return ds * (self.a * ds - 2 * (self.b * do + self.p)) + do * (self.c * do + 2 * self.q)

    def offset(self, ds: Tensor) -> Tensor:
        """Return the best change of the offset beside a change of the scale."""
        return torch.where(self.c > 0, (self.b * ds - self.q) / self.c, torch.zeros_like(ds))

    def scale(self) -> Tensor:
        """Return the best change of the scale, the offset's best beside it; 0 where the codes do not tell."""
        determinant = self.a * self.c - self.b * self.b
        told = determinant > SINGULAR * self.a * self.c
        return torch.where(told, (self.c * self.p - self.b * self.q) / determinant, torch.zeros_like(self.p))

    def stiffness(self) -> Tensor:
        """Return what a squared change of the scale costs where the offset follows."""
        return torch.where(self.c > 0, self.a - self.b * self.b / self.c, self.a).clamp_min(0)
