"""Scales: how a format stores the scale and the offset of a group. Both are rounded before a code is chosen.

A code is the nearest one only for the scale it was chosen with. So the solvers work with scales as the checkpoint will
hold them. A new way to store scales is one class here; ``core/nested.py`` has the scales of K-quants.

A format that rounds some groups of a row together (sub-scales of a super-block) overrides ``round_rows`` and
``round_beside``, and sets ``joint``. A format whose offset is a number of its own, and no code, is ``free``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.levels import Levels, Steps

ScaleDtype = Literal["float32", "float16", "bfloat16"]
# The largest zero of a free offset, in steps. Beyond it, float32 no longer places a step well inside the bound of a sweep,
# and a 16-bit offset is coarser than the steps.
MOST_ZERO = 4096.0


class Scales(ABC):
    """The numbers that a scale and an offset may become."""

    joint: ClassVar[bool] = False
    """Whether groups of a row are rounded together; groups must be static then."""

    @property
    def free(self) -> bool:
        """Whether an offset is a number of its own: zeros are real numbers then, offsets in units of the scale."""
        return False

    @property
    def either_sign(self) -> bool:
        """Whether scales may be negative."""
        return False

    @property
    def held_in(self) -> ScaleDtype | None:
        """The dtype that holds these scales exactly; None: ``scale_dtype`` of the grid."""
        return None

    @abstractmethod
    def nearest(self, scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the nearest scales that can be stored: never 0, and Inf where a scale is too large."""

    def round(
        self, scale: Float[Tensor, "*shape"], offset: Float[Tensor, "*shape"], levels: Levels
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Round the scale and the offset of groups, each on its own; used while scales are fitted.

        Args:
            scale: Scales, above 0 unless ``either_sign``.
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

    def span(self, low: Steps, high: Steps) -> tuple[Steps, Steps]:
        """Return the range that a fit begins with, given the extremes of a group."""
        return low.clamp_(max=0), high.clamp_(min=0)

    def row_reason(self, columns: int, width: int) -> str | None:
        """Tell why rows of so many inputs cannot be stored in groups of ``width``; None if they can."""
        return None

    def fit_rows(
        self,
        groups: Float[Tensor, "out groups width"],
        scale: Float[Tensor, "out groups"],
        zero: Float[Tensor, "out groups"],
        levels: Levels,
        importance: Float[Tensor, "groups width"] | None,
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Round as ``round_rows`` does, where the weights may be looked at.

        Args:
            groups: The weights, a smaller last group filled with zeros.
            scale: Fitted scales.
            zero: Fitted zeros.
            levels: The levels of the grid.
            importance: Weight of each column's squared error, 0 where a group was filled; None: no search is asked for.
        """
        return self.round_rows(scale, zero)

    def round_beside(
        self, wanted: Float[Tensor, "out"], scale: Float[Tensor, "groups out"], group: int
    ) -> Float[Tensor, "out"]:
        """Round a better scale of one group while all other groups keep theirs.

        Args:
            wanted: The new scale of ``group`` in every row, of the sign of the old one.
            scale: The stored scales of all groups.
            group: The group that changes.
        """
        return self.nearest(wanted)

    def beside(self, scale: Float[Tensor, "groups out"], zero: Float[Tensor, "groups out"]) -> "Beside":
        """Return what one group may become while the others keep theirs; asked once a round of refinement.

        Args:
            scale: The stored scales of all groups, which the round then overwrites group by group.
            zero: Their zeros.
        """
        return Beside(self, scale)


class Beside:
    """What the scale and the offset of one group may become while the other groups keep theirs.

    Args:
        scales: Round a scale.
        scale: The stored scales of all groups, (groups, out).
    """

    def __init__(self, scales: Scales, scale: Tensor) -> None:
        self.scales, self.stored = scales, scale

    def scale(self, wanted: Float[Tensor, "out"], group: int) -> Float[Tensor, "out"]:
        """Return the nearest scale of this group; ``wanted`` has the sign of the old one."""
        return self.scales.round_beside(wanted, self.stored, group)

    def around(self, wanted: Float[Tensor, "out"], group: int) -> list[Float[Tensor, "out"]]:
        """Return scales worth trying, each with the best offset for it, where offsets are free."""
        return [self.scale(wanted, group)]

    def zero(self, offset: Float[Tensor, "out"], scale: Float[Tensor, "out"], group: int) -> Float[Tensor, "out"]:
        """Return the zero of the nearest offset that can be stored, where offsets are free."""
        return real_zero(offset, scale)


def real_zero(offset: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a stored offset in units of a stored scale, a float32 number whatever the dtype of the solver."""
    return (offset.float() / scale.float()).to(scale.dtype)


@dataclass(frozen=True)
class Stored(Scales):
    """Scales in a floating dtype, above 0 or of either sign."""

    dtype: ScaleDtype = "float32"
    signed: bool = False

    @property
    def either_sign(self) -> bool:
        return self.signed

    def nearest(self, scale: Tensor) -> Tensor:
        if self.signed:
            return keep_sign(rounded(scale.abs(), self.dtype).clamp_min(least_of(self.dtype)), scale)
        return rounded(scale, self.dtype).clamp_min(least_of(self.dtype))


@dataclass(frozen=True)
class Signed(Scales):
    """Scales in a floating dtype, of either sign: the sign says on which side of its zero the longer half of a grid lies."""

    dtype: ScaleDtype = "float16"
    kind: str = field(default="signed", init=False)

    @property
    def either_sign(self) -> bool:
        return True

    @property
    def held_in(self) -> ScaleDtype | None:
        return self.dtype

    def nearest(self, scale: Tensor) -> Tensor:
        return keep_sign(rounded(scale.abs(), self.dtype).clamp_min(least_of(self.dtype)), scale)


@dataclass(frozen=True)
class Affine(Scales):
    """A scale and an offset, each in a floating dtype: a weight is ``scale * code - offset``."""

    dtype: ScaleDtype = "float16"
    kind: str = field(default="affine", init=False)

    @property
    def free(self) -> bool:
        return True

    @property
    def held_in(self) -> ScaleDtype | None:
        return self.dtype

    def nearest(self, scale: Tensor) -> Tensor:
        return rounded(scale, self.dtype).clamp_min(least_of(self.dtype))

    def round(self, scale: Tensor, offset: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        offset = rounded(offset, self.dtype)
        scale = self.nearest(torch.maximum(scale, offset.abs() / MOST_ZERO))
        return scale, real_zero(offset, scale)

    def span(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high

    def offset(self, scale: Float[Tensor, "*shape"], zero: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the stored offsets of stored scales and their zeros: numbers of ``dtype``, in float32."""
        return rounded(scale.float() * zero.float(), self.dtype)

    def beside(self, scale: Tensor, zero: Tensor) -> Beside:
        return _AffineBeside(self, scale)


class _AffineBeside(Beside):
    """An offset of its own is stored in the dtype of the scale."""

    scales: Affine

    def zero(self, offset: Tensor, scale: Tensor, group: int) -> Tensor:
        most = MOST_ZERO * scale
        return real_zero(rounded(offset.clamp(-most, most), self.scales.dtype), scale)


@dataclass(frozen=True)
class PowerOfTwo(Scales):
    """Powers of two, 2^-126 to 2^127: the exponents of OCP's E8M0 that float32 holds exactly."""

    def nearest(self, scale: Tensor) -> Tensor:
        mantissa, _ = torch.frexp(scale)  # scale = mantissa * 2^k, mantissa in [0.5, 1); dividing by it is exact
        power = scale / 2 / mantissa
        power = torch.where(mantissa > 0.75, 2 * power, power).clamp_min_(2.0**-126)
        return power.masked_fill_(power > 2.0**127, torch.inf)


def rounded(value: Float[Tensor, "*shape"], dtype: ScaleDtype) -> Float[Tensor, "*shape"]:
    """Round to the nearest number of a dtype; the result is in the dtype of ``value``."""
    return value.to(getattr(torch, dtype)).to(value.dtype)


def least_of(dtype: ScaleDtype) -> float:
    """Return the least number above 0 that a scale may be."""
    info = torch.finfo(getattr(torch, dtype))
    # weights below 1e-4 are common enough to need the subnormals of float16
    return float(info.smallest_normal * (info.eps if dtype == "float16" else 1.0))


def keep_sign(size: Float[Tensor, "*shape"], like: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``size`` with the sign of ``like``, + where ``like`` is 0."""
    return torch.where(like < 0, -size, size)
