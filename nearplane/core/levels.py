"""Levels: the numbers, in units of the scale, that a weight may become. All rounding of weights happens here.

A code stands for a level, and a weight is ``scale * (level - zero)``. The solvers work with *steps*: a step is
``level - zero``, so that a weight is ``scale * step``. ``Levels.reach`` gives the least and greatest step of a group.

A new kind of level is one class here, or one ``Codebook``; every solver takes it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nearplane.core.errors import SettingError

Steps = Float[Tensor, "*shape"]
Ends = Float[Tensor, "*#shape"]  # of a group, in a shape that broadcasts with its steps
Column = Float[Tensor, "*#shape 1"]


class Levels(ABC):
    """The levels of a grid and the rounding to them.

    Methods whose names end in an underscore overwrite their first argument. None reads a value on the CPU, so that a
    CUDA graph can record them. Subclasses repeat the signatures with plain tensors: they run once per column, where
    checking shapes at run time would cost tests more than the arithmetic.
    """

    bits: int  # that one code takes on disk
    sym: bool  # whether every group has the same zero
    code_range: tuple[int, int]  # least and greatest code
    ends: tuple[float, float]  # least and greatest level
    count: int  # of different levels
    half_gap: float  # half the largest distance of neighbouring levels: rounding within reach moves no step further

    @abstractmethod
    def scale(self, low: Steps, high: Steps) -> Steps:
        """Return the scale with which the levels cover ``low`` (at most 0) to ``high`` (at least 0)."""

    @abstractmethod
    def zero(self, offset: Steps, scale: Steps) -> Steps:
        """Return the zero that stands nearest to ``offset / scale``; ``offset`` is minus the weight of level 0."""

    @abstractmethod
    def round_(self, steps: Steps, low: Ends, high: Ends) -> Steps:
        """Round to the nearest step within ``reach``, in place."""

    @abstractmethod
    def nearest(self, steps: Column, low: Column, high: Column, k: int) -> Float[Tensor, "*shape k"]:
        """Return the ``k`` nearest steps within ``reach``, ascending; ``k`` is at most ``count``."""

    @abstractmethod
    def clipped(self, steps: Steps, low: Ends, high: Ends) -> Bool[Tensor, "*shape"]:
        """Return where a step lies outside the levels' reach: rounding may move it by more than ``half_gap``."""

    @abstractmethod
    def encode_(self, steps: Steps, zero: Ends) -> Steps:
        """Return the code of the step nearest to each of ``steps``, overwriting them."""

    @abstractmethod
    def decode(self, codes: Shaped[Tensor, "*shape"], dtype: torch.dtype) -> Steps:
        """Return the level of each code; for integer levels this may be ``codes`` itself."""

    def reach(self, zero: Steps) -> tuple[Steps, Steps]:
        """Return the least and the greatest step of groups with these zeros."""
        low, high = self.ends
        return low - zero, high - zero


@dataclass(frozen=True)
class Uniform(Levels):
    """Consecutive integers, each its own level. ``Uniform(2, 1, 3)`` is ternary: {-1, 0, 1} around the zero 2."""

    bits: int = 4
    least: int = 0
    greatest: int = 15
    sym: bool = True

    def __post_init__(self) -> None:
        ends, count = (float(self.least), float(self.greatest)), self.greatest - self.least + 1
        vars(self).update(code_range=(self.least, self.greatest), ends=ends, count=count, half_gap=0.5)

    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        if self.sym:
            high = torch.maximum(-low, high)
            low = -high
        return (high - low) / (self.greatest - self.least)

    def zero(self, offset: Tensor, scale: Tensor) -> Tensor:
        if self.sym:
            return torch.full_like(scale, 2 ** (self.bits - 1))
        return (offset / scale).round_().clamp_(self.least, self.greatest)

    def round_(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return steps.round_().clamp_(low, high)

    def nearest(self, steps: Tensor, low: Tensor, high: Tensor, k: int) -> Tensor:
        first = (steps - (k - 1) / 2).round_().clamp_(low, high - (k - 1))
        return first + torch.arange(k, device=steps.device)

    def clipped(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        free = steps.round()
        return (free < low) | (free > high)

    def encode_(self, steps: Tensor, zero: Tensor) -> Tensor:
        # Ties go to the even step, so the zero is added afterwards. Clamping to two numbers is faster than to tensors.
        return steps.round_().add_(zero).clamp_(self.least, self.greatest)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


@dataclass(frozen=True)
class Shifted(Uniform):
    """Consecutive integers around a zero that is any real number; ``Uniform`` rounds steps to integers, this the codes."""

    sym: bool = False

    def zero(self, offset: Tensor, scale: Tensor) -> Tensor:
        return offset / scale

    def round_(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return steps.sub_(low).round_().clamp_(0, self.count - 1).add_(low)

    def nearest(self, steps: Tensor, low: Tensor, high: Tensor, k: int) -> Tensor:
        first = (steps - low - (k - 1) / 2).round_().clamp_(0, self.count - k)
        return first + torch.arange(k, device=steps.device) + low

    def clipped(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        free = (steps - low).round_()
        return (free < 0) | (free >= self.count)

    def encode_(self, steps: Tensor, zero: Tensor) -> Tensor:
        return steps.add_(zero).round_().clamp_(self.least, self.greatest)


class _Tables(NamedTuple):
    """A codebook's tables on one device."""

    borders: Float[Tensor, "windows_less_1"]  # where the window of the k nearest levels moves on by one
    levels: Float[Tensor, "count"]  # ascending
    codes: Float[Tensor, "count"]  # the code of each of ``levels``
    values: Float[Tensor, "codes"]  # the level of each code


@dataclass(frozen=True)
class Codebook(Levels):
    """Any levels, the same for all groups, around a zero of 0. A tie goes to the lower level."""

    name: str
    values: tuple[float, ...]
    """The level of each code. Of two codes with one level the smaller is used."""

    def __post_init__(self) -> None:
        if not 3 <= len(self.values) <= 256 or not min(self.values) < 0 < max(self.values):
            raise SettingError(f"a codebook has 3 to 256 levels, some below and some above 0; got {self.values}.")
        levels, last = sorted(set(self.values)), len(self.values) - 1
        gap = max(b - a for a, b in pairwise(levels))
        vars(self).update(bits=last.bit_length(), sym=True, code_range=(0, last), ends=(levels[0], levels[-1]))
        vars(self).update(count=len(levels), half_gap=gap / 2)

    def scale(self, low: Tensor, high: Tensor) -> Tensor:
        least, greatest = self.ends
        return torch.maximum(low / least, high / greatest)

    def zero(self, offset: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(scale)

    def round_(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        table = _tables(self, 1, steps.dtype, steps.device)
        return torch.take(table.levels, torch.bucketize(steps.contiguous(), table.borders), out=steps)

    def nearest(self, steps: Tensor, low: Tensor, high: Tensor, k: int) -> Tensor:
        table = _tables(self, k, steps.dtype, steps.device)
        first = torch.bucketize(steps.contiguous(), table.borders)
        return torch.take(table.levels, first + torch.arange(k, device=steps.device))

    def clipped(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return (steps < low - self.half_gap) | (steps > high + self.half_gap)

    def encode_(self, steps: Tensor, zero: Tensor) -> Tensor:
        table = _tables(self, 1, steps.dtype, steps.device)
        return torch.take(table.codes, torch.bucketize(steps.contiguous(), table.borders), out=steps)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.take(_tables(self, 1, dtype, codes.device).values, codes.long())


@cache  # never emptied: a recorded CUDA graph reads its tables where they are
def _tables(book: Codebook, k: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    """Return the tables with which the ``k`` nearest of a codebook's levels are found."""
    code: dict[float, int] = {}
    for number, value in enumerate(book.values):
        code.setdefault(value, number)
    levels = sorted(code)
    # The k nearest levels are neighbours. Beyond the middle of its first level and the next one, a window moves on.
    borders = [(a + b) / 2 for a, b in zip(levels, levels[k:], strict=False)]
    parts = (borders, levels, [code[level] for level in levels], book.values)
    return _Tables(*(torch.tensor(part, dtype=dtype, device=device) for part in parts))


# QLoRA's NormalFloat (arXiv 2305.14314, appendix E): quantiles of a normal distribution, with an exact 0.
NF4 = Codebook(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
# The 4-bit float E2M1 of OCP's Microscaling formats: a sign, two bits of exponent, one of mantissa.
FP4 = Codebook("fp4", tuple(sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)))
