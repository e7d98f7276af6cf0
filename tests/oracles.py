"""The published algorithms restated in a few lines each, to test the solvers against.

Right-looking, float64, with the inverse and its Cholesky factor U as the papers have them. Nothing is shared with
nearplane except the rounding itself (``fit``, ``encode``, ``decode``), which ``core/test_grid.py`` tests against loops.
Weights are (out, in), matrices and codes are in storage order unless a name says otherwise.
"""

import math
from typing import NamedTuple

import torch

from nearplane.core.grid import Grid, decode, encode, fit
from nearplane.core.moments import Moments

BLOCK = 128  # columns per block of the published loops


class Problem(NamedTuple):
    """One layer: weight, the two streams (in, tokens), and their moments per token."""

    W: torch.Tensor
    Xhat: torch.Tensor
    X: torch.Tensor
    H: torch.Tensor
    D: torch.Tensor

    @property
    def moments(self) -> Moments:
        return Moments(self.H, self.D, self.Xhat.shape[1])


def problem(out, n, *, tokens=None, seed=0, drift=0.3, spread=1.0):
    """Correlated inputs with a spread of column sizes, and a reference stream that has drifted away."""
    g = torch.Generator().manual_seed(seed)
    tokens = tokens or 2 * n + 8

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mix = torch.eye(n, dtype=torch.float64) + draw(n, n) / n**0.5
    Xhat = (draw(n) * spread / 2).exp()[:, None] * (mix @ draw(n, tokens))
    X = Xhat + drift * (draw(n, n) / n**0.5 @ Xhat + draw(n, tokens))
    return Problem(draw(out, n), Xhat, X, Xhat @ Xhat.T / tokens, (X - Xhat) @ Xhat.T / tokens)


def damped(H, percent=0.01):
    return H + percent * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def inverse_root(A):
    """U of the papers: upper, U'U = inverse of A."""
    return torch.linalg.cholesky(torch.linalg.inv(A), upper=True)


def column_cost(H, A, order="natural"):
    """The weight of errors in a fit: geometric mean of H_jj and the pivot 1/U_jj² of the column where it is solved."""
    perm = column_order(A, order)
    U = inverse_root(A[perm][:, perm])
    pivots = torch.empty(len(H), dtype=H.dtype)
    pivots[perm] = 1 / U.diagonal() ** 2
    return (pivots * H.diagonal()).sqrt()


def column_order(A, order):
    """``natural``, ``activation`` and ``pivot``, the last one by a right-looking elimination with Schur updates."""
    n = len(A)
    if order == "natural":
        return list(range(n))
    if order == "activation":
        return sorted(range(n), key=lambda j: -float(A[j, j]))
    S, left, pivots = A.clone(), list(range(n)), []
    while left:
        p = min(left, key=lambda j: float(S[j, j]))
        pivots.append(p)
        left.remove(p)
        S = S - torch.outer(S[:, p], S[p]) / S[p, p]
    return pivots[::-1]


def static_scales(W, grid, importance=None):
    """Every group of every row on its own: (out, groups) scale and zero."""
    n = W.shape[1]
    width = n if grid.group_size == -1 else grid.group_size
    parts = [slice(a, min(a + width, n)) for a in range(0, n, width)]
    fits = [fit(W[:, s], grid, None if importance is None else importance[s]) for s in parts]
    return torch.stack([s for s, _ in fits], 1), torch.stack([z for _, z in fits], 1)


def drift_rows(A, D):
    """GPTAQ's P at alpha = 1 by its meaning: row q is ``D[q, q+1:] inverse(A[q+1:, q+1:])``. In solve order."""
    P = torch.zeros_like(A)
    for q in range(len(A) - 1):
        P[q, q + 1 :] = torch.linalg.solve(A[q + 1 :, q + 1 :], D[q, q + 1 :])
    return P


def rtn(W, grid, scales):
    codes = torch.zeros_like(W)
    for j in range(W.shape[1]):
        group = 0 if grid.group_size == -1 else j // grid.group_size
        codes[:, j] = encode(W[:, j], scales[0][:, group], scales[1][:, group], grid)
    return codes


class Solved(NamedTuple):
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    Q: torch.Tensor
    clipped: int  # codes that would have left the range
    loss: torch.Tensor  # sum over columns of ((v - q) / U_jj)**2, per row


def published(W, A, grid, *, order=None, scales=None, importance=None, P=None, R=None, across="v", block=BLOCK):
    """The released loop of GPTQ (P = R = None), GPTAQ (P) and ResComp (P, R), in lazily updated blocks.

    ``A`` is the damped Hessian; P and R are in solve order. ``across`` is what drives P and R over block borders: the
    quantized columns (``q``), the values before rounding clamped to the group's range (``clamped``), or those values as
    they are (``v``); inside a block it is always v. ``scales=None`` fits a group when its first column is reached.
    The one departure: such a group reads its columns of the current block as updated so far, not as the block began.
    """
    out, n = W.shape
    perm = torch.arange(n) if order is None else torch.tensor(order)
    width = n if grid.group_size == -1 else grid.group_size
    least, greatest = (1, 3) if grid.bits == "ternary" else (0, 2**grid.bits - 1)
    U = inverse_root(A[perm][:, perm])
    P = torch.zeros_like(A) if P is None else P
    R = torch.zeros_like(A) if R is None else R
    start = W[:, perm]
    W = start.clone()
    codes, Q = torch.zeros_like(W), torch.zeros_like(W)
    groups = -(-n // width)
    scale, zero = (W.new_ones(out, groups), W.new_zeros(out, groups)) if scales is None else scales
    clipped, loss = 0, W.new_zeros(out)
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        W1, E1, X1 = W[:, i1:i2].clone(), torch.zeros_like(W[:, i1:i2]), torch.zeros_like(W[:, i1:i2])
        for i in range(i2 - i1):
            j = i1 + i
            k = int(perm[j]) // width
            if scales is None and j % width == 0:
                ahead = torch.cat([W1[:, i:], W[:, i2:]], 1)[:, :width]
                scale[:, k], zero[:, k] = fit(
                    ahead, grid, None if importance is None else importance[perm[j : j + width]]
                )
            v, s, z = W1[:, i].clone(), scale[:, k], zero[:, k]
            codes[:, j] = encode(v, s, z, grid)
            q = Q[:, j] = decode(codes[:, j], s, z)
            free = torch.round(v / s) + z
            clipped += int(((free < least) | (free > greatest)).sum())
            E1[:, i] = (v - q) / U[j, j]
            loss += E1[:, i] ** 2
            ends = torch.stack([s * (least - z), s * (greatest - z)])  # the other way round where s is negative
            X1[:, i] = {"q": q, "v": v, "clamped": v.clamp(ends.amin(0), ends.amax(0))}[across]
            W1[:, i + 1 :] -= torch.outer(E1[:, i], U[j, j + 1 : i2])
            W1[:, i + 1 :] += torch.outer(v, P[j, j + 1 : i2]) + torch.outer(start[:, j] - v, R[j, j + 1 : i2])
        W[:, i2:] -= E1 @ U[i1:i2, i2:]
        W[:, i2:] += X1 @ P[i1:i2, i2:] + (start[:, i1:i2] - X1) @ R[i1:i2, i2:]
    back = torch.argsort(perm)
    return Solved(codes[:, back], scale, zero, Q[:, back], clipped, loss)


def gptq(W, A, grid, *, order=None, scales=None, importance=None):
    """GPTQ's equation 3 without blocks: one row and column of the inverse eliminated at a time, no Cholesky at all."""
    out, n = W.shape
    perm = list(range(n)) if order is None else list(order)
    width = n if grid.group_size == -1 else grid.group_size
    groups = -(-n // width)
    inverse, W = torch.linalg.inv(A), W.clone()
    codes = torch.zeros_like(W)
    scale, zero = (W.new_ones(out, groups), W.new_zeros(out, groups)) if scales is None else scales
    for position, j in enumerate(perm):
        if scales is None and position % width == 0:
            weights = None if importance is None else importance[j : j + width]
            scale[:, j // width], zero[:, j // width] = fit(W[:, j : j + width], grid, weights)
        s, z = scale[:, j // width], zero[:, j // width]
        codes[:, j] = encode(W[:, j], s, z, grid)
        error = (W[:, j] - decode(codes[:, j], s, z)) / inverse[j, j]
        left = perm[position + 1 :]
        W[:, left] -= torch.outer(error, inverse[j, left])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def least_squares(W, A, grid, order, scales):
    """Brute force: after each rounded column, dense least squares ``min ||(W - Q) L||`` over the others, LL' = A."""
    L = torch.linalg.cholesky(A)
    return refit_rest(L.T, (W @ L).T, grid, order, scales)


def least_squares_asymmetric(W, Xhat, X, *, damp, grid, order, scales):
    """The same for ``||Q Xhat - W X||^2 / tokens + damp ||Q - W||^2``, never forming a target or a Hessian."""
    root = Xhat.shape[1] ** 0.5
    ridge = damp**0.5 * torch.eye(len(Xhat), dtype=W.dtype)
    return refit_rest(
        torch.cat([Xhat.T / root, ridge]), torch.cat([(W @ X).T / root, ridge @ W.T]), grid, order, scales
    )


def refit_rest(B, Y, grid, order, scales):
    """Columns of ``B q = Y`` rounded one by one, the free ones solved again by dense least squares each time."""
    n, out = B.shape[1], Y.shape[1]
    width = n if grid.group_size == -1 else grid.group_size
    free = list(order)
    Q, codes = B.new_zeros(n, out), B.new_zeros(out, n)
    while free:
        done = [j for j in range(n) if j not in free]
        rest = torch.linalg.lstsq(B[:, free], Y - B[:, done] @ Q[done], driver="gelsd").solution
        j = free.pop(0)
        s, z = scales[0][:, j // width], scales[1][:, j // width]
        codes[:, j] = encode(rest[0], s, z, grid)
        Q[j] = decode(codes[:, j], s, z)
    return codes


def obq(w, A, grid, scale, zero, *, order=None):
    """One row of OBQ by dense least squares at every step; returns its codes and the order of its choices.

    ``scale`` and ``zero`` are per column. Rounding weight j costs the distance from the free optimum to the nearest
    hyperplane ``w_j = grid value``: found by solving for all others once more, not from any inverse. ``order``
    forces the choices.
    """
    n = len(w)
    L = torch.linalg.cholesky(A)
    y = w @ L
    free, q, codes, choices = list(range(n)), torch.zeros_like(w), torch.zeros_like(w), []

    def best(fixed, value):
        """Optimum over the free columns but ``fixed``, and its loss."""
        others = [j for j in free if j != fixed]
        trial = q.clone()
        if fixed is not None:
            trial[fixed] = value
        known = [j for j in range(n) if j not in others]
        if others:
            trial[others] = torch.linalg.lstsq(L.T[:, others], (y - trial[known] @ L[known])[:, None]).solution[:, 0]
        return trial, float(((trial @ L - y) ** 2).sum())

    while free:
        w_free, base = best(None, None)
        rounded = {j: encode(w_free[j], scale[j], zero[j], grid) for j in free}
        value = {j: decode(rounded[j], scale[j], zero[j]) for j in free}
        cost = {j: best(j, value[j])[1] - base for j in free}
        j = min(free, key=cost.get) if order is None else order[len(choices)]
        codes[j], q[j] = rounded[j], value[j]
        free.remove(j)
        choices.append(j)
    return codes, choices


def refined(target, A, solved, grid):
    """A round of refinement by its meaning: group by group the scale, then code by code; all error formed anew each time.

    A scale moves where what the checkpoint can hold lies nearer to the best one (f is a parabola) than the old one does,
    and keeps its sign.
    """
    n = target.shape[1]
    width = n if grid.group_size == -1 else grid.group_size
    least, greatest = (1, 3) if grid.bits == "ternary" else (0, 2**grid.bits - 1)
    levels = torch.arange(least, greatest + 1, dtype=target.dtype)
    stored = getattr(torch, grid.scale_dtype)
    smallest = 2.0**-24 if stored == torch.float16 else torch.finfo(stored).smallest_normal
    group = torch.arange(n) // width
    codes, scale, zero = solved.codes.to(target.dtype), solved.scale.clone(), solved.zero.to(target.dtype)
    for a in range(0, n, width):
        g = a // width
        for r in range(len(target)):
            steps = codes[r] - zero[r, group]
            inside = torch.where(group == g, steps, torch.zeros_like(steps))
            rest = target[r] - (steps - inside) * scale[r, group]
            old = float(scale[r, g])
            if (length := float(inside @ A @ inside)) > 0 and (best := float(rest @ A @ inside) / length) * old > 0:
                near = math.copysign(max(abs(float(torch.tensor(best).to(stored))), smallest), old)
                if abs(near - best) < abs(old - best):
                    scale[r, g] = near
        for j in range(a, min(a + width, n)):
            error = target - (codes - zero[:, group]) * scale[:, group]
            move = (levels - codes[:, j, None]) * scale[:, g, None]
            codes[:, j] = levels[(A[j, j] * move.square() - 2 * move * (error @ A[:, j])[:, None]).argmin(1)]
    return solved._replace(codes=codes.to(torch.uint8), scale=scale)


def loss(W, Q, A):
    """tr((W-Q) A (W-Q)') of each row."""
    E = W - Q
    return torch.stack([e @ A @ e for e in E])


def values(codes, scales, grid: Grid):
    n = codes.shape[1]
    width = n if grid.group_size == -1 else grid.group_size
    Q = torch.zeros_like(scales[0][:, :1].expand(-1, n)).contiguous()
    for j in range(n):
        Q[:, j] = (codes[:, j].to(Q.dtype) - scales[1][:, j // width]) * scales[0][:, j // width]
    return Q
