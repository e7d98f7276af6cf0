"""GPTQ, versions 1 and 2, both ways: the layout of AutoGPTQ and GPTQModel.

Codes are packed along the input columns and stored transposed; zeros are packed along the output rows. Version 1
stores ``zero - 1`` and readers disagree on what a zero of 0 becomes, so it is written for symmetric grids only.
Groups are contiguous: ``g_idx`` is trivial, ``desc_act`` false.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats.base import (
    Decoded,
    Format,
    StoredLayer,
    by_grid,
    check,
    collect,
    expect,
    expect_words,
    group_of_columns,
    group_size_of,
    levels_reason,
    named,
    require,
    scale_dtype_of,
    scales_reason,
    setting,
    tail_reason,
    tensors_of,
)
from nearplane.formats.bits import pack, unpack, unused_bits, words_of
from nearplane.formats.fused import fused_names
from nearplane.formats.store import Store

WIDTHS = (2, 3, 4, 8)
# Kernels read words of 32 codes across both axes, and a 3-bit word only ends where 32 codes do.
MULTIPLE = 32
NEEDED = ("qweight", "qzeros", "scales")
# What may follow the name of a module in a rule.
OF_A_MODULE = r"(\.(qweight|qzeros|scales|g_idx|bias))?$"
# Fields of the configuration that are of the run.
OF_THE_RUN = ("damp_percent", "true_sequential", "static_groups")


@dataclass(frozen=True)
class GPTQ(Format):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""

    name: Literal["gptq", "gptq_v2"] = "gptq"

    reads: ClassVar[str] = "GPTQ (gptq, gptq_v2)"
    holds_conv1d: ClassVar[bool] = True
    order_key: ClassVar[str] = "desc_act"
    fused_rules: ClassVar[bool] = True
    beside: ClassVar[str | None] = "quantize_config.json"

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Widths 2, 3, 4 and 8, sides that are multiples of 32, no tail group; version 1 symmetric only."""
        if levels_reason(grid) or scales_reason(grid):
            return levels_reason(grid) or scales_reason(grid)
        if grid.storage_bits not in WIDTHS:
            return f"{self.name} stores 2, 3, 4 or 8 bits, not {grid.storage_bits}; compressed-tensors stores 2 to 8"
        if not grid.sym and self.name == "gptq":
            return "gptq (version 1) cannot hold every asymmetric zero point; use gptq_v2 or compressed-tensors"
        if shape[0] % MULTIPLE or shape[1] % MULTIPLE:
            return f"{self.name} needs both sides to be multiples of 32, and this weight is {shape[0]} x {shape[1]}"
        return tail_reason(grid, shape[1])

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """Always float16."""
        return "float16"

    def pack(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """int32 (in words, out), int32 (groups, out words), float16 (groups, out), int32 (in,)."""
        codes, scale, zero = check(name, quantized, grid)[:3]
        stored = zero.T if self.name == "gptq_v2" else zero.T - 1  # symmetric: at least 2 - 1, never below 0
        columns = torch.arange(codes.shape[1], dtype=torch.int32)
        return {
            f"{name}.qweight": pack(codes, grid.storage_bits).T.contiguous(),
            f"{name}.qzeros": pack(stored, grid.storage_bits),
            f"{name}.scales": scale.T.contiguous(),
            f"{name}.g_idx": columns // grid.group_width(codes.shape[1]),
        }

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Count exactly."""
        (out, columns), groups = shape, grid.group_count(shape[1])
        words = out * words_of(columns, grid.storage_bits) + groups * words_of(out, grid.storage_bits) + columns
        return 4 * words + 2 * out * groups

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Write the fields of loaders, and whatever else ``settings`` holds under ``meta``.

        The format knows no list of modules left out, but engines skip those that a ``dynamic`` rule starting with
        "-:" matches. A rule starting with "+:" says in what a module differs from the rest. Engines that fuse modules
        look for the fused module's name, so it has a rule, too. ``lm_head`` is left out unless the field of that name
        says otherwise.
        """
        (grid, _), *others = by_grid(grid, grids).items()
        rest = dict(settings)
        config: dict[str, Any] = {
            "bits": grid.storage_bits,
            "group_size": grid.group_size,
            "desc_act": False,
            "sym": grid.sym,
            "lm_head": bool(rest.pop("lm_head", False)),
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        }
        if 0 < rest.get("damp_percent", 0) < 1:  # transformers refuses to load any other value
            config["damp_percent"] = rest.pop("damp_percent")
        for field in ("true_sequential", "static_groups"):
            if field in rest:
                config[field] = rest.pop(field)
        skipped = [module for module in ignore if module != "lm_head"]
        rules: dict[str, dict[str, Any]] = {f"-:{_pattern(module)}": {} for module in [*skipped, *fused_names(skipped)]}
        for some, names in others:
            rule = {"bits": some.storage_bits, "group_size": some.group_size, "sym": some.sym}
            rules |= {f"+:{_pattern(module)}": dict(rule) for module in [*names, *fused_names(names)]}
        if rules:
            config["dynamic"] = rules
        config["meta"] = {"quantizer": [f"nearplane:{rest.pop('version', 'unknown')}"], **rest}
        return config

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The same again as quantize_config.json, where older loaders look."""
        return {"quantize_config.json": dict(config)}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Version 2 claims its name only, version 1 all else that is GPTQ, which ``find`` may refuse."""
        return config.get("quant_method") == "gptq" and (_stored_version(config) == "gptq_v2") == (
            self.name == "gptq_v2"
        )

    def foreign(self, config: dict[str, Any]) -> str | None:
        """Layouts of single kernels, as Marlin's."""
        try:
            _refuse_layout(config, "this checkpoint")
        except NearplaneError as error:
            return str(error).removesuffix(".")
        return None

    def find(
        self, store: Store, config: dict[str, Any], broken: dict[str, str] | None = None
    ) -> dict[str, StoredLayer]:
        """Every ``qweight``, its grid as configured or as a ``dynamic`` rule says."""
        where = f"quantization config of {store.folder}"
        _refuse_layout(config, str(store.folder))
        bits = setting(config, "bits", int, None, where)
        if bits not in WIDTHS:
            raise NearplaneError(f"{where} has bits {bits!r}; GPTQ stores 2, 3, 4 or 8.")
        size = group_size_of(config, -1, where)
        sym = setting(config, "sym", bool, True, where)
        rules = _rules(config, where)

        def find(name: str) -> StoredLayer:
            tensors = tensors_of(store, name, (*NEEDED, "g_idx"))
            require(store, tensors, name, NEEDED)
            expect_words(store, (tensors["qweight"], tensors["qzeros"]))
            grid, shape = _grid(store, tensors, _ruled(name, rules, Grid(bits, size, sym), where), bool(rules))
            return StoredLayer(name, grid, shape, tensors, order=tensors.get("g_idx"))

        return collect(named(store, "qweight"), find, broken)

    def unpack(self, store: Store, layer: StoredLayer) -> Decoded:
        """Read a layer. Raises NearplaneError where its zeros show that the configuration names the wrong version."""
        (out, columns), bits = layer.shape, layer.grid.storage_bits
        codes = unpack(store.get(layer.tensors["qweight"]).T, bits, columns)
        zero = unpack(store.get(layer.tensors["qzeros"]), bits, out).T.contiguous()
        half, last = 1 << (bits - 1), (1 << bits) - 1
        first = self.name == "gptq"
        if first:
            zero = (zero + 1) & last  # a stored "-1" wraps inside its bits
        wrong = half + 1 if first else half - 1
        if layer.grid.sym and bool((zero == wrong).all()):
            raise NearplaneError(
                f"{layer.name} in {store.folder} is symmetric, and all its zeros are {wrong} instead of {half}: "
                f"checkpoint_format must be {'gptq_v2' if first else 'gptq'}, not {self.name}."
            )
        scale = store.get(layer.tensors["scales"]).T.contiguous()
        return Decoded(codes, scale, zero, group_of_columns(store, layer.order, layer.grid, columns))

    def expects(self, config: dict[str, Any], names: set[str], kind: str) -> bool:
        """Every linear of the blocks without a rule against it; ``lm_head`` by its field."""
        where = "quantization config"
        if any(name.rpartition(".")[2] == "lm_head" for name in names) and not config.get("lm_head"):
            return False
        inside = setting(config, "modules_in_block_to_quantize", list, [], where)
        inner = [str(name) for part in inside for name in (part if isinstance(part, list) else [part])]
        if inner and not any(name == part or name.endswith("." + part) for name in names for part in inner):
            return False
        skipped = [pattern for pattern, rule in _rules(config, where) if rule is None]
        return not any(pattern.match(name) for name in names for pattern in skipped)

    def run_settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Damping, and the order in which the run went."""
        return {key: value for key, value in config.items() if key in OF_THE_RUN}

    def flaws(self, store: Store, layer: StoredLayer, decoded: Decoded) -> Iterator[str]:
        """Bits of no code, and zeros that readers of version 1 disagree on."""
        bits, first = layer.grid.storage_bits, self.name == "gptq"
        zero = (decoded.zero - 1) & ((1 << bits) - 1) if first else decoded.zero
        for suffix, value, turned in (("qweight", decoded.codes, True), ("qzeros", zero.T, False)):
            damage = unused_bits(store, layer.tensors[suffix], value, bits, turned)
            yield from [] if damage is None else [damage]
        if first and not layer.grid.sym and bool((decoded.zero == 0).any()):
            yield (
                f"{layer.name} has zero points of 0, which version 1 of GPTQ stores as -1; readers disagree on them."
            )

    def remarks(self, layer: StoredLayer) -> Iterator[str]:
        """Scales of another dtype."""
        if layer.grid.scale_dtype != "float16":
            yield f"{layer.name}: scales are {layer.grid.scale_dtype}; GPTQ's are float16."


def _pattern(module: str) -> str:
    """Write a regular expression for one entry of ``ignore``: a name, or a pattern marked "re:".

    Engines match it with names of modules, ONNX Runtime GenAI with names of their tensors.
    """
    return module.removeprefix("re:") if module.startswith("re:") else rf"^{re.escape(module)}{OF_A_MODULE}"


def _stored_version(config: Mapping[str, Any]) -> Any:
    """Read the version that a configuration names; none named is version 1. Other kernels' layouts are named, too."""
    return (
        "marlin"
        if config.get("is_marlin_format")
        else config.get("checkpoint_format") or config.get("format") or "gptq"
    )


def _refuse_layout(config: Mapping[str, Any], folder: str) -> None:
    """Raise NearplaneError for other kernels' layouts."""
    stored = _stored_version(config)
    if stored not in ("gptq", "gptq_v2"):
        raise NearplaneError(f"{folder} is GPTQ in the layout {stored!r}; nearplane reads gptq and gptq_v2.")
    if config.get("pack_dtype") not in (None, "int32"):
        raise NearplaneError(f"{folder} is GPTQ packed in {config['pack_dtype']}; nearplane reads int32.")


def _rules(config: dict[str, Any], where: str) -> list[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """Parse the ``dynamic`` rules in order: a pattern, matched from a name's start, and its changes; None: left out."""
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
    """Give the grid of a layer by the first rule that matches it."""
    rule = next((change for pattern, change in rules if pattern.match(name)), None) or {}
    bits = setting(rule, "bits", int, grid.bits, f"{where}, dynamic")
    size = setting(rule, "group_size", int, grid.group_size, f"{where}, dynamic")
    if bits not in WIDTHS or (size != -1 and size < 1):
        raise NearplaneError(f"{where} has a rule for {name} with bits {bits!r} and group_size {size!r}.")
    return Grid(bits, size, setting(rule, "sym", bool, grid.sym, f"{where}, dynamic"))


def _grid(store: Store, tensors: dict[str, str], config: Grid, varied: bool) -> tuple[Grid, tuple[int, int]]:
    """Give grid and (out, in) of a layer: as configured, or as the shapes tell where rules may vary it."""
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
