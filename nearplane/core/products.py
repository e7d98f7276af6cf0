"""Let torch multiply float32 matrices at the processor's full rate.

On x86 torch gives products in float32 to MKL, which uses half of the vector width of AMD's processors with AVX-512.
oneDNN, which torch ships, too, uses all of it: 220 instead of 100 GFLOP/s on one thread of a Zen 5. torch hands products to
oneDNN where a program allows bfloat16 inside of float32 products. oneDNN takes that permission on processors with AMX alone;
without AMX the products stay in float32. Both are checked here before a run relies on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# The relative error of a product in float32 is below, that in bfloat16 (2e-3) or tf32 (3e-4) far above.
MOST_ERROR = 2e-6
SHAPES = ((64, 256, 64), (512, 1024, 384))  # (rows, inner, columns) that are compared


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
    """Say how this processor multiplies float32 matrices: what the last digits of a run depend on, beside its threads."""
    library = "oneDNN" if _switch() is not None and exact() else "torch's default library"
    return f"float32 by {library}, coarse ones in {'bfloat16' if bfloat16_is_fast() else 'float32'}"


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
