"""Refinement: from the sweep's answer downhill, by steps that are each exact and never raise the objective

    f(Q) = tr((W* - Q) A (W* - Q)ᵀ),   A = H + λI

Group by group: the group's scale moves to the least of f for its codes, a parabola in one unknown; then its columns in
turn move every code to the grid point of least f. Everything else is fixed meanwhile, and so scales and codes, of this
group and of the others, come to agree. Arrays are (in, out) inside, so that a column is contiguous.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, round_scale
from nearplane.core.sweep import LEAF, PANEL


def refine(target: Float[Tensor, "out in"], A: Float[Tensor, "in in"], solved: Quantized, grid: Grid) -> Quantized:
    """One round over all groups. Zeros stay; the certificate is the sweep's."""
    n = target.shape[1]
    width = grid.group_width(n)
    groups = [(g, slice(a, min(a + width, n))) for g, a in enumerate(range(0, n, width))]
    scale = solved.scale.T.clone(memory_format=torch.contiguous_format)
    zero = solved.zero.T.to(target.dtype).contiguous()
    steps = solved.codes.T.contiguous().to(target.dtype)  # code - zero; first turned, then widened: the fast way
    error = target.T.clone(memory_format=torch.contiguous_format)  # w* - q
    for g, part in groups:
        steps[part] -= zero[g]
        error[part].addcmul_(steps[part], scale[g], value=-1)
    panel = max(1, PANEL // width) * width  # columns that share one look at all the error: whole groups
    diagonal: list[float] = A.diagonal().tolist()
    for a in range(0, n, panel):
        b = min(a + panel, n)
        slope = A[a:b] @ error  # half the negative gradient of f
        moved = torch.zeros_like(slope)  # change of the error
        for first in range(a, b, width):
            end = min(first + width, b)
            g, here, there = first // width, slice(first, end), slice(first - a, end - a)
            if first > a:
                slope[there].addmm_(A[here, a:first], moved[: first - a])
            better = _best_scale(scale[g], steps[here], slope[there], A[here, here], grid)
            moved[there] = steps[here] * (scale[g] - better)
            slope[there].addmm_(A[here, here], moved[there])
            scale[g] = better
            moved[there] += _descend(steps[here], slope[there], A[here, here], diagonal[here], better, zero[g], grid)
        error[a:b] += moved
    for g, part in groups:
        steps[part] += zero[g]
    return solved._replace(codes=steps.to(torch.uint8).T.contiguous(), scale=scale.T.contiguous())


def _best_scale(scale: Tensor, steps: Tensor, slope: Tensor, A: Tensor, grid: Grid) -> Tensor:
    """The scale of least f of one group of each row, (out,): the old one where rounding or a sign leaves no gain."""
    gain, curvature = (steps * slope).sum(0), (steps * (A @ steps)).sum(0)
    wanted = torch.where(curvature > 0, scale + gain / curvature, scale)
    wanted = round_scale(torch.where(wanted > 0, wanted, scale), grid)
    change = wanted - scale
    return torch.where(change.square() * curvature < 2 * change * gain, wanted, scale)


def _descend(
    steps: Tensor, slope: Tensor, A: Tensor, diagonal: list[float], scale: Tensor, zero: Tensor, grid: Grid
) -> Tensor:
    """Every code of one group to its best, column after column, ``steps`` in place: the change of the error."""
    least, greatest = (bound - zero for bound in grid.code_range)
    moved = torch.zeros_like(slope)
    for panel in range(0, len(steps), PANEL):
        stop = min(panel + PANEL, len(steps))
        if panel:
            slope[panel:stop].addmm_(A[panel:stop, :panel], moved[:panel])
        for leaf in range(panel, stop, LEAF):
            end = min(leaf + LEAF, stop)
            if leaf > panel:
                slope[leaf:end].addmm_(A[leaf:end, panel:leaf], moved[panel:leaf])
            for j in range(leaf, end):
                if j > leaf:
                    slope[j].addmv_(moved[leaf:j].T, A[leaf:j, j])
                step, change = steps[j], moved[j]
                change.copy_(step)
                step.addcdiv_(slope[j], scale, value=1 / diagonal[j]).round_().clamp_(least, greatest)
                change.sub_(step).mul_(scale)
    return moved
