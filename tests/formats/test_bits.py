"""The packer against a plain one that moves single bits."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from nearplane.formats.bits import pack, unpack, words_of


def pack_plainly(codes: list[int], bits: int) -> list[int]:
    """Bit by bit, as the format's description says; words as signed 32-bit numbers."""
    stream = [code >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(bit << i for i, bit in enumerate(stream[a : a + 32])) for a in range(0, len(stream), 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@given(st.data(), st.integers(2, 8), st.integers(0, 3), st.integers(1, 100))
def test_packs_as_described_and_back(data: st.DataObject, bits: int, rows: int, n: int) -> None:
    codes = data.draw(
        st.lists(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n), min_size=rows, max_size=rows)
    )
    tensor = torch.tensor(codes, dtype=torch.uint8).view(rows, n)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words_of(n, bits))
    assert packed.tolist() == [pack_plainly(row, bits) for row in codes]
    assert torch.equal(unpack(packed, bits, n), tensor)


@pytest.mark.parametrize("bits", range(2, 9))
def test_same_words_as_compressed_tensors(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 77), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_layout_and_rank(bits: int) -> None:
    """Transposed, one-column, batched and flat inputs, whose strides torch refuses to view as wider words."""
    codes = torch.randint(0, 2**bits, (3, 64, 7), dtype=torch.uint8)
    for view in (codes, codes.transpose(1, 2), codes[:, :, :1].transpose(1, 2), codes[0, :, :1].T, codes[0, :, 0]):
        packed = pack(view, bits)
        assert torch.equal(unpack(packed, bits, view.shape[-1]), view)
        assert torch.equal(packed, pack(view.clone(memory_format=torch.contiguous_format), bits))


def test_input_is_left_alone() -> None:
    codes = torch.randint(0, 8, (4, 64), dtype=torch.uint8)
    before = codes.clone()
    unpack(pack(codes, 3), 3, 64)
    assert torch.equal(codes, before)
