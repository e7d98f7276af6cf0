"""Seeing a linear's input: rows are tokens, in the order the model shows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nearplane.models.discover import Stop


@contextmanager
def capture(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the module's input (tokens, in) and end the forward there: nothing further on is needed."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        seen.append(x.reshape(-1, x.shape[-1]))
        raise Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
