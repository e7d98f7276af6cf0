"""Rotations that are applied while the model runs: what goes into some linears is turned first, for weights turned alike.

A hook before everything else that looks at such an input, so that whoever observes, rounds or multiplies it meets the
turned one: the same code serves the skeleton that is calibrated and the model that is loaded. What a checkpoint says of it
is in its config.json, ``nearplane_rotation``: the seed, and the linears' names in the model.
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


@cache
def turn(n: int, seed: int, device: torch.device, dtype: torch.dtype) -> Rotation:
    """The rotation of vectors of n numbers, where and as they are."""
    found = online(n, seed)
    left, core, right = (part.to(device, dtype) for part in (found.left, found.core, found.right))
    return replace(found, left=left, core=core, right=right)


def turned(x: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Each vector along the last dimension rotated, in its dtype, computed in float32 at least; ``back``: undone."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    rotation = turn(x.shape[-1], seed, work.device, work.dtype)
    return (rotation.inverse if back else rotation).apply(work).to(x.dtype)


def turn_inputs(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Let these linears be given their inputs rotated."""
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args: (turned(args[0], seed), *args[1:]), prepend=True
        )


def turned_linears(config: dict[str, Any], where: Any) -> tuple[list[str], int]:
    """What a config.json says: the linears whose inputs are rotated, and the seed. NearplaneError where it makes no sense."""
    told = config.get(KEY) or {}
    names, seed = (told.get("online") or [], told.get("seed", 0)) if isinstance(told, dict) else (None, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not isinstance(seed, int):
        raise NearplaneError(f"{where}: {KEY} in config.json must name a seed and a list of linears; it is {told!r}.")
    return names, seed
