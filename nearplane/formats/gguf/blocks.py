"""The blocks of GGUF tensors, both ways: codes and the numbers of their scales to bytes, and back.

A row is a sequence of blocks. A block holds the codes of 32, 64 or 256 consecutive columns, cut into *planes*. A plane holds
some of each code's bits; a byte of a plane holds columns that lie ``stride`` apart. The value of a weight is
``scale * code - offset``. In the K types scale and offset are products of a float16 of the block and an integer of the group.

The layouts are facts about ggml. ``tests/formats/gguf`` compares them with the ``gguf`` package's own decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor


class Parts(NamedTuple):
    """The numbers that a block stores for its scales: scale = super_scale * sub_scale, likewise the offset."""

    super_scale: Float[Tensor, "out blocks"]
    """Values of float16."""
    sub_scale: Int32[Tensor, "out groups"] | None = None
    """None: 1."""
    super_offset: Float[Tensor, "out blocks"] | None = None
    """None: the offset is the scale times the block's ``middle``."""
    sub_offset: Int32[Tensor, "out groups"] | None = None


class Plane(NamedTuple):
    """Bits ``shift`` to ``shift + width - 1`` of the codes. A byte holds 8 / width columns, ``stride`` apart."""

    shift: int
    width: int
    stride: int


@dataclass(frozen=True)
class Block:
    """The layout of one GGUF type that is written here."""

    name: str
    number: int
    """Of the type in a file's list of tensors."""
    ftype: int
    """What ``general.file_type`` says of a file that consists of this type mostly."""
    size: int
    """Columns of a block."""
    group: int
    """Columns that share a scale."""
    bits: int
    middle: int | None
    """The code whose value is 0; None: the block stores an offset."""
    fields: tuple[Plane | Literal["scale", "offset", "subs"], ...]
    """In the order of their bytes."""
    subs: Literal["", "four", "six", "signed", "bytes"] = ""
    """How the integers of the groups are packed."""

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        subs = {"": 0, "four": 16, "six": 12, "signed": 12, "bytes": 16}[self.subs]
        planes = sum(self.size * field.width // 8 for field in self.fields if isinstance(field, Plane))
        return planes + subs + 2 * sum(field in ("scale", "offset") for field in self.fields)

    @property
    def weight_bits(self) -> float:
        """Bits that a weight takes, scales counted."""
        return 8 * self.nbytes / self.size

    @property
    def nested(self) -> bool:
        """Whether scales are products: a K type."""
        return bool(self.subs)

    def row_bytes(self, columns: int) -> int:
        """Count the bytes of a row."""
        return columns // self.size * self.nbytes

    def pack(self, codes: UInt8[Tensor, "out in"], parts: Parts) -> UInt8[Tensor, "out bytes"]:
        """Write rows of blocks.

        Args:
            codes: below ``2**bits``; columns are a multiple of ``size``.
            parts: what the scales consist of; float16 must hold the floats exactly. Neither is checked here.
        """
        rows = len(codes)
        blocks = codes.reshape(rows, -1, self.size)
        pieces = []
        for field in self.fields:
            if isinstance(field, Plane):
                pieces.append(_plane(blocks, field))
            elif field == "subs":
                pieces.append(_SUBS[self.subs][0](*(_by_block(part, blocks) for part in (parts[1], parts[3]))))
            else:
                number = parts.super_scale if field == "scale" else _stored_offset(parts, self)
                pieces.append(number.to(torch.float16).contiguous().view(torch.uint8).view(rows, -1, 2))
        if self.bits == 8:
            pieces[-1] = pieces[-1] ^ 0x80  # signed bytes
        return torch.cat(pieces, 2).reshape(rows, -1)

    def unpack(self, data: UInt8[Tensor, "out bytes"]) -> tuple[UInt8[Tensor, "out in"], Parts]:
        """Read rows of blocks. Inverse of ``pack``."""
        rows, at = len(data), 0
        blocks = data.reshape(rows, -1, self.nbytes)
        codes = blocks.new_zeros(rows, blocks.shape[1], self.size)
        scale, offset = torch.empty(0), None
        subs: tuple[Tensor | None, Tensor | None] = None, None
        for field in self.fields:
            if isinstance(field, Plane):
                width = self.size * field.width // 8
                codes |= _from_plane(blocks[..., at : at + width], field)
            elif field == "subs":
                width = 16 if self.subs in ("four", "bytes") else 12
                subs = _SUBS[self.subs][1](blocks[..., at : at + width].to(torch.int32))
            else:
                width = 2
                number = blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(2).float()
                scale, offset = (number, offset) if field == "scale" else (scale, number)
            at += width
        if self.bits == 8:
            codes ^= 0x80
        if offset is not None and not self.nested:
            offset = -offset
        flat = [None if part is None else part.reshape(rows, -1) for part in subs]
        return codes.reshape(rows, -1), Parts(scale, flat[0], offset, flat[1])

    def values(self, data: UInt8[Tensor, "out bytes"]) -> Float[Tensor, "out in"]:
        """Decode rows to float32, in the order of ggml's operations."""
        codes, parts = self.unpack(data)
        scale, offset = products(self, parts)
        level = codes.float()
        if self.middle is not None:
            level -= self.middle
        level = level.reshape(*scale.shape, self.group).mul_(scale[..., None])
        return (level if offset is None else level.sub_(offset[..., None])).reshape(codes.shape)


def products(block: Block, parts: Parts) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"] | None]:
    """Multiply out scales and offsets of all groups, exactly: 11 bits times at most 7. None: no offset is stored."""

    def multiplied(whole: Tensor | None, subs: Tensor | None) -> Tensor | None:
        if whole is None or subs is None:
            return whole
        return whole.repeat_interleave(block.size // block.group, 1) * subs

    scale = multiplied(parts.super_scale, parts.sub_scale)
    assert scale is not None
    return scale, multiplied(parts.super_offset, parts.sub_offset)


def _stored_offset(parts: Parts, block: Block) -> Tensor:
    """Give the second float of a block: what is subtracted in the K types, what is added in the others."""
    assert parts.super_offset is not None
    return parts.super_offset if block.nested else -parts.super_offset


def _by_block(part: Tensor | None, blocks: Tensor) -> Tensor | None:
    return None if part is None else part.reshape(*blocks.shape[:2], -1).to(torch.int32)


def _plane(blocks: Tensor, plane: Plane) -> Tensor:
    """Gather some bits of all codes of each block into bytes."""
    many = 8 // plane.width
    parts = (blocks >> plane.shift) & ((1 << plane.width) - 1)
    parts = parts.view(*blocks.shape[:2], -1, many, plane.stride)
    result = parts[..., 0, :].clone()
    for i in range(1, many):
        result |= parts[..., i, :] << (i * plane.width)
    return result.reshape(*blocks.shape[:2], -1)


def _from_plane(data: Tensor, plane: Plane) -> Tensor:
    """Spread the bytes of a plane to the bits of the codes."""
    shifts = torch.arange(0, 8, plane.width, dtype=torch.uint8)[:, None]
    parts = data.reshape(*data.shape[:2], -1, 1, plane.stride) >> shifts
    return ((parts & ((1 << plane.width) - 1)) << plane.shift).reshape(*data.shape[:2], -1)


def _pack_four(scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Q2_K: a byte a group, the scale in the low half."""
    assert scale is not None and offset is not None
    return (scale | offset << 4).to(torch.uint8)


def _unpack_four(data: Tensor) -> tuple[Tensor, Tensor]:
    return data & 15, data >> 4


def _pack_six(scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """Q4_K, Q5_K: the first four groups in six bits each; of the others four bits together, two above the first."""
    assert scale is not None and offset is not None
    first = [half[..., :4] | (half[..., 4:] >> 4) << 6 for half in (scale, offset)]
    return torch.cat([*first, (scale[..., 4:] & 15) | (offset[..., 4:] & 15) << 4], 2).to(torch.uint8)


def _unpack_six(data: Tensor) -> tuple[Tensor, Tensor]:
    low, both = (data[..., :4], data[..., 4:8]), data[..., 8:]
    rest = (both & 15, both >> 4)
    scale, offset = (torch.cat([a & 63, b | (a >> 6) << 4], 2) for a, b in zip(low, rest, strict=True))
    return scale, offset


def _pack_signed(scale: Tensor | None, _: Tensor | None) -> Tensor:
    """Q3_K: sixteen of six bits, 32 added; low four bits in eight bytes, high two bits in four."""
    assert scale is not None
    raw = scale + 32
    high = (raw >> 4).view(*raw.shape[:2], 4, 4)
    tops = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return torch.cat([(raw[..., :8] & 15) | (raw[..., 8:] & 15) << 4, tops], 2).to(torch.uint8)


def _unpack_signed(data: Tensor) -> tuple[Tensor, None]:
    low = torch.cat([data[..., :8] & 15, data[..., :8] >> 4], 2)
    high = torch.cat([data[..., 8:] >> 2 * i & 3 for i in range(4)], 2)
    return (low | high << 4) - 32, None


def _pack_bytes(scale: Tensor | None, _: Tensor | None) -> Tensor:
    """Q6_K: signed bytes."""
    assert scale is not None
    return scale.to(torch.int8).view(torch.uint8)


def _unpack_bytes(data: Tensor) -> tuple[Tensor, None]:
    return data.to(torch.uint8).view(torch.int8).to(torch.int32), None


_Unpack = Callable[[Tensor], tuple[Tensor, Tensor | None]]
_SUBS: dict[str, tuple[Callable[[Tensor | None, Tensor | None], Tensor], _Unpack]] = {
    "four": (_pack_four, _unpack_four),
    "six": (_pack_six, _unpack_six),
    "signed": (_pack_signed, _unpack_signed),
    "bytes": (_pack_bytes, _unpack_bytes),
}

BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        Block("Q4_0", 2, 2, 32, 32, 4, 8, ("scale", Plane(0, 4, 16))),
        Block("Q4_1", 3, 3, 32, 32, 4, None, ("scale", "offset", Plane(0, 4, 16))),
        Block("Q5_0", 6, 8, 32, 32, 5, 16, ("scale", Plane(4, 1, 1), Plane(0, 4, 16))),
        Block("Q5_1", 7, 9, 32, 32, 5, None, ("scale", "offset", Plane(4, 1, 1), Plane(0, 4, 16))),
        Block("Q8_0", 8, 7, 32, 32, 8, 128, ("scale", Plane(0, 8, 1))),
        Block("Q2_0", 42, 41, 64, 64, 2, 1, ("scale", Plane(0, 2, 1))),
        Block("Q2_K", 10, 10, 256, 16, 2, None, ("subs", Plane(0, 2, 32), "scale", "offset"), "four"),
        Block("Q3_K", 11, 11, 256, 16, 3, 4, (Plane(2, 1, 32), Plane(0, 2, 32), "subs", "scale"), "signed"),
        Block("Q4_K", 12, 14, 256, 32, 4, None, ("scale", "offset", "subs", Plane(0, 4, 32)), "six"),
        Block("Q5_K", 13, 16, 256, 32, 5, None, ("scale", "offset", "subs", Plane(4, 1, 32), Plane(0, 4, 32)), "six"),
        Block("Q6_K", 14, 18, 256, 16, 6, 32, (Plane(0, 4, 64), Plane(4, 2, 32), "subs", "scale"), "bytes"),
    )
}
"""The types that are written, by name."""
