"""A trial: some rows of a linear, on which the held-out tokens judge the choices that the other tokens propose.

The worth of a choice shows only on tokens that had no part in it. Rows of a linear share their input and differ in
nothing else, so a few hundred rows, evenly spaced, represent all.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.dense import coarse_product, unit_solve
from nearplane.core.factor import Factor
from nearplane.core.grid import Grid, Quantized, dequantize, fit_groups, round_to_nearest
from nearplane.core.moments import Moments
from nearplane.core.target import pull, row_shares, share_of


class Trial:
    """Some rows of a weight, with the moments and the pull of the held-out tokens.

    Pulls and errors are multiplied by the gain of their output, where moments have gains: the rows are judged together.

    Args:
        weight: The weight of the linear.
        moments: Moments with a held-out part.
        rows: Rows to take at most.
    """

    def __init__(self, weight: Float[Tensor, "out in"], moments: Moments, rows: int) -> None:
        self.moments, held = moments, moments.held_out()
        self.judges = held.tokens  # with 0 tokens nothing can be judged
        self.rows = slice(None, None, max(1, -(-len(weight) // max(1, rows))))
        self.weight = weight[self.rows]
        self.H = held.H
        self.gain = None if moments.gain is None else moments.gain[self.rows, None].to(weight.dtype)
        self.pull = self._pull(held.D, held.R)
        judges = [part for part in moments.sources if part.tokens]
        self.sources = [(part.H, self._pull(part.D, part.R)) for part in judges] if len(judges) > 1 else []
        """H and pull of each text's held-out tokens, where there are several texts."""

    def fit_pull(self) -> Float[Tensor, "rows in"]:
        """Return the pull of the tokens that are not held out."""
        return self._pull(self.moments.fit("D"), self.moments.fit("R"))

    def confirmed(self, step: Float[Tensor, "rows in"], *, by_row: bool = False) -> Float[Tensor, "#rows 1"]:
        """Return the share of a step, at most 1, behind which some text's held-out loss rises again; 1 where texts are one."""
        share = step.new_ones(len(step) if by_row else 1, 1)
        for H, wanted in self.sources:
            share = torch.minimum(share, row_shares(step, wanted, H) if by_row else share_of(step, wanted, H))
        return share

    def rounding(self, grid: Grid) -> Float[Tensor, "some in"]:
        """Return the errors of rounding every fourth of these rows to nearest: errors before a sweep spreads them.

        They differ from row to row like noise, so that fewer rows suffice.
        """
        weight = self.weight[::4]
        scale, zero = fit_groups(weight, replace(grid, fit="minmax"))
        error = dequantize(round_to_nearest(weight, scale, zero, grid), grid).sub_(weight)
        return error if self.gain is None else error.mul_(self.gain[::4])

    def spread(self, rounding: Float[Tensor, "some in"], factor: Factor) -> float:
        """Return the held-out loss that a sweep with ``factor`` would leave, without sweeping.

        The rounding errors ε of a sweep and the errors e of the weight are tied by ``e = ε T⁻¹``.
        """
        error = torch.empty_like(rounding)
        error[:, factor.order] = unit_solve(rounding.index_select(1, factor.order), factor.feedback)
        return float((error @ self.H).mul_(error).sum(dtype=torch.float64))

    def losses(self, solved: Quantized, grid: Grid) -> list[float]:
        """Return ``‖Q X̂ - W X - R‖²`` of these rows over each text's held-out tokens, up to constants; lower is better.

        Args:
            solved: The whole linear, or these rows of it.
            grid: The grid of ``solved``.
        """
        if len(solved.codes) != len(self.weight):
            solved = solved.rows(self.rows)
        delta = self._gained(dequantize(solved, grid).to(self.weight.dtype).sub_(self.weight))
        judges = self.sources or [(self.H, self.pull)]
        gradients = (coarse_product(delta, H).sub_(wanted, alpha=2) for H, wanted in judges)
        return [float(gradient.mul_(delta).sum(dtype=torch.float64)) for gradient in gradients]

    def _pull(self, D: Float[Tensor, "in in"] | None, R: Float[Tensor, "out in"] | None) -> Float[Tensor, "rows in"]:
        """Return the pull of some tokens' drift on these rows, gained."""
        return self._gained(pull(self.weight, D, None if R is None else R[self.rows]))

    def _gained(self, rows: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """Multiply each row by the gain of its output."""
        return rows if self.gain is None else rows * self.gain
