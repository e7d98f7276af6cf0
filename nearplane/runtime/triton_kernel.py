"""y = x W^T + bias with W packed, in Triton. Reads the layout of layout.py; one program makes a (rows, channels) piece of y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nearplane.runtime.layout import Tiles

ROWS, CHANNELS = 16, 32  # the least that tl.dot takes, and two tiles


@triton.jit
def codes_of(block, lane, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(32, channels): the codes of one block of every channel; ``block`` points to its first byte."""
    k = tl.arange(0, 32)[:, None]
    step, byte = k // 4, lane[None, :] * 4 + k % 4
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
def multiply(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, order, bias, y, rows, out, columns, blocks, span, groups, zero,
    BITS: tl.constexpr, ZEROS: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < out
    tile, lane = (channel // 16).to(tl.int64), channel % 16
    tile = tl.where(inside, tile, 0)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for b in range(blocks):
        code = codes_of(codes + (tile * blocks + b)[None, :] * (64 * BITS), lane, BITS)
        at = (tile * groups + b * 32 // span) * 16 + lane
        shift = tl.load(zeros + at).to(tl.float32)[None, :] if ZEROS else zero * 1.0
        weight = (code.to(tl.float32) - shift) * tl.load(scales + at).to(tl.float32)[None, :]
        column = b * 32 + tl.arange(0, 32)
        if ORDER:
            column = tl.load(order + column)
        known = (row < rows)[:, None] & ((column >= 0) & (column < columns))[None, :]
        part = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=known, other=0.0)
        # tf32 (11 bits) holds a float16 or bfloat16 activation exactly, and rounds the weight as those would
        total += tl.dot(part.to(tl.float32), weight, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + row[:, None].to(tl.int64) * out + channel[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


def launch(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """``x``: (rows, in), contiguous."""
    shape, rows = tiles.shape, x.shape[0]
    y = torch.empty(rows, shape.out, dtype=x.dtype, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(shape.out, CHANNELS))
        scales = tiles.scales.view(shape.scale_dtype)
        with torch.cuda.device(x.device if x.is_cuda else -1):
            multiply[grid](
                x, tiles.codes, scales, tiles.zeros, tiles.order, y if bias is None else bias, y, rows, shape.out,
                shape.columns, shape.positions // 32, shape.span, shape.groups, shape.zero,
                BITS=shape.bits, ZEROS=tiles.zeros.numel() > 0, ORDER=tiles.order.numel() > 0, BIAS=bias is not None,
                ROWS=ROWS, CHANNELS=CHANNELS, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            )  # fmt: skip
    return y
