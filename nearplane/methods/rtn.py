"""RTN, round to nearest: every weight goes to its nearest grid point. Reads no data; the baseline of all others."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, fit_groups, round_to_nearest
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
        """Prepare nothing."""

    def solve(self, weight: Float[Tensor, "out in"], state: None, grid: Grid) -> Quantized:
        """Fit the groups to the weight, and round every weight to nearest."""
        return round_to_nearest(weight, *fit_groups(weight, grid), grid)
