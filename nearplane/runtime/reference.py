"""The plain path: dequantize some rows of the weight, multiply, go on. Works wherever torch does.

What every kernel is tested against, and what runs where none can: on a machine without a compiler, in float64, under
autograd.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from nearplane.runtime.layout import TILE, Tiles, dequantize

# Rows are dequantized in parts of about this many weights, 16 MiB in float32.
PART = 1 << 22


def linear(
    x: Float[Tensor, "*batch in"], tiles: Tiles, bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*batch out"]:
    """``x @ W.T + bias`` in the dtype of ``x``; computed in float32, in float64 where ``x`` is."""
    shape = tiles.shape
    work = torch.promote_types(x.dtype, torch.float32)
    step = max(1, PART // (shape.positions * TILE))
    parts = [
        functional.linear(x.to(work), dequantize(tiles.rows(a, a + step)).to(work)) for a in range(0, shape.tiles, step)
    ]
    y = torch.cat(parts, -1)
    return (y if bias is None else y + bias.to(work)).to(x.dtype)
