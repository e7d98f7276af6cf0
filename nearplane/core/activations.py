"""Rounding of activations: every token has a scale of its own, found while the model runs ("dynamic per token").

The formulas are those of vLLM's kernels for ``strategy: token, dynamic: true``, so that calibration sees the values that an
engine computes. A symmetric scale is the greatest magnitude over the greatest code: max / 127 for 8 bits. compressed-tensors,
by which transformers simulates the same, divides by 127.5. An asymmetric grid is the same in both.
``clip`` below 1 gives up a token's extremes for a finer step (QuaRot, arXiv 2404.00456, takes 0.9).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.errors import SettingError, plain_numbers


@dataclass(frozen=True)
class TokenGrid:
    """The integers that the numbers of a token may become."""

    bits: int = 8
    """Bits per number, 2 to 8."""
    sym: bool = True
    """Symmetric around zero; else the token's least and greatest number are the ends."""
    clip: float = 1.0
    """Share of the token's range that is kept, above 0 and at most 1."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SettingError(f"act_bits and kv_bits are 2 to 8 (16 leaves activations alone); got {self.bits!r}.")
        if not isinstance(self.sym, bool):
            raise SettingError(f"act_sym must be True or False; got {self.sym!r}.")
        if not 0 < self.clip <= 1:
            raise SettingError(f"act_clip is a share of a token's range, above 0 and at most 1; got {self.clip}.")


def round_tokens(x: Float[Tensor, "*batch width"], grid: TokenGrid) -> Float[Tensor, "*batch width"]:
    """Round each vector along the last dimension on a grid of its own.

    Args:
        x: Activations in any floating dtype; the arithmetic is float32 or wider.
        grid: Bits, symmetry and clipping.

    Returns:
        The rounded values in the dtype of ``x``. NaN or Inf makes its whole vector NaN.
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    least, greatest = -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1
    low, high = (grid.clip * end for end in torch.aminmax(work, dim=-1, keepdim=True))
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.sym:
        scale = torch.maximum(-low, high) / greatest
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (greatest - least)
    # Of a token of zeros any scale will do.
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    if not grid.sym:
        zero = (least - low / scale).clamp(least, greatest).round()
    code = (work / scale).add_(zero).round_().clamp_(least, greatest)
    return code.sub_(zero).mul_(scale).to(x.dtype)
