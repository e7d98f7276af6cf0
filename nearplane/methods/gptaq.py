"""GPTAQ (Li et al. 2025, arXiv 2504.02692): GPTQ whose target also corrects the drift of earlier layers.

After column q is rounded every later target gains ``v_q P[q, :]``, with ``P = α striu(D Uᵀ) U`` (their eq. 15) and
``UᵀU = (H+λI)⁻¹``. With ``U = diag(d)^{-1/2} T⁻¹`` that is two triangular solves:

    P = α · striu(D T⁻ᵀ) diag(1/d) T⁻¹

Differs from the published code in: (1) variant="consistent" multiplies P by the compensated value v everywhere. The
published code (variant="released") does so inside a block of 128 columns, and takes the rounded columns across blocks:
its result depends on the block size. (2) H is damped once, not once per linear that shares it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import SettingError
from nearplane.core.factor import Factor, column_cost
from nearplane.core.moments import Moments
from nearplane.core.sweep import Push
from nearplane.methods.base import Need, Prepared, Sweeping

Variant = Literal["consistent", "released"]


def drift_push(factor: Factor, D: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Return ``striu(D Uᵀ) U`` in solve order: row q is ``D[q, q+1:] (H[q+1:, q+1:] + λI)⁻¹``."""
    D = D[factor.order[:, None], factor.order]
    # D T⁻ᵀ = X solves X Tᵀ = D; T = I + feedback, its unit diagonal implied.
    unit = factor.feedback
    half = torch.linalg.solve_triangular(unit.T, D, upper=False, left=False, unitriangular=True).triu_(1)
    half /= factor.pivots
    push: Tensor = torch.linalg.solve_triangular(unit, half, upper=True, left=False, unitriangular=True)
    return push


@dataclass(frozen=True)
class GPTAQ(Sweeping):
    """GPTQ with asymmetric calibration: matches the original model's output on the quantized model's input."""

    alpha: float = 0.25
    """Share of the drift term P."""
    variant: Variant = "consistent"
    """consistent: the compensated value drives P everywhere; released: as the published code does it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("consistent", "released"):
            raise SettingError(f"variant must be consistent or released; got {self.variant!r}.")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"H", "D"})

    def prepare(self, moments: Moments) -> Prepared:
        """Factor H and form P, once for all linears that read this input."""
        factor = self._factor(moments)
        matrix = drift_push(factor, moments.drift()).mul_(self.alpha)
        push = Push(matrix, "value" if self.variant == "consistent" else "code")
        return Prepared(factor, column_cost(moments.H, factor), push)
