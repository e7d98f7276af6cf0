"""Equality up to the rounding of float32, whatever order a processor adds numbers in.

A sum of n products, each rounded to eps, is off by about eps * sqrt(n) times the size of its terms, and by n eps at most.
Vector widths, fused multiply-add, threads and libraries change the order of the terms. A fault moves a value by a share
of itself that no rounding reaches.
"""

from math import sqrt

import torch
from torch import Tensor

# Beyond the typical error: sums follow one another, and the worst of many elements counts.
SLACK = 64


def near(found: Tensor, expected: Tensor, sums: int) -> None:
    """Assert that two tensors of one shape agree as results of float32 sums of ``sums`` terms do."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    allowed = SLACK * torch.finfo(torch.float32).eps * sqrt(sums) * size
    off = (found.double() - expected.double()).abs()
    assert bool(found.isfinite().all()) and float(off.max() if off.numel() else 0.0) <= allowed, (
        f"off by {float(off.max()):.3g} of {size:.3g}, sums of {sums} float32 terms explain {allowed:.3g}"
    )
