"""What blocks hand to each other: the hidden state, and values that one block writes into a container and another reads.

A container is a dictionary, a list or a plain object among a block's arguments, such as the dictionary of keys and values that
Gemma 4's last blocks share. A block in whose place a stored hidden state is returned must leave its containers as the block
itself would have left them. ``Watch`` finds out what a block has written, ``put`` writes it again.

transformers' caches are no containers here: each block reads only its own keys and values in one.
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from nearplane.core.errors import NearplaneError

# Where a container is among the arguments of a block: its keyword or its number, and numbers inside of tuples.
Argument = tuple[str | int, ...]
DEEPEST = 8


def containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Argument, Any]:
    """Find the outermost containers among a block's arguments, by argument."""
    found: dict[Argument, Any] = {}

    def search(path: Argument, value: Any) -> None:
        if isinstance(value, tuple):
            for number, part in enumerate(value):
                search((*path, number), part)
        elif _is_container(value):
            found[path] = value

    for number, value in enumerate(args):
        search((number,), value)
    for name, value in kwargs.items():
        search((name,), value)
    return found


class Watch:
    """What a block writes into its containers: made before the block runs, asked afterwards."""

    def __init__(self, containers: dict[Argument, Any]) -> None:
        self.containers = containers
        self._before = {path: copied(value) for path, value in self.containers.items()}
        self._versions = [(value, value._version) for value in tensors(self._before)]

    def written(self, block: str) -> dict[Argument, Any]:
        """Return what the containers hold that the block has written into, by argument.

        Raises:
            NearplaneError: the block has changed a tensor in a container in place, which other forwards still need.
        """
        if any(value._version != version for value, version in self._versions):
            raise NearplaneError(
                f"{block} changes a tensor in place that it shares with other blocks beside the hidden state; nearplane runs "
                "blocks one by one, and follows only values that a block puts into a dictionary, a list or an object."
            )
        return {path: copied(value) for path, value in self.containers.items() if not alike(self._before[path], value)}


def put(container: Any, content: Any) -> None:
    """Let a container hold ``content``, a copy of a container of its kind. Containers inside are filled, not replaced."""
    if isinstance(container, list):
        held = {number: value for number, value in enumerate(container)}
        container[:] = [_filled(held.get(number), value) for number, value in enumerate(content)]
        return
    place: Any = container if isinstance(container, MutableMapping) else vars(container)
    wanted = content if isinstance(content, MutableMapping) else vars(content)
    for key in [key for key in place if key not in wanted]:
        del place[key]
    for key, value in wanted.items():
        place[key] = _filled(place.get(key), value)


def copied(value: Any, change: Callable[[Any], Any] = lambda part: part, depth: int = 0) -> Any:
    """Copy a value and all containers inside. Tensors, numbers and the like are what ``change`` makes of them."""
    if depth > DEEPEST or not (isinstance(value, tuple) or _is_container(value)):
        return change(value)
    if isinstance(value, tuple | list):
        parts = [copied(part, change, depth + 1) for part in value]
        return parts if isinstance(value, list) else type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    result = copy.copy(value)
    place: Any = result if isinstance(value, MutableMapping) else vars(result)
    for key, part in list(place.items()):
        place[key] = copied(part, change, depth + 1)
    return result


def tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield every tensor in a value, in the order of its parts."""
    if isinstance(value, Tensor):
        yield value
        return
    if depth > DEEPEST:
        return
    for _, part in _parts(value):
        yield from tensors(part, depth + 1)


def alike(a: Any, b: Any, depth: int = 0) -> bool:
    """Tell whether two values have the same parts: the same tensors, and equal values of other kinds."""
    if a is b and not _is_container(a):
        return True
    if isinstance(a, Tensor) or type(a) is not type(b) or depth > DEEPEST:
        return False
    if not isinstance(a, tuple) and not _is_container(a):
        return bool(a == b) if isinstance(a, int | float | str | bytes) else False
    mine, its = dict(_parts(a)), dict(_parts(b))
    return mine.keys() == its.keys() and all(alike(value, its[key], depth + 1) for key, value in mine.items())


def attributes(modules: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """List the tensors in the attributes of modules, other than parameters and buffers, by name of the attribute."""
    found = {
        f"{name}.{key}".lstrip("."): list(tensors(value))
        for name, module in modules.items()
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, str | int | float | None)
    }
    return {name: values for name, values in found.items() if values}


def numbers(content: dict[Argument, Any]) -> int:
    """Count the numbers in the tensors of what was written, each tensor once."""
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in tensors(content)}.values())


def settings_of(module: nn.Module, own: int) -> Any:
    """Return a key of the plain attributes of a block's modules, which decide what blocks of one structure write.

    Args:
        module: the block.
        own: the block's number in its list: attributes of that value are left out.
    """
    return tuple(
        (name, key, value)
        for name, inner in module.named_modules()
        for key, value in sorted(vars(inner).items())
        if isinstance(value, bool | str | float | None) or (isinstance(value, int) and value != own)
    )


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the hidden state among a block's arguments, the first tensor of floats; None if there is none.

    Positional arguments come first, then ``hidden_states``, then other keywords.
    """
    values = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)


def output_hidden(output: Any) -> Tensor | None:
    """Return the hidden state in a block's output: a tensor, or the first of a tuple or list; None for anything else."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, Tensor) else None


def output_rest(output: Any) -> tuple[Any, ...] | list[Any] | None:
    """Return the items behind the hidden state in a block's output; None for a bare tensor."""
    return tuple(output[1:]) if isinstance(output, tuple) else output[1:] if isinstance(output, list) else None


def with_rest(hidden: Tensor, rest: tuple[Any, ...] | list[Any] | None) -> Any:
    """Join a hidden state and ``rest`` to a block's output; a bare tensor if ``rest`` is None."""
    return hidden if rest is None else [hidden, *rest] if isinstance(rest, list) else (hidden, *rest)


def _filled(place: Any, value: Any) -> Any:
    """Return what to put in a container's place: the container that is there, filled, or a copy of the value."""
    if _is_container(value) and type(place) is type(value):
        put(place, value)
        return place
    return copied(value)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, MutableMapping):
        return list(value.items())
    return list(vars(value).items()) if _is_container(value) else []


def _is_container(value: Any) -> bool:
    """Return whether a value can be written into: a dictionary, a list, or an object of a class with attributes."""
    if isinstance(value, list | MutableMapping):
        return True
    fixed = isinstance(value, Cache | nn.Module | Tensor | PreTrainedConfig | type | torch.dtype | torch.device)
    return hasattr(value, "__dict__") and not fixed and not callable(value)
