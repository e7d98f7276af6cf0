"""AWQ's GEMM layout, both ways: 4 bits with a zero for each group, as AutoAWQ writes it.

Codes are packed along the output rows, eight to an int32, in the order of ``ORDER``; zeros likewise. Symmetric grids go
out with the zero 8 everywhere. The configuration knows one group size, and lists modules left out in
``modules_to_not_convert``: vLLM skips a module whose name *contains* an entry, transformers one whose name begins with
or ends in an entry. So an entry that would also skip a quantized module is written as an anchored pattern.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    grid_name,
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
from nearplane.formats.bits import pack, unpack
from nearplane.formats.store import Store

BITS, MIDDLE = 4, 8
# Codes of one word: code i of the word, from the lowest bits up, is that of column ORDER[i] of the word's eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = tuple(ORDER.index(column) for column in range(len(ORDER)))
NEEDED = ("qweight", "scales")
WHO = "nearplane"


@dataclass(frozen=True)
class AWQ(Format):
    """``qweight``, ``qzeros`` and ``scales``."""

    name: str = "awq"

    reads: ClassVar[str] = "AWQ (gemm)"

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """4 bits, a number of rows that is a multiple of 8, no tail group."""
        if levels_reason(grid) or scales_reason(grid):
            return levels_reason(grid) or scales_reason(grid)
        if grid.storage_bits != BITS:
            return f"awq stores 4 bits, not {grid.storage_bits}; compressed-tensors stores 2 to 8"
        if shape[0] % len(ORDER):
            return (
                f"awq packs output rows by eights, and this weight has {shape[0]}; compressed-tensors takes any number"
            )
        return tail_reason(grid, shape[1])

    def together(self, grids: Mapping[str, Grid], model_type: str) -> str | None:
        """One group size for all: zeros lie beside every weight, symmetric or not."""
        sizes: dict[int, str] = {}
        for name, grid in grids.items():
            sizes.setdefault(grid.group_size, name)
        if len(sizes) < 2:
            return None
        (one, first), (other, second), *_ = sizes.items()
        return (
            f"awq knows one group size for all weights, and {first} has {one}, {second} {other}; give all the same, or use "
            "compressed-tensors"
        )

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """Always float16."""
        return "float16"

    def pack(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """int32 (in, out / 8), int32 (groups, out / 8), float16 (groups, out)."""
        codes, scale, zero = check(name, quantized, grid)[:3]
        return {
            f"{name}.qweight": pack(_ordered(codes.T, ORDER), BITS),
            f"{name}.qzeros": pack(_ordered(zero.T, ORDER), BITS),
            f"{name}.scales": scale.T.contiguous(),
        }

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Count exactly."""
        (out, columns), groups = shape, grid.group_count(shape[1])
        return out // len(ORDER) * 4 * (columns + groups) + 2 * out * groups

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Write the fields of loaders; whatever else ``settings`` holds is under ``meta``, and whether all are symmetric."""
        kinds = list(by_grid(grid, grids))
        rest = dict(settings)
        head = bool(rest.pop("lm_head", False))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": kinds[0].group_size,
            "zero_point": True,
            "lm_head": head,
            "modules_to_not_convert": [_entry(name, grids or {}) for name in ignore],
            "meta": {
                "quantizer": [f"{WHO}:{rest.pop('version', 'unknown')}"],
                "symmetric": all(kind.sym for kind in kinds),
                **rest,
            },
        }

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By the method's name."""
        return config.get("quant_method") == "awq"

    def find(
        self, store: Store, config: dict[str, Any], broken: dict[str, str] | None = None
    ) -> dict[str, StoredLayer]:
        """Every ``qweight``; AutoAWQ's older names of fields are read, too."""
        where = f"quantization config of {store.folder}"
        _refuse_layout(config, where, str(store.folder))
        size = group_size_of(config, setting(config, "q_group_size", int, 128, where), where)
        sym = _symmetric(config, where)

        def find(name: str) -> StoredLayer:
            tensors = tensors_of(store, name, (*NEEDED, "qzeros"))
            require(store, tensors, name, NEEDED if sym else (*NEEDED, "qzeros"))
            expect_words(store, (name for suffix, name in sorted(tensors.items()) if suffix != "scales"))
            columns, words = store.shape(tensors["qweight"])
            grid = Grid(BITS, size, sym, scale_dtype=scale_dtype_of(store, tensors["scales"]))
            count, out = grid.group_count(columns), words * len(ORDER)
            what = f"a {(out, columns)} weight in groups of {grid.group_width(columns)}"
            expect(store, tensors["scales"], (count, out), what)
            if "qzeros" in tensors:
                expect(store, tensors["qzeros"], (count, words), what)
            return StoredLayer(name, grid, (out, columns), tensors)

        return collect(named(store, "qweight"), find, broken)

    def unpack(self, store: Store, layer: StoredLayer) -> Decoded:
        """Read a layer. Raises NearplaneError where it is said to be symmetric, and a zero is not 8."""
        out, columns = layer.shape
        codes = _ordered(unpack(store.get(layer.tensors["qweight"]), BITS, out), BACK).T.contiguous()
        scale = store.get(layer.tensors["scales"]).T.contiguous()
        zero = torch.full(scale.shape, MIDDLE, dtype=torch.uint8)
        if "qzeros" in layer.tensors:
            zero = _ordered(unpack(store.get(layer.tensors["qzeros"]), BITS, out), BACK).T.contiguous()
        if layer.grid.sym and bool((zero != MIDDLE).any()):
            raise NearplaneError(
                f"{layer.name} in {store.folder} is symmetric by its configuration, and has zeros other than {MIDDLE}; it is "
                "damaged."
            )
        return Decoded(codes, scale, zero, group_of_columns(store, None, layer.grid, columns))

    def expects(self, config: dict[str, Any], names: set[str], kind: str) -> bool:
        """Every linear that no entry skips, as transformers and as vLLM match entries; the head by its field."""
        if any(name.rpartition(".")[2] == "lm_head" for name in names) and not config.get("lm_head"):
            return False
        entries = map(str, setting(config, "modules_to_not_convert", list, [], "quantization config"))
        return not any(_skips(entry, name) for entry in entries for name in names)

    def flaws(self, store: Store, layer: StoredLayer, decoded: Decoded) -> Iterator[str]:
        """Words hold eight codes, and no bit is left over."""
        yield from ()

    def remarks(self, layer: StoredLayer) -> Iterator[str]:
        """Scales of another dtype than the layout's."""
        if layer.grid.scale_dtype != "float16":
            yield f"{layer.name} ({grid_name(layer.grid)}) has scales in {layer.grid.scale_dtype}; AWQ's kernels take float16."


def _ordered(codes: Tensor, order: Sequence[int]) -> Tensor:
    """Put the columns of each eight in another order."""
    return codes.reshape(codes.shape[0], -1, len(order))[..., list(order)].reshape(codes.shape)


def _refuse_layout(config: Mapping[str, Any], where: str, folder: str) -> None:
    """Raise NearplaneError for AWQ's other layouts and widths."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise NearplaneError(f"{folder} is AWQ in the layout {version!r}; nearplane reads gemm.")
    bits = config.get("bits", config.get("w_bit", BITS))
    if type(bits) is not int or bits != BITS:
        raise NearplaneError(f"{where} has bits {bits!r}; AWQ's gemm layout is read with 4.")


def _symmetric(config: dict[str, Any], where: str) -> bool:
    """Tell whether all zeros are 8: nearplane says so, of other tools' folders those without zeros.

    ``sym`` says nothing: transformers writes its default.
    """
    meta = setting(config, "meta", dict, {}, where)
    if str(meta.get("quantizer")).startswith(f"['{WHO}:"):
        return bool(setting(meta, "symmetric", bool, False, where))
    return not setting(config, "zero_point", bool, True, where)


def _entry(name: str, quantized: Mapping[str, Grid]) -> str:
    """Write the entry of a module left out, which must skip no quantized one."""
    return f"^{re.escape(name)}$" if any(_skips(name, other) for other in quantized) else name


def _skips(entry: str, name: str) -> bool:
    """Tell whether an entry skips a module: contained in its name (vLLM), or a pattern from its start (transformers)."""
    if entry in name:
        return True
    try:
        return re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None
    except re.error:
        return False
