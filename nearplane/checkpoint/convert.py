"""What ``convert`` does: write a checkpoint again in another format. Nothing is quantized again.

Codes, scales and zeros are the truth and stay equal bit for bit, so that the weights do, too. Scales keep their dtype in
compressed-tensors and become float16 in GPTQ; one that float16 cannot hold exactly is a refusal, not a rounding. Layers
of several grids keep them. What the new format cannot hold is refused before anything is written; every dense tensor is
copied as it is.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nearplane.checkpoint.load import modules_of
from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats import FORMATS
from nearplane.formats.base import ONLINE_ONLY_HERE, SCALE_NAMES, Format, check, conv1d_reason
from nearplane.formats.parts import Writer
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.machine.devices import environment
from nearplane.machine.progress import bar
from nearplane.models.locate import locate
from nearplane.models.source import open_skeleton
from nearplane.models.towers import linears_besides
from nearplane.transforms.hooks import turned_linears

QUANTIZATION = ("quantization_config", "compression_config")
# Of the record of a run, what GPTQ's configuration has fields for.
KEPT = ("damp_percent", "true_sequential", "static_groups")


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: str
    out: str
    before: str
    after: str
    layers: int
    dense: int
    scales: str | None = None
    """The dtype in which scales are now, if some had another; their values are the same."""

    def __str__(self) -> str:
        kept = "codes, scales and zeros as they were"
        if self.scales is not None:
            kept = f"codes and zeros as they were, scales of the same values, now {self.scales}"
        return f"{self.out}: {self.layers} layers from {self.before} to {self.after}, {kept}; {self.dense} other tensors copied"

    __repr__ = __str__


def convert(
    path: str | Path, out: str | Path, format: str, *, trust_remote_code: bool = False, progress: bool = False
) -> Conversion:
    """Write the quantized checkpoint ``path`` into the new folder ``out`` in another format, its weights the same bits.

    ``format``: "compressed-tensors", "gptq" or "gptq_v2". Raises NearplaneError, before anything is written, for what the
    format cannot hold exactly, with the layer's name and the reason.
    """
    if format not in FORMATS:
        raise SettingError(f"format must be one of {', '.join(FORMATS)}; got {format!r}.")
    writer, target = Writer(Path(out)), FORMATS[format]
    folder = locate(path, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    if checkpoint.quantization is None or checkpoint.format is None:
        raise SettingError(f"{path} is not quantized; use nearplane quantize.")
    if checkpoint.format == format:
        raise SettingError(f"{path} is {format} already; copy the folder.")
    _refuse_activations(checkpoint, checkpoint.quantization)
    _, model = open_skeleton(folder, trust_remote_code=trust_remote_code)
    modules = modules_of(model, checkpoint)
    grids = _grids(checkpoint, target, model, modules)
    with writer, bar(progress) as display:
        task = display.add_task("convert", total=len(checkpoint.layers) + len(checkpoint.dense))
        for name in checkpoint.layers:
            grid = grids[name]
            writer.put(target.tensors(name, _exact(name, checkpoint.quantized(name), grid, target), grid))
            display.advance(task)
        for name in checkpoint.dense:
            writer.put({name: checkpoint.store.get(name)})
            display.advance(task)
        ignore = linears_besides(model, set(modules.values()))
        # Loaders look for a linear by its name in the model or on disk: both are named.
        named = {key: grid for name, grid in grids.items() for key in (name, modules[name])}
        settings = _settings(checkpoint, modules)
        quantization = target.config(next(iter(grids.values())), ignore=ignore, settings=settings, grids=named)
        writer.json("config.json", {**_plain(checkpoint.config), "quantization_config": quantization})
        for file, content in target.extra_files(quantization).items():
            writer.json(file, content)
        writer.companions(folder, code=trust_remote_code)
        if (folder / "report.json").is_file():  # of the run that chose the codes
            writer.copy(folder / "report.json")
        writer.finish()
    now = {grids[name].scale_dtype for name, layer in checkpoint.layers.items() if layer.grid != grids[name]}
    count = len(checkpoint.layers), len(checkpoint.dense)
    return Conversion(str(path), str(out), checkpoint.format, format, *count, ", ".join(sorted(now)) or None)


def _refuse_activations(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Of compressed-tensors, what is more than weights: dropping it would make another model."""
    groups = config.get("config_groups") or {}
    parts = {key for group in groups.values() for key in ("input_activations", "output_activations") if group.get(key)}
    parts |= {key for key in ("kv_cache_scheme",) if config.get(key)}
    if turned_linears(checkpoint.config, checkpoint.store.folder)[0]:
        raise NearplaneError(
            f"inputs of linears of {checkpoint.store.folder} are rotated while the model runs (r4), which {ONLINE_ONLY_HERE}."
        )
    if parts:
        raise NearplaneError(
            f"{checkpoint.store.folder} quantizes more than weights ({', '.join(sorted(parts))}), which GPTQ has no place for."
        )


def _grids(checkpoint: Checkpoint, target: Format, model: nn.Module, modules: dict[str, str]) -> dict[str, Grid]:
    """The grid of each layer, its scales in the new format's dtype. NearplaneError where a layer does not fit there."""
    grids = {}
    for name, layer in checkpoint.layers.items():
        grids[name] = replace(layer.grid, scale_dtype=_scale_dtype(target, layer.grid))
        conv = isinstance(model.get_submodule(modules[name]), Conv1D)
        reason = (conv1d_reason(target) if conv else None) or target.supports(grids[name], layer.shape)
        if reason is not None:
            raise NearplaneError(f"{name}: {reason}.")
    for name, grid in grids.items():  # all of them before the first is written
        check(name, _exact(name, checkpoint.quantized(name), grid, target), grid)
    return grids


def _scale_dtype(target: Format, stored: Grid) -> ScaleDtype:
    """The dtype scales have in the new format, which is theirs wherever the format leaves a choice."""
    return target.scale_dtype(getattr(torch, stored.scale_dtype))


def _exact(name: str, quantized: Quantized, grid: Grid, target: Format) -> Quantized:
    """The layer with its scales in the new dtype. NearplaneError if one would change by that."""
    scale = quantized.scale.to(getattr(torch, grid.scale_dtype))
    changed = scale.to(quantized.scale.dtype) != quantized.scale
    if bool(changed.any()):
        row, group = (int(i) for i in changed.nonzero()[0])
        raise NearplaneError(
            f"{name}: {int(changed.sum())} of {scale.numel()} scales, stored in {SCALE_NAMES[quantized.scale.dtype]}, have no "
            f"exact value in {grid.scale_dtype}, the dtype of {target.name} (row {row}, group {group}: "
            f"{float(quantized.scale[row, group])!r}); quantize again with --format {target.name}."
        )
    return quantized._replace(scale=scale)


def _settings(checkpoint: Checkpoint, modules: dict[str, str]) -> dict[str, Any]:
    """For GPTQ's configuration: who wrote it, from what, and what the old one knew of the run."""
    known = {key: value for key, value in (checkpoint.quantization or {}).items() if key in KEPT}
    head = {"lm_head": True} if "lm_head" in modules.values() else {}
    return {"version": environment()["nearplane"], "converted_from": checkpoint.format, **known, **head}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without its quantization, wherever a tool put that."""
    config = {key: value for key, value in config.items() if key not in QUANTIZATION}
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = {key: value for key, value in text.items() if key not in QUANTIZATION}
    return config
