"""The last step of ``quantize`` and ``convert``: a format is applied, and a folder becomes a checkpoint.

``quantize`` leaves its solved weights as parts in the neutral layout, ``convert`` reads them from another checkpoint.
Each part is read and packed, and shards of the usual size are written beside the parts. Parts go once all shards and
the index are safe.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearplane.checkpoint.config import in_dtype, written_config
from nearplane.core.grid import Grid, Quantized
from nearplane.formats.base import Format
from nearplane.formats.companions import CARD, kept_card
from nearplane.formats.compressed import NEUTRAL
from nearplane.formats.parts import Writer
from nearplane.formats.store import PAGE, REPORT
from nearplane.models.experts import routers
from nearplane.models.experts_disk import matrices, unowned
from nearplane.models.inputs import bare_linears, is_causal, output_head
from nearplane.models.locate import without_code
from nearplane.models.source import Source
from nearplane.models.towers import linears_besides


class Solved(NamedTuple):
    """A weight to be packed."""

    name: str
    """Of the module on disk."""
    quantized: Quantized
    grid: Grid


@dataclass(frozen=True)
class Rest:
    """Everything in a checkpoint besides its quantized weights."""

    dense: list[str]
    """Names of the tensors that are not quantized, in the order of writing."""
    get: Callable[[str], Tensor]
    """Reads one of them, in the dtype it is to be stored in."""
    config: dict[str, Any]
    """config.json, ``quantization_config`` included."""
    folder: Path
    """Where tokenizer and other companions are copied from."""
    file: "Written | None" = None
    """Of a format whose quantized weights lie in one file: that file."""
    card: str | None = None
    """The model card, which is written unless the folder has one that nearplane has not written."""


class Written(NamedTuple):
    """A file that is written in place of shards of quantized weights."""

    name: str
    nbytes: int
    """Of what it will hold, about."""
    write: Callable[..., None]
    """Writes it under a path; calls the argument ``tick`` after each tensor."""
    listed: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Gives a report's row about a dense matrix as it is in the file."""


def export(
    writer: Writer,
    format: Format,
    rest: Rest,
    report: Mapping[str, Any] | Path | None,
    page: str | None = None,
    weights: Iterable[Solved] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Write the checkpoint and finish the folder; the index comes last.

    Args:
        writer: with its parts sealed, or empty.
        format: that of the checkpoint.
        rest: what is not quantized.
        report: content of report.json, or a file of that name to copy; None: there is none.
        page: report.html; None: there is none.
        weights: what to pack in place of the writer's parts, where ``rest`` has no file of them.
        tick: called after each weight, or each tensor of the file, and each dense tensor.

    Raises:
        NearplaneError: when the disk refuses; sealed parts stay, and a resumed writer exports again to the same bytes.
    """
    if not writer.complete:
        if rest.file is not None:
            writer.repack()
            held = [f"{name}.weight" for name in rest.config["quantization_config"].get("quantized", [])]
            writer.produce(rest.file.name, rest.file.nbytes, partial(rest.file.write, tick=tick), held)
        elif weights is None:
            _pack_parts(writer, format, tick)
        else:
            for name, quantized, grid in weights:
                writer.put(format.pack(name, quantized, grid))
                tick()
        for name in rest.dense:
            writer.put({name: rest.get(name)})
            tick()
        writer.json("config.json", rest.config)
        for file, content in format.extra_files(rest.config["quantization_config"]).items():
            writer.json(file, content)
        writer.companions(rest.folder)
        if rest.card is not None and not kept_card(writer.out):
            writer.text(CARD, rest.card)
        if isinstance(report, Path):
            writer.copy(report)
        elif report is not None:
            writer.json(REPORT, report)
        if page is not None:
            writer.text(PAGE, page)
    writer.finish()


def copied_bytes(weights: Iterable[tuple[tuple[int, int], Grid]]) -> int:
    """Count the bytes of the parts, which lie on disk beside the shards until export ends.

    Args:
        weights: (out, in) and grid of every quantized weight.
    """
    return sum(NEUTRAL.nbytes(shape, grid) for shape, grid in weights)


def rest_of(
    source: Source,
    grid: Grid,
    grids: Mapping[str, Grid],
    format: Format,
    dtype: torch.dtype | None,
    settings: Mapping[str, Any],
) -> Rest:
    """Gather what a quantized model holds besides its quantized weights.

    Args:
        source: the model.
        grid: of all linears, unless ``grids`` says otherwise.
        grids: grid of each quantized linear, by its name in the model.
        format: that of the checkpoint.
        dtype: of dense floating tensors; None: each keeps its own.
        settings: of the run, for formats with fields for them.
    """
    disk = {site: source.names[f"{site}.weight"].removesuffix(".weight") for site in grids}
    # Loaders look for a linear by its name in the model or on disk: both are named.
    named = {name: grids[site] for site in grids for name in (disk[site], site)}
    dense = sorted(source.store.rejoined({f"{name}.weight" for name in disk.values()}))
    ignore = left_out(source.model, source.names, set(grids), matrices(source.store, dense))
    quantization = format.config(grid, ignore=ignore, settings=settings, grids=named)
    raw = without_code(source.written_config(), trust_remote_code=source.trust_remote_code)
    config = in_dtype(
        written_config(raw, type(source.config), source.model), dtype or source.dtype, every=dtype is not None
    )
    config |= format.entries(quantization)

    def get(name: str) -> Tensor:
        return source.store.get(name).to(source.written(name, dtype))

    return Rest(dense, get, config, source.folder)


def head_names(model: nn.Module, quantized: Mapping[str, str]) -> dict[str, list[str]]:
    """Name a quantized output head, as a setting of formats; empty where the head stays dense.

    Args:
        model: its skeleton.
        quantized: names on disk of the quantized linears, by their names in the model.
    """
    head = output_head(model)
    name = next((name for name in quantized if model.get_submodule(name) is head), None)
    return {} if name is None else {"lm_head": sorted({name, quantized[name]})}


def left_out(model: nn.Module, names: Mapping[str, str], quantized: set[str], stored: Iterable[str]) -> list[str]:
    """Name every linear that is not quantized, by all names under which loaders may look for it.

    Engines look for a linear by its name on disk, transformers by its name in the model. A stored matrix that no parameter
    takes is named as well: an engine may have a module for it, such as a layer that predicts further tokens.

    Args:
        model: its skeleton.
        names: on disk of the tensors that are not quantized, by their names in the model; others do no harm.
        quantized: names in the model of the linears that are.
        stored: names on disk of the matrices that are not quantized.
    """
    ignore = linears_besides(model, quantized)
    on_disk = [names.get(f"{name}.weight", name).removesuffix(".weight") for name in ignore]
    if not is_causal(model):  # the part below the head is often loaded by itself, under shorter names
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        ignore += [name.removeprefix(prefix) for name in ignore if name.startswith(prefix)]
        ignore += [name for name in bare_linears(model.config) if not {name, prefix + name} & {*quantized, *ignore}]
    # Routers that are no linears here are linears in engines, by their names on disk.
    others = {*on_disk, *(name for some in unowned(model, names, stored).values() for name in some)}
    # vLLM asks for one expert of fused ones, by a name that differs between its classes: w1, gate_proj.
    others |= {f"re:^{re.escape(name)}\\." for name in others if name.endswith("experts")}
    others |= {name.removesuffix(".weight") for name in routing(model, names)}
    return ignore + sorted(others - set(ignore))


def routing(model: nn.Module, names: Mapping[str, str]) -> set[str]:
    """Name the weights on disk that route tokens to experts; ``names``: on disk, by names in the model."""
    found = (names.get(f"{name}.weight") for name in routers(model))
    return {name for name in found if name is not None}


def _pack_parts(writer: Writer, format: Format, tick: Callable[[], None]) -> None:
    """Pack the parts' weights anew; the writer makes a shard of them whenever enough wait."""
    writer.repack()
    for record in writer.records:
        for solved in _read(writer, record):
            writer.put(format.pack(*solved))
            tick()


def _read(writer: Writer, record: dict[str, Any]) -> Iterator[Solved]:
    """Read the weights of a part back."""
    part = writer.part(record).open()
    if part is None:
        return
    for name, layer in part.layers.items():
        yield Solved(name, part.quantized(name), layer.grid)
