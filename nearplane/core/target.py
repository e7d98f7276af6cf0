"""The exact target: what the weight should be rounded *towards* once its input has drifted.

Asymmetric calibration asks for ``min_Q ‖Q X̂ - W X - R‖²``, R the drift of the residual stream where the output is added
to one. Completing the square it is ``min_Q ‖(Q - W*) X̂‖²`` with

    W* = W + pull H⁻¹,   pull = W D + R X̂ᵀ/n

(which calibration measures as one moment where there is an R) so that any solver of the symmetric problem solves it on
W*. Calibration is noisy, and noisiest where H is small. So of the step only what a part of the tokens that took no part
in it confirms is taken: with the steps ``S_k = pull (H + λ_k I)⁻¹`` of the other part, the held-out loss of
``W + Σ c_k S_k`` is a quadratic in c

    cᵀ K c - 2 cᵀ b,   K_kl = ⟨S_k, S_l H_v⟩,   b_k = ⟨S_k, pull_v⟩

that is minimized over c ≥ 0 without a search. One λ is shrinkage of the whole step; several shrink each direction of the
input by its own measure.
"""

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.factor import Factor, damped_cholesky


def pull(
    weight: Float[Tensor, "out in"], D: Float[Tensor, "in in"] | None, R: Float[Tensor, "out in"] | None
) -> Float[Tensor, "out in"]:
    """What the drift asks of the weight, before the Hessian divides it: the moment R where one is kept, else ``W D``.

    R is of the stream behind the linear and holds ``W D`` already. Neither: nothing is asked.
    """
    if R is not None:
        return R
    return torch.zeros_like(weight) if D is None else weight @ D


def full_step(pull: Float[Tensor, "out in"], factor: Factor) -> Float[Tensor, "out in"]:
    """``pull (H + λI)⁻¹`` by two triangular solves with the factor."""
    unit = factor.feedback  # T, upper; its unit diagonal is implied
    half = pull.index_select(1, factor.order)
    half = torch.linalg.solve_triangular(unit.T, half, upper=False, left=False, unitriangular=True)
    half /= factor.pivots
    solved = torch.linalg.solve_triangular(unit, half, upper=True, left=False, unitriangular=True)
    step = torch.empty_like(solved)
    step[:, factor.order] = solved
    return step


def mixed_step(
    pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"], mix: dict[float, Float[Tensor, "#out 1"]]
) -> tuple[Float[Tensor, "out in"], int]:
    """``Σ c_k pull (H + λ_k I)⁻¹`` with ``mix`` = {λ_k over mean(diag H): c_k}, and how often a λ had to be raised.

    Many rows share one sum of inverses, few are solved for: whichever costs less.
    """
    total: Tensor | None = None
    raised = 0
    many = len(pull) > len(H) and all(share.numel() == 1 for share in mix.values())
    for damp_percent, share in mix.items():
        lower, _, times = damped_cholesky(H.clone, damp_percent)
        raised += times
        part = torch.cholesky_inverse(lower) if many else torch.cholesky_solve(pull.T, lower).T
        total = part.mul_(share) if total is None else total.addcmul_(part, share)
    if total is None:
        return torch.zeros_like(pull), raised
    return pull @ total if many else total.contiguous(), raised


def row_shares(
    step: Float[Tensor, "out in"], pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> Float[Tensor, "out 1"]:
    """The share of ``step`` that the held-out moments (``pull``, ``H``) want of each output row, within [0, 1]."""
    wanted, curvature = (step * pull).sum(1), (step * (step @ H)).sum(1)
    share = torch.where(curvature > 0, wanted / curvature, torch.zeros_like(wanted))
    return share.clamp_(0, 1)[:, None]


def shares(
    steps: list[Float[Tensor, "out in"]], pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> list[float]:
    """How much of each of ``steps`` the held-out moments (``pull``, ``H``) want, together and none below 0.

    The least of a quadratic over c ≥ 0 is the unconstrained least of some subset of the steps: all are tried.
    """
    images = [step @ H for step in steps]
    K = torch.tensor([[_dot(step, image) for image in images] for step in steps], dtype=torch.float64)
    b = torch.tensor([_dot(step, pull) for step in steps], dtype=torch.float64)
    best, result = 0.0, torch.zeros_like(b)
    for size in range(1, len(steps) + 1):
        for chosen in combinations(range(len(steps)), size):
            index = list(chosen)
            c, info = torch.linalg.solve_ex(K[index][:, index], b[index])
            gain = float(c @ b[index])
            if int(info) == 0 and bool((c >= 0).all()) and gain > best:
                best, result = gain, torch.zeros_like(b).index_put_((torch.tensor(index),), c)
    return [float(c) for c in result]


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
