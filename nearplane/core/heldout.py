"""A trial: some rows of a linear, on which the held-out tokens judge what the others propose.

What a choice is worth shows only on tokens that had no part in it. Rows of a linear share their input and differ in
nothing else, so a few hundred of them, evenly spaced, tell of all.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.factor import Factor
from nearplane.core.grid import Grid, Quantized, dequantize, fit_groups, round_to_nearest
from nearplane.core.moments import Moments
from nearplane.core.target import pull


class Trial:
    """About ``rows`` rows of ``weight`` (out, in), and what the held-out tokens ask of them."""

    def __init__(self, weight: Float[Tensor, "out in"], moments: Moments, rows: int) -> None:
        self.moments, held = moments, moments.held_out()
        self.judges = held.tokens  # none: nothing can be judged
        self.rows = slice(None, None, max(1, -(-len(weight) // max(1, rows))))
        self.weight = weight[self.rows]
        self.H = held.H
        self.pull = pull(self.weight, held.D, None if held.R is None else held.R[self.rows])

    def fit_pull(self) -> Float[Tensor, "rows in"]:
        """The pull of the tokens that are not held out."""
        R = self.moments.fit("R")
        return pull(self.weight, self.moments.fit("D"), None if R is None else R[self.rows])

    def rounding(self, grid: Grid) -> Float[Tensor, "some in"]:
        """Errors of rounding every fourth of these rows to nearest: what errors look like before a sweep spreads them.

        They differ from row to row like noise, so that fewer do.
        """
        weight = self.weight[::4]
        scale, zero = fit_groups(weight, replace(grid, fit="minmax"))
        return dequantize(round_to_nearest(weight, scale, zero, grid), grid).sub_(weight)

    def spread(self, rounding: Float[Tensor, "some in"], factor: Factor) -> float:
        """Held-out loss of the error that a sweep with ``factor`` leaves, without sweeping: ε of each column's rounding
        ends as the error ``ε T⁻¹`` of the weight."""
        error = torch.empty_like(rounding)
        error[:, factor.order] = torch.linalg.solve_triangular(
            factor.feedback, rounding[:, factor.order], upper=True, left=False, unitriangular=True
        )
        return float((error @ self.H).mul_(error).sum(dtype=torch.float64))

    def loss(self, solved: Quantized, grid: Grid) -> float:
        """``‖Q X̂ - W X - R‖²`` of these rows over the held-out tokens, less what no Q changes; lower is better.

        ``solved`` is the whole linear, or these rows of it.
        """
        if len(solved.codes) != len(self.weight):
            solved = solved.rows(self.rows)
        delta = dequantize(solved, grid).to(self.weight.dtype).sub_(self.weight)
        gradient = (delta @ self.H).sub_(self.pull, alpha=2)
        return float(gradient.mul_(delta).sum(dtype=torch.float64))
