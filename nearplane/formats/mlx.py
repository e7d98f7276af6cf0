"""MLX's affine layout, both ways: codes, a scale and an offset for each group, as ``mlx_lm.convert`` writes them.

A weight is ``scale * code + bias``: the offset is a number of its own, stored in the dtype of the scale. So a run chooses
its codes for such offsets (``solved_on``). Weights of an integer zero, from another format, get ``-scale * zero``; a
symmetric zero is a power of two, and loses nothing. Codes are one stream of bits like everybody's, as uint32.
mlx-lm renames and stacks tensors while it loads. ``LOADED`` and ``REFUSED`` say for which models that was run, and how it ended.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized
from nearplane.core.scales import Affine
from nearplane.formats.base import (
    Decoded,
    Format,
    StoredLayer,
    by_grid,
    check,
    collect,
    expect,
    expect_words,
    grid_name,
    group_of_columns,
    levels_reason,
    named,
    require,
    scale_dtype_of,
    setting,
    tail_reason,
    tensors_of,
)
from nearplane.formats.bits import pack, unpack, words_of
from nearplane.formats.store import Store

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
NEEDED = ("weight", "scales", "biases")
STACKED = re.compile(r"(.*\.experts)\.\d+\.(.+)")
VERSION = "mlx-lm 0.32.2"
# Model types that mlx-lm loaded from this layout with the log-probabilities of nearplane.load: runs/mlx_families.py.
LOADED = (
    "cohere", "cohere2", "dots1", "ernie4_5", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe",
    "gpt_bigcode", "gpt_neox", "gptj", "granite", "helium", "hunyuan_v1_dense", "llama", "mamba", "ministral3",
    "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
# Model types that it did not load, or not rightly, with the reason. Absent ones: rows of docs/engines.md.
STACKS = "it stacks the experts' weights and leaves their scales"
ABSENT = "it has no such model"
NAMES = "it knows other names of its weights than those of its scales"
REFUSED = {
    "qwen3_moe": STACKS, "ernie4_5_moe": STACKS, "granitemoe": STACKS, "dbrx": STACKS, "gpt_oss": STACKS, "llama4_text": STACKS,
    "lfm2_moe": STACKS, "nanochat": NAMES, "bitnet": "it takes every linear for a ternary one",
    "opt": ABSENT, "bloom": ABSENT, "mpt": ABSENT, "granitemoeshared": ABSENT,
}  # fmt: skip


@dataclass(frozen=True)
class MLX(Format):
    """``weight``, ``scales`` and ``biases``."""

    name: str = "mlx"

    reads: ClassVar[str] = "MLX (affine)"

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Widths 2 to 6 and 8, groups of 32, 64 or 128 that divide the inputs."""
        if levels_reason(grid):
            return levels_reason(grid)
        if grid.scales.held_in is not None and not isinstance(grid.scales, Affine):
            return f"mlx stores a scale and an offset, no {type(grid.scales).__name__} scales"
        if grid.storage_bits not in WIDTHS:
            return f"mlx stores 2, 3, 4, 5, 6 or 8 bits, not {grid.storage_bits}"
        if grid.group_size not in GROUPS:
            size = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
            return f"mlx stores groups of 32, 64 or 128 inputs, not {size}; give --group-size"
        if shape[1] % grid.group_size:
            fitting = [str(size) for size in GROUPS if shape[1] % size == 0]
            choice = f"of mlx's sizes {' and '.join(fitting)} do" if fitting else "none of mlx's 32, 64 and 128 does"
            return f"group_size {grid.group_size} does not divide the {shape[1]} input columns; {choice}"
        return tail_reason(grid, shape[1])

    def together(self, grids: Mapping[str, Grid], model_type: str) -> str | None:
        """A model that mlx-lm loads, and one grid for what it stacks: the same linear of all experts of a layer."""
        if model_type in REFUSED:
            return f"{VERSION} does not load a quantized {model_type}: {REFUSED[model_type]}; use another format"
        first: dict[tuple[str, str], tuple[str, Grid]] = {}
        for name, grid in grids.items():
            match = STACKED.fullmatch(name)
            if match is not None:
                other, wanted = first.setdefault((match.group(1), match.group(2)), (name, grid))
                if (grid.storage_bits, grid.group_size) != (wanted.storage_bits, wanted.group_size):
                    return (
                        f"mlx-lm stacks the experts of a layer, and {other} has {grid_name(wanted)}, {name} "
                        f"{grid_name(grid)}; give all the same"
                    )
        return None

    def solved_on(self, grid: Grid) -> Grid:
        """Offsets of their own, in the dtype of the scales: the layout stores them whatever the grid."""
        if grid.bits == "ternary" or grid.scales.held_in is not None:
            return grid
        fields: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "fit": grid.fit}
        return Grid.of(scales=Affine(grid.scale_dtype), scale_dtype=grid.scale_dtype, sym=False, **fields)

    def pack(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """uint32 (out, words), and scales and biases (out, groups) in one dtype."""
        codes, scale, zero = check(name, quantized, grid, any_scales=True)[:3]
        bias = Affine(grid.held_in).offset(scale.float(), zero.float()).neg().to(scale.dtype)
        if not bool(bias.isfinite().all()):
            raise NearplaneError(f"{name}: an offset is not finite in {grid.held_in}; use --dtype bfloat16.")
        return {
            f"{name}.weight": pack(codes, grid.storage_bits).view(torch.uint32),
            f"{name}.scales": scale,
            f"{name}.biases": bias,
        }

    def rounds(self, quantized: Quantized, grid: Grid) -> float:
        """Measure how far ``pack`` moves the offset of a group at most, in steps of its scale."""
        scale, zero = quantized.scale.float(), quantized.zero.float()
        stored = Affine(grid.held_in).offset(scale, zero)
        return float(((stored - scale * zero) / scale).abs().max())

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Count exactly."""
        out, columns = shape
        dtype: torch.dtype = getattr(torch, grid.held_in)
        return out * (4 * words_of(columns, grid.storage_bits) + 2 * dtype.itemsize * grid.group_count(columns))

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Write bits and group size of most, an entry for every other weight, and ``false`` for what stays dense."""
        (most, _), *others = by_grid(grid, grids).items()
        config: dict[str, Any] = {"group_size": most.group_size, "bits": most.storage_bits, "mode": "affine"}
        for some, names in others:
            entry = {"group_size": some.group_size, "bits": some.storage_bits}
            config |= {name: entry for name in names if entry != {key: config[key] for key in entry}}
        return config | dict.fromkeys(ignore, False)

    def entries(self, config: dict[str, Any]) -> dict[str, Any]:
        """Both keys, as ``mlx_lm.convert`` writes them."""
        return {"quantization": config, "quantization_config": config}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By the method's name, which ``stated`` gives to a configuration under "quantization"."""
        return config.get("quant_method") == "mlx"

    def find(
        self, store: Store, config: dict[str, Any], broken: dict[str, str] | None = None
    ) -> dict[str, StoredLayer]:
        """Every weight with scales and biases; its grid as its entry, or the configuration, or its shapes say."""
        where = f"quantization of {store.folder}"
        if config.get("mode", "affine") != "affine":
            raise NearplaneError(f"{where} has mode {config['mode']!r}; nearplane reads MLX's affine.")
        bits, size = _sizes(config, {}, where)

        def find(name: str) -> StoredLayer:
            tensors = tensors_of(store, name, NEEDED)
            require(store, tensors, name, NEEDED)
            expect_words(store, (tensors["weight"],), torch.uint32)
            sides = [store.shape(tensors[suffix]) for suffix in NEEDED]
            if any(len(shape) != 2 or min(shape) < 1 for shape in sides):
                raise NearplaneError(f"{name} in {store.folder} must be three matrices.")
            entry = config.get(name)
            own, group = _sizes(entry if isinstance(entry, dict) else {}, {"bits": bits, "group_size": size}, where)
            (out, words), (_, count), _ = sides
            if not isinstance(entry, dict) and words * 32 != own * group * count:
                own = words * 32 // (group * count)
            if own not in WIDTHS or words != words_of(group * count, own):
                raise NearplaneError(
                    f"{name} in {store.folder} has {words} words and {count} groups of {group}: no width fits."
                )
            dtype = scale_dtype_of(store, tensors["scales"])
            for suffix in ("scales", "biases"):
                expect(store, tensors[suffix], (out, count), f"a {(out, group * count)} weight in groups of {group}")
            if scale_dtype_of(store, tensors["biases"]) != dtype:
                raise NearplaneError(f"scales and biases of {name} in {store.folder} have different dtypes.")
            grid = Grid.of(scales=Affine(dtype), bits=own, group_size=group, sym=False, scale_dtype=dtype)
            return StoredLayer(name, grid, (out, group * count), tensors)

        return collect(named(store, "scales", "biases"), find, broken)

    def unpack(self, store: Store, layer: StoredLayer) -> Decoded:
        """Read a layer; its zeros are real numbers. Raises NearplaneError for a scale of 0 with codes that it needs."""
        columns = layer.shape[1]
        codes = unpack(store.get(layer.tensors["weight"]).view(torch.int32), layer.grid.storage_bits, columns)
        scale, bias = store.get(layer.tensors["scales"]), store.get(layer.tensors["biases"])
        if bool((scale == 0).any()):
            raise NearplaneError(f"{layer.name} in {store.folder} has scales of 0, whose offsets have no zero point.")
        zero = -bias.float() / scale.float()
        return Decoded(codes, scale, zero, group_of_columns(store, None, layer.grid, columns))

    def expects(self, config: dict[str, Any], names: set[str], kind: str) -> bool:
        """Every linear without an entry that is false; mlx-lm takes those for dense that have no scales."""
        return not any(config.get(name) is False for name in names)

    def remarks(self, layer: StoredLayer) -> Iterator[str]:
        """Nothing is unusual."""
        yield from ()


def _sizes(given: Mapping[str, Any], usual: Mapping[str, int], where: str) -> tuple[int, int]:
    """Read bits and group size. Raises NearplaneError for others than MLX's."""
    bits = setting(dict(given), "bits", int, usual.get("bits", 4), where)
    size = setting(dict(given), "group_size", int, usual.get("group_size", 64), where)
    if bits not in WIDTHS or size not in GROUPS:
        raise NearplaneError(
            f"{where} has bits {bits} and group_size {size}; MLX's are 2 to 6 or 8, and 32, 64 or 128."
        )
    return bits, size
