"""RTN, round to nearest: every weight to its nearest grid point. No data; the baseline of all others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, by_column, encode, fit_groups
from nearplane.core.moments import Moments
from nearplane.methods.base import Need


@dataclass(frozen=True)
class RTN:
    """Round to nearest; reads no calibration data."""

    rows_independent: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def prepare(self, moments: Moments) -> None:
        """Nothing depends on the input."""

    def solve(self, weight: Float[Tensor, "out in"], state: None, grid: Grid) -> Quantized:
        """``Q = round(W)``."""
        scale, zero = fit_groups(weight, grid)
        s, z = (by_column(part, grid, weight.shape[1]) for part in (scale, zero))
        codes = encode(weight, s, z, grid)
        return Quantized(codes.to(torch.uint8), scale, zero.to(torch.uint8))
