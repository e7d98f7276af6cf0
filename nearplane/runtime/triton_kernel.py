"""Compute y = x W^T + bias with a packed W, in Triton. The layout is that of words.py.

``few``: up to 16 rows. A program multiplies some channels by a share of the inputs, in registers, without tensor cores.
``many``: tiles of 16 rows and more, by ``tl.dot``. ``unpack``: the weight for a dense product, where that is cheaper.

Where inputs are split into shares, each program stores its float32 sums. The last program of a tile, known by a counter,
adds the shares in their order: one launch, and the same bits in every run.

A code becomes a number without a conversion. Its bits, at bit ``s`` of a word, are put into the mantissa of the float32
2^(23 - s). Bit ``s`` of that mantissa counts 1. Subtracting 2^(23 - s) leaves the code, exactly.
"""

import triton
import triton.language as tl


@triton.jit
def number(word, shift, S: tl.constexpr, MASK: tl.constexpr, FREE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return code - shift, for a code at bit S."""
    bits = (word & (MASK << S)) | ((150 - S) << 23)
    value = bits.to(tl.float32, bitcast=True)
    if FREE:
        return value - (1 << (23 - S)) - shift
    return value - (shift + (1 << (23 - S)))  # an integer is exact in the sum with a power of two


@triton.jit
def field(word, shift, i: tl.constexpr, BITS: tl.constexpr, FREE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return code - shift, for code ``i`` of a word."""
    fit: tl.constexpr = 23 // BITS  # codes that lie in a mantissa as they are
    low: tl.constexpr = i // fit * fit * BITS
    return number(word >> low, shift, i % fit * BITS, (1 << BITS) - 1, FREE)


@triton.jit
def joined(word, ones, shift, p: tl.constexpr, FREE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return code - shift, for the code of three bits of input ``p``: two of ``word``, one of ``ones``."""
    # Shifted, the third bits of every other input lie on top of its two: two words of codes.
    over: tl.constexpr = 0x44444444 if p % 2 == 0 else 0x11111111
    if p % 16 < 8:
        both = (word & ~over) | ((ones << (2 - p // 16)) & over)
    else:
        both = ((word >> 16) & ~over) | ((ones >> (14 + p // 16)) & over)
    return number(both, shift, p % 8 * 2, 7, FREE)


@triton.jit
def pick(w0, w1, w2, w3, w4, w5, w6, w7, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return word ``i`` of a block."""
    if i < 4:
        return (w0 if i == 0 else w1) if i < 2 else (w2 if i == 2 else w3)
    return (w4 if i == 4 else w5) if i < 6 else (w6 if i == 6 else w7)


@triton.jit
def decoded(  # type: ignore[no-untyped-def]
    w0, w1, w2, w3, w4, w5, w6, w7, shift, p: tl.constexpr, BITS: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Return code - shift, for input ``p`` of a block whose words are given."""
    if BITS == 3:
        return joined(w0 if p < 16 else w1, w2, shift, p, FREE)
    if BITS == 2 or BITS == 4 or BITS == 8:
        share: tl.constexpr = 32 // BITS
        return field(pick(w0, w1, w2, w3, w4, w5, w6, w7, p // share), shift, p % share, BITS, FREE)
    value = (pick(w0, w1, w2, w3, w4, w5, w6, w7, p // 8) >> (p % 8 * 4)) & 15
    if BITS & 2:
        value |= ((w4 if p < 16 else w5) >> (p % 16 * 2) & 3) << 4
    if BITS & 1:
        ones = w4 if BITS == 5 else w6
        value |= (ones >> (2 * (p % 16) + p // 16) & 1) << (BITS - 1)
    return number(value, shift, 0, 127, FREE)


@triton.jit
def input_of(x, order, row, b, p: tl.constexpr, rows, columns, real, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the rows' values at input ``p`` of blocks, float32."""
    column = b * 32 + p
    if ORDER:
        column = tl.load(order + column, mask=real, other=-1)
    known = (row < rows) & real & (column >= 0) & (column < columns)
    return tl.load(x + row * columns + column, mask=known, other=0.0).to(tl.float32)


@triton.jit
def part_of(pair, half: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the value number ``half`` of a 64-bit word of four float16 (KIND 1) or bfloat16 (2), or two float32 (0)."""
    if KIND == 0:
        return (pair >> (32 * half)).to(tl.int32).to(tl.float32, bitcast=True)
    word = (pair >> (32 * (half // 2))).to(tl.int32)
    if KIND == 2:
        bits = (word & -65536) if half % 2 else (word << 16)
        return bits.to(tl.float32, bitcast=True)
    return (word >> (16 * (half % 2))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def wide_at(row, b, columns, p: tl.constexpr, PER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the word of PER values is that begins at input ``p`` of blocks."""
    return row * (columns // PER) + (b * (32 // PER) + p // PER)


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    total, y, bias, partial, counters, rows, out, channels, shares,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store sums (ROWS, CHANNELS), or the sum of all shares if this program is the last of its tile."""
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (row < rows) & (channel < out)
    if BIAS:
        given = tl.load(bias + channel, mask=channel < out, other=0.0).to(tl.float32)
    if SPLIT:
        size = rows.to(tl.int64) * channels
        own = partial + row.to(tl.int64) * channels + channel
        held = (row < rows) & (channel < channels)
        tl.store(own + tl.program_id(1) * size, total, mask=held)
        tl.debug_barrier()  # every thread has stored
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == shares - 1:
            whole = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
            none = tl.zeros((1, 1), dtype=tl.int32)  # the interpreter compares tensors only
            for first in range(0, shares, 4):
                for i in tl.static_range(4):
                    there = held & (none + first + i < shares)
                    whole += tl.load(own + (first + i) * size, mask=there, other=0.0, cache_modifier=".cg")
            if BIAS:
                whole += given
            tl.store(y + row.to(tl.int64) * out + channel, whole.to(y.dtype.element_ty), mask=inside)
            tl.store(counter, 0)  # for the next launch
    else:
        if BIAS:
            total += given
        tl.store(y + row.to(tl.int64) * out + channel, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "zero", "share", "shares"])
def few(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, order, bias, y, partial, counters,
    rows, out, columns, channels, blocks, span, zero, share, shares,
    BITS: tl.constexpr, ZEROS: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of CHANNELS channels, from one share of the blocks. WIDE: ``x`` is loaded 8 bytes at a time.

    Tensors are (rows, blocks, channels): a thread holds all rows of its channels.
    """
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS))[:, None, None].to(tl.int64)
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, None, :]
    start = tl.program_id(1) * share
    last = tl.minimum(start + share, blocks)
    free: tl.constexpr = ZEROS == 2
    total = tl.zeros((ROWS, BLOCKS, CHANNELS), dtype=tl.float32)
    for first in tl.range(start, last, BLOCKS, num_stages=STAGES):
        b = (first + tl.arange(0, BLOCKS))[None, :, None]
        real = b < last
        held = real & (channel < channels)
        at = b.to(tl.int64) * (channels * BITS) + channel
        group = b * 32 // span * channels + channel
        scale = tl.load(scales + group, mask=held, other=0.0).to(tl.float32)
        if ZEROS:
            shift = tl.load(zeros + group, mask=held, other=0).to(tl.float32)
        else:
            shift = zero * 1.0
        sums = tl.zeros((ROWS, BLOCKS, CHANNELS), dtype=tl.float32)
        # All words are asked for before any is used.
        w0 = tl.load(codes + at, mask=held, other=0)
        w1 = tl.load(codes + at + channels, mask=held, other=0)
        w2 = tl.load(codes + at + 2 * channels, mask=held, other=0) if BITS > 2 else w0
        w3 = tl.load(codes + at + 3 * channels, mask=held, other=0) if BITS > 3 else w0
        w4 = tl.load(codes + at + 4 * channels, mask=held, other=0) if BITS > 4 else w0
        w5 = tl.load(codes + at + 5 * channels, mask=held, other=0) if BITS > 5 else w0
        w6 = tl.load(codes + at + 6 * channels, mask=held, other=0) if BITS > 6 else w0
        w7 = tl.load(codes + at + 7 * channels, mask=held, other=0) if BITS > 7 else w0
        for p in tl.static_range(32):
            value = decoded(w0, w1, w2, w3, w4, w5, w6, w7, shift, p, BITS, free)
            if WIDE:
                if p % (2 if KIND == 0 else 4) == 0:
                    known = (row < rows) & real & (b * 32 + p < columns)
                    pair = tl.load(x + wide_at(row, b, columns, p, 2 if KIND == 0 else 4), mask=known, other=0)
                given = part_of(pair, p % (2 if KIND == 0 else 4), KIND)
            else:
                given = input_of(x, order, row, b, p, rows, columns, real, ORDER)
            sums += value * given
        total += sums * scale
    finish(
        tl.sum(total, 1), y, bias, partial, counters, rows, out, channels, shares, BIAS, SPLIT, ROWS, CHANNELS,
    )  # fmt: skip


@triton.jit
def plane(words, at, stride, mask, BITS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a plane of BITS bits as codes (inputs, channels) of BLOCKS blocks. ``at``: (BLOCKS, 1, 1, channels)."""
    number: tl.constexpr = BITS
    share: tl.constexpr = 32 // BITS
    word = tl.load(words + at + tl.arange(0, number)[None, :, None, None] * stride, mask=mask, other=0)
    if BITS == 1:
        p = tl.arange(0, 32)[None, None, :, None]
        fields = (word >> (2 * (p % 16) + p // 16)) & 1
    else:
        fields = (word >> (tl.arange(0, share) * BITS)[None, None, :, None]) & ((1 << BITS) - 1)
    return tl.reshape(fields, (BLOCKS * 32, CHANNELS))


@triton.jit
def weight_of(  # type: ignore[no-untyped-def]
    codes, scales, zeros, first, last, channel, channels, span, zero,
    BITS: tl.constexpr, ZEROS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Load the weight (inputs, channels) of BLOCKS blocks from ``first`` on, float32; 0 from block ``last`` on."""
    b = (first + tl.arange(0, BLOCKS))[:, None, None, None]
    lane = channel[None, None, None, :]
    at = b.to(tl.int64) * (channels * BITS) + lane
    held = (b < last) & (lane < channels)
    if BITS == 8:
        value = plane(codes, at, channels, held, 8, BLOCKS, CHANNELS)
    elif BITS & 4:
        value = plane(codes, at, channels, held, 4, BLOCKS, CHANNELS)
        if BITS & 2:
            value |= plane(codes + 4 * channels, at, channels, held, 2, BLOCKS, CHANNELS) << 4
        if BITS & 1:
            value |= plane(codes + (BITS - 1) * channels, at, channels, held, 1, BLOCKS, CHANNELS) << (BITS - 1)
    else:
        value = plane(codes, at, channels, held, 2, BLOCKS, CHANNELS)
        if BITS & 1:
            value |= plane(codes + 2 * channels, at, channels, held, 1, BLOCKS, CHANNELS) << 2
    block = first + tl.arange(0, 32 * BLOCKS) // 32
    there = (block < last)[:, None] & (channel < channels)[None, :]
    group = (block * 32 // span * channels)[:, None] + channel[None, :]
    scale = tl.load(scales + group, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(zeros + group, mask=there, other=0).to(tl.float32) if ZEROS else zero * 1.0
    return (value.to(tl.float32) - shift) * scale


@triton.jit(do_not_specialize=["rows", "zero", "share", "shares"])
def many(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, order, bias, y, partial, counters,
    rows, out, columns, channels, blocks, span, zero, share, shares,
    BITS: tl.constexpr, ZEROS: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of CHANNELS channels from one share of the blocks, by ``tl.dot`` in the dtype of ``x``.

    PLAIN: the same numbers are multiplied in float32, for Triton's interpreter, which multiplies the bits of bfloat16.
    """
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start = tl.program_id(1) * share
    last = tl.minimum(start + share, blocks)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for first in range(start, last, BLOCKS):
        weight = weight_of(
            codes, scales, zeros, first, last, channel, channels, span, zero, BITS, ZEROS, BLOCKS, CHANNELS
        )
        position = first * 32 + tl.arange(0, 32 * BLOCKS)
        real = position < last * 32
        column = tl.load(order + position, mask=real, other=-1) if ORDER else position
        known = (row < rows)[:, None] & (real & (column >= 0) & (column < columns))[None, :]
        part = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=known, other=0.0)
        weight = weight.to(part.dtype)
        if PLAIN:
            total += tl.dot(part.to(tl.float32), weight.to(tl.float32))
        else:
            total = tl.dot(part, weight, total, input_precision=PRECISION)
    finish(total, y, bias, partial, counters, rows, out, channels, shares, BIAS, SPLIT, ROWS, CHANNELS)


@triton.jit(do_not_specialize=["zero"])
def unpack(  # type: ignore[no-untyped-def]
    codes, scales, zeros, order, weight, out, columns, channels, blocks, span, zero,
    BITS: tl.constexpr, ZEROS: tl.constexpr, ORDER: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write BLOCKS blocks of some channels into ``weight`` (out, columns)."""
    channel, first = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(1) * BLOCKS
    value = weight_of(codes, scales, zeros, first, blocks, channel, channels, span, zero, BITS, ZEROS, BLOCKS, CHANNELS)
    position = first * 32 + tl.arange(0, 32 * BLOCKS)
    real = position < blocks * 32
    column = tl.load(order + position, mask=real, other=-1) if ORDER else position
    known = (real & (column >= 0) & (column < columns))[:, None] & (channel < out)[None, :]
    place = weight + channel[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(place, value.to(weight.dtype.element_ty), mask=known)
