"""Refinement: from the sweep's answer downhill, by steps that are each exact and never raise the objective

    f(Q) = tr((W* - Q) A (W* - Q)ᵀ),   A = H + λI

Group by group, with everything else fixed: the scale of the group moves to the minimum of f, a parabola in one unknown.
Then the columns of the group move every code, in turn, to the grid point of least f. Arrays are (in, out) inside, so that
a column is contiguous.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core import columns
from nearplane.core.cuda_graph import Replay
from nearplane.core.dense import coarse
from nearplane.core.grid import Grid, Quantized
from nearplane.core.levels import Levels
from nearplane.core.line import Line
from nearplane.core.scales import Beside
from nearplane.core.sweep import PANEL

# Columns of a descent that are completed one by one.
DESCENT = 16


class Refinement:
    """The rounds on one weight. What a round moved is kept, so that the next one forms no product anew.

    Args:
        target: The weight to round towards, W*.
        A: The damped Hessian, less ``damp`` on its diagonal.
        solved: The answer to improve.
        grid: Its grid.
        slope: ``A (W* - Q)ᵀ``, (in, out), where the sweep gave it; overwritten.
        damp: What the diagonal of ``A`` lacks.
    """

    def __init__(
        self, target: Tensor, A: Tensor, solved: Quantized, grid: Grid, slope: Tensor | None = None, damp: float = 0.0
    ) -> None:
        self.A, self.damp, self.solved, self.grid, n = A, damp, solved, grid, target.shape[1]
        self.width = grid.group_width(n)
        self.groups = [(g, slice(a, min(a + self.width, n))) for g, a in enumerate(range(0, n, self.width))]
        self.scale = solved.scale.T.clone(memory_format=torch.contiguous_format)
        self.zero = solved.zero.T.to(target.dtype).contiguous()
        # level - zero; transposed before it is widened, which is faster
        self.steps = grid.levels.decode(solved.codes.T.contiguous(), target.dtype)
        for g, part in self.groups:
            self.steps[part] -= self.zero[g]
        self.slope = A @ self._error(target) if slope is None else slope  # half the negative gradient of f
        if slope is None and damp:
            self.slope.add_(self._error(target), alpha=damp)
        far = coarse(A)
        self.far = far.clone() if far is A else far  # the Hessian between panels
        self.far.diagonal().add_(damp)
        self.moved = torch.zeros_like(self.slope, dtype=far.dtype)  # change of the error since ``slope`` was formed
        self.rounds = 0

    def _error(self, target: Tensor) -> Tensor:
        """Return W* - Q, (in, out)."""
        error = target.T.clone(memory_format=torch.contiguous_format)
        for g, part in self.groups:
            error[part].addcmul_(self.steps[part], self.scale[g], value=-1)
        return error

    def round(self) -> Quantized:
        """Run one round over all groups; return better codes and scales, and offsets where they are free."""
        n, scales = len(self.steps), self.grid.scales
        near = scales.beside(self.scale, self.zero)
        descend = _Descent(self.grid)
        panel = max(1, PANEL // self.width) * self.width  # columns that share one product with all moves: whole groups
        for a in range(0, n, panel):
            b = min(a + panel, n)
            before = n if self.rounds else a  # in the first round later panels have not moved
            slope = self.slope[a:b]
            slope = slope + self.far[a:b, :before] @ self.moved[:before] if before else slope.clone()
            moved = torch.empty_like(slope)
            for first in range(a, b, self.width):
                here = slice(first, min(first + self.width, b))
                there = slice(first - a, here.stop - a)
                if first > a:
                    slope[there].addmm_(self.A[here, a:first], moved[: first - a])
                self._group(first // self.width, here, slope[there], moved[there], near, descend)
            self.moved[a:b] += moved
        self.rounds += 1
        return self._result()

    def _group(self, g: int, here: slice, slope: Tensor, moved: Tensor, near: Beside, descend: "_Descent") -> None:
        """Move scale, offset and codes of one group; write the change of the error to ``moved``. ``slope`` is used up."""
        steps, scale, zero = self.steps[here], self.scale[g], self.zero[g]
        A = self.A[here, here].clone()
        A.diagonal().add_(self.damp)
        torch.mul(steps, scale, out=moved)
        if self.grid.scales.free:
            level = (steps + zero).round_()  # code, but for a rounding
            better, offset = _best_line(near, (scale, zero), level, slope, A, g)
            torch.sub(level, offset, out=steps)
            slope.addmm_(A, moved - steps * better)
            self.zero[g] = offset
        else:
            image = A @ steps
            better = _best_scale(near, scale, steps, slope, image, g)
            slope.addcmul_(image, scale - better)
        self.scale[g] = better
        descend(steps, slope, A, better, self.zero[g])
        moved.addcmul_(steps, better, value=-1)

    def _result(self) -> Quantized:
        """Return the answer of now; the certificate stays that of the sweep."""
        codes = torch.empty_like(self.steps, dtype=torch.uint8)
        for g, part in self.groups:
            codes[part] = self.grid.levels.encode_(self.steps[part].clone(), self.zero[g])
        # a copy: the next round may be undone
        scale = self.scale.T.clone(memory_format=torch.contiguous_format)
        solved = self.solved._replace(codes=codes.T.contiguous(), scale=scale)
        zero = self.zero.T.clone(memory_format=torch.contiguous_format)
        return solved._replace(zero=self.grid.stored_zero(zero)) if self.grid.scales.free else solved


def refine(target: Float[Tensor, "out in"], A: Float[Tensor, "in in"], solved: Quantized, grid: Grid) -> Quantized:
    """Run one round over all groups.

    Args:
        target: The weight to round towards, W*.
        A: The damped Hessian.
        solved: The answer to improve.
        grid: Its grid.

    Returns:
        Better codes and scales, and offsets where they are free; the certificate is that of ``solved``.
    """
    return Refinement(target, A, solved, grid).round()


def _best_scale(near: Beside, scale: Tensor, steps: Tensor, slope: Tensor, image: Tensor, g: int) -> Tensor:
    """Return the scale of least f of group g, (out,), ``image = A steps``; the old one where rounding leaves no gain."""
    gain, curvature = (steps * slope).sum(0), (steps * image).sum(0)
    wanted = torch.where(curvature > 0, scale + gain / curvature, scale)
    wanted = near.scale(torch.where(wanted * scale > 0, wanted, scale), g)
    change = wanted - scale
    return torch.where(change.square() * curvature < 2 * change * gain, wanted, scale)


def _best_line(
    near: Beside, at: tuple[Tensor, Tensor], level: Tensor, slope: Tensor, A: Tensor, g: int
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero of least f of group g, (out,) each; the old ones where rounding leaves no gain."""
    (scale, zero), image, ones = at, A @ level, A.sum(1)
    line = Line((level * image).sum(0), ones @ level, ones.sum().expand_as(scale), (level * slope).sum(0), slope.sum(0))
    offset, wanted = scale * zero, scale + line.scale()
    best, better = torch.zeros_like(scale), [scale, zero]
    for some in (scale, *near.around(torch.where(wanted > 0, wanted, scale), g)):
        other = near.zero(offset + line.offset(some - scale), some, g)
        cost = line.cost(some - scale, some * other - offset)
        better = [torch.where(cost < best, new, old) for new, old in zip((some, other), better, strict=True)]
        best = torch.minimum(cost, best)
    return better[0], better[1]


class _Descent:
    """Coordinate descent over the codes of one group, column after column."""

    def __init__(self, grid: Grid) -> None:
        self.levels, self.leaf = grid.levels, Replay(partial(_descend_leaf, grid.levels), written=2)
        self.compiled = partial(columns.descend_columns, grid.levels)

    def __call__(self, steps: Tensor, slope: Tensor, A: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Move ``steps`` in place; ``slope`` is used up."""
        low, high = self.levels.reach(zero)
        pivots = A.diagonal()[:, None]
        wanted = slope.div_(scale).div_(pivots).add_(steps)  # the minimum of f, in steps
        moved = torch.empty_like(steps)  # steps before, less steps after
        coupling = A / pivots.T
        width, leaf_of = (columns.MOST, self.compiled) if columns.fits(self.levels, steps) else (DESCENT, self.leaf)
        for panel in range(0, len(steps), PANEL):
            stop = min(panel + PANEL, len(steps))
            if panel:
                wanted[panel:stop].addmm_(coupling[:panel, panel:stop].T, moved[:panel])
            for leaf in range(panel, stop, width):
                here = slice(leaf, min(leaf + width, stop))
                if leaf > panel:
                    wanted[here].addmm_(coupling[panel:leaf, here].T, moved[panel:leaf])
                leaf_of(wanted[here], moved[here], steps[here], coupling[here, here], low, high)
        steps.copy_(wanted)


def _descend_leaf(
    levels: Levels, wanted: Tensor, moved: Tensor, steps: Tensor, coupling: Tensor, *reach: Tensor
) -> None:
    """Round each column of ``wanted`` to a step, after what the columns before it moved."""
    for j, (w, m, step) in enumerate(zip(wanted, moved, steps, strict=True)):
        if j:
            w.addmv_(moved[:j].T, coupling[:j, j])
        levels.round_(w, *reach)
        torch.sub(step, w, out=m)
