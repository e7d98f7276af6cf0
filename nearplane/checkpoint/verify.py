"""Read a whole checkpoint again and list what is wrong with it.

Decides what a checkpoint owes its readers: whole files, layers that hold what their format says, a configuration that
speaks of every linear, siblings that an engine can fuse, every weight that the model asks for. A damaged file is a line
of the list, never an exception; only a folder that is no checkpoint at all raises. One tensor is in memory at a time.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from nearplane.checkpoint.engines import TITLES, check_engine, described, verdict
from nearplane.checkpoint.files import (
    FileSum,
    Findings,
    check_files,
    check_sums,
    examine,
    files,
    holds_weights,
    signs,
    sums,
)
from nearplane.checkpoint.packed import misfit
from nearplane.core.errors import NearplaneError, some_of
from nearplane.formats.base import conv1d_reason, grid_name
from nearplane.formats.fused import fused, fused_names
from nearplane.formats.journal import unfinished
from nearplane.formats.originals import strays, unexplained
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.formats.store import Store, read_json
from nearplane.machine.progress import bar
from nearplane.models import absent
from nearplane.models.experts_disk import matrices, names_in_model, split_names, unowned
from nearplane.models.locate import locate
from nearplane.models.source import open_skeleton
from nearplane.models.towers import is_linear


@dataclass(frozen=True)
class Verification:
    """Files and tensors read, and findings. A checkpoint is fine where ``problems`` is empty."""

    path: str
    format: str | None
    """"compressed-tensors", "gptq", "gptq_v2", "awq" or "mlx"; None: dense, or not to be told."""
    engine: str | None
    files: tuple[FileSum, ...]
    layers: int
    """Quantized weights that were read."""
    tensors: int
    """Other tensors that were read."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    """Unusual, or not looked at, but not wrong."""
    loads: str | None = None
    """That the engine asked for loads it, and whether that was run or read; None: it does not, or none was asked for."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        if not self.files:  # a run that was not finished: nothing was looked at
            return "\n".join(f"problem: {problem}" for problem in self.problems)
        count = len(self.problems)
        result = f"{count} problem{'s' if count > 1 else ''}" if count else "no problem found"
        what = f"{self.format or 'not quantized'}, {self.layers} quantized layers and {self.tensors} other tensors read"
        if not self.layers + self.tensors:
            what = "no tensor could be read"
        lines = [f"{self.path}: {result}; {what}, {len(self.files)} files"]
        lines += [] if self.loads is None else [self.loads]
        return "\n".join([*lines, *(f"problem: {line}" for line in self.problems), *(f"note: {n}" for n in self.notes)])

    __repr__ = __str__

    def listing(self) -> str:
        """List every file with its bytes and sha256."""
        width = max((len(file.name) for file in self.files), default=4)
        lines = [f"{'file':<{width}} {'bytes':>14}  sha256"]
        return "\n".join([*lines, *(f"{file.name:<{width}} {file.bytes:>14,}  {file.sha256}" for file in self.files)])


def verify(
    path: str | Path, engine: str | None = None, *, revision: str | None = None, trust_remote_code: bool = False,
    progress: bool = False,
) -> Verification:  # fmt: skip
    """Read every file and tensor of a checkpoint again, and list what is wrong.

    Args:
        path: folder or hub id, quantized or not, ours or another tool's.
        engine: a name of ``ENGINES``, such as "vllm" or "llama.cpp", to list also what that engine would refuse.
        revision: of a hub id, the branch, tag or commit.
        trust_remote_code: whether the model's own Python may run.
        progress: whether to draw a bar.

    Returns:
        The verdict, problems, notes, and every file with its sha256.

    Raises:
        NearplaneError: only for a folder that is no checkpoint at all, and for settings; all else is in ``problems``.
    """
    if engine is not None:
        check_engine(engine)
    folder = locate(path, revision=revision)
    reason = unfinished(folder)
    if reason is not None:
        return Verification(str(path), None, engine, (), 0, 0, (reason,), ())
    if not holds_weights(folder):
        Store(folder)  # says what the folder holds instead
    found, broken = Findings(), dict[str, str]()
    check_files(folder, found)
    checkpoint = _open(folder, broken, found)
    layers, dense = (len(checkpoint.layers), len(checkpoint.dense)) if checkpoint else (0, 0)
    with bar(progress) as display:
        task = display.add_task("hash", total=len(files(folder)))
        hashed = []
        for file in sums(folder, found):
            hashed.append(file)
            display.advance(task)
        check_sums(folder, hashed, found)
        if checkpoint is not None:
            task = display.add_task("check", total=layers + dense)
            negative = signs(folder)
            for name in checkpoint.layers:
                examine(checkpoint, name, found, negative)
                display.advance(task)
            for name in checkpoint.dense:
                _check_finite(checkpoint, name, found)
                display.advance(task)
    loads = _check_meaning(checkpoint, broken, engine, trust_remote_code, found) if checkpoint is not None else None
    format = checkpoint.format if checkpoint else None
    return Verification(
        str(path), format, engine, tuple(hashed), layers, dense, tuple(found.problems), tuple(found.notes), loads
    )


def _check_meaning(
    checkpoint: Checkpoint, broken: dict[str, str], engine: str | None, trusted: bool, found: Findings
) -> str | None:
    """Compare tensors, configuration, model and engine; tells of an engine that loads the checkpoint.

    ``trusted``: whether the model's own Python may run.
    """
    _check_strays(checkpoint, broken, found)
    _check_configuration(checkpoint, found)
    _check_siblings(checkpoint, broken, found)
    model = None
    with found.listing():
        _, model = open_skeleton(checkpoint.store.folder, trust_remote_code=trusted)
        _check_model(checkpoint, broken, model, found)
    loads = None
    if engine is not None and checkpoint.format is not None:
        with found.listing():
            loads = _check_engine(checkpoint, engine, model, found)
    return loads if not found.problems else None


def _open(folder: Path, broken: dict[str, str], found: Findings) -> Checkpoint | None:
    """Open the checkpoint, unreadable layers among the problems; None where nothing can be read at all."""
    try:
        checkpoint = open_checkpoint(folder, broken)
    except NearplaneError as error:
        found.problem(str(error))
        found.note("No tensor was checked, because the folder cannot be opened; verify again when that is mended.")
        return None
    lost = checkpoint.store.lost
    within = {name.rpartition(".")[0] for name in lost}
    for name, reason in broken.items():
        if name not in within:  # else why is among the problems already
            found.problem(reason)
    broken.update(dict.fromkeys(within, ""))
    if lost:
        found.note(f"Not checked, because no file gives them: {some_of(sorted(lost))}.")
    return checkpoint


def _check_strays(checkpoint: Checkpoint, broken: dict[str, str], found: Findings) -> None:
    """List tensors of quantized weights that the configuration does not explain; ``broken`` layers are listed already."""
    folder, stated = checkpoint.store.folder, checkpoint.quantization
    with found.listing():
        left = [name for name in strays(checkpoint.store, checkpoint.dense) if name.rpartition(".")[0] not in broken]
        if left:
            found.problem(unexplained(folder, left[0], stated, checkpoint.store.dtype(left[0])))
        if len(left) > 1:
            found.note(f"More such tensors: {some_of(left[1:])}.")
    if checkpoint.original is not None:
        found.note(f"{checkpoint.original}.")


def _check_finite(checkpoint: Checkpoint, name: str, found: Findings) -> None:
    """Look for NaN and Inf in a dense tensor."""
    with found.listing():
        value = checkpoint.store.get(name)
        if not value.is_floating_point():
            return
        bad = int((~(value.float() if value.itemsize == 1 else value).isfinite()).sum())
        if bad:
            found.problem(f"tensor {name} holds {bad} NaN or Inf values.")


def _check_configuration(checkpoint: Checkpoint, found: Findings) -> None:
    """Compare the format's file beside config.json with it, and scales with the dtype that loaders cast them to."""
    folder, stated, reader = checkpoint.store.folder, checkpoint.config.get("quantization_config"), checkpoint.reader
    beside = None if reader is None or reader.beside is None else folder / reader.beside
    if beside is not None and beside.exists() and isinstance(stated, dict):
        with found.listing():
            legacy = read_json(beside)
            differing = sorted(key for key in stated.keys() & legacy.keys() if stated[key] != legacy[key])
            if differing:
                found.problem(f"{beside} and config.json disagree on {', '.join(differing)}; loaders read either.")
            alone = sorted(stated.keys() ^ legacy.keys())
            if alone:
                found.note(f"{beside} and config.json: only one of them states {', '.join(alone)}.")
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    scales = {layer.grid.scale_dtype for layer in checkpoint.layers.values()} - {dtype}
    if reader is not None and reader.casts_scales and scales and dtype in ("float16", "bfloat16"):
        found.note(
            f"Scales are stored in {', '.join(sorted(scales))}; engines round them to {dtype}, the model's dtype."
        )


def _check_siblings(checkpoint: Checkpoint, broken: dict[str, str], found: Findings) -> None:
    """Check that linears which engines fuse are all quantized or none, and alike; llama.cpp fuses none."""
    if checkpoint.format == "gguf":
        return
    dense = {name.removesuffix(".weight") for name in checkpoint.dense if name.endswith(".weight")} - broken.keys()
    for names in fused(checkpoint.layers.keys() | dense):
        _check_alike(names, checkpoint, found)


def _check_alike(names: list[str], checkpoint: Checkpoint, found: Findings) -> None:
    """Check that these linears have one grid, or none."""
    kinds: dict[str, str] = {}
    for name in names:
        layer = checkpoint.layers.get(name)
        kinds.setdefault("not quantized" if layer is None else grid_name(layer.grid), name)
    if len(kinds) > 1:
        told = "; ".join(f"{name} {kind}" for kind, name in kinds.items())
        found.problem(f"Engines fuse these, and they differ: {told}.")


def _check_engine(checkpoint: Checkpoint, engine: str, model: nn.Module | None, found: Findings) -> str | None:
    """List why an engine would not load the checkpoint, and on what condition it would; tells that it does."""
    judged = verdict(engine, described(checkpoint, model))
    for refusal in judged.refusals:
        found.problem(f"engine {engine}: {refusal}.")
    for caveat in judged.caveats:
        found.note(f"engine {engine}: {caveat}.")
    return None if judged.refusals else f"{TITLES[engine]} loads such a checkpoint: {judged.basis}"


def _check_model(checkpoint: Checkpoint, broken: dict[str, str], model: nn.Module, found: Findings) -> None:
    """Check that all the model's class asks for is there, in its shape, and that the configuration knows every linear."""
    folder, modules, state = checkpoint.store.folder, dict(model.named_modules()), model.state_dict()
    quantized = {f"{name}.weight": name for name in (*checkpoint.layers, *broken)}
    known = checkpoint.store.lost.union(quantized)  # whose shapes are no matter here
    store, names = split_names(model, checkpoint.store, checkpoint.dense)
    dense = [name for name in names if name.rpartition(".")[0] not in broken or name.endswith(".bias")]
    on_disk = names_in_model(model, [*dense, *known])
    missing = absent.lacking(model, on_disk)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        disk = on_disk.get(name)
        if disk is not None and disk not in known and store.shape(disk) != tuple(value.shape):
            stored, asked = list(store.shape(disk)), list(value.shape)
            found.problem(f"{folder}: {disk} has shape {stored}, config.json asks for {asked}.")
    if missing:
        found.problem(f"{folder} lacks weights that config.json asks for: {some_of(missing)}.")
    unused = sorted(disk for name, disk in on_disk.items() if name not in state and disk not in known)
    if unused:
        found.note(f"Stored tensors that belong to no parameter of the model: {some_of(unused)}.")
    in_model = {disk: name for name, disk in on_disk.items()}
    for weight, layer in quantized.items():
        if broken.get(layer) == "":
            continue  # in a file that cannot be read
        module = modules.get(in_model.get(weight, weight).removesuffix(".weight"))
        reason = misfit(checkpoint, layer, module) if layer in checkpoint.layers else None
        if reason is not None:
            found.problem(reason)
        elif isinstance(module, Conv1D) and checkpoint.reader is not None and conv1d_reason(checkpoint.reader):
            found.problem(f"{layer}: {conv1d_reason(checkpoint.reader)}.")
    _check_ignored(checkpoint, model, on_disk, set(quantized), found)


def _check_ignored(
    checkpoint: Checkpoint, model: nn.Module, on_disk: dict[str, str], quantized: set[str], found: Findings
) -> None:
    """Check that what is not stored quantized is left out by the configuration, or engines look for its codes.

    Engines ask by the name on disk. transformers asks by the name in the model, where the two differ.
    """
    expected, renamed = dict[str, None](), list[str]()
    for name, module in model.named_modules():
        disk = on_disk.get(f"{name}.weight", f"{name}.weight")
        kind = "Linear" if isinstance(module, nn.Linear) else type(module).__name__
        if not is_linear(module) or disk in quantized:
            continue
        if checkpoint.expects({disk.removesuffix(".weight")}, kind):
            expected[disk.removesuffix(".weight")] = None
        elif checkpoint.expects({name}, kind):
            renamed.append(name)
    stored = matrices(checkpoint.store, checkpoint.dense)
    for tensor, names in unowned(model, on_disk, stored).items():
        module = tensor.endswith(".weight") or len(names) > 1  # a linear, or fused experts
        if module and all(checkpoint.expects({name}, "Linear") for name in names):
            expected[names[0]] = None
    if checkpoint.reader is not None and checkpoint.reader.fused_rules and not expected:
        modules = (name.removesuffix(".weight") for name in stored)
        expected |= {name: None for name in fused_names(modules) if checkpoint.expects({name}, "Linear")}
    if expected:
        found.problem(
            "Neither quantized nor left out by the quantization_config, so that engines look for codes: "
            f"{some_of(list(expected))}."
        )
    if renamed:
        found.note(
            "Left out by their names on disk, not by their names in the model, so that transformers looks for codes: "
            f"{some_of(renamed)}."
        )
