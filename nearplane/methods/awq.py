"""AWQ's rounding (Lin et al. 2023, arXiv 2306.00978): round to nearest, each group's range clipped where its output error falls.

The other half of AWQ, scales of input channels, is a transform (``transforms/scaling.py``), which this method asks for.
The error of a group is that of its share of the output, ``(Q-W) H_g (Q-W)ᵀ`` with H_g the group's block of H. The released
code measures the same on stored inputs. Differs from the released code in: queries and keys are clipped like any linear.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, by_column, decode, encode, fit_groups, round_to_nearest
from nearplane.core.moments import Moments
from nearplane.core.search import of_range
from nearplane.methods.base import Need

# Ranges that are tried: |w| up to 1, 0.95, ... 0.55 of the group's largest.
SHRINK_STEPS, SHRINK_GRAIN = 10, 20
# Numbers of a weight that are worked on at a time.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class AWQ:
    """Round to nearest on clipped ranges; scales input channels first, unless --scale none. --fit minmax clips nothing."""

    rows_independent: ClassVar[bool] = True
    scale: ClassVar[str] = "awq"  # the transform that the method asks for

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"H"})

    def prepare(self, moments: Moments) -> Float[Tensor, "in in"]:
        """Return H, of which the groups' blocks are used."""
        moments.check()
        return moments.H

    def solve(self, weight: Float[Tensor, "out in"], state: Float[Tensor, "in in"], grid: Grid) -> Quantized:
        """Choose the range of every group, and round every weight to nearest."""
        if grid.fit != "auto":
            return round_to_nearest(weight, *fit_groups(weight, grid, state.diagonal()), grid)
        step = max(1, AT_ONCE // weight.shape[1])
        parts = [clip_groups(rows, grid, state) for rows in torch.split(weight, step)]
        scale, zero = (torch.cat(values) for values in zip(*parts, strict=True))
        return round_to_nearest(weight, scale, zero, grid)


def clip_groups(
    weight: Float[Tensor, "out in"], grid: Grid, H: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return the scale and zero of every group, of the range with the least error of the group's share of the output.

    Args:
        weight: The weight.
        grid: ``fit`` is not used.
        H: Second moment of the input.
    """
    if grid.scales.joint:  # scales that are stored together are rounded together, for ranges that are not clipped
        return fit_groups(weight, grid, H.diagonal())
    n, width = weight.shape[1], grid.group_width(weight.shape[1])
    pad = (0, -n % width)
    groups = torch.nn.functional.pad(weight, pad).reshape(len(weight), -1, width)
    if pad[1]:  # a smaller last group: repeat its first weight, which moves no range
        groups[:, -1, width - pad[1] :] = groups[:, -1, :1]
    low, high = (side.flatten() for side in grid.scales.span(groups.amin(2), groups.amax(2)))
    largest = groups.abs().amax(2).flatten()
    blocks = torch.nn.functional.pad(H, (*pad, *pad)).unfold(0, width, width).unfold(1, width, width)
    blocks = blocks.diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # (groups, width, width)
    best = torch.full_like(groups[..., 0], torch.inf)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for i in range(SHRINK_STEPS):
        most = largest * (1 - i / SHRINK_GRAIN)
        for sign in (1, -1) if grid.scales.either_sign else (1,):
            some = of_range(torch.maximum(low, -most), torch.minimum(high, most), grid.levels, grid.scales, sign)
            s, z = (value.reshape(best.shape) for value in some)
            s_by, z_by = (by_column(value, grid, n) for value in (s, z))
            delta = decode(encode(weight, s_by, z_by, grid), s_by, z_by, grid).sub_(weight)
            delta = torch.nn.functional.pad(delta, pad).reshape(groups.shape)
            error = (torch.einsum("rgi,gij->rgj", delta, blocks) * delta).sum(2)
            better = error < best
            best, scale, zero = (torch.where(better, new, old) for new, old in ((error, best), (s, scale), (z, zero)))
    return scale, zero
