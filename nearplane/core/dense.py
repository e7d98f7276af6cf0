"""Dense linear algebra at the rate of the processor: a blocked Cholesky factor, and coarse products.

A *coarse product* keeps 8 binary digits of its factors and of its result, and sums in float32. Processors with
instructions for bfloat16 take a quarter of the time for one. NearPlane takes coarse products where a relative error of
2^-8 is small beside what calibration noise does to the same number: in steps of the target, in shares that held-out
tokens judge, in the slopes of a refinement. No sweep has one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.products import bfloat16_is_fast, full_width

# Columns of the factor that are formed at a time. Below LEAST_BLOCKED columns LAPACK is as fast.
BLOCK, LEAST_BLOCKED = 192, 768
# Columns beside the diagonal whose products stay in full precision in a coarse solve.
NEAR = 128
# Multiply-adds from which a coarse product saves more than turning its factors into bfloat16 costs.
LEAST_COARSE = 2**24


def coarse(matrix: Float[Tensor, "rows columns"]) -> Tensor:
    """Return a matrix as a factor of coarse products: in bfloat16 where that is faster, itself elsewhere.

    Only float32 on a CPU is ever coarse: float64 is asked for by those who want all digits.
    """
    fast = matrix.dtype == torch.float32 and matrix.device.type == "cpu" and bfloat16_is_fast()
    return matrix.bfloat16() if fast else matrix


def coarse_product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Return ``a b`` in the dtype of ``a``, coarse where the product is large enough to gain by it."""
    if a.shape[0] * a.shape[1] * b.shape[1] < LEAST_COARSE:
        return a @ b
    return (coarse(a) @ coarse(b)).to(a.dtype)


def unit_solve(B: Float[Tensor, "rows in"], T: Float[Tensor, "in in"]) -> Float[Tensor, "rows in"]:
    """Return ``B T⁻¹`` for a unit upper triangular T, whose diagonal is not read; coarse where that gains.

    Products of blocks beside the diagonal are the coarse ones. With ``A = T diag(d) Tᵀ``, the error in the metric A is
    what rounding each element of the result to 8 digits would be: no more is amplified.
    """
    n = B.shape[1]
    if n <= NEAR or n * n * len(B) < LEAST_COARSE or coarse(B[:1, :1]).dtype == B.dtype:
        plain: Tensor = torch.linalg.solve_triangular(T, B, upper=True, left=False, unitriangular=True)
        return plain
    far, result = coarse(T), torch.empty_like(B, memory_format=torch.contiguous_format)
    done = torch.empty_like(result, dtype=far.dtype)
    for a in range(0, n, NEAR):
        b = min(a + NEAR, n)
        part = B[:, a:b] - done[:, :a] @ far[:a, a:b] if a else B[:, a:b]
        done[:, a:b] = result[:, a:b] = torch.linalg.solve_triangular(
            T[a:b, a:b], part, upper=True, left=False, unitriangular=True
        )
    return result


def blocked(H: Float[Tensor, "in in"]) -> bool:
    """Return whether ``cholesky_`` works on blocks, fastest where rows are contiguous; else columns should be."""
    return not H.is_cuda and len(H) >= LEAST_BLOCKED


def cholesky_(H: Float[Tensor, "in in"], rough: bool = False) -> int:
    """Overwrite ``H`` by its Cholesky factor, lower and with zeros above the diagonal.

    On a CPU the factor of a large matrix is formed block by block, each by one look back at all blocks before it: a
    product of large matrices, which LAPACK's own blocks are too small for.

    Args:
        H: A symmetric matrix.
        rough: Let the products of blocks be coarse. ``H`` then stands for one whose elements differ by 2^-9 of the roots of
            their diagonals: for a matrix whose damping is far greater.

    Returns:
        0, or the number of a leading minor that is not positive definite, counted from 1.
    """
    n, info = len(H), torch.empty((), dtype=torch.int32, device=H.device)
    if not blocked(H):
        torch.linalg.cholesky_ex(H, out=(H, info))
        return int(info)
    far = torch.empty_like(H, dtype=coarse(H[:1, :1]).dtype) if rough else H
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        if a and far.dtype != H.dtype:
            H[a:, a:b] -= far[a:, :a] @ far[a:b, :a].T
        elif a:
            with full_width(H.device):
                H[a:, a:b].addmm_(H[a:, :a], H[a:b, :a].T, alpha=-1)
        corner = H[a:b, a:b].T.contiguous().T  # in this layout LAPACK works in place
        torch.linalg.cholesky_ex(corner, out=(corner, info))
        if int(info):
            return a + int(info)
        H[a:b, a:b] = corner
        if b < n:
            H[b:, a:b] = torch.linalg.solve_triangular(corner.T, H[b:, a:b], upper=True, left=False)
        if far.dtype != H.dtype:
            far[a:, a:b] = H[a:, a:b]
    H.tril_()
    return 0
