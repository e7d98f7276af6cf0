"""Let transformers' own ``from_pretrained`` hold packed linears, as ``nearplane.load`` does.

Decides which checkpoints are ours: those in a layout that a format of ``nearplane.formats`` reads. All others, and a
``quantization_config`` that is given by hand, go to transformers' own quantizer. transformers builds the model, places the
dense tensors, and spreads the model over devices; ``packed.py`` makes the linears.
"""

import copy
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as theirs

from nearplane.checkpoint.packed import Packing, settle, turn, warn_of_slowness
from nearplane.core.errors import NearplaneError, NumericalError, some_of
from nearplane.core.moments import all_finite
from nearplane.formats import FORMATS
from nearplane.formats.journal import unfinished
from nearplane.formats.originals import is_original
from nearplane.formats.read import open_checkpoint
from nearplane.machine.progress import say
from nearplane.models import absent
from nearplane.models.experts import unfuse
from nearplane.models.experts_disk import NUMBER, joins_experts, names_in_model, split_names
from nearplane.runtime import cpu
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.fused import Decode, check_decode

OURS = "nearplane"
_before: dict[str, Any] = {}  # transformers' classes of configurations, by method, while ours stand in their places
_chosen: dict[str, Any] = {"arithmetic": "auto", "decode": "auto"}


class _Switch(AbstractContextManager[None]):
    """What ``enable`` returns: leaving a ``with`` block calls ``disable``."""

    def __exit__(self, *_: object) -> None:
        disable()


def enable(arithmetic: Arithmetic = "auto", decode: Decode = "auto") -> AbstractContextManager[None]:
    """Let transformers' ``from_pretrained``, pipelines and server hold packed linears from now on, in this process.

    Reads compressed-tensors (pack-quantized, int-quantized) and GPTQ, whatever the bits, with zero points or without,
    experts included. Models that are loaded already, and unquantized ones, stay as they are.

    Args:
        arithmetic: how a CPU multiplies packed weights, as ``LoadSettings.arithmetic``.
        decode: how a CPU decodes one token of one sequence, as ``LoadSettings.decode``.

    Returns:
        A context manager that calls ``disable`` at its end; it need not be entered.

    Raises:
        SettingError: an unknown arithmetic or way to decode.

    Example:
        >>> with nearplane.enable():  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained("out")
    """
    cpu.check(arithmetic)
    check_decode(decode)
    _chosen.update(arithmetic=arithmetic, decode=decode)
    for method, kind in CONFIGURATIONS.items():
        _before.setdefault(method, AUTO_QUANTIZATION_CONFIG_MAPPING[method])
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = kind
    AUTO_QUANTIZER_MAPPING[OURS] = _quantizer
    return _Switch()


def disable() -> None:
    """Give transformers its own quantizers back. Models that were loaded stay packed. Nothing happens if they are back."""
    for method in list(_before):
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _before.pop(method)
    AUTO_QUANTIZER_MAPPING.pop(OURS, None)


def _foreign(quantization: dict[str, Any]) -> str | None:
    """Tell why nearplane does not hold weights of this configuration packed; None if it does."""
    if is_original(quantization):
        return "its weights are small floats with scales"
    reader = next((format for format in FORMATS.values() if format.claims(quantization)), None)
    return "no format of nearplane reads it" if reader is None else reader.foreign(quantization)


class _Stated:
    """A quantization_config of config.json, kept as it is written."""

    quant_method = OURS

    def __init__(self, stated: dict[str, Any]) -> None:
        self.stated = stated

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Keep what is ours; give all else to transformers' own class, and say so."""
        reason = _foreign(config_dict)
        if reason is not None:
            own = _before.get(str(config_dict.get("quant_method")), cls.__mro__[2])
            say(f"note: this checkpoint is loaded by transformers' own quantizer: {reason}")
            return own.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        return (cls(config_dict), kwargs) if return_unused_kwargs else cls(config_dict)

    def to_dict(self) -> dict[str, Any]:
        """Give config.json's entry."""
        return copy.deepcopy(self.stated)

    to_diff_dict = to_dict

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    def get_loading_attributes(self) -> dict[str, Any]:
        """Give none: what is given to ``from_pretrained`` by hand is transformers' own."""
        return {}

    def post_init(self) -> None:
        """Check nothing; the checkpoint is checked where it is opened."""


# transformers compares names of classes where a quantization_config is given by hand, too.
class CompressedTensorsConfig(_Stated, theirs.CompressedTensorsConfig):  # type: ignore[misc]
    """A quantization_config of compressed-tensors."""


class GPTQConfig(_Stated, theirs.GPTQConfig):  # type: ignore[misc]
    """A quantization_config of GPTQ."""


CONFIGURATIONS: dict[str, Any] = {"compressed-tensors": CompressedTensorsConfig, "gptq": GPTQConfig}


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Make the quantizer of a configuration: ours, or transformers' where a configuration was given by hand, too."""
    by_hand = {name: value for name, value in vars(config).items() if name != "stated"}
    if not by_hand:
        return PackedQuantizer(config, **kwargs)
    own = _before[config.stated["quant_method"]].from_dict(config.to_dict())
    for name, value in by_hand.items():
        setattr(own, name, value)
    return AUTO_QUANTIZER_MAPPING[own.quant_method](own, **kwargs)


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """What ``from_pretrained`` calls on the way of a model: leaves linears out before loading, and fills them in after."""

    requires_calibration = True  # no unquantized model is quantized by it

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packing: Packing | None = None  # while a model is being loaded
        self.dtype = torch.float32

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise NearplaneError for a device map that leaves modules on disk."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise NearplaneError(
                'packed weights are not left on disk while they run; leave "disk" out of device_map, or give max_memory more.'
            )

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        """Match the checkpoint with the model, and leave the linears out that will be packed."""
        kind = type(model).__name__
        if not checkpoint_files:
            raise NearplaneError(
                f"the packed weights of a {kind} are read from its folder; give from_pretrained a folder, no state_dict."
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise NearplaneError("packed weights are not split over ranks (tensor parallelism); use device_map.")
        folder = Path(next(iter(checkpoint_files))).parent
        with torch.device("cpu"):  # transformers builds the model on the meta device
            self.packing, self.dtype = _match(model, folder), dtype or torch.float32
        self.packing.dig(model, room=True)
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *_patterns(self.packing)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Leave out the rules that merge experts, where experts stay apart."""
        if self.packing is None or not self.packing.apart:
            return weight_conversions
        return [rule for rule in weight_conversions if not joins_experts(rule)]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Put the packed linears in, on the devices that transformers has chosen."""
        packing, self.packing = self.packing, None
        assert packing is not None
        places = _lift_hooks(model)
        packing.fill(model, self.dtype, places)
        for name, value in model.named_parameters():
            if value.is_floating_point() and not value.is_meta and not all_finite(value.detach()):
                folder = packing.checkpoint.store.folder
                raise NumericalError(f"{folder}: weight {name} holds NaN or Inf; the checkpoint is broken.")
        turn(model, packing.checkpoint, partly=True)
        if cpu.best() is None and any(value.device.type == "cpu" for value in model.buffers()):
            warn_of_slowness()
        settle(model, **_chosen)
        if places is not None:
            _dispatch(model, places)

    def is_serializable(self) -> bool:
        """Say no: the layout in memory is no format on disk."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Say yes: adapters are trained beside packed weights."""
        return True


def _match(model: nn.Module, folder: Path) -> Packing:
    """Open a folder and match it with a model on the meta device. Raises NearplaneError where they do not fit."""
    reason = unfinished(folder)
    if reason is not None:
        raise NearplaneError(reason)
    checkpoint = open_checkpoint(folder)
    skeleton = copy.deepcopy(model)
    unfuse(skeleton)
    packing = Packing(skeleton, checkpoint, partly=True)
    if not packing.modules:
        raise NearplaneError(f"no quantized layer of {folder} belongs to a {type(model).__name__}.")
    _, dense = split_names(skeleton, checkpoint.store, checkpoint.dense)
    on_disk = names_in_model(skeleton, [*dense, *(f"{name}.weight" for name in packing.modules)])
    # Elsewhere a class may have what the checkpoint has not, as a head that is yet to be trained.
    stored, lists = skeleton.state_dict().keys(), {_list_of(name) for name in on_disk} - {None}
    missing = [name for name in absent.lacking(skeleton, on_disk) if name in stored and _list_of(name) in lists]
    if missing:
        raise NearplaneError(f"{folder} lacks weights that config.json asks for: {some_of(missing)}.")
    return packing


def _list_of(name: str) -> str | None:
    """Give the name of the list of blocks that a parameter is in; None for one outside of all."""
    found = NUMBER.search(name)
    return None if found is None else name[: found.start()]


def _patterns(packing: Packing) -> list[str]:
    """Give patterns of the stored tensors that transformers need not place: those of packed linears, and of experts apart."""
    leaves = dict.fromkeys(packing.members.taken)
    for layer, module in packing.modules.items():
        for tensor in packing.checkpoint.layers[layer].tensors.values():
            leaf = tensor.rpartition(".")[2]
            leaves |= dict.fromkeys(f"{name}.{leaf}" for name in (layer, module))
    # transformers' renamings may know no name of a lone expert's linear: any will do.
    apart = [name for name in leaves if name.rpartition(".")[0] in packing.apart] + list(packing.members.dense)
    for name in apart:
        module, _, leaf = name.rpartition(".")
        leaves[f"{module.rpartition('.')[0]}.*.{leaf}"] = None
    found = {re.sub(r"\d+", r"\\d+", re.escape(name).replace(r"\*", r"\w+")) for name in leaves}
    return [rf"(^|\.){name}$" for name in sorted(found)]


def _lift_hooks(model: nn.Module) -> dict[str, Any] | None:
    """Take accelerate's hooks off a model that it has spread over devices; returns its device map, or None."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    places: dict[str, Any] = model.hf_device_map  # type: ignore[assignment]
    return places


def _dispatch(model: nn.Module, places: dict[str, Any]) -> None:
    """Spread a model over devices again. Packed weights are buffers, so that buffers are moved where weights are."""
    from accelerate import dispatch_model

    skipped = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, device_map=places, offload_buffers=True, skip_keys=skipped)
