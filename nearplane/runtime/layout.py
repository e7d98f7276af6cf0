"""Lay out a quantized weight in memory for the kernels. A layout is made when a checkpoint is loaded, and never stored.

A tile is 16 output channels: a stream of blocks of 32 inputs. A block has 8 steps. A step is 64 codes: 4 consecutive inputs of
each of the 16 channels. Codes of ``b`` bits take ``b`` bits: a block is split into planes of 4, 2 and 1 bits, the binary
digits of ``b`` (3 bits: a plane of two and a plane of one). A byte of a plane holds the bits of 2, 4 or 8 consecutive steps,
the first in its lowest bits. 8-bit codes are bytes.

Groups begin at blocks. Groups of other widths than multiples of 32, or of scattered columns (desc_act), need gaps or another
order of columns. Then a position is a column's place in the layout, and ``order`` holds the column of each position.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from nearplane.core.errors import SettingError

TILE, BLOCK, STEPS = 16, 32, 8
# Planes of each number of bits, by their own bits. A byte of a plane holds 8 / plane steps.
PLANES = {bits: tuple(p for p in (4, 2, 1) if bits & p) for bits in range(2, 8)} | {8: (8,)}
# Dtypes of scales, which are kept as integers of the same bits: a model's .to(dtype) leaves integers alone.
SCALE_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a weight that its tensors do not show."""

    out: int
    columns: int
    bits: int
    positions: int
    """Columns and gaps, a multiple of 32."""
    span: int
    """Positions per group; the last group may have fewer."""
    groups: int
    zero: int
    """The zero of every group, if ``zeros`` is empty."""
    scale_dtype: torch.dtype
    free: bool = False
    """Whether zeros are real numbers, the bits of float32; else they are bytes."""

    @property
    def tiles(self) -> int:
        """Tiles of 16 output channels, the last one padded."""
        return -(-self.out // TILE)


def match_shape(
    weight: Any, codes: tuple[torch.dtype, tuple[int, ...]], per_group: tuple[int, ...], on: str = ""
) -> None:
    """Raise ValueError unless the four tensors of a packed weight match its shape.

    Args:
        weight: ``Tiles``, or another layout with the same names.
        codes: dtype and sizes of the codes.
        per_group: sizes of the scales, and of zeros that differ.
        on: where the layout is for, in the error.
    """
    shape: Shape = weight.shape
    zeros = per_group if shape.free or weight.zeros.numel() else (0,)
    wanted = {
        "codes": codes,
        "scales": (SCALE_BITS[shape.scale_dtype], per_group),
        "zeros": (torch.int32 if shape.free else torch.uint8, zeros),
        "order": (torch.int32, (shape.positions,) if weight.order.numel() else (0,)),
    }
    for name, (dtype, sizes) in wanted.items():
        tensor: Tensor = getattr(weight, name)
        if tensor.dtype != dtype or tuple(tensor.shape) != sizes or not tensor.is_contiguous():
            got = f"{list(tensor.shape)} of {tensor.dtype}" + ", not contiguous" * (not tensor.is_contiguous())
            raise ValueError(f"a packed weight's {name}{on} must be {list(sizes)} of {dtype}; got {got}")


@dataclass(frozen=True)
class Tiles:
    """A packed weight."""

    shape: Shape
    codes: UInt8[Tensor, "tiles blocks bytes"]
    scales: Int[Tensor, "tiles groups 16"]
    """Scales, the bits of ``shape.scale_dtype``."""
    zeros: UInt8[Tensor, "tiles groups 16"] | Int[Tensor, "tiles groups 16"]
    """Zeros, bytes or the bits of float32 (``shape.free``); empty if all are ``shape.zero``."""
    order: Int[Tensor, "positions"]
    """Column at each position, -1 for a gap; empty if column and position are the same."""

    def check(self) -> None:
        """Raise ValueError unless the tensors match the shape: a kernel addresses memory by the shape."""
        shape = self.shape
        codes = torch.uint8, (shape.tiles, shape.positions // BLOCK, 64 * shape.bits)
        match_shape(self, codes, (shape.tiles, shape.groups, TILE))
        if self.order.numel() and not -1 <= int(self.order.min()) <= int(self.order.max()) < shape.columns:
            raise ValueError(f"a packed weight's order names columns outside 0 to {shape.columns - 1}")

    def rows(self, first: int, last: int) -> "Tiles":
        """Slice tiles ``first`` to ``last``."""
        shape = replace(self.shape, out=min(self.shape.out, last * TILE) - first * TILE)
        zeros = self.zeros[first:last] if self.zeros.numel() else self.zeros
        return Tiles(shape, self.codes[first:last], self.scales[first:last], zeros, self.order)

    @property
    def numbers(self) -> Tensor:
        """Zeros as numbers, uint8 or float32; empty if all are ``shape.zero``."""
        return self.zeros.view(torch.float32) if self.shape.free else self.zeros

    @property
    def nbytes(self) -> int:
        """Size of all four tensors in bytes."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.order))


def tile(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: UInt8[Tensor, "out groups"] | Float32[Tensor, "out groups"],
    bits: int,
    width: int,
    group: Int[Tensor, "in"] | None = None,
) -> Tiles:
    """Lay out a weight.

    Args:
        codes: codes of the weight.
        scale: scale of each group, float32, float16 or bfloat16.
        zero: zero of each group, float32 where offsets are numbers of their own. Bytes are kept if all are bytes.
        bits: bits of a code, 2 to 8.
        width: columns per group; the last group may have fewer.
        group: group of each column, if groups are not contiguous.

    Raises:
        SettingError: no layout for these bits or scales, or a group of more columns than ``width`` has room for.
    """
    if bits not in PLANES or scale.dtype not in SCALE_BITS:
        raise SettingError(f"{bits} bits with {scale.dtype} scales have no packed layout.")
    out, columns = codes.shape
    order = _order(columns, width, group)
    positions = len(order)
    groups = scale.shape[1]
    span = positions if groups == 1 else -(-width // BLOCK) * BLOCK
    trivial = torch.equal(order[:columns], torch.arange(columns)) and bool((order[columns:] < 0).all())
    if not trivial:
        codes = torch.where(order >= 0, codes[:, order.clamp_min(0)], 0)
    rows = -out % TILE
    codes = torch.nn.functional.pad(codes, (0, positions - codes.shape[1], 0, rows))
    if bool((zero.to(torch.uint8) == zero).all()):
        zero = zero.to(torch.uint8)
    free = zero.is_floating_point()
    same = not free and bool((zero == zero[0, 0]).all())

    def per_group(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, 0, 0, rows)).view(-1, TILE, groups).transpose(1, 2).contiguous()

    shape = Shape(out, columns, bits, positions, span, groups, int(zero[0, 0]) if same else 0, scale.dtype, free)
    zeros = per_group(zero)
    return Tiles(
        shape,
        pack_tiles(codes, bits),
        per_group(scale).view(SCALE_BITS[scale.dtype]),
        zeros.view(torch.int32) if free else zeros[:0].flatten() if same else zeros,
        torch.empty(0, dtype=torch.int32) if trivial else order.int(),
    )


def codes_of(tiles: Tiles) -> UInt8[Tensor, "rows positions"]:
    """Unpack the codes by channel (padded to 16) and position."""
    shape, packed = tiles.shape, tiles.codes
    blocks = shape.positions // BLOCK
    if shape.bits == 8:
        steps = packed.view(shape.tiles, blocks, STEPS, 64)
    else:
        steps, at, done = torch.zeros(1, dtype=torch.uint8, device=packed.device), 0, 0
        for plane in PLANES[shape.bits]:
            part = packed[:, :, at : at + 64 * plane].view(shape.tiles, blocks, plane, 64)
            shifts = torch.arange(0, 8, plane, dtype=torch.uint8, device=packed.device)
            field = part[:, :, :, None] >> shifts[:, None] & (1 << plane) - 1
            steps = steps | field.flatten(2, 3) << done
            at, done = at + 64 * plane, done + plane
    spread = steps.view(shape.tiles, blocks, STEPS, TILE, 4).permute(0, 3, 1, 2, 4)
    return spread.reshape(shape.tiles * TILE, shape.positions)


def dequantize(tiles: Tiles) -> Float[Tensor, "out in"]:
    """Compute ``scale * (code - zero)`` in float32, exact for 16-bit scales."""
    shape = tiles.shape
    group = torch.arange(shape.positions, device=tiles.codes.device) // shape.span

    def per_row(value: Tensor) -> Tensor:
        return value.transpose(1, 2).reshape(shape.tiles * TILE, shape.groups)[:, group]

    zero = per_row(tiles.numbers).float() if tiles.zeros.numel() else shape.zero
    weight = (codes_of(tiles).float() - zero) * per_row(tiles.scales.view(shape.scale_dtype)).float()
    weight = weight[: shape.out]
    if not tiles.order.numel():
        return weight[:, : shape.columns].contiguous()
    used = tiles.order >= 0
    result = weight.new_empty(shape.out, shape.columns)
    result[:, tiles.order[used].long()] = weight[:, used]
    return result


def _order(columns: int, width: int, group: Tensor | None) -> Int[Tensor, "positions"]:
    """Return the column at each position, -1 for gaps."""
    contiguous = torch.arange(columns) // width
    group = contiguous if group is None else group
    parts = []
    for g in range(int(contiguous[-1]) + 1):
        members = (group == g).nonzero()[:, 0]
        if len(members) > -(-width // BLOCK) * BLOCK:
            raise SettingError(
                f"group {g} has {len(members)} columns, and there is room for {-(-width // BLOCK) * BLOCK}."
            )
        last = g == int(contiguous[-1])
        room = -(-(len(members) if last else width) // BLOCK) * BLOCK
        parts.append(torch.nn.functional.pad(members, (0, room - len(members)), value=-1))
    return torch.cat(parts)


def pack_tiles(codes: UInt8[Tensor, "rows positions"], bits: int) -> UInt8[Tensor, "tiles blocks bytes"]:
    """Pack codes by channel (padded to 16) and position into tiles, every block into planes."""
    # tile, block, step, channel, input
    spread = codes.view(-1, TILE, codes.shape[1] // BLOCK, STEPS, 4).permute(0, 2, 3, 1, 4)
    codes = spread.reshape(*spread.shape[:3], 64)
    if bits == 8:
        return codes.flatten(2).contiguous()
    parts, done = [], 0
    for plane in PLANES[bits]:
        shared = 8 // plane
        field = (codes >> done & (1 << plane) - 1).view(*codes.shape[:2], STEPS // shared, shared, 64)
        byte = field[:, :, :, 0].clone()
        for i in range(1, shared):
            byte |= field[:, :, :, i] << i * plane
        parts.append(byte.flatten(2))
        done += plane
    return torch.cat(parts, 2)
