"""OBQ (Frantar & Alistarh 2022, arXiv 2208.11580): the ancestor of GPTQ, kept as the reference.

Per row: round the weight of least ``(w - q)² / [H⁻¹]_qq``, push its error optimally into the rest, eliminate the weight
from the inverse of the row, repeat. O(out · in³): small layers only. GPTQ is OBQ in one order for all rows.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import SettingError
from nearplane.core.factor import Factor, column_cost, factorize
from nearplane.core.grid import Grid, Quantized, by_column, decode, encode, fit_groups
from nearplane.core.moments import Moments
from nearplane.methods.base import Need

# The most multiply-adds, about ten minutes on two cores.
MOST_WORK = 2e12
# Rows are solved together while their inverses fit in about this many numbers: a cache holds them, which is faster than more.
CHUNK_NUMBERS = 1 << 19


class Inverse(NamedTuple):
    """The state of OBQ, prepared once per input."""

    factor: Factor  # of H + λI in natural order; its pivots certify that H is positive definite
    importance: Float[Tensor, "in"]  # column_cost
    inverse: Float[Tensor, "in in"]


@dataclass(frozen=True)
class OBQ:
    """Greedy optimal brain quantization, row by row; a reference for small layers."""

    rows_independent: ClassVar[bool] = True
    damp_percent: float = 0.01
    """Damping of the Hessian, as a fraction of its mean diagonal."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"H"})

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Return why a weight of this (out, in) is too large, or None; asked before a run starts."""
        work = shape[0] * shape[1] ** 3
        if work <= MOST_WORK:
            return None
        return (
            f"obq costs out·in³, {work:.0e} steps for a {shape[0]} x {shape[1]} layer; it is the reference for small "
            "layers. Use gptq, which is the same update in one order for all rows"
        )

    def prepare(self, moments: Moments) -> Inverse:
        """Invert ``H + λI``."""
        moments.check()
        factor = factorize(moments.H, damp_percent=self.damp_percent)
        unit = factor.feedback + torch.eye(len(moments.H), dtype=moments.H.dtype, device=moments.H.device)
        root = unit * factor.pivots.sqrt()  # upper, root @ root.T = H + λI
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        half = torch.linalg.solve_triangular(root, eye, upper=True)
        return Inverse(factor, column_cost(moments.H, factor), half.T @ half)

    def solve(self, weight: Float[Tensor, "out in"], state: Inverse, grid: Grid) -> Quantized:
        """Solve every row on static groups. SettingError for a weight that ``refuses`` names too large."""
        out, n = weight.shape
        reason = self.refuses((out, n))
        if reason is not None:
            raise SettingError(reason + ".")
        scale, zero = fit_groups(weight, grid, state.importance)
        codes = torch.empty(out, n, dtype=torch.uint8, device=weight.device)
        step = max(1, CHUNK_NUMBERS // n**2)
        for a in range(0, out, step):
            part = slice(a, a + step)
            s, z = (by_column(value[part], grid, n) for value in (scale, zero))
            codes[part] = eliminate(weight[part], state.inverse, s, z, grid)
        return Quantized(codes, scale, grid.stored_zero(zero))


def eliminate(
    weight: Float[Tensor, "rows in"],
    inverse: Float[Tensor, "in in"],
    scale: Float[Tensor, "rows in"],
    zero: Float[Tensor, "rows in"],
    grid: Grid,
) -> Float[Tensor, "rows in"]:
    """Eliminate the weights of every row greedily, all rows at once, each with its own inverse (arXiv 2208.11580, eq. 3).

    Args:
        weight: The rows.
        inverse: ``(H + λI)⁻¹``.
        scale: Scale of every weight.
        zero: Zero of every weight.
        grid: The levels.

    Returns:
        Codes, in the dtype of ``weight``.
    """
    rows, n = weight.shape
    w, inv = weight.clone(), inverse.expand(rows, n, n).clone()
    codes = torch.zeros_like(w)
    row = torch.arange(rows, device=w.device)
    left = torch.ones(rows, n, dtype=torch.bool, device=w.device)
    for _ in range(n):
        code = encode(w, scale, zero, grid)
        error = w - decode(code, scale, zero, grid)
        diagonal = inv.diagonal(dim1=1, dim2=2)
        q = (error.square() / diagonal).masked_fill_(~left, torch.inf).argmin(1)
        codes[row, q] = code[row, q]
        column, pivot = inv[row, q], diagonal[row, q].clone()
        w -= (error[row, q] / pivot)[:, None] * column
        inv -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        inv[row, q, q] = 1.0  # eliminated; keeps the division above finite
        left[row, q] = False
    return codes
