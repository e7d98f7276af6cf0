"""Reading compressed-tensors checkpoints: ours, and those of other tools.

Decides which config group speaks for a stored weight and checks the group against the tensors' shapes. Reads integer
weights packed (``pack-quantized``) or plain (``int-quantized``), zeros packed (today) or plain int8 (before 2025),
activation-ordered groups (``weight_g_idx``), and one scale per group, row or tensor.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid
from nearplane.core.tokens import TokenGrid
from nearplane.formats.bits import unpack, words_of
from nearplane.formats.compressed import CLIP, ONLINE
from nearplane.formats.layer import (
    Decoded,
    StoredLayer,
    collect,
    expect,
    group_of_columns,
    require,
    scale_dtype_of,
    setting,
    tensors_of,
)
from nearplane.formats.store import Store

LAYOUTS: dict[str, Literal["packed", "int"]] = {
    "pack-quantized": "packed",
    "int-quantized": "int",
    "naive-quantized": "int",
}
SUPPORTED = "nearplane reads the integer formats pack-quantized and int-quantized"
WEIGHT_SUFFIXES = ("weight_scale", "weight_zero_point", "weight_g_idx")
# Scales of activations belong to the layer too, though nothing here needs them.
OTHER_SUFFIXES = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


@dataclass(frozen=True)
class Scheme:
    """What one config group says about the weights it targets."""

    label: str
    targets: tuple[str, ...]
    layout: Literal["packed", "int"]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    activations: TokenGrid | None = None

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.strategy == "group" else f"one scale per {self.strategy}"
        return f"config group {self.label} ({self.bits} bits, {groups})"


def find_layers(store: Store, config: dict[str, Any], broken: dict[str, str] | None = None) -> dict[str, StoredLayer]:
    """Every quantized weight of the folder. NearplaneError names what is unsupported or does not fit together.

    ``broken``: where layers that do not fit are listed instead.
    """
    where = f"quantization_config of {store.folder}"
    for key, meaning in (("transform_config", "online transforms"), ("sparsity_config", "sparse weights")):
        part = config.get(key)
        if part and not (isinstance(part, dict) and part.get("format") == "dense"):
            raise NearplaneError(f"{where} asks for {meaning} ({key}), which nearplane does not read.")
    schemes = _schemes(config, where)
    ignore = [str(entry) for entry in setting(config, "ignore", list, [], where)]

    def find(name: str) -> StoredLayer:
        if any(_matches(name, entry) for entry in ignore):
            raise NearplaneError(f"{where} lists {name} under ignore, yet the layer is stored quantized.")
        return _layer(store, name, _scheme_of(name, schemes, where))

    return collect(_prefixes(store), find, broken)


def expects(config: dict[str, Any], names: set[str], kind: str) -> bool:
    """Whether the configuration says that a module is quantized: ``names``, what it is called in model and file."""
    where = "quantization_config"
    ignore = [str(entry) for entry in setting(config, "ignore", list, [], where)]
    if any(_matches(name, entry) for name in names for entry in ignore):
        return False
    targets = [target for scheme in _schemes(config, where) for target in scheme.targets]
    return kind in targets or any(_matches(name, target) for name in names for target in targets)


def decode(store: Store, layer: StoredLayer) -> Decoded:
    """Read a layer. NearplaneError if plain int8 codes leave the grid."""
    (out, columns), bits = layer.shape, layer.grid.storage_bits
    half = 1 << (bits - 1)
    if layer.layout == "packed":
        codes = unpack(store.get(layer.tensors["weight_packed"]), bits, columns)
    else:
        codes = _unsigned(store, layer.tensors["weight"], half)
    scale = store.get(layer.tensors["weight_scale"])
    scale = scale.expand(out, 1) if scale.numel() == 1 else scale.reshape(out, -1)
    zero = torch.full(scale.shape, half, dtype=torch.uint8)
    if "weight_zero_point" in layer.tensors:
        zero = _zeros(store, layer, tuple(scale.shape))
    return Decoded(codes, scale, zero, group_of_columns(store, layer.tensors.get("weight_g_idx"), layer.grid, columns))


def _zeros(store: Store, layer: StoredLayer, shape: tuple[int, ...]) -> Tensor:
    """Unsigned zeros (out, groups): packed along the rows, or plain and signed."""
    name, bits = layer.tensors["weight_zero_point"], layer.grid.storage_bits
    words = (words_of(shape[0], bits), shape[1])
    if layer.layout == "packed" and store.dtype(name) == torch.int32 and store.shape(name) == words:
        return unpack(store.get(name).T, bits, shape[0]).T.contiguous()
    zero = _unsigned(store, name, 1 << (bits - 1))
    if zero.numel() not in (1, shape[0] * shape[1]):
        raise NearplaneError(f"tensor {name} in {store.folder} has shape {tuple(zero.shape)}, not {words} or {shape}.")
    return zero.expand(shape) if zero.numel() == 1 else zero.reshape(shape)


def _unsigned(store: Store, name: str, half: int) -> Tensor:
    """A plain signed tensor shifted to unsigned codes."""
    value = store.get(name).to(torch.int16) + half
    if int(value.min()) < 0 or int(value.max()) >= 2 * half:
        raise NearplaneError(f"tensor {name} in {store.folder} leaves the range {-half} to {half - 1} of its bits.")
    return value.to(torch.uint8)


def _prefixes(store: Store) -> set[str]:
    """Modules whose weight is packed, or is stored beside a scale."""
    packed = {name.removesuffix(".weight_packed") for name in store.names if name.endswith(".weight_packed")}
    scaled = {name.removesuffix(".weight_scale") for name in store.names if name.endswith(".weight_scale")}
    return packed | {name for name in scaled if f"{name}.weight" in store.names}


def _layer(store: Store, name: str, scheme: Scheme) -> StoredLayer:
    """Where a layer lies, its shapes checked against its scheme."""
    codes = "weight_packed" if scheme.layout == "packed" else "weight"
    sources = (codes, "weight_shape") if scheme.layout == "packed" else (codes,)
    tensors = tensors_of(store, name, (*sources, *WEIGHT_SUFFIXES, *OTHER_SUFFIXES))
    require(store, tensors, name, (*sources, "weight_scale", *(() if scheme.symmetric else ("weight_zero_point",))))
    wanted = torch.int32 if scheme.layout == "packed" else torch.int8
    if store.dtype(tensors[codes]) != wanted:
        raise NearplaneError(
            f"tensor {tensors[codes]} in {store.folder} is {store.dtype(tensors[codes])}, "
            f"but {scheme} takes {wanted}; {SUPPORTED}."
        )
    shape = _shape(store, tensors, scheme)
    size = scheme.group_size if scheme.strategy == "group" else -1
    grid = Grid(scheme.bits, size, scheme.symmetric, scale_dtype=scale_dtype_of(store, tensors["weight_scale"]))
    if scheme.strategy == "group":
        expect(store, tensors["weight_scale"], (shape[0], grid.group_count(shape[1])), f"a {shape} weight by {scheme}")
    elif store.shape(tensors["weight_scale"]) not in ((shape[0], 1), (shape[0],), (1,), (1, 1), ()):
        expect(store, tensors["weight_scale"], (shape[0], 1), f"a {shape} weight by {scheme}")
    if "weight_g_idx" in tensors:
        expect(store, tensors["weight_g_idx"], (shape[1],), f"a {shape} weight")
    return StoredLayer(name, grid, shape, tensors, scheme.layout, scheme.activations)


def _shape(store: Store, tensors: dict[str, str], scheme: Scheme) -> tuple[int, int]:
    """(out, in), with the tensor of codes checked against it."""
    if scheme.layout == "packed":
        sizes = [int(size) for size in store.get(tensors["weight_shape"]).flatten()]
    else:
        sizes = list(store.shape(tensors["weight"]))
    if len(sizes) != 2 or min(sizes) < 1:
        raise NearplaneError(
            f"the weight of {tensors['weight_scale']} in {store.folder} has shape {sizes}, not two sizes."
        )
    out, columns = sizes
    if scheme.layout == "packed":
        packed = (out, words_of(columns, scheme.bits))
        expect(store, tensors["weight_packed"], packed, f"a {(out, columns)} weight by {scheme}")
    return out, columns


def _schemes(config: dict[str, Any], where: str) -> list[Scheme]:
    """The config groups that quantize weights. NearplaneError if any is not a plain integer one."""
    schemes = []
    for label, group in setting(config, "config_groups", dict, {}, where).items():
        if not isinstance(group, dict):
            raise NearplaneError(f"{where}: config group {label} must be spelled out; it is {group!r}.")
        weights = setting(group, "weights", dict, None, where)
        if weights is None:
            continue
        layout, kind = str(group.get("format") or config.get("format")), weights.get("type", "int")
        layout = layout.removeprefix(ONLINE)
        if layout not in LAYOUTS or kind != "int":
            raise NearplaneError(f"{where}: config group {label} has format {layout} ({kind}); {SUPPORTED}.")
        bits = setting(weights, "num_bits", int, 8, where)
        size = setting(weights, "group_size", int, None, where)
        strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
        if strategy not in ("group", "channel", "tensor") or (strategy == "group" and (size or 0) < 1):
            raise NearplaneError(
                f"{where}: config group {label} has unsupported strategy {strategy}, group_size {size}."
            )
        if not 2 <= bits <= 8:
            raise NearplaneError(f"{where}: config group {label} has {bits} bits; 2 to 8 are supported.")
        symmetric = setting(weights, "symmetric", bool, True, where)
        targets = tuple(map(str, setting(group, "targets", list, [], where)))
        rounded = _activations(setting(group, "input_activations", dict, {}, where), label, where)
        schemes.append(Scheme(label, targets, LAYOUTS[layout], bits, symmetric, strategy, size or -1, rounded))
    if not schemes:
        raise NearplaneError(f"{where} has no config group with weights; {SUPPORTED}.")
    return schemes


def _activations(given: dict[str, Any], label: str, where: str) -> TokenGrid | None:
    """How a group rounds activations. NearplaneError for any way but integers by a dynamic scale per token."""
    if not given:
        return None
    kind, strategy, dynamic = given.get("type", "int"), given.get("strategy"), given.get("dynamic")
    if (kind, strategy, dynamic) != ("int", "token", True):
        told = f"{kind}, strategy {strategy}, dynamic {dynamic}"
        raise NearplaneError(
            f"{where}: config group {label} rounds activations ({told}); nearplane runs integers of a dynamic scale per token."
        )
    clip = setting(given, "observer_kwargs", dict, {}, where).get(CLIP, 1.0)
    return TokenGrid(setting(given, "num_bits", int, 8, where), setting(given, "symmetric", bool, True, where), clip)


def _scheme_of(name: str, schemes: list[Scheme], where: str) -> Scheme:
    """The group for a module: by its exact name, by regular expression, by class, in the library's order.

    A checkpoint knows no classes. Of the class targets "Linear" is the likeliest; a lone group needs no target.
    """
    for scheme in schemes:
        if name in scheme.targets:
            return scheme
    for scheme in schemes:
        if any(target.startswith("re:") and _matches(name, target) for target in scheme.targets):
            return scheme
    for scheme in schemes:
        if "Linear" in scheme.targets:
            return scheme
    if len(schemes) == 1:
        return schemes[0]
    raise NearplaneError(f"{where} has no config group whose targets name {name}, which is stored quantized.")


def _matches(name: str, entry: str) -> bool:
    """Whether an entry of ``targets`` or ``ignore`` names the module: exactly, or from its start by "re:"."""
    if not entry.startswith("re:"):
        return entry == name
    try:
        return re.match(entry.removeprefix("re:"), name) is not None
    except re.error as error:
        raise NearplaneError(f"{entry!r} in the quantization_config is no regular expression: {error}.") from error
