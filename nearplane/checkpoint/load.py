"""Load any folder as an ordinary transformers model: an original, or a checkpoint we or others quantized.

Decides what becomes of quantized weights: packed linears, which keep them as they are, or dense ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError, NumericalError, SettingError, plain_numbers
from nearplane.core.moments import all_finite
from nearplane.formats.originals import unexplained
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.formats.store import SMALL_FLOATS, again, read_json
from nearplane.machine.devices import Dtype, pick_device, pick_dtype
from nearplane.machine.progress import say
from nearplane.models import absent
from nearplane.models.experts import EXPERT, experts_of, unfuse
from nearplane.models.experts_disk import SplitStore, names_in_model, split
from nearplane.models.locate import BAD_CONFIG, first_line, locate
from nearplane.models.source import open_skeleton
from nearplane.models.values import kept_in_float32
from nearplane.runtime import cpu
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.layout import tile
from nearplane.runtime.linear import QuantizedLinear, dense_linear, quantize_head, rounded, set_arithmetic
from nearplane.transforms.hooks import turn_inputs, turned_linears

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class LoadSettings:
    """How a folder is loaded: the settings that ``load``, ``evaluate``, ``generate`` and ``bench`` share.

    Example:
        >>> LoadSettings(packed=False, dtype="bfloat16").packed
        False
    """

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "float32"
    """What dense weights are held and activations computed in; auto: as config.json says. The two small ones save memory, and
    are slower on a CPU. What transformers keeps in float32 stays so."""
    packed: bool = True
    """Multiply quantized weights as they are, as they will be run; --no-packed makes them dense first."""
    arithmetic: Arithmetic = "auto"
    """How a CPU multiplies packed weights: exact (float32), a16 or a8 (activations of 16 or 8 bits); auto: a16 where there
    are vector instructions for it."""
    head_bits: int | None = None
    """Also round the output head to so many bits, in memory."""
    revision: str | None = None
    """Of a hub id, the branch, tag or commit; MODEL@REVISION says the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        pick_dtype(self.dtype)
        cpu.check(self.arithmetic)
        for name in ("packed", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} must be True or False; got {getattr(self, name)!r}.")
        if self.head_bits is not None and (type(self.head_bits) is not int or not 2 <= self.head_bits <= 8):
            raise SettingError(f"bits must be 2 to 8; got head_bits={self.head_bits!r}.")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "LoadSettings":
        """Make settings of values by name.

        Raises:
            SettingError: an unknown name, with the nearest known one; or a value that has no meaning.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known)}."
                raise SettingError(f"unknown setting {name!r}; {hint}")
        return cls(**settings)

    def of_original(self) -> "LoadSettings":
        """Settings for the original beside a checkpoint: same device and dtype, nothing rounded, no revision."""
        return LoadSettings(device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)


class Members:
    """The places of all experts' weights and biases in a checkpoint; empty where no expert is quantized."""

    def __init__(self, skeleton: nn.Module, checkpoint: Checkpoint, modules: dict[str, str]) -> None:
        """``modules``: of the model, by name of the quantized layer."""
        self.checkpoint = checkpoint
        quantized = {module: layer for layer, module in modules.items() if EXPERT.fullmatch(module)}
        self.experts = experts_of(skeleton) if quantized else {}
        self.layers: dict[str, str] = quantized if self.experts else {}
        """Quantized layer by linear of the model."""
        self.store = split(skeleton, checkpoint.store) if self.experts else checkpoint.store
        fused = {p.tensor for p in self.store.pieces.values()} if isinstance(self.store, SplitStore) else set()
        stored = (set(checkpoint.dense) - fused) | (self.store.names - checkpoint.store.names)
        found = names_in_model(skeleton, stored) if self.experts else {}
        self.dense = {name: disk for name, disk in found.items() if EXPERT.fullmatch(name.rpartition(".")[0])}
        """Name on disk by parameter of the model."""
        self.taken = fused | set(self.dense.values())
        """Tensors that are not transformers' to place."""
        self.linears = {
            f"{path}.{expert}.{linear}": part
            for path, module in self.experts.items()
            for expert in range(module.layout.experts)
            for linear, part in module.layout.parts.items()
        }

    def fused(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make the fused parameters dense."""
        state: dict[str, Tensor] = {}
        for path, module in self.experts.items():
            state |= {f"{path}.{name}": torch.empty(shape, dtype=dtype) for name, shape in module.shapes.items()}
            for expert in range(module.layout.experts):
                for linear, part in module.layout.parts.items():
                    name = f"{path}.{expert}.{linear}"
                    for parameter, value in ((part.weight, self._weight(name)), (part.bias, self._bias(name))):
                        if parameter is not None and value is not None:
                            part.cut(module.layout.slab(state[f"{path}.{parameter}"], expert)).copy_(value)
        return state

    def fill(self, model: nn.Module, dtype: torch.dtype, packed: Callable[[str, Tensor | None], nn.Module]) -> None:
        """Put every expert's linear into the model; ``packed`` makes one of a quantized layer and a bias."""
        for name in self.linears:
            bias = self._bias(name)
            bias = None if bias is None else bias.to(dtype)
            if name in self.layers:
                model.set_submodule(name, packed(self.layers[name], bias))
                continue
            weight = self._weight(name).to(dtype)
            model.set_submodule(name, dense_linear(weight, bias))

    def _weight(self, name: str) -> Tensor:
        return self.checkpoint.weight(self.layers[name]) if name in self.layers else self._get(f"{name}.weight")

    def _bias(self, name: str) -> Tensor | None:
        return None if self.linears[name].bias is None else self._get(f"{name}.bias")

    def _get(self, parameter: str) -> Tensor:
        folder = self.checkpoint.store.folder
        if parameter not in self.dense:
            raise NearplaneError(f"{folder} lacks weights that config.json asks for, the first: {parameter}.")
        value = self.store.get(self.dense[parameter])
        if not bool(value.isfinite().all()):
            raise NumericalError(
                f"{folder}: weight {self.dense[parameter]} holds NaN or Inf; the checkpoint is broken."
            )
        return value


def load_model(model: str | Path, settings: LoadSettings | None = None) -> nn.Module:
    """Load a folder, quantized by us or others, or not at all. No other quantization package is needed.

    Args:
        model: a transformers folder, a hub id, or "demo".
        settings: none: the defaults.

    Returns:
        The transformers model. Its quantized linears are ``QuantizedLinear``, or with ``packed=False`` dense ones.

    Raises:
        NearplaneError: a folder that cannot be read, in one sentence.
    """
    settings = settings or LoadSettings()
    device, named = pick_device(settings.device), pick_dtype(settings.dtype)
    packed, head_bits, trust_remote_code = settings.packed, settings.head_bits, settings.trust_remote_code
    folder = locate(model, revision=settings.revision)
    config, skeleton = open_skeleton(folder, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    _check_size(skeleton, checkpoint)
    if checkpoint.original is not None:
        say(f"note: {folder}: {checkpoint.original}")
    _refuse_codes(skeleton, checkpoint)
    modules = modules_of(skeleton, checkpoint)
    members = Members(skeleton, checkpoint, modules)
    dtype = named or _stored(checkpoint)
    state = _state(skeleton, checkpoint, modules, members, dtype, packed)
    holes = {name for name in modules.values() if not _is_embedding(skeleton, name)} if packed else set()
    apart = set(members.linears) if packed else set()
    result = _assemble(type(skeleton), config, state, dtype, folder, holes - apart, apart)
    for name, layer in checkpoint.layers.items():
        if modules[name] in apart or _is_embedding(skeleton, modules[name]):
            continue
        if packed:
            bias = result.get_submodule(modules[name]).bias
            result.set_submodule(modules[name], _packed(checkpoint, dtype, name, bias))
        elif layer.activations is not None:
            _round_inputs(result, modules[name], layer.activations)
    if apart:
        members.fill(result, dtype, partial(_packed, checkpoint, dtype))
    _turn_inputs(result, checkpoint)
    if head_bits is not None:
        quantize_head(result, head_bits)
    if holes and device.type == "cpu" and cpu.best() is None:
        _warn_once()
    if holes or head_bits is not None:
        result.requires_grad_(False)  # else every linear would be asked for a gradient
        for module in result.modules():
            if hasattr(module, "save_pretrained"):
                module.__dict__["save_pretrained"] = _refuse_to_save
        set_arithmetic(result, settings.arithmetic)
    result.config.name_or_path = str(folder)  # type: ignore[union-attr]  # where its tokenizer is
    result.__dict__["name_or_path"] = str(folder)  # what adapters record as their base
    take_generation(result, folder)
    return result.to(device).eval()


def take_generation(model: nn.Module, folder: Path) -> None:
    """Give a model that generates the folder's generation settings, as transformers' from_pretrained does.

    A folder without generation_config.json has those of its config.json. NearplaneError for settings that are unusable.
    """
    found = generation_settings(model, folder)
    if found is not None:
        model.generation_config = found


def generation_settings(model: nn.Module, folder: Path) -> Any:
    """Read a folder's generation settings; None for a model that does not generate. Raises as ``take_generation``."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    path = folder / GENERATION
    there = path.exists() or path.is_symlink()
    try:
        raw, read = read_json(path if there else folder / "config.json"), transformers.GenerationConfig
        found = read.from_dict(raw) if there else read.from_model_config(raw)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(found, name)
            for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
                if token is not None and type(token) is not int:
                    raise ValueError(f"{name} is {value!r}")
    except BAD_CONFIG as error:
        raise NearplaneError(
            f"{path if there else folder / 'config.json'} holds unusable generation settings ({first_line(error)}); "
            f"mend it, or {again(folder)}."
        ) from error
    return found


def _state(
    skeleton: nn.Module,
    checkpoint: Checkpoint,
    modules: dict[str, str],
    members: Members,
    dtype: torch.dtype,
    packed: bool,
) -> dict[str, Tensor]:
    """Gather the tensors that transformers is to place: the dense ones, and those to be made dense. All are finite."""
    state: dict[str, Tensor] = {}
    kept, names = kept_in_float32(skeleton, dtype), names_in_model(skeleton, checkpoint.dense)
    exact = {name for parameter, name in names.items() if kept(parameter)}
    for name in (name for name in checkpoint.dense if name not in members.taken):
        value = checkpoint.store.get(name)
        state[name] = value.to(dtype) if value.is_floating_point() and name not in exact else value
    if not packed:
        state |= members.fused(dtype)
    for name in (name for name in checkpoint.layers if modules.get(name) not in members.layers):
        if not packed or _is_embedding(skeleton, modules.get(name)):
            weight = checkpoint.weight(name).to(dtype)
            conv = name in modules and isinstance(skeleton.get_submodule(modules[name]), Conv1D)
            state[name + ".weight"] = weight.T.contiguous() if conv else weight
    for name, value in state.items():
        if value.is_floating_point() and not all_finite(value):
            raise NumericalError(
                f"{checkpoint.store.folder}: weight {name} holds NaN or Inf; the checkpoint is broken."
            )
    return state


def _check_size(skeleton: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a model far larger than what is stored before transformers makes its missing weights up in memory.

    Tied weights are stored once, and counted once.
    """
    store = checkpoint.store
    held = sum(prod(store.shape(name)) for name in checkpoint.dense)
    held += sum(prod(layer.shape) for layer in checkpoint.layers.values())
    asked = absent.size(skeleton)
    if asked > 2 * held + (1 << 20):
        raise NearplaneError(
            f"{store.folder} stores {held:.3g} weights, config.json asks for {asked:.3g}; {again(store.folder)}."
        )


def _refuse_codes(skeleton: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise NearplaneError for a weight of the model that is stored in integers: it is quantized, in an unknown way."""
    store, floats = checkpoint.store, {name for name, p in skeleton.named_parameters() if p.is_floating_point()}
    whole = [name for name in checkpoint.dense if not store.dtype(name).is_floating_point]
    for name, disk in sorted(names_in_model(skeleton, whole).items()) if whole else ():
        if name in floats:
            raise NearplaneError(unexplained(store.folder, disk, checkpoint.quantization, store.dtype(disk)))


def _stored(checkpoint: Checkpoint) -> torch.dtype:
    """Read the dtype that config.json names; float32 where it names none."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named), None)
    known = isinstance(found, torch.dtype) and found.is_floating_point and found not in SMALL_FLOATS
    return found if known and found is not None else torch.float32


def modules_of(skeleton: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Map quantized layers to modules of the model. Raises NearplaneError where shapes disagree or there is none."""
    found = names_in_model(skeleton, [name + ".weight" for name in checkpoint.layers])
    modules = {disk.removesuffix(".weight"): name.removesuffix(".weight") for name, disk in found.items()}
    known = dict(skeleton.named_modules())
    for disk, name in modules.items():
        reason = misfit(checkpoint, disk, known.get(name))
        if reason is not None:
            raise NearplaneError(reason)
    return modules


def misfit(checkpoint: Checkpoint, disk: str, module: nn.Module | None) -> str | None:
    """Tell why a quantized layer is not the weight of this module of its model; None if it is."""
    shape, weight = checkpoint.layers[disk].shape, getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or weight is None:
        return f"{checkpoint.store.folder} holds a quantized {disk}, and its model has no such linear."
    asked = tuple(weight.T.shape if isinstance(module, Conv1D) else weight.shape)
    if asked != shape:
        return f"{checkpoint.store.folder}: {disk}.weight has shape {list(shape)}, config.json asks for {list(asked)}."
    return None


def _is_embedding(skeleton: nn.Module, name: str | None) -> bool:
    """Tell whether a quantized layer is an embedding, which ``mlx_lm.convert`` quantizes: it is made dense."""
    return name is not None and isinstance(skeleton.get_submodule(name), nn.Embedding)


class _Hole(nn.Module):
    """The place of a packed linear. Its bias is loaded as ever; its weight has no rows, for code that initialises it."""

    weight: Tensor

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, Tensor) else None
        self.register_buffer("weight", torch.empty(0, 1), persistent=False)


def _packed(checkpoint: Checkpoint, dtype: torch.dtype, name: str, bias: Any) -> nn.Module:
    """Make a module of a quantized layer in a model of this dtype; a dense one where offsets are free."""
    layer, decoded = checkpoint.decode(name)
    columns, grid = layer.shape[1], layer.grid
    if grid.scales.free:  # the kernels' zeros are codes
        return dense_linear(checkpoint.weight(name).to(dtype), bias)
    width = grid.group_width(columns)
    group = None if torch.equal(decoded.group, torch.arange(columns) // width) else decoded.group
    tiles = tile(decoded.codes, decoded.scale, decoded.zero, grid.storage_bits, width, group)
    linear = QuantizedLinear(tiles, bias)
    linear.activations, linear.like = layer.activations, linear.like.to(dtype)
    return linear


def _round_inputs(model: nn.Module, path: str, grid: TokenGrid) -> None:
    """Let a dense linear round its input. Raises NearplaneError for one that is part of a fused module."""
    if EXPERT.fullmatch(path):
        raise NearplaneError(
            f"what goes into {path} is to be rounded, which only packed experts do; load with packed=True."
        )
    linear = model.get_submodule(path)
    linear.register_forward_pre_hook(lambda _module, args: (rounded(args[0], grid), *args[1:]))


def _turn_inputs(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Rotate the inputs of linears, if the checkpoint says so."""
    names, seed = turned_linears(checkpoint.config, checkpoint.store.folder)
    strange = sorted(set(names) - {name for name, _ in model.named_modules()})
    if strange:
        raise NearplaneError(
            f"{checkpoint.store.folder}: its model has no {strange[0]}, whose input config.json has rotated."
        )
    turn_inputs(model, names, seed)


@cache
def _warn_once() -> None:
    say(f"note: packed weights run in plain torch, slowly: {cpu.supports(torch.device('cpu'), torch.float32)}")


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise NearplaneError(
        "this model's weights are packed for running, which is not a format on disk; copy the checkpoint's folder "
        "instead, or load with packed=False to save dense weights."
    )


def _assemble(
    kind: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype, folder: Path, holes: set[str], apart: set[str]
) -> nn.Module:
    """Let transformers place the tensors: names, ties and buffers are its business."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        built = _with_holes(kind, holes, apart) if holes or apart else kind
        model, info = built.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise NearplaneError(f"{folder} does not fit its config.json ({reason}).") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    if info["mismatched_keys"]:
        name, found, asked = sorted(info["mismatched_keys"])[0]
        raise NearplaneError(f"{folder}: {name} has shape {list(found)}, config.json asks for {list(asked)}.")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise NearplaneError(
            f"{folder} lacks {len(missing)} weights that config.json asks for, the first: {missing[0]}."
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        say(f"note: {folder} holds {len(unused)} tensors that its model does not use, the first: {unused[0]}")
    model.__class__ = kind
    return model  # type: ignore[no-any-return]


def _with_holes(kind: Any, holes: set[str], apart: set[str]) -> Any:
    """Derive from the model's class one whose quantized linears are left out while it is built: they take no memory.

    ``apart``: all linears of experts that were taken apart; their biases are left out, too.
    """
    build: Callable[..., None] = kind.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if apart:
            unfuse(self)
            for path in experts_of(self):  # whose class may initialise the fused weights that are gone
                self.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True
        for path in holes | apart:
            self.set_submodule(path, _Hole(None if path in apart else self.get_submodule(path).bias))

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
