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

# As in the sweep: columns that share one GEMM, and columns inside it that are completed one by one.
PANEL, LEAF = 256, 32
# Scales are solved for as many rows at a time as make about this many weights, and entries of the systems.
CHUNK_WEIGHTS, CHUNK_SYSTEMS = 1 << 22, 1 << 24


def descend(target: Float[Tensor, "out in"], A: Float[Tensor, "in in"], solved: Quantized, grid: Grid) -> Quantized:
    """One pass of coordinate descent over all codes, column by column."""
    n = target.shape[1]
    width = grid.group_width(n)
    group = torch.arange(n, device=target.device) // width
    scale, zero = solved.scale.T.contiguous(), solved.zero.T.to(target.dtype).contiguous()
    codes = solved.codes.T.clone(memory_format=torch.contiguous_format)
    error = target.T.clone(memory_format=torch.contiguous_format)
    for a in range(0, n, PANEL):
        part = slice(a, min(a + PANEL, n))
        error[part] -= decode(codes[part].to(target.dtype), scale[group[part]], zero[group[part]])
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
    rows = max(1, min(CHUNK_WEIGHTS // target.shape[1], CHUNK_SYSTEMS // grid.group_count(target.shape[1]) ** 2))
    scale = solved.scale.clone()
    for a in range(0, len(target), rows):
        part = slice(a, a + rows)
        scale[part] = _refit_rows(target[part], A, solved.codes[part], scale[part], solved.zero[part], grid)
    return solved._replace(scale=scale)


def _refit_rows(target: Tensor, A: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """``A s = b`` of every row, written for the change of s."""
    n = target.shape[1]
    width, count = grid.group_width(n), grid.group_count(n)
    group = torch.arange(n, device=target.device) // width
    steps = codes.to(target.dtype).sub_(zero.to(target.dtype)[:, group])
    gradient = (target - steps * scale[:, group]) @ A
    b = _per_group(gradient.mul_(steps), width, count)
    system = target.new_empty(len(target), count, count)
    for g in range(count):
        part = slice(g * width, min((g + 1) * width, n))
        pairs = (steps[:, part] @ A[part, : part.stop]).mul_(steps[:, : part.stop])
        system[:, g, : g + 1] = _per_group(pairs, width, g + 1)
        system[:, :g, g] = system[:, g, :g]
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(diagonal.mean(1, keepdim=True) * 1e-6 + torch.finfo(target.dtype).tiny)
    lower, info = torch.linalg.cholesky_ex(system)
    delta = torch.cholesky_solve(b[:, :, None], lower)[:, :, 0]
    moved = scale + delta
    moved = round_scale(torch.where(moved > 0, moved, scale), grid)
    delta = moved - scale
    change = ((system @ delta[:, :, None])[:, :, 0] * delta - 2 * b * delta).sum(1)
    better = (change < 0) & (info == 0)
    return torch.where(better[:, None], moved, scale)


def _per_group(columns: Tensor, width: int, count: int) -> Tensor:
    """Sums over the columns of each group: (out, groups)."""
    n = columns.shape[1]
    if n % width == 0:
        return columns.reshape(len(columns), count, width).sum(2)
    full = n // width * width
    return torch.cat(
        [columns[:, :full].reshape(len(columns), -1, width).sum(2), columns[:, full:].sum(1, keepdim=True)], 1
    )
