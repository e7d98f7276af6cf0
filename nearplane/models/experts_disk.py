"""Experts on disk: which stored tensor is which expert's, by transformers' own conversion mapping.

Most checkpoints store each expert by itself, and transformers merges them while loading: its mapping, read the other way,
says which linear of which expert a stored name means. Others (gpt-oss, Llama 4, Granite) store the fused tensors:
``split`` shows each as the tensors of its experts, which are read one by one. Where such a layer is quantized, its tensors
are written under the experts' own names, as vLLM's loaders read them (``Layout.names``).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import Store
from nearplane.models.experts import EXPERT, Experts, Layout, Part, experts_of

NUMBER = re.compile(r"\.(\d+)(?=\.)")
MEMBER = re.compile(r"(.+)\.(\d+)\.(\w+)\.(weight|bias)")


def names_in_model(model: nn.Module, disk_names: Iterable[str]) -> dict[str, str]:
    """Name on disk by name in the model. transformers' own renamings are applied: old names, a base model's prefix, and
    what it calls the weights of single experts."""
    transforms, experts = get_model_conversion_mapping(model), experts_of(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    merges = [t for t in transforms if _merges_experts(t)] if experts else []
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    state |= dict.fromkeys((f"{path}.{name}" for path, module in experts.items() for name in module.shapes), True)
    found = {}
    for name in sorted(disk_names):
        key, pattern = rename_source_key(name, renamings, merges, prefix, state)
        found[_member(experts, merges, name, key, pattern)] = name
    return found


def converts(model: nn.Module) -> bool:
    """Whether transformers merges or splits stored weights of this model while it loads them, other than experts'."""
    return any(isinstance(t, WeightConverter) and not _merges_experts(t) for t in get_model_conversion_mapping(model))


def merges_experts(model: nn.Module) -> bool:
    """Whether transformers makes fused experts of single ones that are stored."""
    return any(_merges_experts(t) for t in get_model_conversion_mapping(model))


def _merges_experts(transform: object) -> TypeGuard[WeightConverter]:
    """Whether a rule stacks the weights of single experts, those of several linears one below the other."""
    if not isinstance(transform, WeightConverter) or not isinstance(transform.operations[0], MergeModulelist):
        return False
    rest = transform.operations[1:]
    return not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)


def _member(
    experts: dict[str, Experts], merges: list[WeightConverter], name: str, key: str, pattern: str | None
) -> str:
    """The parameter of an expert that a stored name means, ``key`` being what transformers renames it to."""
    path, _, target = key.rpartition(".")
    if pattern is not None and path in experts:
        rule = next(rule for rule in merges if pattern in rule.source_patterns)
        linears = [linear for linear, part in experts[path].layout.parts.items() if part.weight == target]
        expert = NUMBER.findall(name)[-1]
        return f"{path}.{expert}.{linears[rule.source_patterns.index(pattern)]}.weight"
    match = MEMBER.fullmatch(key)
    if match is None or match[1] not in experts:
        return key
    linears = [linear for linear, disk in experts[match[1]].layout.names.items() if disk == match[3]]
    return f"{match[1]}.{match[2]}.{(linears or [match[3]])[0]}.{match[4]}"


@dataclass(frozen=True)
class Piece:
    """One expert's weight or bias in a fused tensor."""

    tensor: str
    layout: Layout
    part: Part
    expert: int
    module: str


class SplitStore(Store):
    """A store whose fused tensors are shown as those of their experts."""

    def __init__(self, store: Store, pieces: dict[str, Piece]) -> None:
        self.folder, self.store, self.pieces = store.folder, store, pieces
        self.names = (store.names - {piece.tensor for piece in pieces.values()}) | pieces.keys()

    def get(self, name: str) -> Tensor:
        """A tensor; of a fused one, only its expert's rows are read."""
        piece = self.pieces.get(name)
        if piece is None:
            return self.store.get(name)
        rows = self.store.shape(piece.tensor)[0] // piece.layout.experts
        slab = self.store.rows(piece.tensor, piece.expert * rows, rows)
        return piece.part.cut(slab[0] if rows == 1 else slab).contiguous()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads no data."""
        piece = self.pieces.get(name)
        if piece is None:
            return self.store.shape(name)
        whole = torch.empty(self.store.shape(piece.tensor), device="meta")
        return tuple(piece.part.cut(piece.layout.slab(whole, piece.expert)).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; reads no data."""
        return self.store.dtype(self.pieces[name].tensor if name in self.pieces else name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor; reads no data."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def rejoined(self, quantized: set[str]) -> frozenset[str]:
        """Names to be copied beside the ``quantized`` ones: a layer none of whose experts is quantized stays fused."""
        apart = {piece.module for name, piece in self.pieces.items() if name in quantized}
        whole = {name: piece.tensor for name, piece in self.pieces.items() if piece.module not in apart}
        return frozenset(whole.get(name, name) for name in self.names - quantized)


def loading_notes(model: nn.Module, store: Store, written: dict[str, str], asymmetric: bool) -> list[str]:
    """What to know of who loads quantized experts; ``written``: name on disk by linear of the model."""
    own = {name for name in written if EXPERT.fullmatch(name)} if experts_of(model) else set()
    pieces = store.pieces if isinstance(store, SplitStore) else {}
    fused = next((written[name] for name in sorted(own) if f"{written[name]}.weight" in pieces), None)
    apart = any(module.layout.scaled for module in experts_of(model).values())  # those transformers takes apart itself
    if fused is not None:
        return [
            f"this checkpoint stores experts in fused tensors; quantized they are written one by one, as {fused}, which "
            f"nearplane loads, transformers {'as well' if apart else 'does not'}, and other engines as docs/experts.md says"
        ]
    if own and asymmetric:
        return ["nearplane loads asymmetric experts, transformers does not: it merges them without their zero points"]
    return []


def unread(model: nn.Module) -> str | None:
    """A parameter that transformers merges from experts' weights, in a module that was not taken apart."""
    merges = [t for t in get_model_conversion_mapping(model) if _merges_experts(t)]
    targets = tuple(target.rpartition(".")[2] for rule in merges for target in rule.target_patterns)
    large = (name for name, value in model.named_parameters() if value.dim() == 3)
    return next((name for name in large if name.rpartition(".")[2] in targets), None)


def copied(store: Store, quantized: set[str]) -> frozenset[str]:
    """Names of a source's tensors to be written beside the ``quantized`` ones."""
    return store.rejoined(quantized) if isinstance(store, SplitStore) else store.names - quantized


def split(model: nn.Module, store: Store) -> Store:
    """The store, its fused tensors split. NearplaneError for a shape that is not the model's, or a layout unknown."""
    experts = experts_of(model)
    fused = {f"{path}.{name}": (path, name) for path, module in experts.items() for name in module.shapes}
    if not fused:
        return store
    transforms, prefix = get_model_conversion_mapping(model), getattr(model, "base_model_prefix", "")
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    others = [t for t in transforms if isinstance(t, WeightConverter) and not _merges_experts(t)]
    state = dict.fromkeys([*model.state_dict(), *fused], True)
    pieces: dict[str, Piece] = {}
    for tensor in sorted(store.names):
        key, pattern = rename_source_key(tensor, renamings, others, prefix, state)
        if key not in fused:
            continue
        path, name = fused[key]
        module = experts[path]
        if pattern is not None:
            raise NearplaneError(f"{store.folder} stores {tensor} in a layout that nearplane does not read.")
        if store.shape(tensor) != module.shapes[name]:
            found, asked = list(store.shape(tensor)), list(module.shapes[name])
            raise NearplaneError(f"{store.folder}: {tensor} has shape {found}, config.json asks for {asked}.")
        own = f"{path.rpartition('.')[2]}.{name}"
        prefix_on_disk = tensor.removesuffix(f".{name}") if tensor.endswith(own) else path
        pieces |= _pieces(tensor, path, prefix_on_disk, name, module.layout)
    return SplitStore(store, pieces) if pieces else store


def _pieces(tensor: str, module: str, prefix: str, name: str, layout: Layout) -> dict[str, Piece]:
    """By their names on disk, the experts' tensors in a fused one."""
    found = {}
    for linear, part in layout.parts.items():
        for leaf in [leaf for leaf, own in (("weight", part.weight), ("bias", part.bias)) if own == name]:
            for expert in range(layout.experts):
                disk = f"{prefix}.{expert}.{layout.names[linear]}.{leaf}"
                found[disk] = Piece(tensor, layout, part, expert, module)
    return found
