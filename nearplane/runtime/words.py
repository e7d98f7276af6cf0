"""Lay out a packed weight for a GPU. A layout is made when a weight moves to a GPU, and undone when the weight leaves.

Codes are 32-bit words. 32 inputs of a channel take as many words as a code has bits: the planes of layout.py, 4 bits first.
A word holds the bits of 32 / plane consecutive inputs, the first in its lowest bits. Words of neighbouring channels are
neighbours: 32 threads that load 16 bytes each read 512 consecutive bytes, of 128 channels.

A word of the plane of one bit holds input ``p`` of a block at bit ``2 (p % 16) + p // 16``. So a shift of the whole word
puts every second bit on top of the two bits that the plane of two has for that input.

Scales and zeros are by group and channel. The tensors have as many bytes as those of ``Tiles``.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, Int32, UInt8
from torch import Tensor

from nearplane.runtime.layout import BLOCK, PLANES, TILE, Shape, Tiles, codes_of, match_shape, pack_tiles

PART = 1 << 22  # codes that are laid out at a time, some 12 bytes each


@dataclass(frozen=True)
class Words:
    """A packed weight on a GPU. Channels are padded to a multiple of 16."""

    shape: Shape
    codes: Int32[Tensor, "blocks bits channels"]
    scales: Int[Tensor, "groups channels"]
    """Scales, the bits of ``shape.scale_dtype``."""
    zeros: UInt8[Tensor, "groups channels"] | Int32[Tensor, "groups channels"]
    """Zeros, bytes or the bits of float32 (``shape.free``); empty if all are ``shape.zero``."""
    order: Int32[Tensor, "positions"]
    """Column at each position, -1 for a gap; empty if column and position are the same."""

    def check(self) -> None:
        """Raise ValueError unless the tensors match the shape. Nothing is read from the device: a graph may be recorded."""
        shape, channels = self.shape, self.shape.tiles * TILE
        codes = torch.int32, (shape.positions // BLOCK, shape.bits, channels)
        match_shape(self, codes, (shape.groups, channels), " on a GPU")

    @property
    def numbers(self) -> Tensor:
        """Zeros as numbers, uint8 or float32; empty if all are ``shape.zero``."""
        return self.zeros.view(torch.float32) if self.shape.free else self.zeros

    @property
    def nbytes(self) -> int:
        """Size of all four tensors in bytes."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.order))

    @property
    def tiles(self) -> Tiles:
        """The same weight in tiles."""
        shape = self.shape
        codes = self.codes.new_empty(shape.tiles, shape.positions // BLOCK, 64 * shape.bits, dtype=torch.uint8)
        step = _step(shape)
        for a in range(0, shape.tiles, step):
            part = _codes(self.codes[:, :, a * TILE : (a + step) * TILE], shape.bits)
            codes[a : a + step] = pack_tiles(part, shape.bits)

        def per_group(value: Tensor) -> Tensor:
            return value.view(shape.groups, shape.tiles, TILE).transpose(0, 1).contiguous()

        zeros = per_group(self.zeros) if self.zeros.numel() else self.zeros
        return Tiles(shape, codes, per_group(self.scales), zeros, self.order)


def words(tiles: Tiles) -> Words:
    """Lay out a weight for a GPU, on the device where the weight is."""
    shape = tiles.shape
    channels = shape.tiles * TILE
    codes = tiles.codes.new_empty(shape.positions // BLOCK, shape.bits, channels, dtype=torch.int32)
    step = _step(shape)
    for a in range(0, shape.tiles, step):
        # The order of columns plays no part here.
        part = replace(tiles.rows(a, min(a + step, shape.tiles)), order=tiles.order[:0])
        codes[:, :, a * TILE : (a + step) * TILE] = _words(codes_of(part), shape.bits)

    def per_group(value: Tensor) -> Tensor:
        return value.transpose(0, 1).reshape(shape.groups, channels).contiguous()

    zeros = per_group(tiles.zeros) if tiles.zeros.numel() else tiles.zeros
    return Words(shape, codes, per_group(tiles.scales), zeros, tiles.order)


def _step(shape: Shape) -> int:
    """Tiles that are laid out at a time."""
    return max(1, PART // (shape.positions * TILE))


def _shifts(plane: int, device: torch.device) -> Int32[Tensor, "words inputs"]:
    """Return where the bits of an input lie in a word, for the words of a plane."""
    if plane == 1:
        p = torch.arange(BLOCK, dtype=torch.int32, device=device)
        return (2 * (p % 16) + p // 16)[None]
    share = BLOCK // plane
    return (torch.arange(share, dtype=torch.int32, device=device) * plane).expand(plane, share)


def _words(codes: UInt8[Tensor, "channels positions"], bits: int) -> Int32[Tensor, "blocks bits channels"]:
    """Pack codes into words."""
    parts, done = [], 0
    blocks = codes.view(codes.shape[0], -1, BLOCK)
    for plane in PLANES[bits]:
        field = (blocks >> done).int() & (1 << plane) - 1
        shifts = _shifts(plane, codes.device)
        field = field.view(*field.shape[:2], *shifts.shape) << shifts
        parts.append(field.sum(-1, dtype=torch.int32))  # fields do not overlap: a sum is an "or"
        done += plane
    return torch.cat(parts, -1).permute(1, 2, 0)


def _codes(packed: Int32[Tensor, "blocks bits channels"], bits: int) -> UInt8[Tensor, "channels positions"]:
    """Unpack the codes of words."""
    channels, at, done = packed.shape[-1], 0, 0
    codes = packed.new_zeros(packed.shape[0], BLOCK, channels)
    for plane in PLANES[bits]:
        shifts = _shifts(plane, packed.device)
        field = packed[:, at : at + plane, None] >> shifts[:, :, None] & (1 << plane) - 1
        codes |= field.reshape(codes.shape) << done
        at, done = at + plane, done + plane
    return codes.to(torch.uint8).permute(2, 0, 1).reshape(channels, -1)
