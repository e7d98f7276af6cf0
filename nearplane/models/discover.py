"""Discovery: blocks and stages of any transformer, found by one probe forward instead of a table of models.

Blocks: the ``nn.ModuleList`` as long as the configuration says. Stages: linears of a block that receive the same tensor
(storage, offset, shape, stride) form one stage and share one Hessian; the order of calls is the order of stages. Blocks of
equal structure are probed once, so that only one block per kind is ever read from disk.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nearplane.core.errors import NearplaneError
from nearplane.models.experts import EXPERT, probing, routers
from nearplane.models.source import Source

PROBE_TOKENS = 8
# Two tensors are one when they differ by no more than rounding, relative to their size.
SAME = 1e-5


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

    @property
    def sites(self) -> list[Site]:
        """All sites, in call order."""
        return [site for stage in self.stages for site in stage]


class Stop(Exception):
    """Ends a forward pass once it has shown what was asked."""


def discover(source: Source) -> list[Block]:
    """Blocks of the model with their stages, in order. Reads one block per kind of structure."""
    names = block_names(source)
    found: dict[Any, tuple[list[Stage], list[str], Any]] = {}
    blocks: list[Block] = []
    cpu, dtype = torch.device("cpu"), torch.float32

    def probe(k: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module, name = source.model.get_submodule(names[k]), names[k]
        kind = _structure(module)
        if kind not in found:
            source.load(name, cpu, dtype)
            with _record(module) as calls, probing(module):
                output = original(*args, **kwargs)
            dense = set(routers(module))
            stages = _stages([call for call in calls if call.name not in dense], output_hidden(output))
            reached = {c.name for c in calls} | dense
            unreached = [n for n, m in module.named_modules() if is_linear(m) and n not in reached]
            found[kind] = stages, unreached, output_rest(output)
            source.unload(name)
        stages, unreached, rest = found[kind]
        rename = [[_below(name, site) for site in stage] for stage in stages]
        blocks.append(Block(name, rename, [f"{name}.{n}" for n in unreached]))
        if k == len(names) - 1:
            raise Stop
        return with_rest(hidden_of(args, kwargs), rest)

    load_outside(source, names, cpu, dtype)
    tokens = torch.arange(1, PROBE_TOKENS + 1)[None] % source.config.get_text_config().vocab_size
    with patched(source.model, names, probe):
        try:
            source.model(input_ids=tokens, use_cache=False)
        except Stop:
            pass
    if len(blocks) != len(names):
        raise NearplaneError(
            f"{source.folder}: the model's forward ran {len(blocks)} of its {len(names)} blocks; this architecture "
            f"({source.config.model_type}) is not supported."
        )
    return blocks


def block_names(source: Source) -> list[str]:
    """Module names of the transformer blocks."""
    depth = source.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in source.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(is_linear(m) for m in module.modules())
    ]
    if not lists:
        raise NearplaneError(
            f"{source.folder}: no list of {depth} blocks was found in {type(source.model).__name__}; "
            "this architecture is not supported."
        )
    # Some models keep small per-layer lists beside the blocks: the blocks are where the parameters are.
    name, module = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return [f"{name}.{i}" for i in range(len(module))]


def load_outside(source: Source, blocks: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Load everything that runs before or between blocks: all but the blocks and an output head of its own."""
    head = head_name(source)
    inside = [*blocks] if head is None else [*blocks, head]
    source.load("", device, dtype, skip=inside)


def head_name(source: Source) -> str | None:
    """Name of the output head's module, where there is one."""
    head = source.model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in source.model.named_modules() if module is head), None)


def is_linear(module: nn.Module) -> bool:
    """Modules whose weight can become a site."""
    return isinstance(module, nn.Linear | Conv1D)


def linears_besides(model: nn.Module, quantized: set[str]) -> list[str]:
    """The linears that stay dense, which a configuration has to name, in the model's order."""
    return [name for name, module in model.named_modules() if is_linear(module) and name not in quantized]


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


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state a block is called with."""
    value = args[0] if args else kwargs["hidden_states"]
    assert isinstance(value, Tensor)
    return value


def output_hidden(output: Any) -> Tensor:
    """The hidden state a block returned."""
    value = output[0] if isinstance(output, tuple) else output
    assert isinstance(value, Tensor)
    return value


def output_rest(output: Any) -> tuple[Any, ...] | None:
    """What a block returned besides its hidden state; None when it returned the bare tensor."""
    return output[1:] if isinstance(output, tuple) else None


def with_rest(hidden: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """A block's output in the shape its model expects."""
    return hidden if rest is None else (hidden, *rest)


class _Call(NamedTuple):
    """One call inside a block; the tensors are kept alive, so that storage identifies them."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor | None


@contextmanager
def _record(module: nn.Module) -> Iterator[list[_Call]]:
    """Every call of a module inside ``module`` that takes one tensor, in the order in which calls begin."""
    calls: list[_Call] = []
    hooks = []
    for name, child in module.named_modules():

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            if isinstance(x, Tensor) and x.is_floating_point():
                calls.append(_Call(name, m, x, None))

        def after(m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            if is_linear(m) and isinstance(output, Tensor):  # not a router's several
                number = max(i for i, call in enumerate(calls) if call.name == name)
                calls[number] = calls[number]._replace(output=output.clone())  # a model may add to it in place

        hooks.append(child.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(child.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def _stages(calls: list[_Call], hidden: Tensor) -> list[Stage]:
    """Group calls of linears by input tensor, first call first."""
    stages: dict[Any, Stage] = {}
    seen: set[str] = set()
    outside = [call for call in calls if EXPERT.fullmatch(call.name) is None]  # experts add to a sum of their own
    for name, module, x, y in calls:
        if name in seen or not is_linear(module):
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


def _stream_point(y: Tensor | None, calls: list[_Call], hidden: Tensor) -> str | None:
    """The module whose input is the residual stream that a linear's output ``y`` is added to, found by its values.

    Some tensor of the block must equal that input plus y: another module's input, or the block's output. A model that scales or
    normalizes what it adds has no such pair, and its sites go without.
    """
    if y is None or y.numel() != hidden.numel():
        return None
    inputs = {call.name: call.input.reshape(y.shape) for call in reversed(calls) if call.input.numel() == y.numel()}
    size = float(y.norm())
    for name, before in inputs.items():  # the first call of a module wins
        for after in (*inputs.values(), hidden.reshape(y.shape)):
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
