"""Scales: how a format stores the scale and the offset of a group. Both are rounded before a code is chosen.

A code is the nearest one only for the scale it was chosen with. So the solvers work with scales as the checkpoint will
hold them. A new way to store scales is one class here.

A format that rounds some groups of a row together (sub-scales of a super-block) overrides ``round_rows`` and
``round_beside``, and sets ``joint``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.levels import Levels

ScaleDtype = Literal["float32", "float16", "bfloat16"]


class Scales(ABC):
    """The numbers that a scale and an offset may become."""

    joint: ClassVar[bool] = False
    """Whether groups of a row are rounded together; groups must be static then."""

    @abstractmethod
    def nearest(self, scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the nearest scales that can be stored: never 0, and Inf where a scale is too large."""

    def round(
        self, scale: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"], levels: Levels
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Round the scale and the offset of groups, each on its own; used while scales are fitted.

        Args:
            scale: Scales, above 0.
            offset: What to subtract from ``scale * level``, in units of the weight.
            levels: Choose the zero where it is stored as a code.

        Returns:
            Scales as stored, and zeros: offsets as stored, in units of the scale.
        """
        scale = self.nearest(scale)
        return scale, levels.zero(offset, scale)

    def round_rows(
        self, scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Round the fitted scales and zeros of all groups of each row together; they are already ``round``'s."""
        return scale, zero

    def round_beside(
        self, wanted: Float[Tensor, "out"], scale: Float[Tensor, "groups out"], group: int
    ) -> Float[Tensor, "out"]:
        """Round a better scale of one group while all other groups keep theirs.

        Args:
            wanted: The new scale of ``group`` in every row, above 0.
            scale: The stored scales of all groups.
            group: The group that changes.
        """
        return self.nearest(wanted)


@dataclass(frozen=True)
class Stored(Scales):
    """Scales in a floating dtype."""

    dtype: ScaleDtype = "float32"

    def nearest(self, scale: Tensor) -> Tensor:
        stored: torch.dtype = getattr(torch, self.dtype)
        least = torch.finfo(stored).smallest_normal
        if stored == torch.float16:  # weights below 1e-4 are common enough to need its subnormals
            least *= torch.finfo(stored).eps
        return scale.to(stored).to(scale.dtype).clamp_min(least)


@dataclass(frozen=True)
class PowerOfTwo(Scales):
    """Powers of two, 2^-126 to 2^127: the exponents of OCP's E8M0 that float32 holds exactly."""

    def nearest(self, scale: Tensor) -> Tensor:
        mantissa, _ = torch.frexp(scale)  # scale = mantissa * 2^k, mantissa in [0.5, 1); dividing by it is exact
        power = scale / 2 / mantissa
        power = torch.where(mantissa > 0.75, 2 * power, power).clamp_min_(2.0**-126)
        return power.masked_fill_(power > 2.0**127, torch.inf)
