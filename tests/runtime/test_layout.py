"""The layout against its own description, byte by byte, and back."""

import pytest
import torch
from problems import SCALES, problem

from nearplane.core.errors import SettingError
from nearplane.runtime.layout import PLANES, codes_of, dequantize, tile

CASES = [(48, 256, 64, False), (16, 32, 32, False), (20, 100, 32, False), (33, 300, 128, False), (5, 70, -1, False),
         (40, 144, 48, False), (32, 96, 16, False), (24, 256, 64, True), (17, 90, 40, True)]  # fmt: skip


def code_at(codes: torch.Tensor, bits: int, channel: int, position: int) -> int:
    """One code, as the description in layout.py has it."""
    block = codes[channel // 16, position // 32]
    step, lane = position % 32 // 4, channel % 16 * 4 + position % 4
    if bits == 8:
        return int(block[64 * step + lane])
    value, start, done = 0, 0, 0
    for plane in PLANES[bits]:
        share = 8 // plane  # steps in one byte
        byte = int(block[start + 64 * (step // share) + lane])
        value |= (byte >> plane * (step % share) & 2**plane - 1) << done
        start, done = start + 64 * plane, done + plane
    return value


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_lies_where_the_description_says(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (20, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    tiles = tile(codes, torch.ones(20, 1), torch.zeros(20, 1, dtype=torch.uint8), bits, 70)
    assert tiles.codes.shape == (2, 3, 64 * bits)
    found = [[code_at(tiles.codes, bits, channel, position) for position in range(70)] for channel in range(20)]
    assert torch.equal(torch.tensor(found, dtype=torch.uint8), codes)
    assert torch.equal(codes_of(tiles)[:20, :70], codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("out", "columns", "group", "shuffled"), CASES)
def test_dequantizing_gives_the_weight_back(bits: int, out: int, columns: int, group: int, shuffled: bool) -> None:
    for dtype in SCALES:
        for free in (False, True):
            found = problem(out, columns, bits, group, bits % 2 == 0, dtype, shuffled, free=free)
            found.tiles.check()
            assert found.tiles.shape.free == free
            dense = dequantize(found.tiles)
            assert torch.equal(dense, found.dense.float()), dtype
            part = dequantize(found.tiles.rows(1, 2)) if out > 16 else None
            assert part is None or torch.equal(part, dense[16:32])


def test_real_zeros_that_are_codes_are_bytes() -> None:
    """A symmetric weight in a type with offsets takes no more memory than elsewhere."""
    codes, scale = torch.randint(0, 16, (20, 64), dtype=torch.uint8), torch.ones(20, 2)
    for zero in (torch.full((20, 2), 8.0), torch.arange(40.0).view(20, 2)):
        tiles = tile(codes, scale, zero, 4, 32)
        assert not tiles.shape.free and tiles.nbytes == tile(codes, scale, zero.to(torch.uint8), 4, 32).nbytes
        assert torch.equal(dequantize(tiles), codes - zero.repeat_interleave(32, 1))
    for zero in (torch.full((20, 2), 8.5), torch.full((20, 2), -1.0), torch.full((20, 2), 256.0)):
        tiles = tile(codes, scale, zero, 4, 32)
        assert tiles.shape.free and torch.equal(dequantize(tiles), codes - zero.repeat_interleave(32, 1))


@pytest.mark.parametrize(("bits", "stored"), [(2, 2.1875), (3, 3.1875), (4, 4.1875), (8, 8.1875)])
def test_size_per_weight(bits: int, stored: float) -> None:
    """Codes, a 16-bit scale and an 8-bit zero for 128 weights; little more than the checkpoint takes."""
    found = problem(64, 512, bits, 128)
    assert found.tiles.nbytes * 8 == stored * 64 * 512
    assert found.tiles.nbytes <= 1.15 * found.checkpoint_bytes
    free = problem(64, 512, bits, 128, free=True)  # offsets are float32
    assert free.tiles.nbytes * 8 == (stored + 24 / 128) * 64 * 512
    symmetric = problem(64, 512, bits, 128, sym=True)
    assert symmetric.tiles.nbytes == symmetric.checkpoint_bytes


def test_what_has_no_layout_is_refused() -> None:
    codes, zero = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8)
    with pytest.raises(SettingError, match="9 bits"):
        tile(codes, torch.ones(4, 1), zero, 9, 64)
    with pytest.raises(SettingError, match="float64"):
        tile(codes, torch.ones(4, 1).double(), zero, 4, 64)
    with pytest.raises(SettingError, match="group 0 has 64 columns"):
        tile(codes, torch.ones(4, 2), zero.expand(4, 2), 4, 32, torch.zeros(64, dtype=torch.long))
