"""Dense linear algebra at the rate of the processor: float32 products by the faster library, coarse products, Cholesky.

On x86 torch gives products in float32 to MKL, which uses half of the vector width of AMD's processors with AVX-512.
oneDNN, which torch ships, too, uses all of it: 220 instead of 100 GFLOP/s on one thread of a Zen 5. torch hands products to
oneDNN where a program allows bfloat16 inside of float32 products. oneDNN takes that permission on processors with AMX alone;
without AMX the products stay in float32. Both are checked here before a run relies on them.

A *coarse product* keeps 8 binary digits of its factors and of its result, and sums in float32. Processors with
instructions for bfloat16 take a quarter to a half of float32's time for one. NearPlane takes coarse products where a relative
error of 2^-8 is small beside what calibration noise does to the same number: in the linears of its reference stream, in D, in
steps of the target, in shares that held-out tokens judge, in the slopes of a refinement. No sweep has one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from nearplane.core import compiled

# The relative error of a product in float32 is below, that in bfloat16 (2e-3) or tf32 (3e-4) far above.
MOST_ERROR = 2e-6
SHAPES = ((64, 256, 64), (512, 1024, 384))  # (rows, inner, columns) that are compared
# Columns of the factor that are formed at a time. Below LEAST_BLOCKED columns LAPACK is as fast.
BLOCK, LEAST_BLOCKED = 192, 768
# Columns beside the diagonal whose products stay in full precision in a coarse solve.
NEAR = 128
# Multiply-adds from which a coarse product saves more than turning its factors into bfloat16 costs.
LEAST_COARSE = 2**24


@contextmanager
def full_width(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices on the CPU by oneDNN while the context lasts, where that is faster and as exact.

    A call of oneDNN takes some 25 microseconds more than one of MKL: this is for large products. A setting of the user's
    own stays.

    Args:
        device: where the products are computed; nothing changes unless it is a CPU.
    """
    switch = _switch()
    if switch is None or device.type != "cpu" or switch.fp32_precision != "none" or not exact():
        yield
        return
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = "none"


@cache
def exact() -> bool:
    """Tell whether this processor gains, and its products keep float32's precision."""
    switch = _switch()
    if switch is None or not halved():
        return False
    switch.fp32_precision, before = "bf16", switch.fp32_precision
    try:
        return all(_error(*shape) < MOST_ERROR for shape in SHAPES)
    finally:
        switch.fp32_precision = before


def capabilities() -> dict[str, Any]:
    """Return what torch knows of this processor, by name; nothing in a torch that does not tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


@cache
def bfloat16_is_fast() -> bool:
    """Tell whether this processor multiplies bfloat16 by instructions of its own."""
    known = capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def described() -> str:
    """Say how this processor multiplies matrices and runs a solver's loops: what the last digits of a run depend on."""
    library = "oneDNN" if _switch() is not None and exact() else "torch's default library"
    loops = f"loops compiled for {isa}" if (isa := compiled.best()) else "loops by torch"
    return f"float32 by {library}, coarse ones in {'bfloat16' if bfloat16_is_fast() else 'float32'}, {loops}"


def halved() -> bool:
    """Tell whether MKL uses half of this processor's vectors: AMD's with AVX-512, without AMX."""
    known = capabilities()
    return (
        "AMD" in str(known.get("cpu_name")) and bool(known.get("avx512_f")) and not known.get("amx_tile")
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    )  # fmt: skip


def _switch() -> Any:
    """Return torch's settings of oneDNN's matrix products; None in a torch that has no such setting."""
    found = getattr(torch.backends.mkldnn, "matmul", None)
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found if there and hasattr(found, "fp32_precision") else None


def _error(rows: int, inner: int, columns: int) -> float:
    """Return the relative error of a product of numbers whose bits are all in use."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
    wanted = a.double() @ b.double()
    return float(((a @ b).double() - wanted).norm() / wanted.norm())


def coarse(matrix: Float[Tensor, "*batch rows columns"]) -> Tensor:
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


@contextmanager
def coarse_linears(device: torch.device) -> Iterator[None]:
    """Let the linears of forwards be coarse products while the context lasts, where that gains. Biases are added in float32.

    Args:
        device: where the model runs; nothing changes unless it is a CPU whose coarse products are in bfloat16.
    """
    if device.type == "cpu" and bfloat16_is_fast():
        with _CoarseLinears():
            yield
    else:
        yield


class _CoarseLinears(TorchFunctionMode):
    """Takes calls of torch's linear, and of the product that GPT-2's Conv1D makes, for coarse products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and len(args) >= 2:
            (x, weight), bias = args[:2], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            if _large(x, weight, len(weight)):
                product = linear(coarse(x), coarse(weight)).to(x.dtype)
                return product if bias is None else product.add_(bias)
        elif func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if _large(x, weight, weight.shape[-1]) and bias.dim() == 1:
                return (coarse(x) @ coarse(weight)).to(x.dtype).add_(bias)
        return func(*args, **(kwargs or {}))


def _large(x: Tensor, weight: Tensor, out: int) -> bool:
    """Tell whether a product of an input (..., in) is in float32, without gradients, and gains by being coarse."""
    dtypes = x.dtype == weight.dtype == torch.float32
    graded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return dtypes and not graded and x.numel() * out >= LEAST_COARSE


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
