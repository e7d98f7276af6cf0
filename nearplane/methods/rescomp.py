"""ResComp (Li et al. 2026, arXiv 2604.07955): GPTQ or GPTAQ, plus a compensation-aware error.

After column q every later target gains ``(W_q - v_q) R[q, :]`` with ``R = α₂ striu((D+H) Uᵀ) U``. So the output of the
layer is matched to that of the original weights, not of the compensated ones. The sum with GPTAQ's ``v_q P[q, :]`` splits
into a push by the compensated value and one by the original weight:

    v_q (P - R) + W_q R    ->    Push(matrix=P - R, shift=R)

Differs from the published code as GPTAQ does (``methods/gptaq.py``). Across blocks the released form takes the rounded
columns at 2 bits ("org"). At 3 bits and more it takes the values before rounding, clamped to the group's range ("allw").
On GPTQ (base="gptq") there is no reference stream and D is zero.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import SettingError
from nearplane.core.factor import column_cost
from nearplane.core.grid import Grid, Quantized
from nearplane.core.moments import Moments
from nearplane.core.sweep import Push
from nearplane.methods.base import Need, Prepared, Sweeping
from nearplane.methods.gptaq import Variant, drift_push


@dataclass(frozen=True)
class ResComp(Sweeping):
    """GPTQ or GPTAQ with the compensation-aware error of each rounded column."""

    rows_independent: ClassVar[bool] = True
    alpha: float = 0.25
    """Share of GPTAQ's drift term P (base=gptaq)."""
    alpha2: float = 0.25
    """Share of the compensation-aware term R."""
    base: Literal["gptaq", "gptq"] = "gptaq"
    """The method it extends."""
    variant: Variant = "consistent"
    """consistent: the compensated value drives both terms everywhere; released: as the published code does it."""
    carry: Literal["auto", "org", "allw"] = "auto"
    """What the released form carries across blocks; auto is the published choice: org at 2 bits, allw above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, allowed in (
            ("base", ("gptaq", "gptq")),
            ("variant", ("consistent", "released")),
            ("carry", ("auto", "org", "allw")),
        ):
            if getattr(self, field) not in allowed:
                raise SettingError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"H", "D"}) if self.base == "gptaq" else frozenset({"H"})

    def prepare(self, moments: Moments) -> Prepared:
        """Factor H and form P and R, once for all linears that read this input."""
        factor = self._factor(moments)
        if self.base == "gptq":
            R = drift_push(factor, moments.H).mul_(self.alpha2)
            return Prepared(factor, column_cost(moments.H, factor), Push(-R, shift=R))
        R = drift_push(factor, moments.drift() + moments.H).mul_(self.alpha2)
        P = drift_push(factor, moments.drift()).mul_(self.alpha)
        return Prepared(factor, column_cost(moments.H, factor), Push(P.sub_(R), shift=R))

    def solve(self, weight: Float[Tensor, "out in"], state: Prepared, grid: Grid) -> Quantized:
        """Solve as ``Sweeping.solve``; the released carry depends on the bits."""
        if self.variant == "released" and state.push is not None:
            org = self.carry == "org" or (self.carry == "auto" and grid.storage_bits == 2)
            state = state._replace(push=replace(state.push, carry="code" if org else "clamped"))
        return super().solve(weight, state, grid)
