"""Discovery: blocks and stages of any transformer, found by one probe forward instead of a table of models.

Blocks: the modules of every tower (``towers.py``). Stages: linears of a block that receive the same tensor
(storage, offset, shape, stride) form one stage and share one Hessian; the order of calls is the order of stages. Blocks of
equal structure are probed once, so that only one block per kind is ever read from disk.
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
from nearplane.models.towers import NotBlocks, find_towers, is_linear

# Two tensors are one when they differ by no more than rounding, relative to their size.
SAME = 1e-5


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


@dataclass(frozen=True)
class Site:
    """One weight to quantize. Its module stores it as (out, in), or transposed (GPT-2's Conv1D)."""

    name: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool = False
    adds_to: str | None = None  # its output is added to what goes into this module: the residual stream there

    def weight(self, model: nn.Module) -> Tensor:
        """The (out, in) view of the live weight."""
        weight = model.get_submodule(self.name).weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight


Stage = list[Site]


@dataclass(frozen=True)
class Block:
    """One transformer block: its stages in call order, and the linears that the probe did not reach."""

    name: str
    stages: list[Stage]
    unreached: list[str] = field(default_factory=list)
    tower: str = ""  # the list that it is in
    shape: tuple[int, ...] = ()  # of the hidden state, for the one sample of the probe

    @property
    def sites(self) -> list[Site]:
        """All sites, in call order."""
        return [site for stage in self.stages for site in stage]

    @property
    def positions(self) -> int:
        """Of the probe's sample."""
        return prod(self.shape[1:-1])


class Stop(Exception):
    """Ends a forward pass once it has shown what was asked."""


def discover(source: Source) -> list[Block]:
    """Find the blocks of the model with their stages, in the order of their calls.

    Reads one block per kind of structure; of a source in sketch mode, nothing.

    Raises:
        NearplaneError: no list of blocks, or the model's forward fails on the probe.
        Unsketchable: the forward fails because it reads a weight by itself, which is not there in sketch mode.
    """
    refused: dict[str, str] = {}
    while True:
        towers = find_towers(source, refused)
        try:
            blocks = _probe(source, towers)
        except NotBlocks as found:
            refused[found.tower] = found.reason
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
            return blocks
        refused |= dict.fromkeys(towers, "the model's forward does not run it")


def _probe(source: Source, towers: dict[str, list[str]]) -> list[Block]:
    """One forward, which opens the first block of each kind. NotBlocks where a list turns out to be no tower."""
    names = [name for blocks in towers.values() for name in blocks]
    tower_of = {name: tower for tower, blocks in towers.items() for name in blocks}
    found: dict[Any, tuple[list[Stage], list[str], Any]] = {}
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
        if kind not in found:
            source.load(name, cpu, dtype)
            try:
                with _record(module) as every, probing(module):
                    output = original(*args, **kwargs)
            finally:
                source.unload(name)
            after = output_hidden(output)
            if after is None or after.shape != hidden.shape:
                raise NotBlocks(tower, f"{name} does not return a hidden state like the one that it is given")
            dense = set(routers(module))
            calls = [call for call in every if call.input is not None and call.name not in dense]
            stages = _stages(calls, after)
            reached = {call.name for call in calls} | dense
            unreached = [n for n, m in module.named_modules() if is_linear(m) and n not in reached]
            found[kind] = stages, unreached, output_rest(output)
        stages, unreached, rest = found[kind]
        rename = [[_below(name, site) for site in stage] for stage in stages]
        blocks[name] = Block(name, rename, [f"{name}.{n}" for n in unreached], tower, tuple(hidden.shape))
        return with_rest(hidden, rest)  # to the end of the forward: a block may run again

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
        source.model(**inputs.probe(source.model, source.folder), **inputs.options(source.model))
    for tower, members in towers.items():
        reached = sum(name in blocks for name in members)
        if 0 < reached < len(members):
            raise NotBlocks(tower, f"the model's forward ran {reached} of its {len(members)} blocks")
    return list(blocks.values())


def load_outside(
    source: Source, blocks: list[str], device: torch.device, dtype: torch.dtype, sample: Mapping[str, Tensor] | None
) -> None:
    """Load everything that runs before or between blocks: all but the blocks and an output head of its own.

    Of a decoder's input embedding, the rows of the tokens in ``sample``, which are all that will run; none: no row.
    """
    head, embedding = head_name(source), embedding_name(source)
    inside = [*blocks] if head is None else [*blocks, head]
    ids = torch.empty(0, dtype=torch.long) if sample is None else sample.get("input_ids")
    rows = {} if embedding is None or ids is None else {embedding: torch.unique(ids)}
    source.load("", device, dtype, skip=inside, rows=rows)


def embedding_name(source: Source) -> str | None:
    """Name of the parameter that is a decoder's input embedding, where it is an ordinary one."""
    if not is_causal(source.model):
        return None
    module = source.model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, each in source.model.named_modules() if each is module), None)
    return f"{name}.weight" if name and isinstance(module, nn.Embedding) else None


def head_name(source: Source) -> str | None:
    """Name of the output head's module, where there is one."""
    head = output_head(source.model)
    return next((name for name, module in source.model.named_modules() if module is head), None)


@contextmanager
def _stopping(head: nn.Module | None) -> Iterator[None]:
    """Stop where the output head begins: its weights are not there."""

    def stop(*_: Any) -> None:
        raise Stop

    handle = None if head is None else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def patched(model: nn.Module, names: list[str], run: Callable[..., Any]) -> Iterator[None]:
    """Replace every block's forward by ``run(k, original, *args, **kwargs)`` for the time being."""
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
    """The hidden state that a block is called with: the first tensor of numbers, unless one is called so."""
    named = kwargs.get("hidden_states")
    given = (*args, named, *kwargs.values())
    return next((x for x in given if isinstance(x, Tensor) and x.is_floating_point()), None)


def output_hidden(output: Any) -> Tensor | None:
    """The hidden state that a block returned, bare or first of several."""
    value = output[0] if isinstance(output, tuple) and output else output
    return value if isinstance(value, Tensor) else None


def output_rest(output: Any) -> tuple[Any, ...] | None:
    """What a block returned besides its hidden state; None when it returned the bare tensor."""
    return output[1:] if isinstance(output, tuple) else None


def with_rest(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """A block's output in the shape its model expects."""
    return hidden if rest is None else (hidden, *rest)


def _record(module: nn.Module) -> AbstractContextManager[list[Call]]:
    """Calls of modules inside ``module``. Inputs are kept alive, so that storage identifies them; a model may add to outputs
    in place, so those of linears are copied."""

    def copied(m: nn.Module, output: Any) -> Tensor | None:  # a router may return several
        return output.clone() if is_linear(m) and isinstance(output, Tensor) else None

    return recorded(module, hidden_of, copied)


def _stages(calls: list[Call], hidden: Tensor) -> list[Stage]:
    """Group calls of linears by input tensor, first call first."""
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
    """The module whose input is the residual stream that a linear's output ``y`` is added to, found by its values.

    Some tensor of the block must equal that input plus y: another module's input, or the block's output. A model that scales or
    normalizes what it adds has no such pair, and its sites go without.
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
    """A site of a block's kind, named in one block."""
    point = None if site.adds_to is None else f"{block}.{site.adds_to}".rstrip(".")
    return replace(site, name=f"{block}.{site.name}", adds_to=point)


def _structure(module: nn.Module) -> Any:
    """What makes two blocks alike: classes, names and shapes of everything inside."""
    return tuple(
        (name, type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters(recurse=False)))
        for name, m in module.named_modules()
    )


# Relative to a token's own size: two tensors are one; a share of a sum counts.
SAME, COUNTS = 1e-5, 1e-4
