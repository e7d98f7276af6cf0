"""Devices and dtypes by the names that users give them."""

import torch

from nearplane.core.errors import SettingError


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
    if name not in ("float32", "float16", "bfloat16"):
        raise SettingError(f"dtype must be auto, float32, float16 or bfloat16; got {name!r}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
