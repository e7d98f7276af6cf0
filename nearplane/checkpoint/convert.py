"""Write a checkpoint again in another format, or as one .gguf file. Nothing is quantized again.

Codes, scales and zeros are the truth and stay equal bit for bit, so that the weights do, too. MLX alone stores a scale times
a zero, which is rounded to the scale's dtype; how far is said. Scales keep their dtype in
compressed-tensors and become float16 in GPTQ; one that float16 cannot hold exactly is a refusal, not a rounding. Layers
of several grids keep them. What the new format cannot hold is refused before anything is written; every dense tensor is
copied as it is.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.checkpoint.config import written_config
from nearplane.checkpoint.engines import Described, model_facts, verdicts
from nearplane.checkpoint.engines.describe import Weight
from nearplane.checkpoint.export import Rest, Solved, Written, export, head_names, left_out
from nearplane.checkpoint.gguf import (
    Placed,
    check_template,
    described,
    file_name,
    open_template,
    place_checkpoint,
    write_alone,
    write_gguf,
)
from nearplane.checkpoint.hub.card import Made, card, commonest
from nearplane.checkpoint.hub.card import described as described_source
from nearplane.checkpoint.packed import modules_of
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats import Format, pick_format
from nearplane.formats.base import ONLINE_ONLY_HERE, SCALE_NAMES, check, conv1d_reason
from nearplane.formats.companions import companions
from nearplane.formats.gguf.format import GGUF
from nearplane.formats.gguf.grids import known_type
from nearplane.formats.originals import plain_config
from nearplane.formats.parts import Writer
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.formats.store import REPORT, read_json
from nearplane.machine.devices import environment
from nearplane.machine.progress import bar
from nearplane.models.experts_disk import matrices, names_in_model, split_names
from nearplane.models.inputs import is_causal
from nearplane.models.locate import given_path, locate, refuse_loaded, without_code
from nearplane.models.source import open_skeleton
from nearplane.page.facts import listing, mapping
from nearplane.page.html import page_or_reason
from nearplane.transforms.hooks import KEY as ROTATED
from nearplane.transforms.hooks import turned_linears
from nearplane.transforms.scaling import KEY as SCALED


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in another format than before."""

    path: str
    out: str
    before: str
    after: str
    layers: int
    dense: int
    scales: str | None = None
    """The dtype in which scales are now, if some had another; their values are the same."""
    note: str | None = None
    """Files of ``path`` that are not in ``out``, with the reasons; and how far offsets were rounded."""
    types: str | None = None
    """Of a GGUF file, how many tensors of each type it holds, and what was copied."""
    moved: float = 0.0
    """How far the offset of a group moved at most, in steps of its scale, where the new format rounds offsets."""

    def __str__(self) -> str:
        if self.types is not None:
            line = f"{self.out}: {self.layers} layers from {self.before} to gguf; {self.types}"
            return line if self.note is None else f"{line}\nnote: {self.note}"
        kept = "codes, scales and zeros as they were" if self.moved == 0 else "codes and scales as they were"
        if self.scales is not None:
            kept = f"codes and zeros as they were, scales of the same values, now {self.scales}"
        line = f"{self.out}: {self.layers} layers from {self.before} to {self.after}, {kept}; {self.dense} other tensors copied"
        return line if self.note is None else f"{line}\nnote: {self.note}"

    __repr__ = __str__


def convert(
    path: str | Path,
    out: str | Path,
    format: str | Format | None = None,
    *,
    template: str | Path | None = None,
    gguf_type: str | None = None,
    gguf_dense: str | None = None,
    formats: Sequence[Format] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write a quantized checkpoint in another format, its weights the same bits.

    Args:
        path: folder or hub id of the checkpoint, ours or another tool's.
        out: a folder that does not exist or is empty, or a new .gguf file; it appears whole or not at all.
        format: a name, or a format of the caller's own; none: gguf where ``out`` ends in .gguf.
        template: of gguf, a GGUF file of the original model (docs/gguf.md).
        gguf_type: of gguf, the type of all weights; none: of each the smallest that keeps its values.
        gguf_dense: of gguf, the type of embedding and output head; none: the template's.
        formats: formats of the caller's own that ``path`` may be in.
        revision: of a hub id, the branch, tag or commit.
        trust_remote_code: whether the model's own Python may run.
        progress: whether to draw a bar.

    Returns:
        What was written. Printed, it is one line, and a note on files that were not copied.

    Raises:
        NearplaneError: before anything is written, names the layer that the format cannot hold exactly.
    """
    refuse_loaded(path)
    of_gguf = {"template": template, "gguf_type": gguf_type, "gguf_dense": gguf_dense}
    target, alone = _target(given_path("out", out), format, of_gguf)
    writer = None if alone else Writer(Path(out))
    checkpoint = open_checkpoint(folder := locate(path, revision=revision), formats=formats)
    before = _refuse(path, checkpoint, target)
    opened, model = open_skeleton(folder, trust_remote_code=trust_remote_code)
    modules = modules_of(model, checkpoint)
    grids, moved = _grids(checkpoint, target, model, modules)
    config = _configuration(checkpoint, target, (type(opened), model), modules, grids, trust_remote_code)
    rest = Rest(checkpoint.dense, checkpoint.store.get, config, folder)
    weights = (Solved(n, _exact(n, checkpoint.quantized(n), grid, target), grid) for n, grid in grids.items())
    notes: list[str | None] = []
    with bar(progress) as display, writer or nullcontext():
        placed = _placed(checkpoint, target, model, display)
        rest = rest if placed is None else _in_file(rest, placed, checkpoint, target, grids)
        written = len(checkpoint.layers) if placed is None else len(placed.template.tensors)
        tick = partial(display.advance, display.add_task("convert", total=written + len(rest.dense) * (not alone)))
        if writer is not None:
            told = _tell((str(path), str(out)), checkpoint, target, model, rest.file, (grids, modules))
            export(writer, target, replace(rest, card=told.card), told.report, told.page, weights, tick)
            notes = [told.note, companions(folder).note()]
        elif rest.file is not None:
            write_alone(Path(out), partial(rest.file.write, tick=tick))
    note, types = "; ".join(filter(None, [*notes, _rounded(moved, target)])), _told(placed, target, checkpoint, grids)
    said = _new_dtypes(checkpoint, grids), note or None, types, moved
    return Conversion(str(path), str(out), before, target.name, len(checkpoint.layers), len(checkpoint.dense), *said)


class _Told(NamedTuple):
    """What a converted folder says of itself."""

    card: str
    report: dict[str, Any] | Path | None
    page: str | None
    note: str


def _tell(
    names: tuple[str, str], checkpoint: Checkpoint, target: Format, model: nn.Module, file: Written | None,
    layers: tuple[dict[str, Grid], dict[str, str]],
) -> _Told:  # fmt: skip
    """Write card, report and page of the new folder: the report of its run, with format, engines and sizes of now.

    Args:
        names: of the checkpoint and of the new folder, as they were given.
        checkpoint: what is converted.
        target: the new format.
        model: its skeleton.
        file: of a format that has one.
        layers: the grids, and the names in the model, of the layers by their names on disk.
    """
    grids, modules = layers
    source = checkpoint.store.folder / REPORT
    try:
        run = dict(read_json(source)) if source.is_file() else {}
    except NearplaneError:  # copied as it is; ``nearplane report`` says what is wrong with it
        run = {}
    shapes = {name: layer.shape for name, layer in checkpoint.layers.items()}
    quantized = sum(target.nbytes(shapes[name], grid) for name, grid in grids.items())
    dense = sum(checkpoint.store.nbytes(name) for name in checkpoint.dense) if file is None else file.nbytes - quantized
    weights = dict.fromkeys(Weight(grid, shapes[name]) for name, grid in grids.items())
    facts = model_facts(model, {modules[name]: grid for name, grid in grids.items()})
    engines = verdicts(Described(target.name, tuple(weights), facts))
    made = Made(
        model=str(run.get("model", names[0])),
        format=target.name,
        grids=commonest(grids.values()),
        report=run,
        engines=engines,
        nbytes=quantized + dense,
        file=None if file is None else file.name,
        causal=is_causal(model),
        version=environment()["nearplane"],
        **described_source(names[0], checkpoint.store.folder, checkpoint.config, converted=True)[0],
    )
    if not run:
        return _Told(card(made), source if source.is_file() else None, None, "")
    run["converted"] = {"format": target.name, "out": names[1]}
    run["engines"] = {engine: verdict.as_dict() for engine, verdict in engines.items()}
    size = {"after": quantized + dense, "quantized": quantized, "dense": dense}
    run["bytes"] = {**mapping(run.get("bytes")), **size}
    if file is not None:
        run["dense"] = [file.listed(mapping(row)) for row in listing(run.get("dense"))]
    bits = 8 * quantized / sum(prod(shape) for shape in shapes.values())
    run["totals"] = {**mapping(run.get("totals")), "bits_per_weight": bits}
    page, reason = page_or_reason(run)
    return _Told(card(made), run, page, reason)


def _new_dtypes(checkpoint: Checkpoint, grids: dict[str, Grid]) -> str | None:
    """Name the dtypes of scales that had another one; None where all have their own."""
    now = {grids[n].held_in for n, layer in checkpoint.layers.items() if layer.grid.held_in != grids[n].held_in}
    return ", ".join(sorted(now)) or None


def _target(out: Path, format: str | Format | None, options: dict[str, Any]) -> tuple[Format, bool]:
    """Give the format to write, and whether it is one file by itself.

    Args:
        out: the new folder or file.
        format: the format, or its name; none: gguf where ``out`` ends in .gguf or ``options`` are given.
        options: of gguf: template, gguf_type, gguf_dense; None where not given.

    Raises:
        SettingError: no format, an unknown one, options of another one, or a file that exists.
    """
    options = {name: value for name, value in options.items() if value is not None}
    named, type = out.suffix.lower() == ".gguf", options.get("gguf_type")
    if format is None and not named and not options:
        raise SettingError("convert needs the format to write: give --format, or a NEW that ends in .gguf.")
    target = pick_format("gguf" if format is None else format)
    if named and not isinstance(target, GGUF):
        raise SettingError(
            f"{out} ends in .gguf, and {target.name} is a folder; choose another name, or --format gguf."
        )
    target = target.asked({name: value for name, value in options.items() if name != "gguf_type"})
    if type is not None:
        target.grid(Grid(), type, ())  # refuses a type of another format
    if isinstance(target, GGUF) and type is not None:
        target = replace(target, type=known_type(type))
    if named and out.exists():
        raise SettingError(f"{out} exists; choose another name, or delete it.")
    return target, named


def _placed(checkpoint: Checkpoint, target: Format, model: nn.Module, display: Progress) -> Placed | None:
    """Find the checkpoint's weights in the template of a GGUF file; None for other formats."""
    if not isinstance(target, GGUF):
        return None
    folder = checkpoint.store.folder
    made_of = read_json(folder / REPORT).get("model") if (folder / REPORT).is_file() else ""
    template = open_template(target.template, str(made_of) if made_of == "demo" else folder)
    check_template(template, model, {name: layer.shape for name, layer in checkpoint.layers.items()})
    task = display.add_task("find", total=None)
    placed = place_checkpoint(
        checkpoint, target, template, lambda done, total: display.update(task, completed=done, total=total)
    )
    display.remove_task(task)
    return placed


def _in_file(rest: Rest, placed: Placed, checkpoint: Checkpoint, target: Format, grids: dict[str, Grid]) -> Rest:
    """Let one file hold the quantized weights, and the dense matrices that it holds anyway."""

    def rows(name: str) -> Tensor:
        name = name.removesuffix(".weight")
        return target.pack(name, _exact(name, checkpoint.quantized(name), grids[name], target), grids[name])[
            f"{name}.weight"
        ]

    file = file_name(checkpoint.store.folder.name, placed.label)
    inside = {name for names in placed.stored.values() for name in names}
    told = {**rest.config["quantization_config"], **described(placed, file)}
    return replace(
        rest,
        dense=[name for name in rest.dense if name not in inside],
        config={**rest.config, "quantization_config": told},
        file=Written(file, placed.nbytes, partial(write_gguf, placed=placed, rows=rows), placed.listed),
    )


def _told(placed: Placed | None, target: Format, checkpoint: Checkpoint, grids: dict[str, Grid]) -> str | None:
    """Tell what a GGUF file holds, and whether all of it has the values that it had; None for another format."""
    if placed is None:
        return None
    shapes = {name: layer.shape for name, layer in checkpoint.layers.items()}
    rounded = [
        name for name, grid in grids.items() if isinstance(target, GGUF) and not target.keeps(grid, shapes[name][1])
    ]
    kept = "every weight as it was" if not rounded else f"offsets of {len(rounded)} layers rounded to float16"
    return f"{placed.describe()}; {kept}"


def _configuration(
    checkpoint: Checkpoint,
    target: Format,
    opened: tuple[Any, nn.Module],
    modules: dict[str, str],
    grids: dict[str, Grid],
    trusted: bool,
) -> dict[str, Any]:
    """Give config.json in the new format.

    ``opened``: class of the configuration, and the skeleton. ``trusted``: whether the model's own Python ran.
    """
    kind, model = opened
    names = names_in_model(model, split_names(model, checkpoint.store, checkpoint.dense)[1])
    ignore = left_out(model, names, set(modules.values()), matrices(checkpoint.store, checkpoint.dense))
    # Loaders look for a linear by its name in the model or on disk: both are named.
    named = {key: grid for name, grid in grids.items() for key in (name, modules[name])}
    settings = _settings(checkpoint) | head_names(model, {module: name for name, module in modules.items()})
    quantization = target.config(next(iter(grids.values())), ignore=ignore, settings=settings, grids=named)
    plain = without_code(plain_config(checkpoint.config), trust_remote_code=trusted)
    return {**written_config(plain, kind, model), **target.entries(quantization)}


def _refuse(path: str | Path, checkpoint: Checkpoint, target: Format) -> str:
    """Refuse a checkpoint that is none, or quantizes more than weights: dropping that would make another model.

    Returns:
        The name of its format.
    """
    if checkpoint.original is not None:
        raise SettingError(f"{path} is an original: {checkpoint.original}; use nearplane quantize.")
    if checkpoint.format is None:
        raise SettingError(f"{path} is not quantized; use nearplane quantize.")
    if checkpoint.format == target.name:
        raise SettingError(f"{path} is {target.name} already; copy the folder.")
    folder = checkpoint.store.folder
    if turned_linears(checkpoint.config, folder)[0]:
        raise NearplaneError(
            f"inputs of linears of {folder} are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}."
        )
    if isinstance(target, GGUF) and ROTATED in checkpoint.config:
        raise NearplaneError(
            f"{folder} is rotated, and so are its embeddings and norms, which a GGUF file takes from its template; convert a "
            "checkpoint without rotations."
        )
    if isinstance(target, GGUF) and SCALED in checkpoint.config:
        raise NearplaneError(
            f"channels of {folder} are scaled, and so are its norms, which a GGUF file takes from its template; convert a "
            "checkpoint of --scale none."
        )
    parts = checkpoint.reader.besides_weights(checkpoint.quantization or {}) if checkpoint.reader else []
    if parts:
        raise NearplaneError(
            f"{folder} quantizes more than weights ({', '.join(parts)}), which {target.name} has no place for."
        )
    return checkpoint.format


def _grids(
    checkpoint: Checkpoint, target: Format, model: nn.Module, modules: dict[str, str]
) -> tuple[dict[str, Grid], float]:
    """Give each layer's grid, scales in the new format's dtype, and how far offsets are rounded, in steps.

    Raises:
        NearplaneError: a layer does not fit.
    """
    grids = {}
    for name, layer in checkpoint.layers.items():
        grids[name] = replace(layer.grid, scale_dtype=_scale_dtype(target, layer.grid))
        conv = isinstance(model.get_submodule(modules[name]), Conv1D)
        reason = (conv1d_reason(target) if conv else None) or target.supports(grids[name], layer.shape)
        if reason is not None:
            raise NearplaneError(f"{name}: {reason}.")
    together = target.together(grids, str(checkpoint.config.get("model_type", "")))
    if together is not None:
        raise NearplaneError(f"{together}.")
    moved = 0.0
    for name, grid in grids.items():  # all of them before the first is written
        quantized = _exact(name, checkpoint.quantized(name), grid, target)
        check(name, quantized, grid, any_scales=True)  # as it supports
        moved = max(moved, target.rounds(quantized, grid))
    return grids, moved


def _rounded(moved: float, target: Format) -> str | None:
    """Say how far offsets were rounded; None: they are what they were."""
    if moved == 0:
        return None
    return f"{target.name} stores offsets in the dtype of scales, and rounding them moved weights by up to {moved:.2g} steps"


def _scale_dtype(target: Format, stored: Grid) -> ScaleDtype:
    """Give the dtype of scales in the new format, which is the present one wherever the format leaves a choice."""
    return target.scale_dtype(getattr(torch, stored.scale_dtype))


def _exact(name: str, quantized: Quantized, grid: Grid, target: Format) -> Quantized:
    """Cast a layer's scales to the new dtype. Raises NearplaneError if one would change by that."""
    scale = quantized.scale.to(getattr(torch, grid.held_in))
    changed = scale.to(quantized.scale.dtype) != quantized.scale
    if bool(changed.any()):
        row, group = (int(i) for i in changed.nonzero()[0])
        raise NearplaneError(
            f"{name}: {int(changed.sum())} of {scale.numel()} scales, stored in {SCALE_NAMES[quantized.scale.dtype]}, have no "
            f"exact value in {grid.held_in}, the dtype of {target.name} (row {row}, group {group}: "
            f"{float(quantized.scale[row, group])!r}); quantize again with --format {target.name}."
        )
    return quantized._replace(scale=scale)


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give settings for the new configuration: who wrote it, from what, and what the old one records of the run."""
    known = checkpoint.reader.run_settings(checkpoint.quantization or {}) if checkpoint.reader else {}
    return {"version": environment()["nearplane"], "converted_from": checkpoint.format, **known}
