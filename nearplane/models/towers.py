"""Where the blocks of a model are: its towers, the lists of modules that a hidden state passes one after another.

A decoder has one, an encoder-decoder two, a pair of image and text models two, and a model that halves its images as it
goes one per size. A list is a tower if it is as long as some number of layers in the configuration (of any length where
the configuration, as timm's, has no such number) and if, in the probe forward, each of its modules returns a hidden state
of the shape that it was given. Of nested lists the outermost counts.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.models.source import Source

# What towers are called besides their own names: in words that the names of their modules hold.
ALIASES = {
    "text": ("text", "language"),
    "vision": ("vision", "visual", "image"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
# Numbers of layers in a configuration: num_hidden_layers, n_layer, encoder_layers, depths, ...
DEPTH = re.compile(r"(layers?|depths?|blocks)$")


class NotBlocks(Exception):
    """A list of modules through which no hidden state passes in turn."""

    def __init__(self, tower: str, reason: str) -> None:
        super().__init__(reason)
        self.tower, self.reason = tower, reason


def find_towers(source: Source, refused: dict[str, str]) -> dict[str, list[str]]:
    """Names of the blocks of each list that may be a tower; ``refused``: lists that are none, with the reason."""
    lengths = depths(source.config.to_dict())
    found: dict[str, list[str]] = {}

    def search(name: str, module: nn.Module) -> None:
        fits = _is_list(module) and (not lengths or len(module) in lengths)  # type: ignore[arg-type]
        if fits and name not in refused:
            found[name] = [f"{name}.{i}" for i, _ in enumerate(module.children())]
            return
        for child, inner in module.named_children():
            search(f"{name}.{child}".lstrip("."), inner)

    search("", source.model)
    if not found:
        counts = " or ".join(str(n) for n in sorted(lengths)) or "any number of"
        why = "".join(f"; {name}: {reason}" for name, reason in refused.items())
        raise NearplaneError(
            f"{source.folder}: no list of {counts} blocks was found in {type(source.model).__name__}{why}; "
            "this architecture is not supported."
        )
    return found


def chosen_towers(words: Sequence[str], towers: Sequence[str], others: Iterable[str] = ()) -> set[str]:
    """The towers that a user names: by a list's name or a module that it is in, or as text, vision, encoder or decoder.

    SettingError for a word that names none, or towers of several modules. ``others``: linears that are in no tower.
    """
    found: set[str] = set()
    for word in words:
        parts = {tower: _part(word, tower) for tower in towers}
        named = {tower for tower, part in parts.items() if part}
        if not named or len({parts[tower] for tower in named}) > 1:
            problem = "may be several of this model's" if named else "names none of this model's"
            if not named and any(_part(word, name) for name in others):
                problem = "is a part of this model that does not run on what it is calibrated on"
            raise SettingError(f"towers: {word!r} {problem}; its towers are {', '.join(towers)}.")
        found |= named
    return found


def _part(word: str, tower: str) -> str:
    """The module by which a word names a tower: the beginning of its name up to there; empty where it does not."""
    names = tower.split(".")
    for stop, name in enumerate(names, 1):
        start = ".".join(names[:stop])
        if word in (start, name) or any(alias in name for alias in ALIASES.get(word, ())):
            return start
    return ""


def main_tower(source: Source) -> list[str]:
    """Names of the blocks where most parameters are: small lists of as many modules may lie beside them."""

    def size(names: list[str]) -> int:
        return sum(p.numel() for name in names for p in source.model.get_submodule(name).parameters())

    return max(find_towers(source, {}).values(), key=size)


def depths(config: dict[str, Any]) -> set[int]:
    """Every number of layers that a configuration names."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= depths(value)
        elif DEPTH.search(str(key)):
            values = value if isinstance(value, list | tuple) else [value]
            found |= {number for number in values if type(number) is int and number > 0}
    return found


def is_linear(module: nn.Module) -> bool:
    """Modules whose weight can become a site."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_besides(model: nn.Module, quantized: set[str]) -> list[str]:
    """The linears that stay dense, which a configuration has to name, in the model's order."""
    return [name for name, module in model.named_modules() if is_linear(module) and name not in quantized]


def _is_list(module: nn.Module) -> bool:
    """A list of modules with linears inside, or of several such lists' elements; a list of linears is none."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    return any(is_linear(m) for m in module.modules()) and not any(is_linear(child) for child in children)
