"""The exact target: the weight to round *towards* once the input has drifted.

Asymmetric calibration asks for ``min_Q ‖Q X̂ - W X - R‖²``, R the drift of the residual stream where the output is added
to one. Completing the square it is ``min_Q ‖(Q - W*) X̂‖²`` with

    W* = W + pull H⁻¹,   pull = W D + R X̂ᵀ/n

so that any solver of the symmetric problem solves it on W*. (Where there is an R, calibration measures the pull as one
moment.) Calibration is noisy, and noisiest where H is small. So only the share of the step that held-out tokens confirm
is taken. With the steps ``S_k = pull (H + λ_k I)⁻¹`` of the other tokens, the held-out loss of ``W + Σ c_k S_k`` is
a quadratic in c

    cᵀ K c - 2 cᵀ b,   K_kl = ⟨S_k, S_l H_v⟩,   b_k = ⟨S_k, pull_v⟩

that is minimized over c ≥ 0 without a search. One λ shrinks the whole step; several λ shrink each direction of the input
by a measure of its own.
"""

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.dense import coarse_product, unit_solve
from nearplane.core.factor import Factor, damped_cholesky, factorize


def pull(
    weight: Float[Tensor, "out in"], D: Float[Tensor, "in in"] | None, R: Float[Tensor, "out in"] | None
) -> Float[Tensor, "out in"]:
    """Return the pull of the drift on a weight: the moment R where kept, which holds ``W D`` already, else ``W D``, else 0."""
    if R is not None:
        return R
    return torch.zeros_like(weight) if D is None else coarse_product(weight, D)


def full_step(pull: Float[Tensor, "out in"], factor: Factor) -> Float[Tensor, "out in"]:
    """Solve ``pull (H + λI)⁻¹`` by two triangular solves with the factor."""
    unit = factor.feedback  # T, upper; its unit diagonal is implied
    half = pull.index_select(1, factor.order)
    # Small directions of H amplify what this solve rounds, so that it is never coarse.
    half = torch.linalg.solve_triangular(unit.T, half, upper=False, left=False, unitriangular=True)
    half /= factor.pivots
    solved = unit_solve(half, unit)
    step = torch.empty_like(solved)
    step[:, factor.order] = solved
    return step


def mixed_step(
    pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"], mix: dict[float, Float[Tensor, "#out 1"]], *known: Factor
) -> tuple[Float[Tensor, "out in"], int]:
    """Return ``Σ c_k pull (H + λ_k I)⁻¹``.

    Args:
        pull: The pull of the drift.
        H: Second moment of the input.
        mix: λ_k, as a fraction of mean(diag H), to its share c_k, of all rows or of each.
        known: Factors of H that were made already.

    Returns:
        The step, and how often a λ had to be raised. Many rows share one sum of inverses; few rows are solved for.
    """
    total: Tensor | None = None
    raised = 0
    many = len(pull) > len(H) and all(share.numel() == 1 for share in mix.values())
    for damp_percent, share in mix.items():
        factor = next((f for f in known if f.damp_percent == damp_percent), None)
        if many:
            lower, _, times = damped_cholesky(H.clone, damp_percent)
            part = torch.cholesky_inverse(lower)
        else:
            made = factor or factorize(H, damp_percent=damp_percent)
            times = 0 if factor else made.raised  # a known factor's raises were counted where it was made
            part = full_step(pull, made)
        raised += times
        total = part.mul_(share) if total is None else total.addcmul_(part, share)
    if total is None:
        return torch.zeros_like(pull), raised
    return pull @ total if many else total.contiguous(), raised


def row_shares(
    step: Float[Tensor, "out in"], pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> Float[Tensor, "out 1"]:
    """Return the share of ``step`` that the held-out moments (``pull``, ``H``) confirm for each row, within [0, 1]."""
    wanted, curvature = (step * pull).sum(1), (step * coarse_product(step, H)).sum(1)
    share = torch.where(curvature > 0, wanted / curvature, torch.zeros_like(wanted))
    return share.clamp_(0, 1)[:, None]


def share_of(
    step: Float[Tensor, "out in"], pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> Float[Tensor, "1 1"]:
    """Return the share of ``step`` that the held-out moments (``pull``, ``H``) confirm for all rows together, within [0, 1]."""
    curvature = _dot(step, coarse_product(step, H))
    return step.new_full((1, 1), min(max(_dot(step, pull) / curvature, 0.0), 1.0) if curvature > 0 else 0.0)


def shares(
    steps: list[Float[Tensor, "out in"]], pull: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> list[float]:
    """Return the shares of ``steps``, none below 0, whose sum has the least loss on the held-out ``pull`` and ``H``.

    The minimum of a quadratic over c ≥ 0 is the unconstrained minimum of some subset of the steps: all are tried.
    """
    images = [coarse_product(step, H) for step in steps]
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
