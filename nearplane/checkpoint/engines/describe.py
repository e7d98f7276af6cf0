"""What engines look at of a checkpoint: a plain ``Described``, made from a plan as well as from an opened folder."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nearplane.core.activations import TokenGrid
from nearplane.core.grid import Grid
from nearplane.formats.base import tail_reason
from nearplane.formats.gguf.grids import own_type
from nearplane.formats.read import Checkpoint
from nearplane.models.experts import EXPERT, experts_of
from nearplane.models.experts_disk import converts, merges_experts, names_in_model
from nearplane.models.inputs import is_causal, output_head
from nearplane.models.locate import BAD_CONFIG
from nearplane.models.towers import linears_besides
from nearplane.transforms.hooks import turned_linears


class Weight(NamedTuple):
    """One kind of quantized weight in a checkpoint."""

    grid: Grid
    shape: tuple[int, int]
    """(out, in)."""
    activations: TokenGrid | None = None
    """How the input of the linear is rounded."""


@dataclass(frozen=True)
class Model:
    """What loaders look at of a model whose linears are quantized."""

    name: str
    """Its class."""
    causal: bool = True
    """Whether it predicts the next token."""
    converts: bool = False
    """Whether transformers merges or splits stored weights other than experts' while loading."""
    merges: bool = False
    """Whether transformers makes fused experts of single stored ones."""
    experts: bool = False
    """Whether linears of fused experts are quantized."""
    dense_experts: bool = False
    """Whether all fused experts of some layer stay dense."""
    scaled: bool = False
    """Whether transformers takes these experts apart itself."""
    zeros: bool = False
    """Whether some of these experts are asymmetric."""
    head: bool = False
    """Whether the output head is quantized."""
    initialises: bool = False
    """Whether the class, while it is loaded, initialises weights of linears that are quantized (``initialises_packed``)."""
    dense: bool = False
    """Whether some linears stay dense in a list of layers, such as ``model.layers``, in which others are quantized."""
    parts: frozenset[str] = frozenset()
    """Names of the quantized linears behind the class of the module that holds each: ``LlamaMLP.up_proj``."""
    type: str = ""
    """Its ``model_type``; empty: not known."""
    renamed: tuple[str, ...] = ()
    """Names on disk of linears of an expert, where the model stores experts fused and engines look for other names."""


@dataclass(frozen=True)
class Described:
    """What engines look at of a checkpoint."""

    format: str
    weights: tuple[Weight, ...]
    """Every kind of quantized weight once."""
    model: Model | None = None
    """None: not known, and not judged."""
    online: bool = False
    """Whether inputs of linears are rotated while the model runs."""
    ordered: bool = False
    """Whether groups may lie in activation order (``desc_act``); other tools' checkpoints only."""

    @property
    def kinds(self) -> list[str]:
        """Name the kinds of weights by which ``ran.json`` says what was run."""
        found = [kind_of(self.format, w.grid, w.activations) for w in self.weights]
        found += [
            f"{kind} tail" for kind, w in zip(found, self.weights, strict=True) if tail_reason(w.grid, w.shape[1])
        ]
        return sorted({*found, *([f"{self.format} online"] if self.online else [])})


def kind_of(format: str, grid: Grid, activations: TokenGrid | None = None) -> str:
    """Name a kind of quantized weight: format, bits, symmetry, and how inputs are rounded; of GGUF the type."""
    own = own_type(grid) if format == "gguf" else None
    if own is not None:
        return f"gguf {own}"
    rounded = (
        "" if activations is None else f", inputs {activations.bits} bits{'' if activations.sym else ' asymmetric'}"
    )
    return f"{format} {grid.storage_bits} bits{'' if grid.sym else ' asymmetric'}{rounded}"


def described(checkpoint: Checkpoint, model: nn.Module | None) -> Described:
    """Describe an opened, quantized folder; ``model``: its skeleton, None where it cannot be built."""
    layers = checkpoint.layers
    facts = None
    if model is not None:
        names = names_in_model(model, [f"{name}.weight" for name in layers])
        grids = {n.removesuffix(".weight"): layers[d.removesuffix(".weight")].grid for n, d in names.items()}
        facts = model_facts(model, grids, names)
    weights = [Weight(layer.grid, layer.shape, layer.activations) for layer in layers.values()]
    online = bool(turned_linears(checkpoint.config, checkpoint.store.folder)[0])
    return Described(checkpoint.format or "", tuple(dict.fromkeys(weights)), facts, online, checkpoint.ordered)


def model_facts(model: nn.Module, layers: Mapping[str, Grid], stored: Mapping[str, str] | None = None) -> Model:
    """Look up what loaders look at of a model.

    Args:
        model: its skeleton, experts taken apart.
        layers: grid of each quantized linear by its name in the model.
        stored: names on disk of the weights of a finished checkpoint, by names in the model.
    """
    found = {name: grid for name, grid in layers.items() if EXPERT.fullmatch(name)}
    mixtures = experts_of(model)
    experts = [module for path, module in mixtures.items() if any(name.startswith(f"{path}.") for name in found)]
    return Model(
        name=type(model).__name__,
        causal=is_causal(model),
        converts=converts(model),
        merges=merges_experts(model),
        experts=bool(experts),
        dense_experts=len(experts) < len(mixtures),
        scaled=all(module.layout.scaled for module in experts),
        zeros=not all(grid.sym for grid in found.values()),
        head=any(model.get_submodule(name) is output_head(model) for name in layers),
        initialises=initialises_packed(model, layers.keys() - found.keys()),
        dense=bool(_lists(linears_besides(model, set(layers))) & _lists(layers)),
        parts=frozenset(_part(model, name) for name in layers),
        type=str(getattr(model.config, "model_type", "")),
        renamed=() if merges_experts(model) else tuple(sorted(_renamed(found, stored or {}))),
    )


def _lists(names: Iterable[str]) -> set[str]:
    """Give the lists of layers in which modules lie: their names before the first number."""
    return {found[1] for name in names if (found := re.match(r"(.+?)\.\d+\.", name))}


def _part(model: nn.Module, name: str) -> str:
    """Name a linear behind the class of its parent."""
    parent, _, leaf = name.rpartition(".")
    return f"{type(model.get_submodule(parent)).__name__}.{leaf}"


def _renamed(experts: Iterable[str], stored: Mapping[str, str]) -> set[str]:
    """Give the names on disk of an expert's linears that are not those of the model."""
    leaves = {
        (name.rpartition(".")[2], stored.get(f"{name}.weight", name + ".weight").split(".")[-2]) for name in experts
    }
    return {disk for own, disk in leaves if own != disk}


def initialises_packed(model: nn.Module, quantized: Iterable[str]) -> bool:
    """Tell whether ``_init_weights`` of a model's class reads the weight of a quantized linear.

    transformers calls that for every module after loading, and a packed linear has no ``weight`` there. So the call is made
    here on the skeleton, with these weights taken away: in Mamba, RWKV and T5 it fails.

    Args:
        model: its skeleton; left as it was.
        quantized: names of linears in the model.
    """
    linears = [model.get_submodule(name) for name in quantized]
    weights = [linear._parameters.pop("weight") for linear in linears]
    buffers = [
        (m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None and not b.is_meta
    ]
    try:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.to("meta")  # computed ones are not to be computed anew
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return any(
                _reads_weight(owner, module) for owner, module in _initialised(model, model, set(map(id, linears)))
            )
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for linear, weight in zip(linears, weights, strict=True):
            linear._parameters["weight"] = weight


def _initialised(module: nn.Module, owner: nn.Module, linears: set[int]) -> list[tuple[nn.Module, nn.Module]]:
    """List the linears and the modules around them, of each class one, with the part of the model that initialises them."""
    found: dict[tuple[type, type], tuple[nn.Module, nn.Module]] = {}

    def visit(module: nn.Module, owner: nn.Module) -> bool:
        owner = module if hasattr(module, "_init_weights") else owner
        holds = any([visit(child, owner) for child in module.children()]) or id(module) in linears
        if holds:
            found.setdefault((type(owner), type(module)), (owner, module))
        return holds

    visit(module, owner)
    return list(found.values())


def _reads_weight(owner: Any, module: nn.Module) -> bool:
    """Tell whether the initialisation of a module misses a weight; other failures are of tensors without values."""
    try:
        owner._init_weights(module)
    except AttributeError as error:
        return "has no attribute 'weight'" in str(error)
    except (*BAD_CONFIG, RuntimeError):
        pass
    return False
