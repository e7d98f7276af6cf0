"""compressed-tensors, the default output, both ways: what vLLM, SGLang and transformers load.

With activations rounded too it is ``int-quantized``: an int8 for every code, whatever its bits. Else ``pack-quantized``:
codes are packed along the input columns of each row, zeros (asymmetric only) along the output rows. The library
shifts codes and zeros to signed before it subtracts them, so unsigned ones are stored as they are.
Ternary weights are 2-bit symmetric ones that never use code 0. ``NEUTRAL`` is the layout of a run's parts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.core.nested import described, scales_of
from nearplane.core.scales import Scales
from nearplane.formats.base import (
    ONLY_HERE,
    Decoded,
    Format,
    StoredLayer,
    by_grid,
    check,
    collect,
    expect,
    group_of_columns,
    named,
    require,
    scale_dtype_of,
    setting,
    tail_reason,
    tensors_of,
)
from nearplane.formats.bits import pack, unpack, unused_bits, words_of
from nearplane.formats.originals import refuse_transforms
from nearplane.formats.store import Store

# The release of the library whose reading of these tensors is the one described here.
LAYOUT_VERSION = "0.17.0"
CLIP = "nearplane_clip"
# Scales that the library does not know, in a run's parts: no checkpoint of this format has them.
SCALES = "nearplane_scales"
# Before the names of formats where inputs are rotated while the model runs: no other reader is to take such weights.
ONLINE = "nearplane-online-"


@dataclass(frozen=True)
class CompressedTensors(Format):
    """``weight_packed``, ``weight_scale``, ``weight_shape`` and, asymmetric, ``weight_zero_point``."""

    name: str = "compressed-tensors"
    activations: TokenGrid | None = None
    """How engines round the input of a linear."""
    online: bool = False
    """Whether inputs of some linears are rotated while the model runs: only nearplane does that."""
    parts: bool = False
    """Whether this is the layout of a run's parts, which hold scales of every kind."""

    reads: ClassVar[str] = "compressed-tensors (pack-quantized, int-quantized)"
    casts_scales: ClassVar[bool] = True
    order_key: ClassVar[str] = "actorder"

    def running(self, activations: TokenGrid | None, online: bool) -> "CompressedTensors":
        """Both can be stated, online rotations by a name of the format that no other reader knows."""
        return replace(self, activations=activations, online=online)

    def warn(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """A tail group has its own scale on disk, but the library refuses to multiply it out; nor does it know of a clip."""
        if self.activations is not None and self.activations.clip < 1:
            return (
                f"engines round activations without the clip of {self.activations.clip:g}; only nearplane applies it."
            )
        reason = tail_reason(grid, shape[1])
        return reason and f"{reason}; {ONLY_HERE}, vLLM, SGLang and transformers refuse it."

    def pack(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """int32 (out, words), scale (out, groups), int64 (2,), and int32 (words, groups) of zeros if asymmetric."""
        codes, scale, zero = check(name, quantized, grid, any_scales=self.parts)[:3]
        if self.activations is not None:
            half = 1 << (grid.storage_bits - 1)
            plain = {f"{name}.weight": (codes.to(torch.int16) - half).to(torch.int8), f"{name}.weight_scale": scale}
            zeros = {} if grid.sym else {f"{name}.weight_zero_point": (zero.to(torch.int16) - half).to(torch.int8)}
            return plain | zeros
        tensors = {
            f"{name}.weight_packed": pack(codes, grid.storage_bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if not grid.sym:  # a zero point beside a symmetric weight makes vLLM refuse the checkpoint
            stored = zero if grid.scales.free else pack(zero.T, grid.storage_bits).T
            tensors[f"{name}.weight_zero_point"] = stored.contiguous()
        return tensors

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Count exactly."""
        (out, columns), groups = shape, grid.group_count(shape[1])
        scale: torch.dtype = getattr(torch, grid.held_in)
        if self.activations is not None:
            return out * columns + out * groups * (scale.itemsize + (not grid.sym))
        zeros = 0 if grid.sym else 4 * groups * (out if grid.scales.free else words_of(out, grid.storage_bits))
        return 4 * out * words_of(columns, grid.storage_bits) + scale.itemsize * out * groups + zeros + 16

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Write one group for all linears, or for several grids one group each, which names its modules.

        None of several may target the class: vLLM asks for a fused module's class before it asks for the names of its
        parts. The library refuses keys it does not know, so ``settings`` stay out. A quantized output head is named, because
        vLLM's class of it is no linear's.
        """
        groups, every = by_grid(grid, grids), ["Linear", *settings.get("lm_head", ())]
        entries = [_group(some, names or every, self.activations, self.online) for some, names in groups.items()]
        return {
            "quant_method": "compressed-tensors",
            "version": LAYOUT_VERSION,
            "format": entries[0]["format"],
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(entries)},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
        }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Its name, or config groups without one."""
        return bool(config.get("quant_method", self.name if "config_groups" in config else "") == self.name)

    def find(
        self, store: Store, config: dict[str, Any], broken: dict[str, str] | None = None
    ) -> dict[str, StoredLayer]:
        """Packed and plain integer weights, each by the config group that targets it."""
        where = f"quantization_config of {store.folder}"
        refuse_transforms(config, where)
        schemes = _schemes(config, where)
        ignore = [str(entry) for entry in setting(config, "ignore", list, [], where)]

        def find(name: str) -> StoredLayer:
            if any(_matches(name, entry) for entry in ignore):
                raise NearplaneError(f"{where} lists {name} under ignore, yet the layer is stored quantized.")
            return _layer(store, name, _scheme_of(name, schemes, where))

        return collect(_prefixes(store), find, broken)

    def expects(self, config: dict[str, Any], names: set[str], kind: str) -> bool:
        """By ``ignore``, then by the targets of the groups."""
        where = "quantization_config"
        ignore = [str(entry) for entry in setting(config, "ignore", list, [], where)]
        if any(_matches(name, entry) for name in names for entry in ignore):
            return False
        targets = [target for scheme in _schemes(config, where) for target in scheme.targets]
        return kind in targets or any(_matches(name, target) for name in names for target in targets)

    def unpack(self, store: Store, layer: StoredLayer) -> Decoded:
        """Read a layer. Raises NearplaneError if plain int8 codes leave the grid."""
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
        return Decoded(codes, scale, zero, group_of_columns(store, layer.order, layer.grid, columns))

    def ordered(self, config: Mapping[str, Any]) -> bool:
        """Any group may say so."""
        groups = [group.get("weights") for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
        return any(weights.get(self.order_key) for weights in groups if isinstance(weights, dict))

    def foreign(self, config: dict[str, Any]) -> str | None:
        """Floats, sparse weights, online transforms of other tools, static scales of activations."""
        try:
            refuse_transforms(config, "quantization_config")
            _schemes(config, "quantization_config")
        except NearplaneError as error:
            return str(error).removesuffix(".")
        return None

    def besides_weights(self, config: Mapping[str, Any]) -> list[str]:
        """Activations in any group, and the cache."""
        groups = (config.get("config_groups") or {}).values()
        parts = {key for group in groups for key in ("input_activations", "output_activations") if group.get(key)}
        return sorted(parts | {key for key in ("kv_cache_scheme",) if config.get(key)})

    def flaws(self, store: Store, layer: StoredLayer, decoded: Decoded) -> Iterator[str]:
        """Bits of no code, and zero points that a symmetric layer must not have."""
        parts = (("weight_packed", decoded.codes, False), ("weight_zero_point", decoded.zero.T, True))
        for suffix, value, turned in parts if layer.layout == "packed" else ():
            if suffix in layer.tensors and not value.is_floating_point():
                damage = unused_bits(store, layer.tensors[suffix], value, layer.grid.storage_bits, turned)
                yield from [] if damage is None else [damage]
        if layer.grid.sym and "weight_zero_point" in layer.tensors:
            yield f"{layer.name} is symmetric and stores zero points; vLLM refuses such a checkpoint."


NEUTRAL = CompressedTensors(parts=True)
"""The layout in which a run keeps what it has solved, whatever the format of the checkpoint."""


def _group(grid: Grid, targets: list[str], activations: TokenGrid | None, online: bool) -> dict[str, Any]:
    """Describe one config group."""
    channel = grid.group_size == -1
    weights = {
        "num_bits": grid.storage_bits,
        "type": "int",
        "symmetric": grid.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {} if grid.scales.held_in is None else {SCALES: described(grid.scales)},
    }
    return {
        "targets": targets,
        "format": (ONLINE if online else "") + ("pack-quantized" if activations is None else "int-quantized"),
        "weights": weights,
        "input_activations": None if activations is None else _tokens(activations),
        "output_activations": None,
    }


def _tokens(grid: TokenGrid) -> dict[str, Any]:
    """Describe rounded activations. The library knows no clip: it goes where an observer's settings are kept."""
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.sym,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {} if grid.clip == 1 else {CLIP: grid.clip},
    }


LAYOUTS: dict[str, Literal["packed", "int"]] = {
    "pack-quantized": "packed",
    "int-quantized": "int",
    "naive-quantized": "int",
}
INTEGERS = "nearplane reads the integer formats pack-quantized and int-quantized"
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
    scales: Scales | None = None

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.strategy == "group" else f"one scale per {self.strategy}"
        return f"config group {self.label} ({self.bits} bits, {groups})"


def _zeros(store: Store, layer: StoredLayer, shape: tuple[int, ...]) -> Tensor:
    """Read unsigned zeros (out, groups): packed along the rows, or plain and signed."""
    name, bits = layer.tensors["weight_zero_point"], layer.grid.storage_bits
    if layer.grid.scales.free:
        return store.get(name)
    words = (words_of(shape[0], bits), shape[1])
    if layer.layout == "packed" and store.dtype(name) == torch.int32 and store.shape(name) == words:
        return unpack(store.get(name).T, bits, shape[0]).T.contiguous()
    zero = _unsigned(store, name, 1 << (bits - 1))
    if zero.numel() not in (1, shape[0] * shape[1]):
        raise NearplaneError(f"tensor {name} in {store.folder} has shape {tuple(zero.shape)}, not {words} or {shape}.")
    return zero.expand(shape) if zero.numel() == 1 else zero.reshape(shape)


def _unsigned(store: Store, name: str, half: int) -> Tensor:
    """Read a plain signed tensor and shift it to unsigned codes."""
    if store.dtype(name).is_floating_point:
        raise NearplaneError(f"tensor {name} in {store.folder} is {store.dtype(name)}, and no integers; {INTEGERS}.")
    value = store.get(name).to(torch.int16) + half
    if int(value.min()) < 0 or int(value.max()) >= 2 * half:
        raise NearplaneError(f"tensor {name} in {store.folder} leaves the range {-half} to {half - 1} of its bits.")
    return value.to(torch.uint8)


def _prefixes(store: Store) -> set[str]:
    """List the modules whose weight is packed, or is stored beside a scale."""
    scaled = {name for name in named(store, "weight_scale") if f"{name}.weight" in store.names}
    return named(store, "weight_packed") | scaled


def _layer(store: Store, name: str, scheme: Scheme) -> StoredLayer:
    """Locate a layer, and check its shapes against its scheme."""
    codes = "weight_packed" if scheme.layout == "packed" else "weight"
    sources = (codes, "weight_shape") if scheme.layout == "packed" else (codes,)
    tensors = tensors_of(store, name, (*sources, *WEIGHT_SUFFIXES, *OTHER_SUFFIXES))
    require(store, tensors, name, (*sources, "weight_scale", *(() if scheme.symmetric else ("weight_zero_point",))))
    wanted = torch.int32 if scheme.layout == "packed" else torch.int8
    if store.dtype(tensors[codes]) != wanted:
        raise NearplaneError(
            f"tensor {tensors[codes]} in {store.folder} is {store.dtype(tensors[codes])}, "
            f"but {scheme} takes {wanted}; {INTEGERS}."
        )
    shape = _shape(store, tensors, scheme)
    size = scheme.group_size if scheme.strategy == "group" else -1
    fields: dict[str, Any] = {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}
    fields["scale_dtype"] = scale_dtype_of(store, tensors["weight_scale"])
    grid = Grid(**fields) if scheme.scales is None else Grid.of(scales=scheme.scales, **fields)
    reason = grid.scales.row_reason(shape[1], grid.group_width(shape[1]))
    if reason is not None:
        raise NearplaneError(f"{name} in {store.folder} does not fit its scales: {reason}.")
    if grid.scales.free:
        zeros, groups = tensors["weight_zero_point"], (shape[0], grid.group_count(shape[1]))
        expect(store, zeros, groups, f"a {shape} weight by {scheme}")
        if store.dtype(zeros) != torch.float32:
            raise NearplaneError(f"tensor {zeros} in {store.folder} is {store.dtype(zeros)}, not float32.")
    if scheme.strategy == "group":
        expect(store, tensors["weight_scale"], (shape[0], grid.group_count(shape[1])), f"a {shape} weight by {scheme}")
    elif store.shape(tensors["weight_scale"]) not in ((shape[0], 1), (shape[0],), (1,), (1, 1), ()):
        expect(store, tensors["weight_scale"], (shape[0], 1), f"a {shape} weight by {scheme}")
    if "weight_g_idx" in tensors:
        expect(store, tensors["weight_g_idx"], (shape[1],), f"a {shape} weight")
    return StoredLayer(name, grid, shape, tensors, scheme.layout, tensors.get("weight_g_idx"), scheme.activations)


def _shape(store: Store, tensors: dict[str, str], scheme: Scheme) -> tuple[int, int]:
    """Read (out, in), and check the tensor of codes against it."""
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
    """Parse the config groups that quantize weights. Raises NearplaneError if any is not a plain integer one."""
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
            raise NearplaneError(f"{where}: config group {label} has format {layout} ({kind}); {INTEGERS}.")
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
        told = setting(setting(weights, "observer_kwargs", dict, {}, where), SCALES, dict, None, where)
        scales = None if told is None else scales_of(told, f"{where}: config group {label}")
        if scales is not None and (scales.free if symmetric else scales.either_sign):
            raise NearplaneError(f"{where}: config group {label} says both symmetric {symmetric} and {told!r}.")
        schemes.append(Scheme(label, targets, LAYOUTS[layout], bits, symmetric, strategy, size or -1, rounded, scales))
    if not schemes:
        raise NearplaneError(f"{where} has no config group with weights; {INTEGERS}.")
    return schemes


def _activations(given: dict[str, Any], label: str, where: str) -> TokenGrid | None:
    """Parse how a group rounds activations; only integers by a dynamic scale per token are known."""
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
    """Pick the group of a module: by its exact name, by regular expression, by class, in the library's order.

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
    """Tell whether an entry of ``targets`` or ``ignore`` names a module: exactly, or from its start by "re:"."""
    if not entry.startswith("re:"):
        return entry == name
    try:
        return re.match(entry.removeprefix("re:"), name) is not None
    except re.error as error:
        raise NearplaneError(f"{entry!r} in the quantization_config is no regular expression: {error}.") from error
