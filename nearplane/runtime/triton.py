"""Decide whether the Triton kernel can run, and run it on CUDA devices.

The kernel is in triton_kernel.py, which is imported at the first call because Triton is optional (CUDA builds of torch bring
it). Tests on a CPU use Triton's interpreter, which shows what is computed but not how fast.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from nearplane.runtime.layout import Shape, Tiles

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(shape: Shape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernel cannot take such a weight or input; None if it can."""
    if device.type != "cuda":
        return f"the Triton kernel runs on CUDA, not on {device.type}"
    if shape.bits not in BITS:
        return f"the Triton kernel reads 2, 3, 4 and 8 bits, not {shape.bits}"
    if dtype not in DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {dtype}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def linear(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias``, (..., in) to (..., out) of the same dtype; products are summed in float32."""
    from nearplane.runtime.triton_kernel import launch

    flat = x.reshape(-1, tiles.shape.columns)
    y: Tensor = launch(flat.contiguous(), tiles, bias)
    return y.view(*x.shape[:-1], tiles.shape.out)
