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

from nearplane.core.cuda_graph import Replay
from nearplane.core.grid import Grid, Quantized
from nearplane.core.levels import Levels
from nearplane.core.line import Line
from nearplane.core.scales import Beside
from nearplane.core.sweep import LEAF, PANEL


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
    n = target.shape[1]
    width = grid.group_width(n)
    groups = [(g, slice(a, min(a + width, n))) for g, a in enumerate(range(0, n, width))]
    scale = solved.scale.T.clone(memory_format=torch.contiguous_format)
    zero = solved.zero.T.to(target.dtype).contiguous()
    # level - zero; transposed before it is widened, which is faster
    steps = grid.levels.decode(solved.codes.T.contiguous(), target.dtype)
    error = target.T.clone(memory_format=torch.contiguous_format)  # w* - q
    for g, part in groups:
        steps[part] -= zero[g]
        error[part].addcmul_(steps[part], scale[g], value=-1)
    near = grid.scales.beside(scale, zero)
    panel = max(1, PANEL // width) * width  # columns that share one product with all the error: whole groups
    descend = _Descent(grid)
    for a in range(0, n, panel):
        b = min(a + panel, n)
        slope = A[a:b] @ error  # half the negative gradient of f
        moved = torch.zeros_like(slope)  # change of the error
        for first in range(a, b, width):
            end = min(first + width, b)
            g, here, there = first // width, slice(first, end), slice(first - a, end - a)
            if first > a:
                slope[there].addmm_(A[here, a:first], moved[: first - a])
            if grid.scales.free:
                level = (steps[here] + zero[g]).round_()  # code, but for a rounding
                better, offset = _best_line(near, (scale[g], zero[g]), level, slope[there], A[here, here], g)
                moved[there], steps[here] = steps[here] * scale[g], level - offset
                moved[there] -= steps[here] * better
                zero[g] = offset
            else:
                better = _best_scale(near, scale[g], steps[here], slope[there], A[here, here], g)
                moved[there] = steps[here] * (scale[g] - better)
            slope[there].addmm_(A[here, here], moved[there])
            scale[g] = better
            moved[there] += descend(steps[here], slope[there], A[here, here], better, zero[g])
        error[a:b] += moved
    codes = torch.empty_like(steps, dtype=torch.uint8)
    for g, part in groups:
        codes[part] = grid.levels.encode_(steps[part], zero[g])
    solved = solved._replace(codes=codes.T.contiguous(), scale=scale.T.contiguous())
    return solved._replace(zero=grid.stored_zero(zero.T).contiguous()) if grid.scales.free else solved


def _best_scale(near: Beside, scale: Tensor, steps: Tensor, slope: Tensor, A: Tensor, g: int) -> Tensor:
    """Return the scale of least f of group g, (out,); the old one where rounding or a sign leaves no gain."""
    gain, curvature = (steps * slope).sum(0), (steps * (A @ steps)).sum(0)
    wanted = torch.where(curvature > 0, scale + gain / curvature, scale)
    wanted = near.scale(torch.where(wanted * scale > 0, wanted, scale), g)
    change = wanted - scale
    return torch.where(change.square() * curvature < 2 * change * gain, wanted, scale)


def _best_line(
    near: Beside, at: tuple[Tensor, Tensor], level: Tensor, slope: Tensor, A: Tensor, g: int
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero of least f of group g, (out,) each; the old ones where rounding leaves no gain."""
    (scale, zero), image, ones = at, A @ level, A.sum(1)
    line = Line(
        (level * image).sum(0), ones @ level, ones.sum().expand_as(scale), (level * slope).sum(0), slope.sum(0)
    )
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

    def __call__(self, steps: Tensor, slope: Tensor, A: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Move ``steps`` in place; return the change of the error."""
        low, high = self.levels.reach(zero)
        moved = torch.zeros_like(slope)
        slope /= A.diagonal()[:, None]  # the way to the minimum of f, in units of the weight
        for panel in range(0, len(steps), PANEL):
            stop = min(panel + PANEL, len(steps))
            coupling = A[:stop, panel:stop] / A.diagonal()[panel:stop]
            if panel:
                slope[panel:stop].addmm_(coupling[:panel].T, moved[:panel])
            for leaf in range(panel, stop, LEAF):
                end = min(leaf + LEAF, stop)
                here, columns = slice(leaf, end), slice(leaf - panel, end - panel)
                if leaf > panel:
                    slope[here].addmm_(coupling[panel:leaf, columns].T, moved[panel:leaf])
                self.leaf(steps[here], moved[here], slope[here], coupling[here, columns], scale, low, high)
        return moved


def _descend_leaf(
    levels: Levels, steps: Tensor, moved: Tensor, slope: Tensor, coupling: Tensor, scale: Tensor, *reach: Tensor
) -> None:
    """Move each column's codes to the grid point of least f, after what the columns before it moved."""
    for j in range(len(steps)):
        if j:
            slope[j].addmv_(moved[:j].T, coupling[:j, j])
        step, change = steps[j], moved[j]
        change.copy_(step)
        levels.round_(step.addcdiv_(slope[j], scale), *reach)
        change.sub_(step).mul_(scale)
