"""Which grid fits which GGUF type, and solved weights as rows of blocks, both ways.

Every type has a grid of its own (``Grid.named("q4_k")``). An integer grid with plain scales goes into a group-of-32 type bit for
bit where its groups are whole blocks, its levels lie within the type's, and float16 holds its scales. K types hold their
own grids only.
"""

from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized
from nearplane.core.levels import Uniform
from nearplane.core.nested import Nested
from nearplane.core.scales import Affine, real_zero
from nearplane.formats.base import Decoded, levels_reason, stored_grid
from nearplane.formats.gguf.blocks import BLOCKS, Block, Parts, products

# In the place of a K type whose blocks do not divide a row: what llama.cpp's own tool takes.
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q2_0": "Q4_0"}


class Fit(NamedTuple):
    """A type that can hold a grid."""

    type: str
    exact: bool
    """Whether every value stays; else offsets are rounded to float16."""


def known_type(name: str) -> str:
    """Give the name of a type that is written, in capitals. Raises SettingError for another."""
    found = str(name).upper()
    if found not in BLOCKS:
        near = [known for known in BLOCKS if found.startswith(known)]
        hint = f"; did you mean {near[0]}? A suffix as _M means a mix of types: see --override" if near else ""
        raise SettingError(f"gguf_type must be one of {', '.join(BLOCKS)}; got {name!r}{hint}.")
    return found


def grid_of(type: str) -> Grid:
    """Give the grid of a type."""
    return Grid.named(type.lower())


def own_type(grid: Grid) -> str | None:
    """Name the type whose grid this is; None for any other grid."""
    return next((name for name in BLOCKS if stored_grid(grid_of(name)) == stored_grid(grid)), None)


def dividing(columns: int) -> list[str]:
    """Name the types whose blocks divide so many inputs."""
    return [name for name, block in BLOCKS.items() if columns % block.size == 0]


def reason(type: str, grid: Grid, columns: int) -> str | None:
    """Tell why a type cannot hold a weight of so many inputs on a grid; None if it can."""
    block, width = BLOCKS[type], grid.group_width(columns)
    found = levels_reason(grid)
    if found is None and columns % block.size:
        others = ", ".join(dividing(columns)) or "none"
        found = f"{type} has blocks of {block.size} inputs, which do not divide {columns} as those of {others} do"
    if found is not None or own_type(grid) == type:
        return found
    if block.nested or isinstance(grid.scales, Nested):
        found = f"{type} cannot hold it: K types hold their own grids only, and nothing else holds those"
    elif width % block.size:
        found = f"groups of {width} inputs are no whole blocks of {type}, which are {block.size}"
    elif block.middle is None and grid.code_range[1] >= 1 << block.bits:
        found = f"codes go to {grid.code_range[1]}, those of {type} to {(1 << block.bits) - 1}"
    elif block.middle is not None and grid.scales.free:
        found = f"its offsets are numbers of their own, and {type} has none"
    elif block.middle is not None:
        (low, high), (least, most) = _range(grid), _ends(block)
        inside = least <= low and high <= most
        found = None if inside else f"its levels reach from {low} to {high}, those of {type} from {least} to {most}"
    return found


def fits(grid: Grid, columns: int) -> list[Fit]:
    """List the types that can hold a weight, exact ones first, the smaller before the larger."""
    found = [Fit(name, _exact(name, grid)) for name in BLOCKS if reason(name, grid, columns) is None]
    return sorted(found, key=lambda fit: (not fit.exact, BLOCKS[fit.type].weight_bits))


def cheapest(grid: Grid, columns: int) -> str | None:
    """Name the smallest type that holds a weight exactly, a type's own grid in that type; None if there is none."""
    own = own_type(grid)
    if own is not None:
        return own if reason(own, grid, columns) is None else None
    return next((fit.type for fit in fits(grid, columns) if fit.exact), None)


def refusal(grid: Grid, columns: int) -> str:
    """Tell why no type holds a weight exactly."""
    own = own_type(grid)
    if own is not None:
        return str(reason(own, grid, columns))
    near = [fit.type for fit in fits(grid, columns)]
    told = f"; {', '.join(near)} can, its offsets rounded to float16" if near else ""
    groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    signs = "" if grid.sym else " asymmetric"
    why = "" if dividing(columns) else f"; no block of a GGUF type divides {columns} inputs"
    if not why and grid.group_width(columns) % 32:
        why = "; groups must be whole blocks of 32"
    return f"no GGUF type holds{signs} {grid.storage_bits} bits in {groups} exactly{why}{told}"


def pack(type: str, quantized: Quantized, grid: Grid, name: str) -> UInt8[Tensor, "out bytes"]:
    """Write a weight as rows of blocks.

    Raises:
        NearplaneError: names the module of which a scale is no float16.
    """
    block, (codes, scale, zero) = BLOCKS[type], quantized[:3]
    width = grid.group_width(codes.shape[1])
    if isinstance(grid.scales, Nested):
        return block.pack(codes, Parts(*grid.scales.parts(scale.float(), zero)))
    scale = scale.float()
    offset = None
    if block.middle is None:
        affine = grid.scales if isinstance(grid.scales, Affine) else Affine("float16")
        offset = affine.offset(scale, zero.float())
        _halves(name, offset, type, "offset")
        offset = _per_block(offset, width, block, codes.shape[1])
    else:
        level = codes.to(torch.int16) - zero.to(torch.int16).repeat_interleave(width, 1)[:, : codes.shape[1]]
        if block.name == "Q2_0":  # its levels are -1 to 2: a scale of the other sign makes them -2 to 1
            level, scale = -level, -scale
        codes = (level + block.middle).to(torch.uint8)
    _halves(name, scale, type, "scale")
    return block.pack(codes, Parts(_per_block(scale, width, block, codes.shape[1]), None, offset))


def unpack(type: str, data: UInt8[Tensor, "out bytes"]) -> Decoded:
    """Read rows of blocks as a weight on the type's own grid."""
    block, grid = BLOCKS[type], grid_of(type)
    codes, parts = block.unpack(data)
    scale, offset = products(block, parts)
    if block.name == "Q2_0":
        codes, scale = 3 - codes, -scale
    scale = scale.to(getattr(torch, grid.held_in))
    middle = torch.full(scale.shape, 1 << (block.bits - 1), dtype=torch.uint8)
    zero = middle if offset is None else real_zero(offset, scale.float())
    return Decoded(codes, scale, zero, torch.arange(codes.shape[1]) // block.group)


def _exact(type: str, grid: Grid) -> bool:
    """Tell whether a type that can hold a grid keeps every value, scales being float16."""
    if BLOCKS[type].middle is not None or own_type(grid) == type or grid.scales.free:
        return True
    return grid.sym  # the offset is then the scale times a power of two


def _range(grid: Grid) -> tuple[int, int]:
    """Give the least and greatest step of a grid with plain zeros."""
    assert isinstance(grid.levels, Uniform)
    least, greatest = grid.code_range
    if grid.sym:
        middle = 1 << (grid.storage_bits - 1)
        return least - middle, greatest - middle
    return -greatest, greatest


def _ends(block: Block) -> tuple[int, int]:
    """Give the least and greatest level of a type without an offset."""
    if block.name == "Q2_0":
        return -2, 1
    assert block.middle is not None
    return -block.middle, (1 << block.bits) - 1 - block.middle


def _per_block(value: Tensor, width: int, block: Block, columns: int) -> Tensor:
    """Repeat a number per group for each block of the group."""
    return value.repeat_interleave(width // block.size, 1)[:, : columns // block.size]


def _halves(name: str, value: Tensor, type: str, what: str) -> None:
    """Raise NearplaneError unless float16 holds every number."""
    wrong = value.half().float() != value
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise NearplaneError(
            f"{name}: {int(wrong.sum())} of {value.numel()} {what}s have no exact value in float16, the dtype of {type} (row "
            f"{row}, group {group}: {float(value[row, group])!r}); quantize again with --format gguf."
        )
