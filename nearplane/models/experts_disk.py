"""Map experts on disk to experts of the model, through transformers' own conversion mapping.

Most checkpoints store each expert by itself, and transformers merges the experts while loading. Read backwards, its mapping
says which linear of which expert a stored name means. Other checkpoints (gpt-oss, Llama 4, Granite) store fused tensors:
``split`` shows each as the tensors of its experts, which are read one by one. Once quantized, such experts are
written under names of their own that vLLM's loaders read: ``experts.7.gate_proj``, ``up_proj``, ``down_proj``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import Store
from nearplane.models.converted import ConvertedStore, grouped
from nearplane.models.experts import EXPERT, Experts, Layout, Part, experts_of

NUMBER = re.compile(r"\.(\d+)(?=\.)")
# Modules whose weights engines never look for as codes, or whose names are listed as linears'.
OWNERS = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
MEMBER = re.compile(r"(.+)\.(\d+)\.(\w+)\.(weight|bias)")
# Names that were written for Granite's experts until vLLM was run, which does not read them.
FORMER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Piece:
    """One expert's weight or bias in the fused tensor ``tensor``."""

    tensor: str
    layout: Layout
    part: Part
    expert: int
    module: str


class SplitStore(Store):
    """A store whose fused tensors appear as the tensors of single experts."""

    def __init__(self, store: Store, pieces: dict[str, Piece]) -> None:
        """Wrap ``store``; ``pieces``: by the name on disk that an expert's tensor gets."""
        self.folder, self.store, self.pieces = store.folder, store, pieces
        self.names = (store.names - {piece.tensor for piece in pieces.values()}) | pieces.keys()

    def get(self, name: str) -> Tensor:
        """Read a tensor; of a fused tensor, only one expert's rows."""
        piece = self.pieces.get(name)
        if piece is None:
            return self.store.get(name)
        rows = self.store.shape(piece.tensor)[0] // piece.layout.experts
        slab = self.store.rows(piece.tensor, piece.expert * rows, rows)
        return piece.part.cut(slab[0] if rows == 1 else slab).contiguous()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads no data."""
        piece = self.pieces.get(name)
        if piece is None:
            return self.store.shape(name)
        whole = torch.empty(self.store.shape(piece.tensor), device="meta")
        return tuple(piece.part.cut(piece.layout.slab(whole, piece.expert)).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; reads no data."""
        return self.store.dtype(self.pieces[name].tensor if name in self.pieces else name)

    def nbytes(self, name: str) -> int:
        """Return a tensor's size in bytes; reads no data."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes: of a fused one the slab of an expert is read."""
        piece = self.pieces.get(name)
        if piece is None:
            return self.store.reading(name)
        return max(self.nbytes(name), self.store.reading(piece.tensor) // piece.layout.experts)

    @property
    def total(self) -> int:
        """Bytes of all tensors on disk."""
        return self.store.total

    def rejoined(self, quantized: set[str]) -> frozenset[str]:
        """Return the names to copy beside the ``quantized`` ones. A layer without a quantized expert stays fused."""
        apart = {piece.module for name, piece in self.pieces.items() if name in quantized}
        whole = {name: piece.tensor for name, piece in self.pieces.items() if piece.module not in apart}
        return self.store.stored(whole.get(name, name) for name in self.names - quantized)


def split(model: nn.Module, store: Store) -> Store:
    """Wrap a store so that fused tensors of experts appear as single ones, and others as transformers converts them.

    Args:
        model: the skeleton, its experts taken apart.
        store: the tensors on disk.

    Returns:
        A ``SplitStore`` or a ``ConvertedStore``; the store itself if no tensor is fused or converted.

    Raises:
        NearplaneError: a fused tensor has a shape that the model does not expect, or an unknown layout.
    """
    experts = experts_of(model)
    fused = {f"{path}.{name}": (path, name) for path, module in experts.items() for name in module.shapes}
    transforms, prefix = get_model_conversion_mapping(model), getattr(model, "base_model_prefix", "")
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    others = [t for t in transforms if isinstance(t, WeightConverter) and not joins_experts(t)]
    if not fused and not others:
        return store
    state = dict.fromkeys([*model.state_dict(), *fused], True)
    keys = {name: renamed(name, renamings, others, prefix, state) for name in sorted(store.names)}
    rules = {
        name: (key, rule) for name, (key, rule) in keys.items() if rule is not None and key in state.keys() - fused
    }
    if rules:
        store = ConvertedStore(store, model, grouped(rules, others))
    pieces: dict[str, Piece] = {}
    for tensor, (key, pattern) in keys.items():
        if key not in fused:
            continue
        path, name = fused[key]
        layout = _stored_layout(experts[path], name, pattern, others, store, tensor)
        own = f"{path.rpartition('.')[2]}.{name}"
        prefix_on_disk = tensor.removesuffix(f".{name}") if tensor.endswith(own) else path
        pieces |= _pieces(tensor, path, prefix_on_disk, name, layout)
    return SplitStore(store, pieces) if pieces else store


def _stored_layout(
    module: Experts, name: str, pattern: str | None, rules: list[WeightConverter], store: Store, tensor: str
) -> Layout:
    """Return the layout of a stored fused tensor: the model's, or transposed as Qwen3-VL's.

    Args:
        module: the model's experts.
        name: the fused parameter that the tensor becomes.
        pattern: source pattern of the rule that converts the tensor; None: there is none.
    """
    stored, wanted = store.shape(tensor), module.shapes[name]
    operations: list[Any] = next((rule.operations for rule in rules if pattern in rule.source_patterns), [])
    turned = len(operations) == 1 and isinstance(operations[0], Transpose) and operations[0].check_dims
    if pattern is not None and not turned:
        raise NearplaneError(f"{store.folder} stores {tensor} in a layout that nearplane does not read.")
    if stored == wanted:
        return module.layout
    if not turned or (stored[0], *stored[:0:-1]) != wanted:
        raise NearplaneError(f"{store.folder}: {tensor} has shape {list(stored)}, config.json asks for {list(wanted)}.")
    parts = {linear: replace(part, transposed=not part.transposed) for linear, part in module.layout.parts.items()}
    return replace(module.layout, parts=parts)


def names_in_model(model: nn.Module, disk_names: Iterable[str]) -> dict[str, str]:
    """Map names in the model to names on disk, by transformers' own renamings.

    These undo old names, a base model's prefix and other names of single experts' weights.

    Args:
        model: the skeleton, its experts taken apart.
        disk_names: names of the stored tensors.
    """
    transforms, experts = get_model_conversion_mapping(model), experts_of(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    merges = [t for t in transforms if joins_experts(t)] if experts else []
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    state |= dict.fromkeys((f"{path}.{name}" for path, module in experts.items() for name in module.shapes), True)
    names = {}
    for name in sorted(disk_names):
        key, pattern = renamed(name, renamings, merges, prefix, state)
        names[_member(experts, merges, name, key, pattern)] = name
    return names


def renamed(
    name: str, renamings: list[WeightRenaming], converters: list[WeightConverter], prefix: str, state: dict[str, Any]
) -> tuple[str, str | None]:
    """Return transformers' name for a stored tensor, and the source pattern of the rule that converts it, if any.

    A name that is the model's own stays where renaming leads nowhere, as in transformers: DeepSeek V4's ``model.norm``.
    """
    key, pattern = rename_source_key(name, renamings, converters, prefix, state)
    return (name, None) if key not in state and name in state else (key, pattern)


def converts(model: nn.Module) -> bool:
    """Return whether transformers converts stored weights of a model while loading, other than experts'.

    One such rule, whatever it names, and transformers loads no packed weights of the model.
    """
    return any(isinstance(t, WeightConverter) and not joins_experts(t) for t in get_model_conversion_mapping(model))


def merges_experts(model: nn.Module) -> bool:
    """Return whether transformers fuses experts that are stored one by one."""
    return any(joins_experts(t) for t in get_model_conversion_mapping(model))


def keep_layout(model: Any, made: Sequence[str]) -> None:
    """Let ``save_pretrained`` write tensors of experts that were fused here as the model's type stores experts.

    transformers reverts the conversions that its own loading used, and these tensors came to it ready made.

    Args:
        model: loaded by transformers; its list of conversions is changed.
        made: names of fused parameters.
    """
    if not made:
        return
    used = getattr(model, "_weight_conversions", None) or []
    current = [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    merges = [t for t in current if isinstance(t, WeightConverter)]
    others = [t for t in current if isinstance(t, WeightRenaming)]
    kept = {_patterns(t) for t in used}
    for name in made:
        for back in [t for t in merges if apply_converters(name, [t.reverse_transform()])[1] is not None]:
            kept.add(_patterns(back))
        stored, _ = apply_converters(name, [t.reverse_transform() for t in merges])
        kept |= {_patterns(t) for t in others if apply_renamings(stored, [t.reverse_transform()]) != stored}
    rules = get_model_conversion_mapping(model)
    known = {_patterns(t) for t in rules}
    model._weight_conversions = [t for t in rules if _patterns(t) in kept] + [
        t for t in used if _patterns(t) not in known
    ]


def _patterns(transform: Any) -> tuple[Any, ...]:
    """Tell two conversions apart."""
    return type(transform).__name__, tuple(transform.source_patterns), tuple(transform.target_patterns)


def unread(model: nn.Module) -> str | None:
    """Return the name of a fused parameter of experts that was not taken apart; None if there is none."""
    merges = [t for t in get_model_conversion_mapping(model) if joins_experts(t)]
    targets = tuple(target.rpartition(".")[2] for rule in merges for target in rule.target_patterns)
    large = (name for name, value in model.named_parameters() if value.dim() == 3)
    return next((name for name in large if name.rpartition(".")[2] in targets), None)


def split_names(model: nn.Module, store: Store, dense: Iterable[str]) -> tuple[Store, list[str]]:
    """Show fused tensors among the ``dense`` ones of a store as the tensors of single experts, and list all by name."""
    whole = split(model, store)
    return whole, sorted((set(dense) & whole.names) | (whole.names - store.names))


def matrices(store: Store, names: Iterable[str]) -> list[str]:
    """List the floating tensors of two or more dimensions among ``names``."""
    return [name for name in names if len(store.shape(name)) > 1 and store.dtype(name).is_floating_point]


def unowned(model: nn.Module, names: Mapping[str, str], matrices: Iterable[str]) -> dict[str, list[str]]:
    """Name modules by their stored matrices that no linear of the model has, but an engine's module may.

    These are matrices that no parameter takes, weights of modules that are neither linears nor embeddings nor
    convolutions, and fused tensors of experts.

    Args:
        model: the skeleton, its experts taken apart.
        names: on disk, by name in the model.
        matrices: names on disk of dense tensors of two or more dimensions.

    Returns:
        By tensor, the names under which an engine may ask for it; tensors that are owned are left out.
    """
    state, modules, found = model.state_dict(), dict(model.named_modules()), dict[str, list[str]]()
    owners = {disk: name.rpartition(".")[0] for name, disk in names.items() if name in state}
    for tensor in matrices:
        parent, _, leaf = tensor.rpartition(".")
        if parent.endswith("experts"):  # engines ask for the module that holds fused tensors
            found[tensor] = [parent, tensor]
        elif leaf == "weight" and not isinstance(modules.get(owners.get(tensor, "")), OWNERS):
            found[tensor] = [parent]
        elif tensor not in owners and leaf not in ("weight", "bias"):
            found[tensor] = [tensor]
    return found


def loading_notes(model: nn.Module, store: Store, written: dict[str, str], asymmetric: bool) -> list[str]:
    """Say which engines load quantized experts.

    Args:
        model: the skeleton, its experts taken apart.
        store: the original tensors.
        written: name on disk by name of each quantized linear.
        asymmetric: whether zero points are stored.
    """
    own = {name for name in written if EXPERT.fullmatch(name)} if experts_of(model) else set()
    pieces = store.pieces if isinstance(store, SplitStore) else {}
    fused = next((written[name] for name in sorted(own) if f"{written[name]}.weight" in pieces), None)
    apart = any(
        module.layout.scaled for module in experts_of(model).values()
    )  # transformers takes Llama 4's apart itself
    if fused is not None:
        return [
            f"this checkpoint stores experts in fused tensors; quantized they are written one by one, as {fused}, which "
            f"nearplane loads, transformers {'as well' if apart else 'does not'}, and other engines as docs/experts.md says"
        ]
    if own and asymmetric:
        return ["nearplane loads asymmetric experts, transformers does not: it merges them without their zero points"]
    return []


def joins_experts(transform: object) -> TypeGuard[WeightConverter]:
    """Return whether a rule stacks single experts' weights, and at most concatenates several linears' rows."""
    if not isinstance(transform, WeightConverter) or not isinstance(transform.operations[0], MergeModulelist):
        return False
    rest = transform.operations[1:]
    return not rest or (len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1)


def _member(
    experts: dict[str, Experts], merges: list[WeightConverter], name: str, key: str, pattern: str | None
) -> str:
    """Return the parameter of an expert that a stored name means, or ``key`` for any other tensor.

    ``key`` is transformers' new name for ``name``; ``pattern`` is the source pattern of the rule that merges it, if any.
    """
    path, _, target = key.rpartition(".")
    if pattern is not None and path in experts:
        rule = next(rule for rule in merges if pattern in rule.source_patterns)
        linears = [linear for linear, part in experts[path].layout.parts.items() if part.weight == target]
        expert = NUMBER.findall(name)[-1]
        return f"{path}.{expert}.{linears[rule.source_patterns.index(pattern)]}.weight"
    match = MEMBER.fullmatch(key)
    if match is None or match[1] not in experts:
        return key
    return f"{match[1]}.{match[2]}.{FORMER.get(match[3], match[3])}.{match[4]}"


def _pieces(tensor: str, module: str, prefix: str, name: str, layout: Layout) -> dict[str, Piece]:
    """Return the experts' tensors in the fused tensor ``tensor``, by the names on disk that they get."""
    pieces = {}
    for linear, part in layout.parts.items():
        for leaf in [leaf for leaf, own in (("weight", part.weight), ("bias", part.bias)) if own == name]:
            for expert in range(layout.experts):
                disk = f"{prefix}.{expert}.{linear}.{leaf}"
                pieces[disk] = Piece(tensor, layout, part, expert, module)
    return pieces
