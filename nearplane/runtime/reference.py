"""Multiply with a packed weight in plain torch: dequantize some rows of the weight, multiply, go on.

Every kernel is tested against this path. It runs where no kernel can: on a machine without a compiler, in float64, under
autograd.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nearplane.runtime.layout import TILE, Tiles, dequantize

# Weights that are dequantized at a time, 16 MiB in float32.
PART = 1 << 22


def linear(
    x: Float[Tensor, "*batch in"], tiles: Tiles, bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*batch out"]:
    """Compute ``x @ W.T + bias`` in float32, or float64 if ``x`` is; return the dtype of ``x``."""
    shape = tiles.shape
    work = torch.promote_types(x.dtype, torch.float32)
    step = max(1, PART // (shape.positions * TILE))
    parts = [
        functional.linear(x.to(work), dequantize(tiles.rows(a, a + step)).to(work)) for a in range(0, shape.tiles, step)
    ]
    y = torch.cat(parts, -1)
    return (y if bias is None else y + bias.to(work)).to(x.dtype)
