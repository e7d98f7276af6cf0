"""The output head in 8 (or fewer) bits while a model runs: in a small model it is most of what a token reads.

Done in memory and on request only. The embedding that a tied head shares its weight with stays as it is: a token reads
one row of it.
"""

from typing import Any

import torch
from torch import nn

from nearplane.core.errors import SettingError
from nearplane.core.grid import Grid, by_column, encode, fit_groups
from nearplane.runtime.layout import tile
from nearplane.runtime.linear import QuantizedLinear

GROUP = 64


def quantize_head(model: nn.Module, bits: int) -> None:
    """Round the output head to nearest, symmetric, in groups of 64. SettingError where the model has none that is dense."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if not isinstance(head, nn.Linear):
        raise SettingError(f"{type(model).__name__} has no dense output head to round to {bits} bits.")
    grid = Grid(bits=bits, group_size=GROUP, sym=True, fit="minmax", scale_dtype="float16")
    codes, scales, zeros = [], [], []
    for rows in torch.split(head.weight.detach(), 4096):  # a head is large, and its float32 copy need not be
        weight = rows.float()
        scale, zero = fit_groups(weight, grid)
        s, z = (by_column(part, grid, weight.shape[1]) for part in (scale, zero))
        codes.append(encode(weight, s, z, grid).to(torch.uint8))
        scales.append(scale.half())
        zeros.append(zero.to(torch.uint8))
    width = grid.group_width(head.in_features)
    tiles = tile(torch.cat(codes), torch.cat(scales), torch.cat(zeros), grid.storage_bits, width)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, QuantizedLinear(tiles, head.bias))
