"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): sweep on W.

Differs from the published code in: (1) the factor needs no inverse; (2) order=activation keeps groups contiguous on
disk (desc_act=false, static groups); (3) a dead input column keeps its weight, rounded, instead of being zeroed.
"""

from dataclasses import dataclass

from nearplane.core.factor import column_cost
from nearplane.core.moments import Moments
from nearplane.methods.base import Need, Prepared, Sweeping


@dataclass(frozen=True)
class GPTQ(Sweeping):
    """The sweep: round a column, push its error into the columns not yet rounded."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"H"})

    def prepare(self, moments: Moments) -> Prepared:
        """Factor H, once for all linears that read this input."""
        factor = self._factor(moments)
        return Prepared(factor, column_cost(moments.H, factor))
