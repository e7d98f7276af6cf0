"""The contract of an on-disk format, and the checks that every format makes before it packs.

A format decides the names, dtypes and shapes of the tensors of one weight and the ``quantization_config`` that says
so. It says *why* it cannot hold a weight (``supports``) and why engines will not load one that it can (``warn``).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats.store import Store

# Group sizes worth suggesting: kernels read at least 8 columns at a time, and beyond 256 one scale per row is near.
SUGGESTED = range(8, 257, 8)
ONLY_HERE = "only nearplane loads such a weight"
ONLINE_ONLY_HERE = "only nearplane does; transformers, vLLM and SGLang do not know its format, and refuse it"


# Linears that read the same input, which engines fuse into one: they must share bits and group size.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"),
    ("q", "k", "v"), ("wq", "wk", "wv"), ("wi_0", "wi_1"),
)  # fmt: skip
# What vLLM and SGLang call the fused module, by which they look for GPTQ's dynamic rules.
FUSED_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
EXPERTS = re.compile(r"(.*\bexperts)\.\d+\.")


class Format(Protocol):
    """How one quantized weight and its description lie on disk."""

    @property
    def name(self) -> str:
        """What the user calls it, and the key in ``FORMATS``."""

    @property
    def holds_conv1d(self) -> bool:
        """Whether loaders look for this format in GPT-2's transposed Conv1D, too."""

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a weight of this (out, in) shape on this grid cannot be stored; None if it can."""

    def warn(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why engines will refuse a weight that can be stored; None if none is known to."""

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """The dtype scales are stored in, which a grid needs to know before codes are chosen."""

    def tensors(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """The tensors of the module ``name``, on the CPU and contiguous. NearplaneError names the module."""

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Bytes of the tensors of a weight of this (out, in) shape; ``grid.scale_dtype`` counts."""

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """The ``quantization_config`` of config.json; ``ignore``: module names left as they were.

        ``grids``: the grid of each quantized module by name, where they are not all ``grid``.
        """

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files the format wants beside config.json, by name."""


def by_grid(grid: Grid, grids: Mapping[str, Grid] | None) -> dict[Grid, list[str]]:
    """Names of modules by what disk tells of their grids, the grid of most first; of one grid alone no names."""
    found: dict[Grid, list[str]] = {}
    for name, some in (grids or {}).items():
        found.setdefault(Grid(some.storage_bits, some.group_size, some.sym), []).append(name)
    if len(found) > 1:
        return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))
    return {next(iter(found), grid): []}


def tail_reason(grid: Grid, in_features: int) -> str | None:
    """A sentence about a smaller last group (or a group larger than the row); None if the groups divide the row."""
    if grid.group_size == -1 or in_features % grid.group_size == 0:
        return None
    fitting = [str(size) for size in SUGGESTED if in_features % size == 0]
    choice = f"{', '.join(fitting)}, or -1 (one scale per row)" if fitting else "-1 (one scale per row) only"
    return f"group_size {grid.group_size} does not divide the {in_features} input columns; what divides them: {choice}"


def conv1d_reason(format: Format) -> str | None:
    """Why a Conv1D cannot be stored; None if it can."""
    if format.holds_conv1d:
        return None
    return f"{format.name} knows nn.Linear only, loaders would fill this Conv1D with random weights; use gptq"


def check(name: str, quantized: Quantized, grid: Grid) -> Quantized:
    """The same weight on the CPU with scales in ``grid.scale_dtype``, once it is known that disk can hold it exactly.

    Raises NearplaneError for codes or zeros off the grid, shapes that do not fit together, and scales that are not
    finite or that storing would round: the codes were chosen for other values then.
    """
    codes, scale, zero = (tensor.detach().cpu() for tensor in quantized[:3])
    groups = (codes.shape[0], grid.group_count(codes.shape[1]))
    if codes.dtype != torch.uint8 or zero.dtype != torch.uint8:
        raise NearplaneError(f"{name}: codes and zeros must be uint8, and are {codes.dtype} and {zero.dtype}.")
    if scale.shape != groups or zero.shape != groups:
        raise NearplaneError(
            f"{name}: scales {tuple(scale.shape)} and zeros {tuple(zero.shape)} must both be {groups} (out, groups)."
        )
    least, greatest = grid.code_range
    if int(codes.min()) < least or int(codes.max()) > greatest:
        raise NearplaneError(f"{name}: codes leave the grid's range {least} to {greatest}.")
    half = 1 << (grid.storage_bits - 1)
    if grid.sym and bool((zero != half).any()):
        raise NearplaneError(f"{name}: every zero of a symmetric grid of {grid.storage_bits} bits must be {half}.")
    if int(zero.max()) > greatest:
        raise NearplaneError(f"{name}: a zero point leaves the grid's range 0 to {greatest}.")
    stored = scale.to(getattr(torch, grid.scale_dtype))
    if not bool(stored.isfinite().all()):
        raise NearplaneError(f"{name}: a scale is not finite in {grid.scale_dtype}.")
    if not torch.equal(stored.to(scale.dtype), scale):
        raise NearplaneError(
            f"{name}: storing the scales in {grid.scale_dtype} would round them after the codes were chosen; "
            "solve with this scale_dtype."
        )
    return Quantized(codes, stored.contiguous(), zero)


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


def fused(names: Iterable[str]) -> list[list[str]]:
    """Of these linears, those that engines fuse: siblings, and all experts of a layer."""
    present = set(names)
    groups = [[f"{parent}{leaf}" for leaf in leaves] for parent in sorted(map(_parent, present)) for leaves in SIBLINGS]
    experts: dict[str, list[str]] = {}
    for name in sorted(present):
        match = EXPERTS.match(name)
        if match:
            experts.setdefault(match.group(1), []).append(name)
    found = [[name for name in group if name in present] for group in [*groups, *experts.values()]]
    return [list(group) for group in dict.fromkeys(tuple(group) for group in found if len(group) > 1)]


def fused_names(names: Iterable[str]) -> list[str]:
    """What engines call the modules into which they fuse some of these linears."""
    present, found = set(names), dict[str, None]()
    for parent in sorted(map(_parent, present)):
        for leaves, name in FUSED_NAMES.items():
            if all(f"{parent}{leaf}" in present for leaf in leaves):
                found[f"{parent}{name}"] = None
    return list(found)


def _parent(name: str) -> str:
    """A module's name up to its last part, the dot included."""
    return name[: len(name) - len(name.rpartition(".")[2])]


def grid_name(grid: Grid) -> str:
    """A grid as it is stored, in words."""
    groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.storage_bits} bits in {groups}{'' if grid.sym else ', asymmetric'}"
