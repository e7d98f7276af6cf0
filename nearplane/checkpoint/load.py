"""Load any folder as an ordinary transformers model: an original, or a checkpoint we or others quantized.

Decides what becomes of quantized weights: packed linears, which keep them as they are, or dense ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.checkpoint.packed import Packing, settle, turn, warn_of_slowness
from nearplane.core.activations import TokenGrid
from nearplane.core.errors import NearplaneError, NumericalError, SettingError, plain_numbers
from nearplane.core.moments import all_finite
from nearplane.formats.read import Checkpoint, open_checkpoint
from nearplane.formats.store import SMALL_FLOATS, again, read_json
from nearplane.machine.devices import Dtype, pick_device, pick_dtype
from nearplane.machine.progress import say
from nearplane.models.experts import EXPERT
from nearplane.models.experts_disk import keep_layout, names_in_model
from nearplane.models.locate import BAD_CONFIG, first_line, locate
from nearplane.models.source import open_skeleton
from nearplane.models.values import kept_in_float32
from nearplane.runtime import cpu
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.fused import Decode, check_decode
from nearplane.runtime.linear import quantize_head, rounded

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
    decode: Decode = "auto"
    """How a CPU decodes one token of one sequence: auto, in one call of C++ where the model's blocks are of the standard kind;
    plain, as transformers does."""
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
        check_decode(self.decode)
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
    if checkpoint.original is not None:
        say(f"note: {folder}: {checkpoint.original}")
    packing = Packing(skeleton, checkpoint)
    dtype = named or _stored(checkpoint)
    state = _state(skeleton, packing, dtype, packed)
    holds = packed and bool(packing.modules)
    result = _assemble(type(skeleton), config, state, dtype, folder, packing if holds else None)
    if holds:
        packing.fill(result, dtype)
    else:
        for name, layer in checkpoint.layers.items():
            if layer.activations is not None:
                _round_inputs(result, packing.modules[name], layer.activations)
        keep_layout(result, packing.members.made)
    turn(result, checkpoint)
    if head_bits is not None:
        quantize_head(result, head_bits)
    if holds and device.type == "cpu" and cpu.best() is None:
        warn_of_slowness()
    if holds or head_bits is not None:
        settle(result, settings.arithmetic, settings.decode)
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
        raw = read_json(path if there else folder / "config.json")
        read = transformers.GenerationConfig
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


def _state(skeleton: nn.Module, packing: Packing, dtype: torch.dtype, packed: bool) -> dict[str, Tensor]:
    """Gather the tensors that transformers is to place: the dense ones, and those to be made dense. All are finite."""
    state: dict[str, Tensor] = {}
    checkpoint, modules, members = packing.checkpoint, packing.modules, packing.members
    kept, names = kept_in_float32(skeleton, dtype), names_in_model(skeleton, checkpoint.dense)
    exact = {name for parameter, name in names.items() if kept(parameter)}
    for name in (name for name in checkpoint.dense if name not in members.taken):
        value = checkpoint.store.get(name)
        state[name] = value.to(dtype) if value.is_floating_point() and name not in exact else value
    if not packed:
        state |= members.fused(dtype)
    for name in (name for name in checkpoint.layers if modules.get(name) not in members.layers):
        if not packed or modules.get(name) in packing.embeddings:
            weight = checkpoint.weight(name).to(dtype)
            conv = name in modules and isinstance(skeleton.get_submodule(modules[name]), Conv1D)
            state[name + ".weight"] = weight.T.contiguous() if conv else weight
    for name, value in state.items():
        if value.is_floating_point() and not all_finite(value):
            raise NumericalError(
                f"{checkpoint.store.folder}: weight {name} holds NaN or Inf; the checkpoint is broken."
            )
    return state


def _stored(checkpoint: Checkpoint) -> torch.dtype:
    """Read the dtype that config.json names; float32 where it names none."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named), None)
    known = isinstance(found, torch.dtype) and found.is_floating_point and found not in SMALL_FLOATS
    return found if known and found is not None else torch.float32


def _round_inputs(model: nn.Module, path: str, grid: TokenGrid) -> None:
    """Let a dense linear round its input. Raises NearplaneError for one that is part of a fused module."""
    if EXPERT.fullmatch(path):
        raise NearplaneError(
            f"what goes into {path} is to be rounded, which only packed experts do; load with packed=True."
        )
    linear = model.get_submodule(path)
    linear.register_forward_pre_hook(lambda _module, args: (rounded(args[0], grid), *args[1:]))


def _assemble(
    kind: Any, config: Any, state: dict[str, Tensor], dtype: torch.dtype, folder: Path, packing: Packing | None
) -> nn.Module:
    """Let transformers place the tensors: names, ties and buffers are its business. ``packing``: what it leaves out."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        built = kind if packing is None else _with_holes(kind, packing)
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
    result: nn.Module = model
    result.__class__ = kind
    return result


def _with_holes(kind: Any, packing: Packing) -> Any:
    """Derive from the model's class one whose quantized linears are left out while it is built: they take no memory."""
    build: Callable[..., None] = kind.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        packing.dig(self)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
