"""What the readers of all formats agree on: where a quantized weight lies, and what is read from there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, ScaleDtype
from nearplane.core.tokens import TokenGrid
from nearplane.formats.store import Store

SCALE_NAMES: dict[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class StoredLayer:
    """One quantized weight on disk."""

    name: str
    """Module prefix of its tensors."""
    grid: Grid
    """As far as the checkpoint tells: a ternary weight is a 2-bit one, and ``fit`` is not stored."""
    shape: tuple[int, int]
    """(out, in)."""
    tensors: dict[str, str] = field(hash=False)
    """Suffix -> name on disk."""
    layout: Literal["packed", "int", "gptq", "gptq_v2"]
    """How the tensors hold the codes."""
    activations: TokenGrid | None = None
    """How what goes into the linear is rounded."""


class Decoded(NamedTuple):
    """A weight as read: ``scale[:, group] * (codes - zero[:, group])``."""

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    group: Int[Tensor, "in"]


def tensors_of(store: Store, name: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Those tensors of a module that exist, by suffix."""
    return {suffix: f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in store.names}


def collect(
    names: Iterable[str], find: Callable[[str], StoredLayer], broken: dict[str, str] | None
) -> dict[str, StoredLayer]:
    """The layers of these names, sorted. One that cannot be read raises, or with ``broken`` is listed there instead."""
    layers = {}
    for name in sorted(names):
        try:
            layers[name] = find(name)
        except NearplaneError as error:
            if broken is None:
                raise
            broken[name] = str(error)
    return layers


def require(store: Store, layer: dict[str, str], name: str, suffixes: tuple[str, ...]) -> None:
    """NearplaneError unless the module has all of these tensors."""
    for suffix in suffixes:
        if suffix not in layer:
            raise NearplaneError(f"{store.folder} holds part of quantized layer {name} but no {name}.{suffix}.")


def expect(store: Store, name: str, wanted: tuple[int, ...], why: str) -> None:
    """NearplaneError unless tensor ``name`` has the wanted shape; ``why``: what the configuration says."""
    shape = store.shape(name)
    if shape != wanted:
        raise NearplaneError(f"tensor {name} in {store.folder} has shape {shape}, but {why} takes {wanted}.")


def scale_dtype_of(store: Store, name: str) -> ScaleDtype:
    """Name of the dtype of stored scales."""
    dtype = store.dtype(name)
    if dtype not in SCALE_NAMES:
        raise NearplaneError(f"scales {name} in {store.folder} are {dtype}, not float32, float16 or bfloat16.")
    return SCALE_NAMES[dtype]


def setting(config: dict[str, Any], key: str, kind: type, default: object, where: str) -> Any:
    """A value of a configuration with its type checked; ``null`` counts as absent."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise NearplaneError(f"{where}: {key} must be of type {kind.__name__}, and is {value!r}.")
    return value


def group_of_columns(store: Store, name: str | None, grid: Grid, in_features: int) -> Int[Tensor, "in"]:
    """Group of each input column: the tensor ``name`` of an activation-ordered checkpoint, else contiguous groups."""
    contiguous = torch.arange(in_features) // grid.group_width(in_features)
    if name is None:
        return contiguous
    stored = store.get(name).long()
    if bool((stored == -1).all()):  # compressed-tensors' mark for "no order was used"
        return contiguous
    if int(stored.min()) < 0 or int(stored.max()) >= grid.group_count(in_features):
        raise NearplaneError(
            f"tensor {name} in {store.folder} names groups {int(stored.min())} to {int(stored.max())}, "
            f"and there are {grid.group_count(in_features)}."
        )
    return stored
