"""Reading GPTQ checkpoints, versions 1 and 2: ours, and those of AutoGPTQ, GPTQModel and others.

Decides bits and group size of each layer, which may differ from the configuration's where ``dynamic`` rules exist: then
the first rule that matches the name speaks, and the shapes speak where they say otherwise.
Groups may be in any order (``desc_act``), and old checkpoints have no ``g_idx``.
"""

import re
from typing import Any, Literal

import torch

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid
from nearplane.formats.bits import unpack, words_of
from nearplane.formats.gptq import WIDTHS
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

NEEDED = ("qweight", "qzeros", "scales")


def version(config: dict[str, Any], folder: str) -> Literal["gptq", "gptq_v2"]:
    """The version a configuration names; none named is version 1. NearplaneError for other kernels' layouts."""
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        stored = "marlin"
    if stored not in ("gptq", "gptq_v2"):
        raise NearplaneError(f"{folder} is GPTQ in the layout {stored!r}; nearplane reads gptq and gptq_v2.")
    if config.get("pack_dtype") not in (None, "int32"):
        raise NearplaneError(f"{folder} is GPTQ packed in {config['pack_dtype']}; nearplane reads int32.")
    return "gptq" if stored == "gptq" else "gptq_v2"


def find_layers(store: Store, config: dict[str, Any], broken: dict[str, str] | None = None) -> dict[str, StoredLayer]:
    """Every quantized weight of the folder. NearplaneError names the tensor that does not fit the configuration.

    ``broken``: where layers that do not fit are listed instead.
    """
    where = f"quantization config of {store.folder}"
    layout = version(config, str(store.folder))
    bits = setting(config, "bits", int, None, where)
    if bits not in WIDTHS:
        raise NearplaneError(f"{where} has bits {bits!r}; GPTQ stores 2, 3, 4 or 8.")
    size = setting(config, "group_size", int, -1, where)
    if size != -1 and size < 1:
        raise NearplaneError(f"{where} has group_size {size}; it must be positive or -1.")
    sym = setting(config, "sym", bool, True, where)
    rules = _rules(config, where)

    def find(name: str) -> StoredLayer:
        tensors = tensors_of(store, name, (*NEEDED, "g_idx"))
        require(store, tensors, name, NEEDED)
        for suffix in ("qweight", "qzeros"):
            sides = store.shape(tensors[suffix])
            if store.dtype(tensors[suffix]) != torch.int32 or len(sides) != 2 or min(sides) < 1:
                raise NearplaneError(f"tensor {tensors[suffix]} in {store.folder} must be an int32 matrix.")
        grid, shape = _grid(store, tensors, _ruled(name, rules, Grid(bits, size, sym), where), bool(rules))
        return StoredLayer(name, grid, shape, tensors, layout)

    return collect({name.removesuffix(".qweight") for name in store.names if name.endswith(".qweight")}, find, broken)


def expects(config: dict[str, Any], names: set[str]) -> bool:
    """Whether the configuration says that a linear is quantized: ``names``, what it is called in model and file."""
    where = "quantization config"
    if any(name.rpartition(".")[2] == "lm_head" for name in names) and not config.get("lm_head"):
        return False
    inside = setting(config, "modules_in_block_to_quantize", list, [], where)
    inner = [str(name) for part in inside for name in (part if isinstance(part, list) else [part])]
    if inner and not any(name == part or name.endswith("." + part) for name in names for part in inner):
        return False
    skipped = [pattern for pattern, rule in _rules(config, where) if rule is None]
    return not any(pattern.match(name) for name in names for pattern in skipped)


def _rules(config: dict[str, Any], where: str) -> list[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """The ``dynamic`` rules in order: a pattern, matched from a name's start, and what it changes; None: left out."""
    found: list[tuple[re.Pattern[str], dict[str, Any] | None]] = []
    for rule, change in setting(config, "dynamic", dict, {}, where).items():
        try:
            pattern = re.compile(str(rule).removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise NearplaneError(f"a rule of dynamic in the {where} is no regular expression: {error}.") from error
        changed = change if isinstance(change, dict) else {}
        found.append((pattern, None if str(rule).startswith("-:") else changed))
    return found


def _ruled(name: str, rules: list[tuple[re.Pattern[str], dict[str, Any] | None]], grid: Grid, where: str) -> Grid:
    """The grid of a layer by the first rule that matches it."""
    rule = next((change for pattern, change in rules if pattern.match(name)), None) or {}
    bits = setting(rule, "bits", int, grid.bits, f"{where}, dynamic")
    size = setting(rule, "group_size", int, grid.group_size, f"{where}, dynamic")
    if bits not in WIDTHS or (size != -1 and size < 1):
        raise NearplaneError(f"{where} has a rule for {name} with bits {bits!r} and group_size {size!r}.")
    return Grid(bits, size, setting(rule, "sym", bool, grid.sym, f"{where}, dynamic"))


def decode(store: Store, layer: StoredLayer) -> Decoded:
    """Read a layer. NearplaneError where the zeros show that the checkpoint names the wrong version."""
    (out, columns), bits = layer.shape, layer.grid.storage_bits
    codes = unpack(store.get(layer.tensors["qweight"]).T, bits, columns)
    zero = unpack(store.get(layer.tensors["qzeros"]), bits, out).T.contiguous()
    half, last = 1 << (bits - 1), (1 << bits) - 1
    if layer.layout == "gptq":
        zero = (zero + 1) & last  # a stored "-1" wraps inside its bits
    wrong = half + 1 if layer.layout == "gptq" else half - 1
    if layer.grid.sym and bool((zero == wrong).all()):
        raise NearplaneError(
            f"{layer.name} in {store.folder} is symmetric, and all its zeros are {wrong} instead of {half}: "
            f"checkpoint_format must be {'gptq_v2' if layer.layout == 'gptq' else 'gptq'}, not {layer.layout}."
        )
    scale = store.get(layer.tensors["scales"]).T.contiguous()
    return Decoded(codes, scale, zero, group_of_columns(store, layer.tensors.get("g_idx"), layer.grid, columns))


def _grid(store: Store, tensors: dict[str, str], config: Grid, varied: bool) -> tuple[Grid, tuple[int, int]]:
    """Grid and (out, in) of one layer: as configured, or as the shapes tell where rules may vary it."""
    rows, out = store.shape(tensors["qweight"])
    bits = config.storage_bits
    if varied:
        bits = next((b for b in (bits, *WIDTHS) if words_of(out, b) == store.shape(tensors["qzeros"])[1]), bits)
    columns = rows * 32 // bits
    if "g_idx" in tensors and len(store.shape(tensors["g_idx"])) == 1:
        columns = store.shape(tensors["g_idx"])[0]
    what = f"a {(out, columns)} weight of {bits} bits"
    expect(store, tensors["qweight"], (words_of(columns, bits), out), what)
    if "g_idx" in tensors:
        expect(store, tensors["g_idx"], (columns,), what)
    groups = store.shape(tensors["scales"])[0] if store.shape(tensors["scales"]) else 0
    size = config.group_size
    if varied and groups and Grid(bits, size).group_count(columns) != groups:
        size = -1 if groups == 1 else -(-columns // groups)
    grid = Grid(bits, size, config.sym, scale_dtype=scale_dtype_of(store, tensors["scales"]))
    count = grid.group_count(columns)
    expect(store, tensors["scales"], (count, out), f"{what} in groups of {grid.group_width(columns)}")
    expect(store, tensors["qzeros"], (count, words_of(out, bits)), f"{what} in groups of {grid.group_width(columns)}")
    return grid, (out, columns)
