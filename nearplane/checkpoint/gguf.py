"""GGUF files made of a template: which of its tensors are ours, what each becomes, and the file.

Metadata, tokenizer, names and shapes are the template's. Quantized weights are ours, in its order of rows. Dense tensors are the
template's bytes, or embedding and output head encoded again from the original's values.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.core.errors import NearplaneError, SettingError, some_of
from nearplane.core.grid import Grid, fit_groups, round_to_nearest
from nearplane.formats.base import Format
from nearplane.formats.gguf.blocks import BLOCKS
from nearplane.formats.gguf.file import FILE_TYPES, STRING, TYPES, UINT32, GGUFFile, Info, scalar, write
from nearplane.formats.gguf.format import GGUF, NOT_ROTATED, SUFFIX, record
from nearplane.formats.gguf.grids import dividing, grid_of, pack
from nearplane.formats.gguf.template import Mapping as Found
from nearplane.formats.gguf.template import Matrix, Tick, find, silent
from nearplane.formats.journal import sync
from nearplane.formats.read import Checkpoint
from nearplane.formats.store import Store
from nearplane.machine.devices import environment
from nearplane.models.discover import Site
from nearplane.models.locate import demo_template
from nearplane.models.source import Source

# What every GGUF file calls the input embedding and the output head.
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Rows that are encoded at once.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Placed:
    """A template, which of its rows are ours, and the type that each tensor gets."""

    template: GGUFFile
    found: Found
    types: dict[str, str]
    """Of the tensors that hold our quantized weights."""
    dense: dict[str, str]
    """Of the dense tensors that get another type."""
    values: Callable[[str], Tensor]
    """Reads a dense matrix of ours by its name."""

    @property
    def infos(self) -> list[Info]:
        """Every tensor, in the type that it gets."""
        typed = {**self.dense, **self.types}
        return [replace(info, type=typed.get(name, info.type)) for name, info in self.template.tensors.items()]

    @property
    def counts(self) -> dict[str, int]:
        """Count the tensors of each type, the most common first."""
        return dict(Counter(info.type for info in self.infos).most_common())

    @property
    def label(self) -> str:
        """The type of most weights."""
        sizes: Counter[str] = Counter()
        for info in self.infos:
            sizes[info.type] += prod(info.shape)
        return sizes.most_common(1)[0][0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos)

    @property
    def stored(self) -> dict[str, list[str]]:
        """Name our matrices that the file will hold whole, by its tensors."""
        return self.found.tensors()

    def listed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Give a report's row about a dense matrix with the bytes that it takes in the file, and its type there.

        Of a tensor that holds several of our matrices, each takes a share by its rows.
        """
        infos, size, kinds = {info.name: info for info in self.infos}, 0, dict[str, None]()
        for at, pieces in self.found.pieces.items():
            rows = sum(len(piece.rows) for piece in pieces if piece.name == row.get("name"))
            if rows:
                info = infos[at.tensor]
                size += info.nbytes * rows // (info.matrices * info.rows)
                kinds[info.type] = None
        if not kinds:
            return dict(row)
        reason = str(row.get("reason")).partition("; the file holds")[0]
        return {**row, "bytes": size, "reason": f"{reason}; the file holds it as {' and '.join(kinds)}"}

    def describe(self) -> str:
        """Tell in words what the file holds."""
        told = ", ".join(f"{count} {type}" for type, count in self.counts.items())
        alone = [name for name in self.found.alone if name not in (EMBEDDING, HEAD)]
        return f"{told}; copied without a partner: {some_of(alone)}" if alone else told


def open_template(template: Path | None, model: str | Path) -> GGUFFile:
    """Open the template of a run. Raises NearplaneError where there is none, or it is one part of several."""
    if template is None and str(model) == "demo":
        template = demo_template()
    if template is None:
        raise SettingError(
            "a GGUF file takes its metadata, tokenizer and names from one of the original model; give it as --template "
            "ORIGINAL.gguf (llama.cpp's convert_hf_to_gguf.py makes one, or download one)."
        )
    file = GGUFFile(template)
    parts = file.value("split.count", 0)
    if parts and parts > 1:
        raise NearplaneError(f"{template} is one of {parts} parts; join them first (llama-gguf-split --merge).")
    return file


def template_for(
    format: Format, source: Source, shapes: Mapping[str, tuple[int, int]], *, rotated: bool
) -> GGUFFile | None:
    """Open the file of which a GGUF checkpoint is made, and check it by sizes; None for other formats.

    Args:
        format: of the checkpoint.
        source: the model.
        shapes: shapes of the linears to be quantized, by name on disk.
        rotated: whether the model is rotated, which no template is.
    """
    if not takes_template(format):
        return None
    if rotated:
        raise SettingError(NOT_ROTATED)
    template = open_template(getattr(format, "template", None), source.name)
    check_template(template, source.model, shapes)
    return template


def check_template(template: GGUFFile, model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse what sizes alone show: another vocabulary, another model. Reads no tensor.

    Args:
        template: an open file.
        model: our skeleton.
        shapes: (out, in) of the weights that it must hold, by name.
    """
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    ours = getattr(embed, "weight", None)
    theirs = template.tensors.get(EMBEDDING)
    if ours is not None and ours.dim() == 2 and theirs is not None and theirs.columns == ours.shape[1]:
        tokens = template.length("tokenizer.ggml.tokens")
        if theirs.rows != ours.shape[0]:
            raise NearplaneError(
                f"{template.path} has another vocabulary: {theirs.rows} tokens, and the model {ours.shape[0]}; give a GGUF of "
                "the same model."
            )
        if tokens is not None and tokens > ours.shape[0]:
            raise NearplaneError(f"{template.path} has another vocabulary: its tokenizer has {tokens} tokens.")
    room: Counter[int] = Counter()
    for info in template.tensors.values():
        room[info.columns] += info.matrices * info.rows
    need: Counter[int] = Counter()
    for rows, columns in shapes.values():
        need[columns] += rows
    for name, (_, columns) in shapes.items():
        if need[columns] > room[columns]:
            raise NearplaneError(
                f"{template.path} is of another model: it holds {room[columns]} rows of {columns} inputs, and {name} and others "
                f"need {need[columns]}."
            )


def dense_bytes(
    template: GGUFFile, format: GGUF, quantized: Sequence[tuple[int, int]], quantized_head: bool
) -> tuple[int, int]:
    """Count what a file will hold besides quantized weights, by sizes alone: dense tensors, and the header.

    Where sizes leave open which matrices stay dense, those of the largest rows do: routers are F32.

    Args:
        template: an open file.
        format: gives the type of embedding and output head.
        quantized: (out, in) of the weights that will be quantized.
        quantized_head: whether the output head is one of them.
    """
    apart = [name for name in (EMBEDDING, HEAD) if name != HEAD or not quantized_head]
    encoded = _dense_types(template, {}, format.dense)
    total, rows = 0, dict[int, list[tuple[int, int]]]()
    for info in template.tensors.values():
        if info.name in apart or not info.matrices:
            total += replace(info, type=encoded.get(info.name, info.type)).nbytes
        else:
            rows.setdefault(info.columns, []).append((info.row_bytes, info.matrices * info.rows))
    for columns, some in rows.items():
        left = sum(count for _, count in some) - sum(out for out, width in quantized if width == columns)
        for nbytes, count in sorted(some, reverse=True):
            total += nbytes * max(0, min(count, left))
            left -= count
    return total, min((info.start for info in template.tensors.values()), default=0)


def place_source(
    source: Source,
    sites: Sequence[tuple[Site, Grid]],
    format: GGUF,
    template: GGUFFile,
    tick: Tick = silent,
) -> Placed:
    """Find the weights of a model in a template by their values.

    Args:
        source: its weights can be read.
        sites: the linears that will be quantized, with their grids.
        format: gives the types.
        template: an open file.
        tick: called with the steps that are done, and all steps.
    """
    store = source.store
    read = lru_cache(2)(store.get)
    grids = {source.names[f"{site.name}{SUFFIX}"]: grid for site, grid in sites}
    turned = {source.names[f"{site.name}{SUFFIX}"] for site, _ in sites if site.transposed}

    def values(name: str) -> Tensor:
        return read(name).T if name in turned else read(name)

    shapes = {source.names[f"{site.name}{SUFFIX}"]: site.shape for site, _ in sites}
    return _place(_dense(store, store.names - shapes.keys()), shapes, grids, values, format, template, tick)


def place_checkpoint(checkpoint: Checkpoint, format: GGUF, template: GGUFFile, tick: Tick) -> Placed:
    """Find the weights of a checkpoint, quantized and dense ones, in a template; the arguments are ``place_source``'s."""
    grids = {f"{name}{SUFFIX}": layer.grid for name, layer in checkpoint.layers.items()}
    shapes = {f"{name}{SUFFIX}": layer.shape for name, layer in checkpoint.layers.items()}

    @lru_cache(2)
    def values(name: str) -> Tensor:
        return checkpoint.weight(name.removesuffix(SUFFIX)) if name in grids else checkpoint.store.get(name)

    dense = _dense(checkpoint.store, checkpoint.dense)
    return _place(dense, shapes, grids, values, format, template, tick)


def _dense(store: Store, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Give the dense matrices among some tensors, sorted, with their shapes."""
    shapes = {name: store.shape(name) for name in sorted(names)}
    return {name: s for name, s in shapes.items() if len(s) == 2 and store.dtype(name).is_floating_point}


def _place(
    dense: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, int]],
    grids: Mapping[str, Grid],
    values: Callable[[str], Tensor],
    format: GGUF,
    template: GGUFFile,
    tick: Tick,
) -> Placed:
    def matrix(name: str, shape: tuple[int, ...], needed: bool) -> Matrix:
        read = lambda first, count: values(name)[first : first + count].float()  # noqa: E731
        return Matrix(name, (shape[0], shape[1]), read, needed)

    matrices = [matrix(name, shape, True) for name, shape in shapes.items()]
    found = find(template, matrices + [matrix(name, shape, False) for name, shape in dense.items()], tick)
    _same_tokens(template, found)
    types = _types(template, found, {name: format.type_of(grid, shapes[name][1]) for name, grid in grids.items()})
    return Placed(template, found, types, _dense_types(template, types, format.dense), values)


def _same_tokens(template: GGUFFile, found: Found) -> None:
    """Raise NearplaneError where the template's tokens are ours in another order."""
    for pieces in found.of(EMBEDDING):
        if any(not torch.equal(piece.at, piece.rows) for piece in pieces):
            raise NearplaneError(
                f"{template.path} has another vocabulary: its tokens are in another order; give a GGUF of the same model."
            )


def _types(template: GGUFFile, found: Found, ours: Mapping[str, str]) -> dict[str, str]:
    """Give the type of each tensor that holds quantized weights. A tensor of several weights has one type for all."""
    types: dict[str, str] = {}
    for tensor, names in found.tensors().items():
        kinds = {ours.get(name): name for name in reversed(names)}
        if len(kinds) > 1:
            stays = {type: "stays dense" if type is None else f"is {type}" for type in kinds}
            told = " and ".join(f"{name.removesuffix(SUFFIX)} {stays[type]}" for type, name in kinds.items())
            plain = some_of([name.removesuffix(SUFFIX) for name in names])
            raise SettingError(
                f"tensor {tensor} of {template.path} holds {plain} in one type, and {told}; make them alike."
            )
        (type,) = kinds
        if type is not None:
            types[tensor] = type
    return types


def _dense_types(template: GGUFFile, types: Mapping[str, str], asked: str | None) -> dict[str, str]:
    """Give the type of embedding and head, where one is asked for. Raises SettingError for one that does not divide them."""
    if asked is None:
        return {}
    infos = [template.tensors[name] for name in (EMBEDDING, HEAD) if name in template.tensors and name not in types]
    for info in infos:
        if info.columns % TYPES[asked][1]:
            others = [name for name in ("Q8_0", "F16") if name == "F16" or name in dividing(info.columns)]
            raise SettingError(
                f"gguf_dense {asked} has blocks of {TYPES[asked][1]} inputs, which do not divide the {info.columns} of "
                f"{info.name}; give {' or '.join(others)}."
            )
    return {info.name: asked for info in infos}


def write_gguf(
    path: Path, placed: Placed, rows: Callable[[str], Tensor], tick: Callable[[], None] = lambda: None
) -> None:
    """Write the file.

    Args:
        path: of the new file, which is overwritten.
        placed: says what goes where.
        rows: packs a quantized weight by its name: uint8 (out, bytes), in our order of rows.
        tick: called after each tensor.
    """
    template = placed.template
    packed = lru_cache(1)(rows)
    version = environment()["nearplane"]
    changed = {
        "general.file_type": scalar("general.file_type", UINT32, FILE_TYPES.get(placed.label, 1)),
        "general.quantization_version": scalar("general.quantization_version", UINT32, 2),
        "general.quantized_by": scalar("general.quantized_by", STRING, f"nearplane {version}"),
    }

    def data(name: str) -> Iterator[bytes]:
        if name in placed.types:
            yield from _ours(placed, name, packed)
        elif name in placed.dense:
            yield from _encoded(placed, name, placed.dense[name])
        else:
            yield from template.pieces(name)
        tick()

    write(path, template, {**placed.dense, **placed.types}, changed, data)


def _ours(placed: Placed, name: str, packed: Callable[[str], Tensor]) -> Iterator[bytes]:
    """Give the bytes of a tensor of quantized weights, a matrix at a time."""
    info = placed.template.tensors[name]
    width = BLOCKS[placed.types[name]].row_bytes(info.columns)
    for pieces in placed.found.of(name):
        result = torch.empty(info.rows, width, dtype=torch.uint8)
        for piece in pieces:
            result[piece.at] = packed(piece.name)[piece.rows]
        yield result.numpy().tobytes()


def _encoded(placed: Placed, name: str, type: str) -> Iterator[bytes]:
    """Encode a dense matrix again, from our values where it is ours, else from the template's."""
    info, template = placed.template.tensors[name], placed.template
    found = placed.found.of(name)
    ours = found[0][0].name if found and len(found[0]) == 1 else None
    step = max(1, CHUNK // info.columns)
    for first in range(0, info.rows, step):
        count = min(step, info.rows - first)
        value = (
            template.values(name, first, count) if ours is None else placed.values(ours)[first : first + count].float()
        )
        yield encode(value, type).numpy().tobytes()


def encode(value: Tensor, type: str) -> Tensor:
    """Encode dense rows: F16, or rounded to nearest on the type's own grid."""
    if type == "F16":
        return value.half().view(torch.uint8)
    grid = grid_of(type)
    scale, zero = fit_groups(value, grid)
    return pack(type, round_to_nearest(value, scale, zero, grid), grid, "a dense tensor")


def write_alone(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file by itself: under a temporary name, then renamed; nothing stays of one that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        raise NearplaneError(f"{path} cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def described(placed: Placed, file: str) -> dict[str, Any]:
    """Describe the file for the folder's config.json."""
    quantized = {name for tensor in placed.types for name in placed.stored[tensor]}
    return record(placed.found, file, quantized, {tensor: "" for tensor in placed.stored})


def file_name(model: str | Path, label: str) -> str:
    """Name the .gguf file of a model, as demo-Q4_K.gguf."""
    stem = Path(str(model).partition("@")[0]).name
    return f"{''.join(c if c.isalnum() or c in '-_.' else '-' for c in stem) or 'model'}-{label}.gguf"


def takes_template(format: Format) -> bool:
    """Tell whether a format's file is made of a template."""
    return format.container == "gguf"
