"""Devices and dtypes by the names that users give them, and what is asked of the memory beneath."""

import ctypes
import platform
import sys
from importlib.metadata import version
from typing import Literal, get_args

import torch

from nearplane.core.errors import SettingError

Dtype = Literal["auto", "float32", "float16", "bfloat16"]

# Blocks of memory of this size go back to the system when they are freed. glibc raises its own limit to 32 MiB as a program
# runs; blocks below it stay, wherever something that lives lies above them.
GIVEN_BACK = 4 << 20
M_MMAP_THRESHOLD = -3  # malloc.h


def give_memory_back() -> None:
    """Have freed blocks of GIVEN_BACK bytes leave this process, where its allocator is glibc's; elsewhere nothing is done."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. SettingError when it cannot hold a tensor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}).") from error
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for "auto"; SettingError for any other than the three that checkpoints are stored in."""
    if name == "auto":
        return None
    if name not in get_args(Dtype):
        raise SettingError(f"dtype must be auto, float32, float16 or bfloat16; got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def environment() -> dict[str, str]:
    """Versions that a result depends on."""
    packages = ("nearplane", "torch", "transformers", "safetensors")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
