"""Refinement: from the sweep's answer downhill, by steps that are each exact and never raise the objective

    f(Q) = tr((W* - Q) A (W* - Q)ᵀ),   A = H + λI

``descend`` takes the columns in turn and moves every code to the grid point of least f, all others fixed. ``refit``
takes the codes as given and solves for the scales of each row, a (groups, groups) system. Alternating the two is what
makes codes and scales agree. Arrays are (in, out) inside, so that a column is contiguous.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, decode, encode, round_scale

PANEL, LEAF = 256, 32


def descend(target: Float[Tensor, "out in"], A: Float[Tensor, "in in"], solved: Quantized, grid: Grid) -> Quantized:
    """One pass of coordinate descent over all codes, column by column."""
    n = target.shape[1]
    width = grid.group_width(n)
    group = torch.arange(n, device=target.device) // width
    scale, zero = solved.scale.T.contiguous(), solved.zero.T.to(target.dtype).contiguous()
    codes = solved.codes.T.clone(memory_format=torch.contiguous_format)
    error = target.T - decode(codes.to(target.dtype), scale[group], zero[group])
    diagonal = A.diagonal().tolist()
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        gradient = A[a:b] @ error
        moved = torch.zeros_like(gradient)
        for leaf in range(a, b, LEAF):
            end = min(leaf + LEAF, b)
            if leaf > a:
                gradient[leaf - a : end - a].addmm_(A[leaf:end, a:leaf], moved[: leaf - a])
            for j in range(leaf, end):
                s, z = scale[j // width], zero[j // width]
                g = gradient[j - a]
                if j > leaf:
                    g.addmv_(moved[leaf - a : j - a].T, A[leaf:j, j])
                old = codes[j].to(s.dtype)
                best = encode(decode(old, s, z).add_(g, alpha=1 / diagonal[j]), s, z, grid)
                torch.mul(old.sub_(best), s, out=moved[j - a])
                codes[j] = best
        error[a:b] += moved
    return solved._replace(codes=codes.T.contiguous())


def refit(target: Float[Tensor, "out in"], A: Float[Tensor, "in in"], solved: Quantized, grid: Grid) -> Quantized:
    """Scales of least f for fixed codes; a row that rounding or a sign would make worse keeps its own."""
    out, n = target.shape
    width, count = grid.group_width(n), grid.group_count(n)
    zero = solved.zero.to(target.dtype)
    group = torch.arange(n, device=target.device) // width
    steps = solved.codes.to(target.dtype).sub_(zero[:, group])
    gradient = (target - steps * solved.scale[:, group]) @ A
    b = _per_group(gradient.mul_(steps), width, count)
    system = target.new_empty(out, count, count)
    for g in range(count):
        part = slice(g * width, min((g + 1) * width, n))
        system[:, g, : g + 1] = _per_group(
            (steps[:, part] @ A[part, : part.stop]).mul_(steps[:, : part.stop]), width, g + 1
        )
        system[:, :g, g] = system[:, g, :g]
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.mean(1, keepdim=True) * 1e-6 + torch.finfo(target.dtype).tiny)
    lower, info = torch.linalg.cholesky_ex(system)
    delta = torch.cholesky_solve(b[:, :, None], lower)[:, :, 0]
    scale = solved.scale + delta
    scale = torch.where(scale > 0, scale, solved.scale)
    scale = round_scale(scale, grid)
    delta = scale - solved.scale
    change = ((system @ delta[:, :, None])[:, :, 0] * delta - 2 * b * delta).sum(1)
    better = (change < 0) & (info == 0)
    return solved._replace(scale=torch.where(better[:, None], scale, solved.scale))


def _per_group(columns: Tensor, width: int, count: int) -> Tensor:
    """Sums over the columns of each group: (out, groups)."""
    n = columns.shape[1]
    if n % width == 0:
        return columns.reshape(len(columns), count, width).sum(2)
    full = n // width * width
    return torch.cat(
        [columns[:, :full].reshape(len(columns), -1, width).sum(2), columns[:, full:].sum(1, keepdim=True)], 1
    )
