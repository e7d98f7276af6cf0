"""What is done to the numbers of a tensor between disk and model, a part at a time: whole copies would be the largest there."""

import mmap

import torch
from torch import Tensor

from nearplane.core.moments import all_finite

# Numbers that are worked on at a time.
AT_ONCE = 1 << 22


def finite(value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor holds neither NaN nor Inf, as it is or in another dtype."""
    if not value.is_floating_point():
        return True
    return all(all_finite(part.to(dtype or value.dtype)) for part in torch.split(value.flatten(), AT_ONCE))


def only_rows(value: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with these rows, all others zero: pages of an anonymous map that nobody wrote to take no memory."""
    pages = mmap.mmap(-1, value.numel() * dtype.itemsize)
    result = torch.frombuffer(pages, dtype=dtype).view(value.shape)
    for some in torch.split(rows, max(1, AT_ONCE // value.shape[1])):
        result[some] = value[some].to(dtype)
    return result
