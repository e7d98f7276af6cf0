"""Layers whose tokens are at hand, some of them held out: what moments say of them can be computed token by token."""

import torch
from oracles import problem

from nearplane.core.grid import dequantize
from nearplane.core.moments import Moments


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer:
    """A weight and tokens (rows) of both streams, every fourth of them held out; ``drift`` of the stream is optional."""

    def __init__(self, W, xhat, x, drift=None, held=None):
        self.W, self.xhat, self.x, self.drift = W, xhat, x, drift
        self.held = torch.arange(len(xhat)) % 4 == 3 if held is None else held

    def part(self, rows):
        """Moments as the walk measures them: with a stream, the drift behind the linear stands in for D."""
        xhat, x, n = self.xhat[rows], self.x[rows], self.W.shape[1]
        if self.drift is None:
            m = Moments.zeros(n, drift=True, dtype=self.W.dtype)
            m.add(xhat, x)
        else:
            m = Moments.zeros(n, residual=len(self.W), dtype=self.W.dtype)
            m.add(xhat, None, (x - xhat) @ self.W.T + self.drift[rows])
        return m

    @property
    def moments(self):
        return self.part(~self.held).join(self.part(self.held))

    def loss(self, solved, grid, rows=None):
        """``‖Q X̂ - W X - R‖²/n`` over some of the tokens, computed token by token."""
        return self.loss_of(dequantize(solved, grid), rows)

    def loss_of(self, Q, rows=None):
        """The same of any weight."""
        rows = slice(None) if rows is None else rows
        wanted = self.x[rows] @ self.W.T + (0 if self.drift is None else self.drift[rows])
        return float((self.xhat[rows] @ Q.T - wanted).square().sum(1).mean())

    def dense(self, rows):
        """H and the pull ``W D + R`` of some of the tokens."""
        xhat, n = self.xhat[rows], int(rows.sum())
        pull = self.W @ (self.x[rows] - xhat).T @ xhat / n
        return xhat.T @ xhat / n, pull + (0 if self.drift is None else self.drift[rows].T @ xhat / n)

    def to(self, dtype):
        drift = None if self.drift is None else self.drift.to(dtype)
        return Layer(self.W.to(dtype), self.xhat.to(dtype), self.x.to(dtype), drift, self.held)


def layer(out=6, n=40, tokens=200, seed=0, residual=False):
    p = problem(out, n, tokens=tokens, seed=seed)
    drift = None
    if residual:  # partly a function of the input, partly noise
        drift = 0.2 * (p.Xhat.T @ draw(seed + 1, n, out) / n**0.5 + draw(seed + 2, tokens, out))
    return Layer(p.W, p.Xhat.T.contiguous(), p.X.T.contiguous(), drift)
