"""The one packer: codes of 2 to 8 bits as a dense little-endian bit stream in int32 words.

Code ``i`` of a row lies at bit ``i * bits``; the stream is cut into 32-bit words and a row ends at a whole word.
GPTQ and compressed-tensors store exactly this and differ in axis and offset only.

Eight codes are ``bits`` whole bytes. Packing closes the gaps between eight bytes in three steps, each on all codes at
once: inside pairs of bytes, of pairs, of quadruples. Unpacking is the same three steps backwards. Needs a
little-endian machine, as safetensors files are little-endian themselves. Eight bits are bytes already: there the
result may share memory with the argument.
"""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from nearplane.formats.store import Store

# The stream of 32 codes is ``bits`` whole words for every width, so padding to 32 codes always suffices.
TILE = 32
_HALVES = ((torch.int16, 8), (torch.int32, 16), (torch.int64, 32))


def words_of(n: int, bits: int) -> int:
    """Count the 32-bit words that ``n`` codes take."""
    return -(-n * bits // 32)


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> Int32[Tensor, "*rows words"]:
    """Pack the last dimension. Codes must be below ``2**bits``; this is not checked here."""
    rows, n = codes.shape[:-1], codes.shape[-1]
    x = _padded(codes, -n % TILE)
    if bits < 8:
        for step, (dtype, half) in enumerate(_HALVES):
            width = bits << step  # bits in use in each half
            low = (1 << width) - 1
            x = x.view(dtype)
            x = (x & low).bitwise_or_((x >> (half - width)).bitwise_and_(low << width))
        x = x.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return x.view(torch.int32).view(*rows, -(-n // TILE) * bits)[..., : words_of(n, bits)].contiguous()


def unpack(words: Int32[Tensor, "*rows words"], bits: int, n: int) -> UInt8[Tensor, "*rows n"]:
    """Unpack the ``n`` codes of every row; ``words`` must be ``words_of(n, bits)``. Inverse of ``pack``."""
    rows, tiles = words.shape[:-1], -(-n // TILE)
    x = _padded(words, tiles * bits - words.shape[-1]).view(torch.uint8)
    if bits < 8:
        spread = x.new_zeros(x.numel() // bits, 8)
        spread[:, :bits] = x.view(-1, bits)
        x = spread.view(-1)
        for step, (dtype, half) in reversed(list(enumerate(_HALVES))):
            width = bits << step
            low = (1 << width) - 1
            x = x.view(dtype)
            x = (x & low).bitwise_or_((x & (low << width)) << (half - width))
        x = x.view(torch.uint8)
    return x.view(*rows, tiles * TILE)[..., :n].contiguous()


def _padded(x: Tensor, missing: int) -> Tensor:
    """Lengthen rows by ``missing`` zeros, and flatten: torch views wider dtypes of nothing less plain."""
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padded.contiguous().view(-1)


def unused_bits(store: Store, tensor: str, value: UInt8[Tensor, "rows n"], bits: int, turned: bool) -> str | None:
    """Tell whether bits behind the last code of a packed row are set, by packing the codes again.

    Args:
        store: holds ``tensor``, the words of the codes.
        tensor: name on disk.
        value: the codes as read.
        bits: of a code.
        turned: whether the words are stored transposed.
    """
    length = value.shape[1]
    if length * bits % 32 == 0:  # the last word is full
        return None
    words, wanted = store.get(tensor), pack(value.contiguous(), bits)
    wanted = wanted.T if turned else wanted
    # Zeros may be plain int8: then there are no words.
    if words.dtype != wanted.dtype or words.shape != wanted.shape or torch.equal(words, wanted):
        return None
    return f"{tensor} has bits set behind the last of {length} codes of {bits} bits; it is damaged."
