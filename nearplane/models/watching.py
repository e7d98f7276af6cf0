"""Watching a forward: what goes into every module and comes out of it, and when two such tensors are one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Relative to a token's own size: two tensors are one; a share of a sum counts.
SAME, COUNTS = 1e-5, 1e-4


class Call(NamedTuple):
    """One call of a module, and what was kept of its input and output."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def shares_of(total: Tensor, parts: list[Any]) -> list[float] | None:
    """Weights of a sum of ``parts`` that is ``total``, zero where a part does not count; None if there is no such sum."""
    if not parts:
        return None
    size = total.norm(dim=1, keepdim=True).clamp_min(1e-30)
    columns = torch.stack([(part / size).flatten() for part in parts], 1).double().cpu()
    wanted = (total / size).flatten().double().cpu()
    length = columns.norm(dim=0).clamp_min(1e-30)
    share = torch.linalg.lstsq(columns / length, wanted[:, None], driver="gelsd").solution[:, 0] / length
    if not same(total, sum((part * float(c) for part, c in zip(parts, share, strict=True)), torch.zeros_like(total))):
        return None
    amount = [float(c) * float(n) for c, n in zip(share, length, strict=True)]
    return [float(c) if abs(a) > COUNTS else 0.0 for c, a in zip(share, amount, strict=True)]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal up to rounding, token by token."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(((a - b).norm(dim=1) <= SAME * b.norm(dim=1)).all())


def fits(a: Tensor | None, like: Tensor) -> bool:
    """Whether two tensors have one shape."""
    return a is not None and a.shape == like.shape


def rows_of(x: Tensor) -> Tensor:
    """A copy, its rows tokens."""
    return x.detach().reshape(-1, x.shape[-1]).clone()


def watching(model: nn.Module) -> AbstractContextManager[list[Call]]:
    """Every call of a module and copies of its tensors, rows of tokens."""

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        return returned(model, args[0] if args else kwargs.get("hidden_states"))

    def returned(_: nn.Module, x: Any) -> Tensor | None:
        return rows_of(x) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 else None

    return recorded(model, given, returned)


@contextmanager
def recorded(
    model: nn.Module,
    given: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None],
    returned: Callable[[nn.Module, Any], Tensor | None],
) -> Iterator[list[Call]]:
    """Every call of a module, in the order in which calls begin, with what is to be kept of its arguments and its output."""
    calls: list[Call] = []
    hooks = []
    for name, module in model.named_modules():

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            calls.append(Call(name, m, given(args, kwargs), None))

        def after(m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            # None where the calls have been cleared meanwhile
            number = max((i for i, call in enumerate(calls) if call.name == name), default=None)
            if number is not None:
                calls[number] = calls[number]._replace(output=returned(m, output))

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()
