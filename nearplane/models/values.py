"""What is asked of stored values: whether they are finite, their hash, some of their rows, and whether they must stay float32."""

import hashlib
import mmap
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nearplane.core.moments import all_finite

# Elements that are processed at a time.
AT_ONCE = 1 << 22
# 64-bit words that a fingerprint adds up: 4 KiB.
ADDED_UP = 512


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return a test for names of parameters that transformers keeps in float32 where a model is loaded in ``dtype``."""
    kinds = {torch.float16: ("", "_strict"), torch.bfloat16: ("_strict",)}.get(dtype, ())
    parts = [part for kind in kinds for part in getattr(model, f"_keep_in_fp32_modules{kind}", None) or ()]
    if not parts:
        return lambda _name: False
    pattern = re.compile("|".join(part.replace("*", ".*") for part in sorted(parts)))
    return lambda name: pattern.search(name) is not None


def finite(value: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether a tensor holds neither NaN nor Inf, after conversion to ``dtype`` if given."""
    if not value.is_floating_point():
        return True
    return all(all_finite(part.to(dtype or value.dtype)) for part in torch.split(value.flatten(), AT_ONCE))


def fingerprint(value: Tensor) -> str:
    """Hash the bytes of a tensor: BLAKE2b of one 64-bit sum per 4 KiB.

    Any single changed number changes the hash. Hashing runs at about the speed of memory.
    """
    raw = value.flatten().view(torch.uint8)
    parts = len(raw) // (8 * ADDED_UP)
    whole = parts * 8 * ADDED_UP
    total = raw[:whole].view(torch.int64).view(parts, ADDED_UP).sum(1)
    digest = hashlib.blake2b(total.numpy().tobytes(), digest_size=8)
    digest.update(raw[whole:].numpy().tobytes())
    return digest.hexdigest()


def only_rows(value: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the given rows of a matrix; all other rows are zero.

    The result is an anonymous memory map, whose untouched pages take no memory.
    """
    pages = mmap.mmap(-1, value.numel() * dtype.itemsize)
    result = torch.frombuffer(pages, dtype=dtype).view(value.shape)
    for part in torch.split(rows, max(1, AT_ONCE // value.shape[1])):
        result[part] = value[part].to(dtype)
    return result
