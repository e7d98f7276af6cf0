"""The sweep: round one column, push its error into the columns not yet rounded.

With ``H + λI = T diag(d) Tᵀ``, ``M = T - I`` (``core/factor.py``), target W and rounded weight Q:

    v_j = w_j + Σ_{i<j} (w_i - q_i) M[i,j]        q_j = round_to_grid(v_j)

This is GPTQ (arXiv 2210.17323) written left-looking: a column is completed by one look back at all earlier error, and
no later column is ever rewritten. GPTAQ (arXiv 2504.02692) and ResComp (arXiv 2604.07955) move the target while sweeping:
after column i every later target gains ``v_i P[i,j]``; that matrix is the optional ``push``.

Differs from the published code in: (1) one Cholesky and no inverse; (2) left-looking, in panels; (3) arrays are stored
transposed, (in, out), so that a column is contiguous; (4) a group fitted in mid-block reads compensated weights.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core import columns
from nearplane.core.cuda_graph import Replay
from nearplane.core.dense import coarse, full_width
from nearplane.core.errors import SettingError
from nearplane.core.factor import Factor
from nearplane.core.grid import Certificate, Grid, Quantized, decode, fit, group_index
from nearplane.core.levels import Levels

Carry = Literal["value", "code", "clamped"]

# Columns that share one look back; results do not depend on it, except where Push.carry says so.
PANEL = 256
# Rows of the weight that are transposed at a time.
ROWS = 256
# Columns inside a panel that are completed one by one; larger leaves cost memory traffic, smaller ones launches.
LEAF = 32


@dataclass(frozen=True)
class Push:
    """A moving target: ``w_j += x_i matrix[i,j] + w_i shift[i,j]`` for i < j, w_i the original column.

    Inside a published block of 128 columns x_i is the compensated value v_i. Across blocks ``carry`` chooses: ``value``
    keeps v_i (the consistent form). ``code`` takes the rounded q_i (GPTAQ as released). ``clamped`` takes v_i clamped to
    the range of its group (ResComp as released, "allw").
    """

    matrix: Float[Tensor, "in in"]  # strictly upper, columns in solve order
    carry: Carry = "value"
    block: int = 128
    shift: Float[Tensor, "in in"] | None = None  # strictly upper, columns in solve order


def sweep(
    target: Float[Tensor, "out in"],
    factor: Factor,
    grid: Grid,
    scales: tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]] | None = None,
    *,
    push: Push | None = None,
    importance: Float[Tensor, "in"] | None = None,
    panel: int = PANEL,
) -> Quantized:
    """Round ``target`` column by column in ``factor.order``.

    Args:
        target: The weight to round towards.
        factor: The factored Hessian.
        grid: The levels, and how groups are fitted.
        scales: Scale and zero of every group, fixed beforehand ("static groups"). None fits each group to the
            compensated weights when the sweep reaches it ("dynamic groups", natural order only).
        push: How targets move, for GPTAQ and ResComp.
        importance: ``column_cost``, for fitting dynamic groups.
        panel: Columns that share one look back. Codes do not depend on it.

    Returns:
        Codes in storage order, with Babai's certificate.

    Raises:
        SettingError: The scales of the grid are rounded together, and groups are dynamic.
    """
    if scales is None and grid.scales.joint:
        raise SettingError("this grid rounds the scales of several groups together, so groups must be static.")
    state = _State(target, factor, grid, scales, push, importance)
    n = target.shape[1]
    width = grid.group_width(n)
    cuts = set(range(0, n, panel)) | {n}
    if scales is None:
        cuts |= set(range(0, n, width))
    if push is not None:
        cuts |= set(range(0, n, push.block))
    edges = sorted(cuts)
    for a, b in pairwise(edges):
        state.look_back(a, b)
        if scales is None and a % width == 0:
            state.fit_group(a, min(a + width, n), b)
        state.round_panel(a, b)
    return state.result()


def sweep_with_slope(
    target: Float[Tensor, "out in"],
    factor: Factor,
    grid: Grid,
    scales: tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]],
) -> tuple[Quantized, Float[Tensor, "in out"]]:
    """Round as ``sweep`` does with static groups; return also ``(H + λI) (W - Q)ᵀ`` in storage order, for a refinement.

    The errors e of the weight and the rounding errors ε = v - q are tied by ``e T = ε``, so ``(H + λI) eᵀ = T D εᵀ``: half
    the arithmetic of the plain product, and no sum in which large numbers cancel. The product is coarse.
    """
    state = _State(target, factor, grid, scales, None, None)
    n = len(state.target)
    state.missed = missed = torch.empty_like(state.target, dtype=coarse(state.target[:1]).dtype)
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        state.look_back(a, b)
        state.round_panel(a, b)
    slope = state.target  # its memory is free now
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        part = coarse(factor.feedback[a:b, a:]) @ missed[a:]
        slope[factor.order[a:b]] = part.to(slope.dtype).add_(missed[a:b])
    return state.result(), slope


class _State:
    """The arrays of one sweep, all (in, out) in solve order, and the three steps on a panel [a, b)."""

    def __init__(
        self,
        target: Tensor,
        factor: Factor,
        grid: Grid,
        scales: tuple[Tensor, Tensor] | None,
        push: Push | None,
        importance: Tensor | None,
    ) -> None:
        out, n = target.shape
        self.factor, self.grid, self.push = factor, grid, push
        # A copy, which becomes the moving target w'. Transposing first lets index_select gather whole rows; taking a few
        # rows of the weight at a time avoids a second copy.
        self.target = target.new_empty(n, out)
        for a in range(0, out, ROWS):
            self.target[:, a : a + ROWS] = target[a : a + ROWS].T.contiguous().index_select(0, factor.order)
        self.start, self.value = 0, self.target[:0]  # the current panel: its first column, its v
        self.error = self.target  # w' - q of a solved column replaces its w'
        self.source = torch.zeros_like(self.target if push else self.target[:0])  # x of Push
        self.weight = self.target.clone() if push and push.shift is not None else self.target[:0]  # w of Push
        self.codes = torch.empty(n, out, dtype=torch.uint8, device=target.device)
        self.group = group_index(factor.order, grid)
        self.groups: list[int] = self.group.tolist()
        self.importance = importance
        shape = (grid.group_count(n), out)
        self.scale = target.new_ones(shape) if scales is None else scales[0].T.to(target.dtype).contiguous()
        self.zero = target.new_zeros(shape) if scales is None else scales[1].T.to(target.dtype).contiguous()
        self.loss, self.bound = target.new_zeros(out), target.new_zeros(out)
        self.clipped = torch.zeros(out, dtype=torch.long, device=target.device)
        self.missed: Tensor | None = None  # where d_j (v_j - q_j) is to be kept, (in, out)
        self.leaf = Replay(partial(_round_leaf, grid.levels), written=5)
        self.compiled = push is None and columns.fits(grid.levels, target)

    def look_back(self, a: int, b: int) -> None:
        """Bring panel [a, b) up to date with every column before it."""
        self.start, self.value = a, self.target[a:b].clone()
        with full_width(self.target.device):
            self.receive(a, b, 0, a)

    def receive(self, a: int, b: int, since: int, until: int) -> None:
        """Add to columns [a, b) of the panel the error of the solved columns [since, until)."""
        if since == until:
            return
        value = self.value[a - self.start : b - self.start]
        if self.push is not None:
            moved = self.moved(a, b, since, until)
            self.target[a:b] += moved
            value += moved
        value.addmm_(self.factor.feedback[since:until, a:b].T, self.error[since:until])

    def moved(self, a: int, b: int, since: int, until: int) -> Tensor:
        """Return how far the columns [since, until) push the targets of [a, b)."""
        if self.push is None:
            return torch.zeros_like(self.target[a:b])
        result = self.push.matrix[since:until, a:b].T @ self.source[since:until]
        if self.push.shift is not None:
            result.addmm_(self.push.shift[since:until, a:b].T, self.weight[since:until])
        return result

    def fit_group(self, a: int, b: int, panel_end: int) -> None:
        """Fit the group [a, b) to its conditional optimum given the columns already rounded.

        In look-back form that is ``W_g + F (I + M_gg)⁻¹``, F the earlier error received by [a, b). Columns past the
        panel have received none yet, and are completed here.
        """
        received = self.value - self.target[a:panel_end]
        target = self.target[a:panel_end]
        if b > panel_end:
            received = torch.cat([received, self.factor.feedback[:a, panel_end:b].T @ self.error[:a]])
            target = torch.cat([target, self.target[panel_end:b] + self.moved(panel_end, b, 0, a)])
        unit = self.factor.feedback[a:b, a:b].T  # (I + M_gg) transposed, its unit diagonal implied
        solved = torch.linalg.solve_triangular(unit, received, upper=False, unitriangular=True)
        weights = None if self.importance is None else self.importance[self.factor.order[a:b]]
        group = self.groups[a]
        self.scale[group], self.zero[group] = fit((target + solved).T, self.grid, weights)

    def round_panel(self, a: int, b: int) -> None:
        """Round the columns of [a, b), leaf by leaf, column by column, each after the error of those before it."""
        scale, zero = (part.index_select(0, self.group[a:b]) for part in (self.scale, self.zero))
        low, high = self.grid.levels.reach(zero)
        steps = torch.empty_like(scale)
        nothing = self.target[:0, :0]
        width = columns.MOST if self.compiled else LEAF
        for leaf in range(a, b, width):
            end = min(leaf + width, b)
            self.receive(leaf, end, a, leaf)
            here, there = slice(leaf, end), slice(leaf - a, end - a)
            if self.compiled:
                columns.sweep_columns(
                    self.grid.levels, self.value[there], steps[there], self.error[here], scale[there], low[there], high[there],
                    self.factor.feedback[here, here],
                )  # fmt: skip
                continue
            moving = (self.push.matrix, self.push.shift) if self.push else (None, None)
            pushes = [nothing if m is None else m[here, here] for m in moving]
            self.leaf(*_Leaf(
                self.value[there], self.target[here], self.error[here], steps[there], self.source[here], self.weight[here],
                scale[there], low[there], high[there], self.factor.feedback[here, here], *pushes,
            ))  # fmt: skip
        self.clipped += self.grid.levels.clipped(self.value / scale, low, high).sum(0)
        self._settle(a, b, steps, scale, zero)

    def _settle(self, a: int, b: int, steps: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Add a finished panel to the certificate, store its codes, and choose the x_i it carries on."""
        levels = self.grid.levels
        pivots = self.factor.pivots[a:b, None]
        missed = self.value.addcmul_(steps, scale, value=-1)
        if self.missed is not None:
            self.missed[a:b] = missed * pivots
        self.loss += missed.square_().mul_(pivots).sum(0)
        self.bound += (pivots * scale.square()).sum(0) * levels.half_gap**2
        self.codes[a:b] = levels.encode_(steps, zero)
        if self.push is not None and b % self.push.block == 0:
            block = slice(b - self.push.block, b)
            s, z = self.scale[self.group[block]], self.zero[self.group[block]]
            if self.push.carry == "code":
                self.source[block] = decode(self.codes[block].to(s.dtype), s, z, self.grid)
            elif self.push.carry == "clamped":
                low, high = levels.reach(z)
                ends = low * s, high * s  # a negative scale turns them round
                self.source[block] = self.source[block].clamp(torch.minimum(*ends), torch.maximum(*ends))

    def result(self) -> Quantized:
        """Return the codes, back in storage order."""
        codes = torch.empty_like(self.codes)
        codes[self.factor.order] = self.codes
        certificate = Certificate(self.loss, self.bound, self.clipped)
        zero = self.grid.stored_zero(self.zero.T).contiguous()
        return Quantized(codes.T.contiguous(), self.scale.T.contiguous(), zero, certificate)


class _Leaf(NamedTuple):
    """Some columns, (columns, out), as parts of the arrays of ``_State``; those of a ``Push`` may be empty."""

    value: Tensor
    target: Tensor
    error: Tensor
    steps: Tensor
    source: Tensor
    weight: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    feedback: Tensor
    push: Tensor
    shift: Tensor


def _round_leaf(levels: Levels, *tensors: Tensor) -> None:
    """Round the columns of a ``_Leaf``, each after receiving the error of those before it."""
    value, target, error, steps, source, weight, scale, low, high, feedback, push, shift = _Leaf(*tensors)
    each = zip(*(part.unbind() for part in (value, steps, scale, low, high)), strict=True)
    for j, (v, step, s, least, greatest) in enumerate(each):
        if j and len(push):
            moved = push[:j, j : j + 1].T @ source[:j]
            if len(shift):
                moved.addmm_(shift[:j, j : j + 1].T, weight[:j])
            target[j : j + 1] += moved
            value[j : j + 1] += moved
        if j:
            value[j : j + 1].addmm_(feedback[:j, j : j + 1].T, error[:j])
        levels.round_(torch.div(v, s, out=step), least, greatest)
        torch.sub(target[j], step * s, out=error[j])
        if len(push):
            source[j] = v
