"""One factor, no inverse: ``H + λI = T diag(d) Tᵀ`` with T unit upper triangular, after ordering the columns.

T is the Cholesky factor of the matrix with rows and columns reversed, reversed back and column-normalised: one
Cholesky (in³/3 FLOPs). The published GPTQ code (arXiv 2210.17323) takes ``chol -> inverse -> chol``, about four times the
work, and is less accurate in float32. Their U (upper, ``UᵀU = (H+λI)⁻¹``) is ``diag(d)^{-1/2} T⁻¹``.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearplane.core.dense import blocked, cholesky_
from nearplane.core.errors import NumericalError

Order = Literal["natural", "activation", "pivot"]

# Damping of an indefinite matrix is raised tenfold, up to the mean diagonal; every raise is reported.
RAISE, MOST_DAMP_PERCENT = 10.0, 1.0
# Rows that are permuted at a time.
STRIP = 512


class Factor(NamedTuple):
    """``H + damp·I`` with columns taken in ``order`` is ``T diag(pivots) Tᵀ``, ``T = I + feedback``."""

    feedback: Float[Tensor, "in in"]  # T - I, strictly upper
    pivots: Float[Tensor, "in"]
    order: Int[Tensor, "in"]  # column solved at each position
    damp: float  # added to the diagonal
    damp_percent: float  # damp over mean(diag H), after any raise
    raised: int = 0  # times the damping had to be raised


def factorize(
    H: Float[Tensor, "in in"], *, order: Order = "natural", damp_percent: float = 0.01, rough: bool = False
) -> Factor:
    """Order the columns of ``H``, add ``damp_percent * mean(diag H)`` to its diagonal, and factor it.

    Args:
        H: Second moment of the input, symmetric.
        order: The order of solving, see ``choose_order``.
        damp_percent: Damping as a fraction of the mean diagonal; raised where ``H`` is indefinite.
        rough: Let a factor with a damping of the mean diagonal and more be made of coarse products.

    Raises:
        NumericalError: ``H`` stays indefinite at damping 1.0.
    """
    mean = float(H.diagonal().mean())
    chosen = choose_order(H, order, damp_percent * mean)
    # Reversing rows and columns turns the lower Cholesky factor into the upper one that a left-to-right sweep needs.
    upper, used, raised = damped_cholesky(
        partial(_arranged, H, chosen.flip(0)), damp_percent, rough and damp_percent >= 1
    )
    if raised and order == "pivot":  # this order was chosen with too little damping
        again = factorize(H, order=order, damp_percent=used)
        return again._replace(raised=raised + again.raised)
    _reverse(upper.mT.view(-1) if upper.mT.is_contiguous() else upper.view(-1))
    root = upper.diagonal().clone()
    upper.div_(root).diagonal().zero_()
    return Factor(upper, root.square_(), chosen, used * mean, used, raised)


def _arranged(H: Tensor, order: Tensor) -> Tensor:
    """Return a copy with rows and columns in this order, made by strips so that it is the only copy."""
    result = torch.empty_like(H, memory_format=torch.contiguous_format)
    for a in range(0, len(H), STRIP):
        torch.index_select(H.index_select(0, order[a : a + STRIP]), 1, order, out=result[a : a + STRIP])
    return result


def _reverse(numbers: Tensor) -> None:
    """Flip ``numbers`` in place."""
    n, step = len(numbers), STRIP**2
    for a in range(0, n // 2, step):
        b = min(a + step, n // 2)
        head = numbers[a:b].flip(0)
        numbers[a:b] = numbers[n - b : n - a].flip(0)
        numbers[n - b : n - a] = head


class Cholesky(NamedTuple):
    """``lower lowerᵀ = H + damp_percent mean(diag H) I``."""

    lower: Float[Tensor, "in in"]
    damp_percent: float  # after any raise
    raised: int


def damped_cholesky(copy: Callable[[], Float[Tensor, "in in"]], damp_percent: float, rough: bool = False) -> Cholesky:
    """Damp a Hessian until it is positive definite, and factor it.

    Args:
        copy: Makes a copy of the Hessian; the factor takes its memory.
        damp_percent: Damping to begin with, as a fraction of the mean diagonal.
        rough: Try coarse products first.

    Raises:
        NumericalError: The Hessian stays indefinite at damping 1.0, or at ``damp_percent`` if that is more.
    """
    raised = 0
    while True:
        H = copy()
        H = H if blocked(H) else H.mT  # symmetric; in this layout LAPACK works in place
        H.diagonal().add_(damp_percent * float(H.diagonal().mean()))
        if cholesky_(H, rough) == 0 and bool(H.diagonal().isfinite().all()):
            return Cholesky(H, damp_percent, raised)
        if rough:
            rough = False
            continue
        if damp_percent >= MOST_DAMP_PERCENT:
            raise NumericalError(
                f"the Hessian is not positive definite even with damp_percent={damp_percent:g}. Likely causes: "
                "activations of very different size in float32, far fewer tokens than inputs, or a broken layer before "
                "this one. Use more calibration tokens, a larger damp_percent, or check the model's activations."
            )
        damp_percent = min(max(damp_percent, 1e-4) * RAISE, MOST_DAMP_PERCENT)
        raised += 1


def column_cost(H: Float[Tensor, "in in"], factor: Factor) -> Float[Tensor, "in"]:
    """Return the cost of an error in each column to a sweep, in storage order: the weight of errors in a fit.

    The cost is H_jj where no later column compensates the error, and the pivot d_j where all do. Clipping and the last
    columns leave some errors uncompensated. The geometric mean of both fits better scales than either (docs/LOG.md).
    """
    pivots = torch.empty_like(factor.pivots)
    pivots[factor.order] = factor.pivots
    return pivots.mul_(H.diagonal()).sqrt_()


def choose_order(H: Float[Tensor, "in in"], order: Order, damp: float = 0.0) -> Int[Tensor, "in"]:
    """Return the column to solve at each position.

    Args:
        H: Second moment of the input, symmetric.
        order: ``natural``; ``activation``, descending diag(H), GPTQ's act-order; or ``pivot``, the reverse of a min-pivot
            LDL elimination, which lowers the sum of pivots and so Babai's bound (arXiv 2507.18553).
        damp: Damping that will be added to the diagonal.
    """
    if order == "natural":
        return torch.arange(len(H), device=H.device)
    if order == "activation":
        return torch.argsort(H.diagonal(), descending=True, stable=True)
    return _min_pivot(H, damp).flip(0)


def _min_pivot(H: Tensor, damp: float) -> Tensor:
    """Return the elimination order that takes the smallest diagonal of the Schur complement each time.

    Left-looking: a column of the factor is formed when it is chosen; only the diagonal is always up to date.
    """
    n = len(H)
    diagonal = H.diagonal() + damp
    columns = torch.zeros_like(H)  # row k: column k of the unscaled factor
    picked = torch.empty(n, dtype=torch.long, device=H.device)
    for k in range(n):
        p = int(diagonal.argmin())
        picked[k] = p
        column = H[p] - columns[:k, p] @ columns[:k]
        column[p] += damp
        root = diagonal[p].clamp_min(torch.finfo(H.dtype).tiny).sqrt()
        columns[k] = column.div_(root)
        diagonal -= columns[k].square()
        diagonal[picked[: k + 1]] = torch.inf
    return picked
