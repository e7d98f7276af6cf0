"""Write a checkpoint again in another format. Nothing is quantized again.

Codes, scales and zeros are the truth and stay equal bit for bit, so that the weights do, too. MLX alone stores a scale times
a zero, which is rounded to the scale's dtype; how far is said. Scales keep their dtype in
compressed-tensors and become float16 in GPTQ; one that float16 cannot hold exactly is a refusal, not a rounding. Layers
of several grids keep them. What the new format cannot hold is refused before anything is written; every dense tensor is
copied as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nearplane.checkpoint.config import written_config
from nearplane.checkpoint.export import Rest, Solved, export, head_names, left_out
from nearplane.checkpoint.load import modules_of
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats import Format, pick_format
from nearplane.formats.base import ONLINE_ONLY_HERE, SCALE_NAMES, check, conv1d_reason
from nearplane.formats.companions import companions
from nearplane.formats.originals import plain_config
from nearplane.formats.parts import Writer
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.formats.store import REPORT
from nearplane.machine.devices import environment
from nearplane.machine.progress import bar
from nearplane.models.experts_disk import matrices, names_in_model, split_names
from nearplane.models.locate import given_path, locate, refuse_loaded, without_code
from nearplane.models.source import open_skeleton
from nearplane.transforms.hooks import turned_linears


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
    moved: float = 0.0
    """How far the offset of a group moved at most, in steps of its scale, where the new format rounds offsets."""

    def __str__(self) -> str:
        kept = "codes, scales and zeros as they were" if self.moved == 0 else "codes and scales as they were"
        if self.scales is not None:
            kept = f"codes and zeros as they were, scales of the same values, now {self.scales}"
        line = f"{self.out}: {self.layers} layers from {self.before} to {self.after}, {kept}; {self.dense} other tensors copied"
        return line if self.note is None else f"{line}\nnote: {self.note}"

    __repr__ = __str__


def convert(
    path: str | Path,
    out: str | Path,
    format: str | Format,
    *,
    formats: Sequence[Format] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write a quantized checkpoint in another format, its weights the same bits.

    Args:
        path: folder or hub id of the checkpoint, ours or another tool's.
        out: a folder that does not exist or is empty; it appears whole or not at all.
        format: "compressed-tensors", "gptq", "gptq_v2", "awq", "mlx" or a format of the caller's own.
        formats: formats of the caller's own that ``path`` may be in.
        revision: of a hub id, the branch, tag or commit.
        trust_remote_code: whether the model's own Python may run.
        progress: whether to draw a bar.

    Returns:
        What was written. Printed, it is one line, and a note on files that were not copied.

    Raises:
        NearplaneError: before anything is written, for what the format cannot hold exactly, with the layer's name and
            the reason.
    """
    refuse_loaded(path)
    target, writer = pick_format(format), Writer(given_path("out", out))
    folder = locate(path, revision=revision)
    checkpoint = open_checkpoint(folder, formats=formats)
    if checkpoint.original is not None:
        raise SettingError(f"{path} is an original: {checkpoint.original}; use nearplane quantize.")
    if checkpoint.format in (None, target.name):
        told = (
            "not quantized; use nearplane quantize"
            if checkpoint.format is None
            else f"{target.name} already; copy the folder"
        )
        raise SettingError(f"{path} is {told}.")
    _refuse_more(checkpoint, target)
    opened, model = open_skeleton(folder, trust_remote_code=trust_remote_code)
    modules = modules_of(model, checkpoint)
    grids, moved = _grids(checkpoint, target, model, modules)
    config = _configuration(checkpoint, target, (type(opened), model), modules, grids, trust_remote_code)
    rest = Rest(checkpoint.dense, checkpoint.store.get, config, folder)
    weights = (
        Solved(name, _exact(name, checkpoint.quantized(name), grids[name], target), grids[name]) for name in grids
    )
    report = folder / REPORT  # of the run that chose the codes
    with writer, bar(progress) as display:
        task = display.add_task("convert", total=len(checkpoint.layers) + len(checkpoint.dense))
        export(writer, target, rest, report if report.is_file() else None, weights, partial(display.advance, task))
    now = {
        grids[name].held_in for name, layer in checkpoint.layers.items() if layer.grid.held_in != grids[name].held_in
    }
    count, scales = (len(checkpoint.layers), len(checkpoint.dense)), ", ".join(sorted(now)) or None
    note = "; ".join(filter(None, (companions(folder).note(), _rounded(moved, target)))) or None
    return Conversion(str(path), str(out), str(checkpoint.format), target.name, *count, scales, note, moved)


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


def _refuse_more(checkpoint: Checkpoint, target: Format) -> None:
    """Refuse a checkpoint that quantizes more than weights: dropping that would make another model."""
    folder = checkpoint.store.folder
    if turned_linears(checkpoint.config, folder)[0]:
        raise NearplaneError(
            f"inputs of linears of {folder} are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}."
        )
    parts = checkpoint.reader.besides_weights(checkpoint.quantization or {}) if checkpoint.reader else []
    if parts:
        raise NearplaneError(
            f"{folder} quantizes more than weights ({', '.join(parts)}), which {target.name} has no place for."
        )


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
