"""Compute y = x W^T + bias with a packed W, in Triton. The layout is that of layout.py.

Few rows: inputs are split into shares, because programs for whole outputs would leave most of the GPU idle. One program
computes a (rows, channels) piece of y from one share, and the shares are summed. Many rows: the weight is unpacked once, for
a dense product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from nearplane.runtime.layout import Tiles

ROWS = 16  # the least number of rows for tl.dot
# Of one program: output channels, blocks of 32 inputs per step, warps. The best of 27 choices on an H200.
CHANNELS, BLOCKS, WARPS = 16, 1, 1
# Programs that keep a large GPU busy. Inputs are split until there are so many programs.
PROGRAMS = 1024
UNPACKED = 32  # output channels per program of ``unpack``
# From this many rows on, unpacking the weight costs less than reading its codes again for every 16 rows.
MANY = 64


@triton.jit
def codes_of(tile, b, lane, k, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the codes (inputs, channels) at positions ``k`` of block ``b``. ``tile`` points to the channels' tiles."""
    block, step, byte = tile + b * (64 * BITS), k // 4, lane * 4 + k % 4
    if BITS == 8:
        return tl.load(block + step * 64 + byte).to(tl.int32)
    code = tl.zeros_like(step + byte)
    if BITS & 4:
        code |= (tl.load(block + step // 2 * 64 + byte).to(tl.int32) >> (step % 2 * 4)) & 15
    if BITS & 2:
        start: tl.constexpr = (BITS & 4) * 64
        code |= ((tl.load(block + start + step // 4 * 64 + byte).to(tl.int32) >> (step % 4 * 2)) & 3) << (BITS & 4)
    if BITS & 1:
        last: tl.constexpr = (BITS & 6) * 64
        code |= ((tl.load(block + last + byte).to(tl.int32) >> step) & 1) << (BITS & 6)
    return code


@triton.jit
def weight_of(  # type: ignore[no-untyped-def]
    codes, scales, zeros, first, channel, out, blocks, span, groups, zero,
    BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Load the weight (inputs, channels) of BLOCKS blocks from ``first`` on, float32; the last block repeats past the end."""
    position = tl.arange(0, 32 * BLOCKS)
    b = tl.minimum(first + position // 32, blocks - 1)
    tile, lane = tl.where(channel < out, channel // 16, 0).to(tl.int64), channel % 16
    code = codes_of(
        codes + (tile * blocks * (64 * BITS))[None, :], b[:, None], lane[None, :], (position % 32)[:, None], BITS
    )
    at = (tile * groups * 16 + lane)[None, :] + (b * 32 // span * 16)[:, None]
    shift = tl.load(zeros + at).to(tl.float32) if ZEROS else zero * 1.0
    return (code.to(tl.float32) - shift) * tl.load(scales + at).to(tl.float32)


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, order, bias, y, rows, out, columns, blocks, span, groups, zero, share,
    BITS: tl.constexpr, ZEROS: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a (ROWS, CHANNELS) piece of ``y`` from one share of the inputs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(2) * share
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for first in range(start, tl.minimum(start + share, blocks), BLOCKS):
        weight = weight_of(codes, scales, zeros, first, channel, out, blocks, span, groups, zero, BITS, ZEROS, BLOCKS)
        position = first * 32 + tl.arange(0, 32 * BLOCKS)
        real = position < blocks * 32
        column = tl.load(order + position, mask=real, other=-1) if ORDER else position
        known = (row < rows)[:, None] & (real & (column >= 0) & (column < columns))[None, :]
        part = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=known, other=0.0)
        # tf32 (11 bits) holds float16 and bfloat16 activations exactly, and rounds the weight as their dtypes would
        total += tl.dot(part.to(tl.float32), weight, input_precision=PRECISION)
    inside = channel < out
    if BIAS:
        given = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(start == 0, given, 0.0)[None, :]
    target = y + (tl.program_id(2) * rows + row)[:, None].to(tl.int64) * out + channel[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def unpack(  # type: ignore[no-untyped-def]
    codes, scales, zeros, order, weight, out, columns, blocks, span, groups, zero,
    BITS: tl.constexpr, ZEROS: tl.constexpr, ORDER: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one block of some channels into ``weight`` (out, columns)."""
    channel, b = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1)
    value = weight_of(codes, scales, zeros, b, channel, out, blocks, span, groups, zero, BITS, ZEROS, 1)
    position = b * 32 + tl.arange(0, 32)
    column = tl.load(order + position) if ORDER else position
    known = ((column >= 0) & (column < columns))[:, None] & (channel < out)[None, :]
    tl.store(
        weight + channel[None, :].to(tl.int64) * columns + column[:, None],
        value.to(weight.dtype.element_ty),
        mask=known,
    )


def launch(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """Compute ``x @ W.T + bias`` for a contiguous ``x`` of shape (rows, in), in the dtype of ``x``."""
    shape, rows = tiles.shape, x.shape[0]
    if rows == 0:
        return torch.empty(0, shape.out, dtype=x.dtype, device=x.device)
    if rows >= MANY:
        return functional.linear(x, dense(tiles, x.dtype), bias)
    blocks = shape.positions // 32
    pieces = triton.cdiv(rows, ROWS), triton.cdiv(shape.out, CHANNELS)
    steps = triton.cdiv(blocks, BLOCKS)
    share = BLOCKS * triton.cdiv(steps, max(1, min(steps // 2, PROGRAMS // (pieces[0] * pieces[1]))))
    shares = triton.cdiv(blocks, share)
    kind = x.dtype if shares == 1 else torch.float32
    y = torch.empty(shares, rows, shape.out, dtype=kind, device=x.device)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        multiply[(*pieces, shares)](
            x, tiles.codes, tiles.scales.view(shape.scale_dtype), tiles.numbers, tiles.order, y if bias is None else bias, y,
            rows, shape.out, shape.columns, blocks, shape.span, shape.groups, shape.zero, share,
            BITS=shape.bits, ZEROS=tiles.zeros.numel() > 0, ORDER=tiles.order.numel() > 0, BIAS=bias is not None,
            ROWS=ROWS, CHANNELS=CHANNELS, BLOCKS=BLOCKS, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=WARPS,
        )  # fmt: skip
    return y[0] if shares == 1 else y.sum(0).to(x.dtype)


def dense(tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """Unpack the weight (out, in), rounded to ``dtype``."""
    shape = tiles.shape
    weight = torch.empty(shape.out, shape.columns, dtype=dtype, device=tiles.codes.device)
    with torch.cuda.device(weight.device if weight.is_cuda else -1):
        unpack[(triton.cdiv(shape.out, UNPACKED), shape.positions // 32)](
            tiles.codes, tiles.scales.view(shape.scale_dtype), tiles.numbers, tiles.order, weight, shape.out, shape.columns,
            shape.positions // 32, shape.span, shape.groups, shape.zero,
            BITS=shape.bits, ZEROS=tiles.zeros.numel() > 0, ORDER=tiles.order.numel() > 0, CHANNELS=UNPACKED,
        )  # fmt: skip
    return weight
