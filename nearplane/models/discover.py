"""Find the blocks and stages of any transformer by one probe forward, without a table of models.

A tower (``towers.py``) is a list of blocks. The linears of a block that read the same tensor (address, shape, strides)
form a stage and share one Hessian. Stages are in the order of their first calls. Blocks of equal structure are probed
once, so that only one block of each kind is read from disk. The same forward shows what adds to the residual stream:
tensors of a block are compared by value. Rotations use the same hooks and the same comparisons.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.models import inputs
from nearplane.models.experts import EXPERT, probing, routers
from nearplane.models.inputs import ForwardFailed, is_causal, output_head
from nearplane.models.sketch import Unsketchable
from nearplane.models.source import Source
from nearplane.models.towers import NotBlocks, find_towers, is_linear, refuse_shared

# Relative to a token's norm: the largest difference of equal tensors; the smallest part of a sum that counts.
SAME, COUNTS = 1e-5, 1e-4


class Call(NamedTuple):
    """A recorded call of a module, with the tensors that were kept of its input and its output."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


@dataclass(frozen=True)
class Site:
    """A weight to quantize. Its module stores the weight as (out, in), or transposed as GPT-2's Conv1D does."""

    name: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool = False
    adds_to: str | None = None  # the module whose input is the residual stream that the output is added to

    def weight(self, model: nn.Module) -> Tensor:
        """Return the live weight in ``model``, a view of shape (out, in)."""
        weight = model.get_submodule(self.name).weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight


Stage = list[Site]


@dataclass(frozen=True)
class Block:
    """A transformer block: its stages in call order, and the linears that the probe did not reach."""

    name: str
    stages: list[Stage]
    unreached: list[str] = field(default_factory=list)
    tower: str = ""  # name of the list that holds the block
    shape: tuple[int, ...] = ()  # of the hidden state in the probe: (1, positions, ..., width)

    @property
    def sites(self) -> list[Site]:
        """Sites of all stages, in call order."""
        return [site for stage in self.stages for site in stage]

    @property
    def positions(self) -> int:
        """Positions of the probe's sample."""
        return prod(self.shape[1:-1])


class Stop(Exception):
    """Raised by a hook to end a forward early."""


def discover(source: Source) -> list[Block]:
    """Find the blocks of a model and their stages by one forward over a small sample.

    One block of each kind is read from disk; in sketch mode, none.

    Args:
        source: the opened model.

    Returns:
        Blocks in the order of their calls. Names of sites begin at the model.

    Raises:
        NearplaneError: no list of blocks is found, blocks share weights, or the forward fails on the sample.
        Unsketchable: in sketch mode, the forward fails because the model reads a weight by itself.
    """
    refused: dict[str, str] = {}
    while True:
        towers = find_towers(source, refused)
        try:
            blocks = _probe(source, towers)
        except NotBlocks as refusal:
            refused[refusal.tower] = refusal.reason
            continue
        except ForwardFailed as error:
            if not source.sketch:
                raise
            word = (str(error.__cause__).strip().splitlines() or ["no word"])[0][:100]
            raise Unsketchable(
                f"{source.folder}: a model of type {source.config.model_type} cannot be probed without its weights "
                f"({word}); nearplane inspect reads one block of it."
            ) from error
        if blocks:
            refuse_shared(source, [block.name for block in blocks])
            return blocks
        refused |= dict.fromkeys(towers, "the model's forward does not run it")


def load_outside(
    source: Source, blocks: list[str], device: torch.device, dtype: torch.dtype, sample: Mapping[str, Tensor] | None
) -> None:
    """Load everything that runs before or between blocks: all parameters outside of the blocks and the output head.

    Args:
        source: the model.
        blocks: names of the blocks.
        device: device of the loaded tensors.
        dtype: dtype of the loaded floats.
        sample: arguments of the forward. Only the rows of its tokens are read from a decoder's input embedding; None: no row.
    """
    head, embedding = head_name(source), embedding_name(source)
    inside = [*blocks] if head is None else [*blocks, head]
    ids = torch.empty(0, dtype=torch.long) if sample is None else sample.get("input_ids")
    rows = {} if embedding is None or ids is None else {embedding: torch.unique(ids)}
    source.load("", device, dtype, skip=inside, rows=rows)


def embedding_name(source: Source) -> str | None:
    """Return the name of the weight of a decoder's input embedding; None unless that is an ``nn.Embedding``."""
    if not is_causal(source.model):
        return None
    module = source.model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, other in source.model.named_modules() if other is module), None)
    return f"{name}.weight" if name and isinstance(module, nn.Embedding) else None


def head_name(source: Source) -> str | None:
    """Return the name of the output head's module; None for a model without one."""
    head = output_head(source.model)
    return next((name for name, module in source.model.named_modules() if module is head), None)


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


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the hidden state among a block's arguments, the first tensor of floats; None if there is none.

    Positional arguments come first, then ``hidden_states``, then other keywords.
    """
    values = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)


def output_hidden(output: Any) -> Tensor | None:
    """Return the hidden state in a block's output, a tensor or the first of a tuple; None for anything else."""
    value = output[0] if isinstance(output, tuple) and output else output
    return value if isinstance(value, Tensor) else None


def output_rest(output: Any) -> tuple[Any, ...] | None:
    """Return the items behind the hidden state in a block's output; None for a bare tensor."""
    return output[1:] if isinstance(output, tuple) else None


def with_rest(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """Join a hidden state and ``rest`` to a block's output; a bare tensor if ``rest`` is None."""
    return hidden if rest is None else (hidden, *rest)


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


def _probe(source: Source, towers: dict[str, list[str]]) -> list[Block]:
    """Run one forward and load the first block of each kind in it.

    Returns no block if the forward runs none. Raises NotBlocks for a list that is no tower.
    """
    names = [name for blocks in towers.values() for name in blocks]
    tower_of = {name: tower for tower, blocks in towers.items() for name in blocks}
    kinds: dict[Any, tuple[list[Stage], list[str], Any]] = {}
    blocks: dict[str, Block] = {}
    cpu, dtype = torch.device("cpu"), torch.float32

    def probe(k: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module, name = source.model.get_submodule(names[k]), names[k]
        tower = tower_of[name]
        if name in blocks:
            raise NotBlocks(tower, f"{name} runs more than once")
        hidden = hidden_of(args, kwargs)
        if hidden is None:
            raise NotBlocks(tower, f"{name} is given no hidden state")
        kind = _structure(module)
        if kind not in kinds:
            source.load(name, cpu, dtype)
            try:
                with _record(module) as recording, probing(module):
                    output = original(*args, **kwargs)
            finally:
                source.unload(name)
            after = output_hidden(output)
            if after is None or after.shape != hidden.shape:
                raise NotBlocks(tower, f"{name} does not return a hidden state like the one that it is given")
            dense = set(routers(module))
            calls = [call for call in recording if call.input is not None and call.name not in dense]
            stages = _stages(calls, after)
            reached = {call.name for call in calls} | dense
            unreached = [n for n, m in module.named_modules() if is_linear(m) and n not in reached]
            kinds[kind] = stages, unreached, output_rest(output)
        stages, unreached, rest = kinds[kind]
        rename = [[_below(name, site) for site in stage] for stage in stages]
        blocks[name] = Block(name, rename, [f"{name}.{n}" for n in unreached], tower, tuple(hidden.shape))
        return with_rest(hidden, rest)  # the forward goes on to its end, to see whether a block runs again

    with inputs.blamed(source.model, source.folder):
        sample = inputs.probe(source.model, source.folder)
    load_outside(source, names, cpu, dtype, sample)
    head = output_head(source.model)
    with (
        patched(source.model, names, probe),
        _stopping(head),
        suppress(Stop),
        inputs.blamed(source.model, source.folder),
    ):
        source.model(**sample, **inputs.options(source.model))
    for tower, members in towers.items():
        reached = sum(name in blocks for name in members)
        if 0 < reached < len(members):
            raise NotBlocks(tower, f"the model's forward ran {reached} of its {len(members)} blocks")
    return list(blocks.values())


@contextmanager
def _stopping(head: nn.Module | None) -> Iterator[None]:
    """Raise ``Stop`` at the output head while inside, because its weights are not loaded."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = None if head is None else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _record(module: nn.Module) -> AbstractContextManager[list[Call]]:
    """Record the calls inside a block, with what identifies stages.

    Inputs are kept alive: their addresses identify them. Outputs of linears are copied: a model may add to them in place.
    """

    def copied(m: nn.Module, output: Any) -> Tensor | None:  # a router may return several
        return output.clone() if is_linear(m) and isinstance(output, Tensor) else None

    return recorded(module, hidden_of, copied)


def _stages(calls: list[Call], hidden: Tensor) -> list[Stage]:
    """Group calls of linears by input tensor, in the order of first calls. ``hidden``: the block's output."""
    stages: dict[Any, Stage] = {}
    seen: set[str] = set()
    outside = [call for call in calls if EXPERT.fullmatch(call.name) is None]  # experts add to a sum of their own
    for name, module, x, y in calls:
        if name in seen or x is None or not is_linear(module):
            continue
        seen.add(name)
        key = (x.data_ptr(), x.shape, x.stride())
        weight = module.weight
        assert isinstance(weight, Tensor)
        transposed = isinstance(module, Conv1D)
        out, width = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        site = Site(
            name, (out, width), transposed, None if EXPERT.fullmatch(name) else _stream_point(y, outside, hidden)
        )
        stages.setdefault(key, []).append(site)
    return list(stages.values())


def _stream_point(y: Tensor | None, calls: list[Call], hidden: Tensor) -> str | None:
    """Find the module whose input is the residual stream that a linear's output ``y`` is added to.

    Another module's input, or the block's output ``hidden``, must equal that input plus y. No tensors fit where a model scales or
    normalizes y before adding it: None.
    """
    if y is None or y.numel() != hidden.numel():
        return None
    like = ((call.name, call.input) for call in reversed(calls))
    before_of = {name: x.reshape(y.shape) for name, x in like if x is not None and x.numel() == y.numel()}
    size = float(y.norm())
    for name, before in before_of.items():  # the first call of a module wins
        for after in (*before_of.values(), hidden.reshape(y.shape)):
            rounding = SAME * float(after.norm())
            if float((after - before - y).norm()) <= rounding + SAME * size < size:
                return name
    return None


def _below(block: str, site: Site) -> Site:
    """Rename a site of a block's kind for one block of that kind."""
    point = None if site.adds_to is None else f"{block}.{site.adds_to}".rstrip(".")
    return replace(site, name=f"{block}.{site.name}", adds_to=point)


def _structure(module: nn.Module) -> Any:
    """Return a key that equal blocks share: classes, names and shapes of all modules inside."""
    return tuple(
        (name, type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters(recurse=False)))
        for name, m in module.named_modules()
    )
