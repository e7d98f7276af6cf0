"""What is done to the numbers of a tensor between disk and model, a part at a time: whole copies would be the largest there."""

import hashlib
import mmap

import torch
from torch import Tensor

from nearplane.core.moments import all_finite

# Numbers that are worked on at a time.
AT_ONCE = 1 << 22
# Words of 8 bytes that a fingerprint adds up: 4 KiB.
ADDED_UP = 512


def finite(value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor holds neither NaN nor Inf, as it is or in another dtype."""
    if not value.is_floating_point():
        return True
    return all(all_finite(part.to(dtype or value.dtype)) for part in torch.split(value.flatten(), AT_ONCE))


def fingerprint(value: Tensor) -> str:
    """A short hash of the bytes of a tensor as it was read: of the sums of each 4 KiB of them, as numbers of 64 bits.

    Any one changed number changes it, at about the speed of memory.
    """
    raw = value.flatten().view(torch.uint8)
    parts = len(raw) // (8 * ADDED_UP)
    whole = parts * 8 * ADDED_UP
    added = raw[:whole].view(torch.int64).view(parts, ADDED_UP).sum(1)
    digest = hashlib.blake2b(added.numpy().tobytes(), digest_size=8)
    digest.update(raw[whole:].numpy().tobytes())
    return digest.hexdigest()


def only_rows(value: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with these rows, all others zero: pages of an anonymous map that nobody wrote to take no memory."""
    pages = mmap.mmap(-1, value.numel() * dtype.itemsize)
    result = torch.frombuffer(pages, dtype=dtype).view(value.shape)
    for some in torch.split(rows, max(1, AT_ONCE // value.shape[1])):
        result[some] = value[some].to(dtype)
    return result
