"""A trial: some rows of a linear, solved without the held-out tokens, which then judge.

What a choice is worth shows only on tokens that had no part in it. Rows of a linear share their input and differ in
nothing else, so a few hundred of them, evenly spaced, tell of all.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, dequantize
from nearplane.core.moments import Moments
from nearplane.core.target import pull


class Trial:
    """About ``rows`` rows of ``weight`` (out, in), and what each part of the tokens asks of them."""

    def __init__(self, weight: Float[Tensor, "out in"], moments: Moments, rows: int) -> None:
        held = moments.held_out()
        self.rows = slice(None, None, max(1, -(-len(weight) // max(1, rows))))
        self.weight = weight[self.rows]
        fit_R, held_R = (None if R is None else R[self.rows] for R in (moments.fit("R"), held.R))
        self.fit_pull = pull(self.weight, moments.fit("D"), fit_R)
        self.held_pull = pull(self.weight, held.D, held_R)
        self.held_H = held.H
        self.steps: dict[float, Tensor] = {}  # steps towards the target that these rows may take, by damping

    def loss(self, solved: Quantized, grid: Grid) -> float:
        """``‖Q X̂ - W X - R‖²`` of these rows over the held-out tokens, less what no Q changes; lower is better.

        ``solved`` is the whole linear, or these rows of it.
        """
        if len(solved.codes) != len(self.weight):
            solved = Quantized(solved.codes[self.rows], solved.scale[self.rows], solved.zero[self.rows])
        delta = dequantize(solved, grid).to(self.weight.dtype).sub_(self.weight)
        gradient = (delta @ self.held_H).sub_(self.held_pull, alpha=2)
        return float(gradient.mul_(delta).sum(dtype=torch.float64))
