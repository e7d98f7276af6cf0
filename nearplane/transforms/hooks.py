"""Rotate the inputs of linears while the model runs (R4 of SpinQuant, arXiv 2405.16406).

The weights of these linears are rotated to match. The hook comes before every other hook on the input, so that observing,
rounding and multiplying all use the rotated input. The calibrated skeleton and the loaded model use the same code. A
checkpoint's config.json holds the seed and the names of the linears under ``nearplane_rotation``.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError
from nearplane.transforms.hadamard import Rotation, online

KEY = "nearplane_rotation"


def turn_inputs(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Hook the named linears of a model so that their inputs are rotated."""
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args: (turned(args[0], seed), *args[1:]), prepend=True
        )


def turned_linears(config: dict[str, Any], where: Any) -> tuple[list[str], int]:
    """Read the linears with rotated inputs, and the seed, from a config.json.

    Args:
        config: config.json as a dictionary.
        where: folder or file, for the error.

    Raises:
        NearplaneError: the entry is malformed.
    """
    entry = config.get(KEY) or {}
    names, seed = (entry.get("online") or [], entry.get("seed", 0)) if isinstance(entry, dict) else (None, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not isinstance(seed, int):
        raise NearplaneError(f"{where}: {KEY} in config.json must name a seed and a list of linears; it is {entry!r}.")
    return names, seed


def turned(x: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Rotate ``x`` along its last dimension, in float32 at least; the dtype is kept. ``back``: rotate backwards."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    rotation = turn(x.shape[-1], seed, work.device, work.dtype)
    return (rotation.inverse if back else rotation).apply(work).to(x.dtype)


@cache
def turn(n: int, seed: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """Return the cached rotation of width n on a device and in a dtype."""
    plain = online(n, seed)
    left, core, right = (part.to(device, dtype) for part in (plain.left, plain.core, plain.right))
    return replace(plain, left=left, core=core, right=right)
