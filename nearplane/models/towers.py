"""Find the towers of a model: lists of modules that a hidden state passes one after another.

A decoder has one tower. An encoder-decoder has two, and so has a pair of image and text models. A model that halves its
images as it goes has one per size. A list can be a tower if its length is some number of layers in the configuration; any
length will do if the configuration has no such number, as timm's. In the probe forward, each module must return a hidden
state of its input's shape (``discover.py``). Of nested lists, the outermost is the tower.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.models.source import Source

# Words for towers besides their own names -> words in the names of their modules.
ALIASES = {
    "text": ("text", "language"),
    "vision": ("vision", "visual", "image"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
# Numbers of layers in a configuration: num_hidden_layers, n_layer, encoder_layers, depths, ... ALBERT's groups are its blocks.
DEPTH = re.compile(r"(layers?|depths?|blocks|hidden_groups)$")


class NotBlocks(Exception):
    """The finding that a list of modules is no tower: no hidden state passes through them in turn."""

    def __init__(self, tower: str, reason: str) -> None:
        """Refuse the list ``tower`` for ``reason``."""
        super().__init__(reason)
        self.tower, self.reason = tower, reason


def find_towers(source: Source, refused: dict[str, str]) -> dict[str, list[str]]:
    """List the blocks of every list of modules that may be a tower.

    Args:
        source: the model.
        refused: reason by name of each list that is known to be no tower.

    Returns:
        Names of blocks, by name of the list.

    Raises:
        NearplaneError: no list is left.
    """
    lengths = depths(source.config.to_dict())
    lists: dict[str, list[str]] = {}

    def search(name: str, module: nn.Module) -> None:
        eligible = is_list(module) and (not lengths or len(module) in lengths)  # type: ignore[arg-type]
        if eligible and name not in refused:
            lists[name] = [f"{name}.{i}" for i, _ in enumerate(module.children())]
            return
        for child, inner in module.named_children():
            search(f"{name}.{child}".lstrip("."), inner)

    search("", source.model)
    if not lists:
        counts = " or ".join(str(n) for n in sorted(lengths)) or "any number of"
        why = "".join(
            f"; {name}: {reason}" for name, reason in {**_without_linears(source, lengths), **refused}.items()
        )
        raise NearplaneError(
            f"{source.folder}: no list of {counts} blocks was found in {type(source.model).__name__}{why}; "
            "this architecture is not supported."
        )
    return lists


def _without_linears(source: Source, lengths: set[int]) -> dict[str, str]:
    """Tell of lists of the right length whose modules hold no linear, as SqueezeBERT's convolutions and I-BERT's own classes."""
    found = {}
    for name, module in source.model.named_modules():
        fits = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) in lengths
        if fits and not any(is_linear(m) for m in module.modules()):
            kinds = {type(m).__name__ for m in module.modules() if isinstance(getattr(m, "weight", None), Tensor)}
            kinds = {kind for kind in kinds if "Norm" not in kind and kind != "Embedding"}
            found[name] = f"its modules hold no linear, but {', '.join(sorted(kinds))}"
    return found


def refuse_shared(source: Source, blocks: Iterable[str]) -> None:
    """Raise NearplaneError if a linear of one block has the weight of another's, as in Zamba. ``blocks``: their names."""
    names = tuple(f"{block}." for block in blocks)
    for name, origin in (getattr(source.model, "all_tied_weights_keys", None) or {}).items():
        if name.startswith(names) and is_linear(source.model.get_submodule(name.rpartition(".")[0])):
            raise NearplaneError(
                f"{source.folder}: {name} is one weight with {origin}; nearplane solves each block by itself, and does not "
                "support blocks that share weights."
            )


def main_tower(source: Source) -> list[str]:
    """Return the blocks of the tower with most parameters. Small lists of equal length may lie beside it."""

    def size(names: list[str]) -> int:
        return sum(p.numel() for name in names for p in source.model.get_submodule(name).parameters())

    return max(find_towers(source, {}).values(), key=size)


def chosen_towers(words: Sequence[str], towers: Sequence[str], others: Iterable[str] = ()) -> set[str]:
    """Return the towers that a user's words name.

    A word is the name of a list, of a module around the list, or one of text, vision, encoder and decoder.

    Args:
        words: the words.
        towers: names of the model's towers.
        others: names of linears outside of every tower, to tell an unknown word from an unused part.

    Raises:
        SettingError: a word names no tower, or towers in several modules.
    """
    chosen: set[str] = set()
    for word in words:
        parts = {tower: _part(word, tower) for tower in towers}
        named = {tower for tower, part in parts.items() if part}
        if not named or len({parts[tower] for tower in named}) > 1:
            problem = "may be several of this model's" if named else "names none of this model's"
            if not named and any(_part(word, name) for name in others):
                problem = "is a part of this model that does not run on what it is calibrated on"
            raise SettingError(f"towers: {word!r} {problem}; its towers are {', '.join(towers)}.")
        chosen |= named
    return chosen


def depths(config: dict[str, Any]) -> set[int]:
    """Return every number of layers in a configuration, given as a dictionary."""
    numbers: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            numbers |= depths(value)
        elif DEPTH.search(str(key)):
            values = value if isinstance(value, list | tuple) else [value]
            numbers |= {number for number in values if type(number) is int and number > 0}
    return numbers


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an ``nn.Linear`` or a ``Conv1D``, whose weight can be quantized."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_besides(model: nn.Module, quantized: set[str]) -> list[str]:
    """List the linears outside of ``quantized``, in the model's order: those that stay dense."""
    return [name for name, module in model.named_modules() if is_linear(module) and name not in quantized]


def _part(word: str, tower: str) -> str:
    """Return the part of a tower's name, up to the module that a word names; empty if the word names none."""
    names = tower.split(".")
    for stop, name in enumerate(names, 1):
        start = ".".join(names[:stop])
        if word in (start, name) or any(alias in name for alias in ALIASES.get(word, ())):
            return start
    return ""


def is_list(module: nn.Module) -> bool:
    """Return whether a module is a list of blocks: modules with linears inside that are no linears themselves.

    A list of lists is none, because no forward runs through a bare list.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    bare = any(is_linear(child) or isinstance(child, nn.ModuleList | nn.ModuleDict) for child in module.children())
    return not bare and any(is_linear(inner) for inner in module.modules())
