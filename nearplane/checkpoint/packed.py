"""Put packed linears into a model: ``load`` into one that it builds, ``enable`` into one that transformers builds.

Decides which modules of a model hold which quantized layers. A module is left out while the model is built and its dense
weights are loaded, so that no memory is taken twice; then its packed linear takes the place.
"""

import copy
import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError, NumericalError
from nearplane.formats.originals import unexplained
from nearplane.formats.read import Checkpoint
from nearplane.formats.store import again
from nearplane.machine.progress import say
from nearplane.models import absent
from nearplane.models.experts import EXPERT, experts_of, unfuse
from nearplane.models.experts_disk import SplitStore, names_in_model, split
from nearplane.runtime import cpu
from nearplane.runtime.cpu import Arithmetic
from nearplane.runtime.fused import Decode, fuse
from nearplane.runtime.layout import tile
from nearplane.runtime.linear import QuantizedLinear, dense_linear, set_arithmetic
from nearplane.transforms.hooks import turn_inputs, turned_linears


class Packing:
    """Which modules of a model hold which quantized layers of a checkpoint."""

    def __init__(self, skeleton: nn.Module, checkpoint: Checkpoint, *, partly: bool = False) -> None:
        """Match a checkpoint with a model.

        Args:
            skeleton: the model on the meta device, its experts taken apart.
            checkpoint: the opened folder.
            partly: layers that the model has no module for are left out, as by a class without the output head.

        Raises:
            NearplaneError: a layer that is no linear of the model or of another shape, or far fewer weights than asked for.
        """
        check_size(skeleton, checkpoint)
        _refuse_codes(skeleton, checkpoint)
        self.checkpoint = checkpoint
        self.modules = modules_of(skeleton, checkpoint, partly=partly)
        """Module of the model by quantized layer."""
        self.members = Members(skeleton, checkpoint, self.modules)
        self.apart = set(self.members.linears)
        """Linears of experts that are taken apart, dense ones, too."""
        self.embeddings = {n for n in self.modules.values() if isinstance(skeleton.get_submodule(n), nn.Embedding)}
        """Embeddings that are quantized, as ``mlx_lm.convert`` does: they are made dense."""
        self.holes = set(self.modules.values()) - self.apart - self.embeddings
        """All other modules that become packed linears."""

    def dig(self, model: nn.Module, *, room: bool = False) -> None:
        """Leave the modules out of a model that is being built.

        Args:
            model: the model; in place.
            room: let each module take as many bytes as its packed weight will, for code that spreads a model over devices.
        """
        if self.apart:
            unfuse(model)
            for path in experts_of(model):  # whose class may initialise the fused weights that are gone
                model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        layers = {module: self.checkpoint.layers[layer].tensors.values() for layer, module in self.modules.items()}
        for path in self.holes | self.apart:
            linear: Any = model.get_submodule(path)
            taken = sum(map(self.checkpoint.store.nbytes, layers[path])) if path in layers else linear.weight.nbytes
            model.set_submodule(path, _Hole(None if path in self.apart else linear.bias, taken if room else 0))

    def fill(self, model: nn.Module, dtype: torch.dtype, places: Mapping[str, Any] | None = None) -> None:
        """Put the packed linears in their places.

        Args:
            model: the model, in which ``dig`` has left them out.
            dtype: of its dense weights.
            places: devices by module, a device map; none: each is put where transformers has put its hole.
        """
        for path in self.holes | self.apart if places is not None else ():
            model.get_submodule(path).to(place_of(path, places or {}))
        for layer, path in self.modules.items():
            if path in self.holes:
                hole: Any = model.get_submodule(path)
                model.set_submodule(path, _packed(self.checkpoint, dtype, layer, hole.bias).to(hole.weight.device))
        if self.apart:
            self.members.fill(model, dtype, partial(_packed, self.checkpoint, dtype))


def place_of(path: str, places: Mapping[str, Any]) -> Any:
    """Give the device of a module by a device map, which names it or a module around it."""
    while path not in places and path:
        path = path.rpartition(".")[0]
    return places.get(path, "cpu")


class Members:
    """The places of all experts' weights and biases in a checkpoint; empty where no expert is quantized."""

    def __init__(self, skeleton: nn.Module, checkpoint: Checkpoint, modules: dict[str, str]) -> None:
        """``modules``: of the model, by name of the quantized layer."""
        self.checkpoint = checkpoint
        quantized = {module: layer for layer, module in modules.items() if EXPERT.fullmatch(module)}
        self.experts = experts_of(skeleton) if quantized else {}
        self.made = [f"{path}.{name}" for path, module in self.experts.items() for name in module.shapes]
        """Names of the fused parameters, where experts are made dense."""
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
            hole: Any = model.get_submodule(name)
            device = hole.weight.device
            if name in self.layers:
                model.set_submodule(name, packed(self.layers[name], bias).to(device))
                continue
            weight = self._weight(name).to(device, dtype)
            model.set_submodule(name, dense_linear(weight, None if bias is None else bias.to(device)))

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


def check_size(skeleton: nn.Module, checkpoint: Checkpoint) -> None:
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


def modules_of(skeleton: nn.Module, checkpoint: Checkpoint, *, partly: bool = False) -> dict[str, str]:
    """Map quantized layers to modules of the model. Raises NearplaneError where shapes disagree or there is none.

    ``partly``: layers are left out that the model has no module for.
    """
    found = names_in_model(skeleton, [name + ".weight" for name in checkpoint.layers])
    modules = {disk.removesuffix(".weight"): name.removesuffix(".weight") for name, disk in found.items()}
    known = dict(skeleton.named_modules())
    modules = {disk: name for disk, name in modules.items() if name in known or not partly}
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


class _Hole(nn.Module):
    """The place of a packed linear. Its bias is loaded as ever; its weight has no rows, for code that initialises it."""

    weight: Tensor

    def __init__(self, bias: Any, room: int) -> None:
        """``room``: bytes that it takes on its device."""
        super().__init__()
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, Tensor) else None
        self.register_buffer("weight", torch.empty(0, 1), persistent=False)
        if room:
            self.register_buffer("room", torch.empty(room, dtype=torch.uint8), persistent=False)


def _packed(checkpoint: Checkpoint, dtype: torch.dtype, name: str, bias: Any) -> QuantizedLinear:
    """Make a packed linear of a quantized layer in a model of this dtype."""
    layer, decoded = checkpoint.decode(name)
    columns, grid = layer.shape[1], layer.grid
    width = grid.group_width(columns)
    group = None if torch.equal(decoded.group, torch.arange(columns) // width) else decoded.group
    tiles = tile(decoded.codes, decoded.scale, decoded.zero, grid.storage_bits, width, group)
    linear = QuantizedLinear(tiles, bias)
    linear.activations, linear.like = layer.activations, linear.like.to(dtype)
    return linear


def turn(model: nn.Module, checkpoint: Checkpoint, *, partly: bool = False) -> None:
    """Rotate the inputs of linears, if the checkpoint says so. ``partly``: of those that the model has, as a bare model."""
    names, seed = turned_linears(checkpoint.config, checkpoint.store.folder)
    known = {name for name, _ in model.named_modules()}
    if partly:
        own = f"{getattr(model, 'base_model_prefix', '')}."
        bare = {name: name.removeprefix(own) for name in names}
        names = [name if name in known else bare[name] for name in names if {name, bare[name]} & known]
    strange = sorted(set(names) - known)
    if strange:
        raise NearplaneError(
            f"{checkpoint.store.folder}: its model has no {strange[0]}, whose input config.json has rotated."
        )
    turn_inputs(model, names, seed)


@cache
def warn_of_slowness() -> None:
    """Say once why no kernel runs packed weights on this CPU, if so."""
    reason = cpu.supports(torch.device("cpu"), torch.float32)
    say(f"note: packed weights run in plain torch, slowly: {reason}")


def settle(model: nn.Module, arithmetic: Arithmetic, decode: Decode = "auto") -> None:
    """Make a model with packed linears ready: no gradients, not saved, and multiplying and decoding as it was asked to."""
    model.requires_grad_(False)  # else every linear would be asked for a gradient
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.__dict__["save_pretrained"] = _Unsaved(module)
    set_arithmetic(model, arithmetic)
    fuse(model, decode)


class _Unsaved:
    """Stands where a packed model's ``save_pretrained`` was, and refuses. Adapters that were added to it are saved."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model()
        if getattr(model, "_hf_peft_config_loaded", False):
            return type(model).save_pretrained(model, *args, **kwargs)
        raise NearplaneError(
            "this model's weights are packed for running, which is not a format on disk; copy the checkpoint's folder "
            "instead, or load it with nearplane.load(..., packed=False) to save dense weights."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Unsaved":
        return _Unsaved(copy.deepcopy(self.model(), memo))  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unsaved, (self.model(),)
