"""Record what modules of a running model are given and return, and compare tensors by value.

Discovery (``discover.py``) and rotations (``transforms/roles.py``) find out what a model does from such records.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Relative to a token's norm: the largest difference of equal tensors; the smallest part of a sum that counts.
SAME, COUNTS = 1e-5, 1e-4


class Call(NamedTuple):
    """A recorded call of a module, with the tensors that were kept of its input and its output."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


@contextmanager
def patched(model: nn.Module, names: list[str], run: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of every block while inside, with gradients off.

    Args:
        model: the model.
        names: names of the blocks.
        run: called as ``run(k, original, *args, **kwargs)`` with the block's number and its own forward.
    """
    modules = [model.get_submodule(name) for name in names]

    def bind(k: int, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _self, *args, **kwargs: run(k, original, *args, **kwargs)

    for k, module in enumerate(modules):
        module.forward = types.MethodType(bind(k, module.forward), module)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            del module.forward


def watching(model: nn.Module) -> AbstractContextManager[list[Call]]:
    """Record every call in ``model`` while inside, with copies of first inputs and outputs as (tokens, width)."""

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
    """Record every call of a module in ``model`` while inside.

    Args:
        model: the model to hook.
        given: picks the tensor to keep from a call's arguments and keyword arguments.
        returned: picks the tensor to keep from a module's output.

    Yields:
        Calls in the order in which they begin; outputs are filled in as calls end. The list may be cleared meanwhile.
    """
    calls: list[Call] = []
    hooks = []
    for name, module in model.named_modules():

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            calls.append(Call(name, m, given(args, kwargs), None))

        def after(m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            # None where the caller has cleared the list meanwhile
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


def rows_of(x: Tensor) -> Tensor:
    """Copy a tensor of shape (..., width) to (tokens, width)."""
    return x.detach().reshape(-1, x.shape[-1]).clone()


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether ``a`` and ``b``, (tokens, width), are equal up to rounding in every token."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(((a - b).norm(dim=1) <= SAME * b.norm(dim=1)).all())


def gain_of(module: nn.Module, like: Tensor) -> Tensor:
    """Return what a norm or a scale multiplies each feature by, from its answer to ones; (width,), up to a common factor.

    Args:
        module: takes a tensor like ``like`` alone.
        like: (..., width).
    """
    gain: Tensor = module(torch.ones_like(like)).reshape(-1, like.shape[-1])[0]
    return gain


def scales_of(y: Tensor, passed: Tensor, gain: Tensor) -> Tensor:
    """Return the factor of each token, (tokens,), with which ``passed`` is nearest to factor x gain x y; 0 where that is 0.

    Args:
        y: (tokens, width), what a norm or a scale was given.
        passed: (tokens, width), what came of it.
        gain: (width,).
    """
    shaped = y * gain
    return ((passed * shaped).sum(1) / shaped.square().sum(1)).nan_to_num(0, 0, 0)


def fits(a: Tensor | None, like: Tensor) -> bool:
    """Return whether ``a`` has the shape of ``like``."""
    return a is not None and a.shape == like.shape


def shares_of(total: Tensor, parts: list[Any]) -> list[float] | None:
    """Solve for the weights of ``parts`` in a sum that equals ``total``, by least squares.

    Args:
        total: (tokens, width).
        parts: tensors of the same shape.

    Returns:
        One weight a part, zero for a part below ``COUNTS`` of the sum; None if no sum equals ``total`` up to rounding.
    """
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
