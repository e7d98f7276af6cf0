"""The format ``gguf``: a folder with one .gguf file of quantized and large dense tensors, and beside it what it lacks.

The file is llama.cpp's. config.json records which of its rows are rows of which of the model's matrices, so that nearplane
opens the folder again: quantized weights, and those dense matrices that the file holds, are read from it. Small tensors
(norms, biases) and matrices that are not in the file lie beside it as safetensors, in transformers' names.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats.base import Decoded, Format, StoredLayer, check, collect, setting
from nearplane.formats.gguf.blocks import BLOCKS
from nearplane.formats.gguf.file import FLOATS, GGUFFile
from nearplane.formats.gguf.grids import (
    INSTEAD,
    cheapest,
    dividing,
    fits,
    grid_of,
    known_type,
    own_type,
    pack,
    reason,
    refusal,
    unpack,
)
from nearplane.formats.gguf.template import Mapping as Found
from nearplane.formats.store import Store

DENSE = ("Q8_0", "Q6_K", "F16")
DEFAULT = "Q4_0"
SUFFIX = ".weight"
NOT_ROTATED = (
    "rotations and other transforms change embeddings and norms, which a GGUF file takes from its template; use --format gguf "
    "without them (--scale none: no channels are scaled)."
)


@dataclass(frozen=True)
class GGUF(Format):
    """Rows of blocks in a file of llama.cpp's."""

    name: str = "gguf"
    template: Path | None = None
    """A GGUF file of the original model, which gives metadata, names and shapes."""
    dense: str | None = None
    """The type that embedding and output head get; None: the template's."""
    type: str | None = None
    """The type that every weight is stored in; None: the smallest that holds its grid exactly."""

    container: ClassVar[Literal["safetensors", "gguf"]] = "gguf"
    holds_conv1d: ClassVar[bool] = True
    reads: ClassVar[str] = "gguf (folders that nearplane wrote)"

    def running(self, activations: TokenGrid | None, online: bool) -> Format:
        """Refuse a rotation while the model runs; others are refused where the template is opened."""
        if online:
            raise SettingError(NOT_ROTATED)
        return super().running(activations, online)

    def asked(self, options: Mapping[str, Any]) -> "GGUF":
        """Take the template and the type of dense tensors."""
        dense = options.get("gguf_dense")
        if dense is not None and str(dense).upper() not in DENSE:
            raise SettingError(f"gguf_dense must be one of {', '.join(DENSE)}; got {dense!r}.")
        template = options.get("template", self.template)
        if template is not None and not isinstance(template, str | PathLike):
            raise SettingError(f"template must be a path; got {str(template)[:80]}.")
        return replace(
            self,
            template=None if template is None else Path(template),
            dense=self.dense if dense is None else str(dense).upper(),
        )

    def grid(self, grid: Grid, type: str | None, given: Container[str]) -> Grid:
        """Give the grid of a type; without a type one that was given stays, else it is Q4_0's."""
        fields = [name for name in ("bits", "group_size", "sym") if name in given]
        if type is None and (fields or "grid" in given):
            return grid
        own = grid_of(known_type(type or DEFAULT))
        for name in ("bits", "group_size", "sym") if "grid" in given else fields:
            if getattr(grid, name) != getattr(own, name):
                told = f"{name}={getattr(grid, name)} contradicts gguf_type {type or DEFAULT}, whose {name} is"
                raise SettingError(f"{told} {getattr(own, name)}; give one of them.")
        if own.scales.either_sign and not grid.negative_scales:
            told = f"the scales of gguf_type {type or DEFAULT} have a sign of their own"
            raise SettingError(f"{told}; leave out --no-negative-scales, or give --bits and --group-size instead.")
        return replace(own, fit=grid.fit, scale_dtype=grid.scale_dtype)

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Some type holds the weight exactly, or the one that was asked for holds it."""
        if self.type is not None:
            found, others = reason(self.type, grid, shape[1]), [fit.type for fit in fits(grid, shape[1])]
            return found and f"{found}; types that hold it: {', '.join(others) or 'none'}"
        return None if cheapest(grid, shape[1]) else refusal(grid, shape[1])

    def help(self, refused: Mapping[str, tuple[Grid, tuple[int, int]]]) -> str:
        """Give the override that would do for linears whose inputs a type does not divide; empty where none would.

        ``refused``: grid and (out, in) by name.
        """
        leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in refused))
        own = own_type(next(iter(refused.values()))[0])
        other = INSTEAD.get(own or "", "Q8_0")
        if own is None or any(other not in dividing(shape[1]) for _, shape in refused.values()):
            return ""
        pattern = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        return f"; this would do: --override '{pattern}=gguf_type={other}'"

    def type_of(self, grid: Grid, columns: int) -> str:
        """Name the type of a weight. Raises NearplaneError where there is none."""
        found = self.type or cheapest(grid, columns)
        if found is None:
            raise NearplaneError(f"{refusal(grid, columns)}.")
        return found

    def keeps(self, grid: Grid, columns: int) -> bool:
        """Tell whether every value stays: only the offsets of some types are rounded."""
        return any(fit.exact for fit in fits(grid, columns) if fit.type == self.type_of(grid, columns))

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """Blocks hold float16."""
        return "float16"

    def pack(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """uint8 (out, bytes): rows of blocks, in the order of our rows."""
        held = check(name, quantized, grid, any_scales=True)
        return {f"{name}{SUFFIX}": pack(self.type_of(grid, held.codes.shape[1]), held, grid, name)}

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Count exactly."""
        return shape[0] * BLOCKS[self.type_of(grid, shape[1])].row_bytes(shape[1])

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Record the file and its rows, which ``settings["gguf"]`` gives."""
        own = {key: settings[key] for key in ("version", "converted_from") if key in settings}
        return {"quant_method": "gguf", **settings.get("gguf", {}), "ignore": list(ignore), "meta": own}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """By its name."""
        return config.get("quant_method") == "gguf"

    def store(self, store: Store, config: Mapping[str, Any]) -> Store:
        """Show the rows of the file as tensors of the folder."""
        where = f"quantization_config of {store.folder}"
        name = config.get("file")
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise NearplaneError(
                f"{where} names no .gguf file in the folder; nearplane opens GGUF folders that it wrote, and llama.cpp opens the "
                "file alone."
            )
        return RowStore(store, GGUFFile(store.folder / name), dict(config), where)

    def find(
        self, store: Store, config: dict[str, Any], broken: dict[str, str] | None = None
    ) -> dict[str, StoredLayer]:
        """Find the weights that the configuration calls quantized."""

        def layer(name: str) -> StoredLayer:
            assert isinstance(store, RowStore)
            type, shape = store.type_of(f"{name}{SUFFIX}")
            return StoredLayer(name, grid_of(type), shape, {"weight": f"{name}{SUFFIX}"}, type)

        names = store.quantized if isinstance(store, RowStore) else []
        return collect((name.removesuffix(SUFFIX) for name in names), layer, broken)

    def unpack(self, store: Store, layer: StoredLayer) -> Decoded:
        """Read a layer on its type's own grid."""
        return unpack(layer.layout, store.get(layer.tensors["weight"]))


class RowStore(Store):
    """The tensors of a folder, and matrices whose rows lie in a .gguf file beside them.

    Quantized weights are bytes, uint8 (out, bytes); dense matrices are floats.
    """

    def __init__(self, store: Store, file: GGUFFile, config: dict[str, Any], where: str) -> None:
        """``config``: the ``quantization_config``, which is checked here; ``where``: its place, for errors."""
        self.inner, self.file, self.folder = store, file, store.folder
        self.lost = store.lost
        self.quantized = [str(name) for name in setting(config, "quantized", list, [], where)]
        self.places: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        for tensor, slices in setting(config, "tensors", dict, {}, where).items():
            if tensor not in file.tensors or not isinstance(slices, list):
                raise NearplaneError(f"{where} names tensor {str(tensor)[:80]!r}, which {file.path} does not hold.")
            info = file.tensors[tensor]
            if not 0 < len(slices) <= info.matrices:
                raise NearplaneError(
                    f"{where}: {tensor} has {info.matrices} matrices, and {len(slices)} are described."
                )
            for index, pieces in enumerate(slices):
                for name, at, rows in read_pieces(pieces, info.rows, f"{where}: {tensor}"):
                    self.places.setdefault(name, []).append((tensor, at + index * info.rows, rows))
        self.sizes = {name: self._size(name, some, where) for name, some in self.places.items()}
        missing = [name for name in self.quantized if name not in self.places]
        if missing:
            raise NearplaneError(
                f"{where} calls {missing[0][:80]!r} quantized, and says of no tensor that it holds it."
            )
        self.names = store.names | self.places.keys()

    def type_of(self, name: str) -> tuple[str, tuple[int, int]]:
        """Give the GGUF type and (out, in) of a matrix in the file. Raises NearplaneError for a type that is not written."""
        info = self.file.tensors[self.places[name][0][0]]
        if name in self.quantized and info.type not in BLOCKS:
            raise NearplaneError(
                f"{name} in {self.file.path} is {info.type}, which is no type of quantized weights here."
            )
        return info.type, (self.sizes[name], info.columns)

    def get(self, name: str) -> Tensor:
        """Read a tensor: rows gathered from the file."""
        if name not in self.places:
            return self.inner.get(name)
        pieces = [(rows, self._rows(tensor, at, name)) for tensor, at, rows in self.places[name]]
        result = torch.empty(self.shape(name), dtype=self.dtype(name))
        for rows, value in pieces:
            result[rows] = value.to(result.dtype)
        return result

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows."""
        return self.get(name)[first : first + count] if name in self.places else self.inner.rows(name, first, count)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape; of a quantized weight that of its bytes."""
        if name not in self.places:
            return self.inner.shape(name)
        info = self.file.tensors[self.places[name][0][0]]
        return self.sizes[name], info.row_bytes if name in self.quantized else info.columns

    def dtype(self, name: str) -> torch.dtype:
        """Give the dtype: uint8 of a quantized weight, else a float that holds the file's values."""
        if name not in self.places:
            return self.inner.dtype(name)
        if name in self.quantized:
            return torch.uint8
        return FLOATS.get(self.file.tensors[self.places[name][0][0]].type, torch.float32)

    def nbytes(self, name: str) -> int:
        """Count the bytes that a tensor takes on disk."""
        if name not in self.places:
            return self.inner.nbytes(name)
        return prod((self.sizes[name], self.file.tensors[self.places[name][0][0]].row_bytes))

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def _rows(self, tensor: str, at: Tensor, name: str) -> Tensor:
        """Read rows of a tensor of the file: bytes, or values of a dense one."""
        first, count = int(at.min()), int(at.max()) - int(at.min()) + 1
        read = self.file.rows if name in self.quantized else self.file.values
        return read(tensor, first, count)[at - first]

    def _size(self, name: str, places: list[tuple[str, Tensor, Tensor]], where: str) -> int:
        """Count the rows of a matrix. Raises NearplaneError unless each has one place, all of one kind."""
        rows = torch.cat([part for _, _, part in places])
        size = len(rows)
        kinds = {(self.file.tensors[tensor].type, self.file.tensors[tensor].columns) for tensor, _, _ in places}
        if len(kinds) > 1 or int(rows.max()) >= size or int(torch.bincount(rows, minlength=size).max()) > 1:
            raise NearplaneError(f"{where}: the rows of {name[:80]!r} are not described one by one; it is damaged.")
        return size


def record(found: Found, file: str, quantized: Iterable[str], types: Mapping[str, str]) -> dict[str, Any]:
    """Describe a file for config.json.

    Args:
        found: which rows are which.
        file: its name.
        quantized: names of our quantized weights, which end in .weight.
        types: by tensor of the file.
    """
    tensors = {tensor: [[_piece(*some) for some in pieces] for pieces in found.of(tensor)] for tensor in types}
    return {"file": file, "quantized": sorted(quantized), "tensors": tensors}


def _piece(name: str, at: Tensor, rows: Tensor) -> dict[str, Any]:
    plain = torch.arange(len(rows))
    told = {"of": name, "n": len(rows)}
    return told | {k: _short(v) for k, v in (("at", at), ("rows", rows)) if not torch.equal(v, plain)}


def _short(rows: Tensor) -> list[Any]:
    """Write row numbers as nested loops, ``[start, [count, step], ...]``, the innermost last; else one by one."""
    loops, rest = list[list[int]](), rows
    while len(rest) > 1:
        step = int(rest[1] - rest[0])
        broken = (rest[1:] - rest[:-1] != step).nonzero()
        count = len(rest) if not len(broken) else int(broken[0]) + 1
        if count < 2 or len(rest) % count or not bool((_loop(rest[::count], [[count, step]]) == rest).all()):
            return rows.tolist()
        loops.insert(0, [count, step])
        rest = rest[::count]
    return [int(rest[0]), *loops]


def _loop(starts: Tensor, loops: list[list[int]]) -> Tensor:
    """Spread starts by loops, the innermost last."""
    for count, step in loops:
        starts = (starts[:, None] + torch.arange(count) * step).flatten()
    return starts


def read_pieces(pieces: object, most: int, where: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Read the pieces of one matrix: name of ours, rows of the file's matrix, rows of ours.

    Args:
        pieces: as config.json has them.
        most: rows of the matrix.
        where: their place, for errors.

    Raises:
        NearplaneError: they are not what ``record`` writes.
    """
    wrong = NearplaneError(f"{where}: its rows are not described as nearplane does; the configuration is damaged.")
    for piece in pieces if isinstance(pieces, list) else [None]:
        if not isinstance(piece, dict) or not isinstance(piece.get("of"), str):
            raise wrong
        count = piece.get("n")
        if type(count) is not int or not 0 < count <= most:
            raise wrong
        at, rows = (_numbers(piece.get(key), count) for key in ("at", "rows"))
        if at is None or rows is None or int(at.min()) < 0 or int(at.max()) >= most or int(rows.min()) < 0:
            raise wrong
        yield piece["of"], at, rows


def _numbers(told: object, count: int) -> Tensor | None:
    """Read row numbers; None where they are no such list."""
    if told is None:
        return torch.arange(count)
    given: list[Any] = told if isinstance(told, list) and told else [None]
    start, loops = given[0], given[1:]
    if _whole(start) and all(map(_whole, loops)):
        return torch.tensor([start, *loops]) if 1 + len(loops) == count else None
    pairs = all(isinstance(some, list) and len(some) == 2 and _whole(*some) and some[0] > 0 for some in loops)
    if not _whole(start) or not pairs or prod(some[0] for some in loops) != count:
        return None
    return _loop(torch.tensor([start]), loops)


def _whole(*values: object) -> bool:
    """Tell whether all are whole numbers that a row may have."""
    return all(type(value) is int and abs(value) < 1 << 40 for value in values)
