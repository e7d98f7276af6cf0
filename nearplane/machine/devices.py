"""Choose devices and dtypes by the names that users type, and describe the environment.

A device must be able to hold a tensor. ``give_memory_back`` sets how glibc returns freed memory to the system.
"""

import ctypes
import platform
import sys
from importlib.metadata import version
from typing import Literal, get_args

import torch

from nearplane.core.dense import described
from nearplane.core.errors import SettingError

Dtype = Literal["auto", "float32", "float16", "bfloat16"]

# Freed blocks of this size go back to the system. glibc raises its own threshold up to 32 MiB as a program runs; smaller
# blocks stay in the process while a block above them lives. Keys and values of a batch, and the solver's arrays of a small
# model, have 1 to 4 MiB: with 4 here a run of SmolLM2 held 0.14 GB more.
GIVEN_BACK = 1 << 20
# The same where memory is plenty; glibc takes no more. A page that the system gives anew costs 2 microseconds: activations
# of 4 to 32 MiB then took a fifth of a run.
REUSED = 32 << 20
# Free bytes above the last block that stay in the process then.
KEPT_FREE = 256 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(name: str) -> torch.device:
    """Return a device by name; "auto" prefers CUDA. SettingError if the device cannot hold a tensor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}).") from error
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """Return float32, float16 or bfloat16 by name, None for "auto". SettingError for any other name."""
    if name == "auto":
        return None
    if not isinstance(name, str) or name not in get_args(Dtype):
        raise SettingError(f"dtype must be auto, float32, float16 or bfloat16; got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def environment() -> dict[str, str]:
    """Return the versions, and what of the machine a result depends on, by name."""
    packages = ("nearplane", "torch", "transformers", "safetensors")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "products": described(),
    }


def give_memory_back(plenty: bool = False) -> None:
    """Let large freed blocks leave the process. Other allocators than glibc's are left alone.

    Args:
        plenty: let blocks below ``REUSED`` bytes be used again instead, which is faster, and holds up to a third more.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, REUSED if plenty else GIVEN_BACK)
            mallopt(M_TRIM_THRESHOLD, KEPT_FREE if plenty else GIVEN_BACK)
