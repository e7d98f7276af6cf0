"""What a rotation has to know of a model: which tensors make up the residual stream, and who reads and writes it.

Nothing is listed by model: one forward over a few tokens is watched, block by block, and every claim is checked by values.
The stream enters the first block as a weighted sum of embedding rows; a linear writes to it if the stream further on is a
weighted sum of the stream before and outputs of linears; a norm reads it; linears read the norm. Whose columns are
attention heads is found at the first token, which attends to itself alone: what goes into the output projection there
*is* the value projection's output, head by head. Whatever does not fit is a SettingError that says what.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nearplane.core.errors import SettingError
from nearplane.models.discover import (
    block_names,
    head_name,
    hidden_of,
    is_linear,
    load_outside,
    output_hidden,
    patched,
)
from nearplane.models.source import Source

TOKENS = 16
# Relative to a token's own size: two tensors are one; a share of a sum counts.
SAME, COUNTS = 1e-5, 1e-4


@dataclass(frozen=True)
class Norm:
    """A norm that reads the stream: ``u ∘ s + b``, u being x over its size, s and b its own parameters."""

    name: str
    weight: bool
    bias: bool
    unit: float  # the value of its weight at which s = 1: 1, or 0 where s = 1 + weight
    centred: bool  # u is of x less its mean: a LayerNorm


@dataclass(frozen=True)
class Heads:
    """A linear whose columns are attention heads, and where each head's values come from: (linear, its first row)."""

    width: int
    sources: tuple[tuple[str, int], ...]


@dataclass
class Anatomy:
    """Who touches the residual stream of ``width``, by module names."""

    width: int
    embeddings: list[str] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)  # a linear -> the norm it reads, the output head among them
    writes: list[str] = field(default_factory=list)  # linears whose outputs are added to the stream
    heads: list[dict[str, Heads]] = field(default_factory=list)  # one entry a block
    no_heads: str | None = None  # why a block's heads were not found


class Call(NamedTuple):
    """One call of a module, its tensors as they were then; rows are tokens."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def probe_tokens(source: Source) -> Tensor:
    """The tokens that are watched, seeded."""
    vocabulary = source.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def logits(source: Source, device: torch.device, watch: "_Watch | None" = None) -> Tensor:
    """Logits of the probe tokens in float32, in the memory of one block and what is outside of the blocks."""
    names, dtype, head = block_names(source), torch.float32, head_name(source)

    def run(k: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        source.load(names[k], device, dtype)
        before = hidden_of(args, kwargs).clone()
        output = original(*args, **kwargs)
        if watch is not None:
            watch.block(k, before, output_hidden(output))
        source.unload(names[k])
        return output

    load_outside(source, names, device, dtype)
    if head is not None:
        source.load(head, device, dtype)
        if is_tied(source):
            source.model.get_submodule(head).weight = source.model.get_input_embeddings().weight  # type: ignore[operator]
    with patched(source.model, names, run):
        found = source.model(input_ids=probe_tokens(source).to(device), use_cache=False).logits
        if watch is not None:
            watch.outside()
    source.unload("")
    assert isinstance(found, Tensor)
    return found.cpu()


def is_tied(source: Source) -> bool:
    """Whether the output head has no weight of its own: it is the input embedding's."""
    head = head_name(source)
    return head is not None and f"{head}.weight" not in source.names


def examine(source: Source, device: torch.device) -> tuple[Anatomy, Tensor]:
    """Watch a forward of the whole model; its anatomy and its logits. SettingError where the stream cannot be followed."""
    with _watching(source.model) as calls:
        watch = _Watch(source, block_names(source), calls)
        found = logits(source, device, watch)
    return watch.anatomy, found


class _Watch:
    """Follows the stream through a forward as its calls come in."""

    def __init__(self, source: Source, names: list[str], calls: list[Call]) -> None:
        self.source, self.names, self.calls = source, names, calls
        self.anatomy = Anatomy(0)
        self.stream: Tensor | None = None  # behind the last block seen

    def block(self, k: int, before: Tensor, after: Tensor) -> None:
        """Follow the stream through a block; ``calls`` holds what ran since the block before."""
        name = self.names[k]
        inside = [call for call in self.calls if call.name.startswith(name + ".")]
        outside = [call for call in self.calls if not call.name.startswith(name)]
        self.calls.clear()
        x = _rows(before)
        if self.stream is None:
            self.anatomy.width = x.shape[1]
            self._embed(x, outside)
        elif not _same(x, self.stream):
            raise SettingError(self._no(f"what {name} is given is not what the block before returned"))
        self._reached(name, inside)
        known, writers = self._follow(name, x, inside, _rows(after))
        norms = self._norms(known, inside)
        self._readers(norms, inside)
        self.anatomy.writes += [call.name for call in writers]
        self._heads(inside)
        self.stream = _rows(after)

    def outside(self) -> None:
        """What comes behind the last block: a norm and the head that reads it."""
        stream, head = self.stream, head_name(self.source)
        if stream is None or head is None:
            raise SettingError(self._no("it has no blocks or no output head"))
        self._readers(self._norms([stream], self.calls), self.calls)
        if head not in self.anatomy.reads:
            raise SettingError(self._no(f"its output head {head} does not read a norm of what the last block returns"))
        if len({norm.centred for norm in self.anatomy.norms.values()}) > 1:
            raise SettingError(self._no("some of its norms subtract the mean and some do not"))

    def _no(self, reason: str) -> str:
        return f"{self.source.folder} ({self.source.config.model_type}) cannot be rotated: {reason}."

    def _embed(self, x: Tensor, calls: list[Call]) -> None:
        """The embeddings whose rows the stream begins as a weighted sum of."""
        found = [c for c in calls if isinstance(c.module, nn.Embedding) and _fits(c.output, x)]
        shares = _shares(x, [c.output for c in found])
        if shares is None:
            raise SettingError(self._no("its first block is not given a sum of embeddings"))
        self.anatomy.embeddings = [c.name for c, share in zip(found, shares, strict=True) if share]

    def _reached(self, name: str, calls: list[Call]) -> None:
        """Every linear of the block runs, and once."""
        ran = [call.name for call in calls if is_linear(call.module)]
        for path, module in self.source.model.get_submodule(name).named_modules():
            full = f"{name}.{path}"
            if is_linear(module) and ran.count(full) != 1:
                times = "did not reach it" if full not in ran else "reached it more than once"
                raise SettingError(self._no(f"nothing is known of {full}, the probe forward {times}"))

    def _follow(self, name: str, x: Tensor, calls: list[Call], end: Tensor) -> tuple[list[Tensor], list[Call]]:
        """The stream at every point of a block, and the linears that write to it."""
        known, writers, free = [x], list[Call](), list[Call]()
        for call in [*calls, Call(name, nn.Identity(), end, None)]:
            at = call.input
            if at is not None and _fits(at, x) and not any(_same(at, old) for old in known):
                shares = _shares(at, [known[-1], *(c.output for c in free)])
                if shares is not None and shares[0] and any(shares[1:]):
                    known.append(at)
                    writers += [c for c, share in zip(free, shares[1:], strict=True) if share]
                    free = [c for c in free if c not in writers]
            if is_linear(call.module) and _fits(call.output, x):
                free.append(call)
        if not _same(known[-1], end):
            raise SettingError(
                self._no(f"what {name} adds to the stream are not outputs of its linears as they are, perhaps normalized")
            )
        return known, writers

    def _norms(self, stream: list[Tensor], calls: list[Call]) -> list[tuple[Norm, Tensor]]:
        """The norms that read the stream, with their outputs. Nothing else may read it."""
        found = []
        for call in calls:
            if call.input is None or not any(_same(call.input, x) for x in stream):
                continue
            if is_linear(call.module):
                raise SettingError(self._no(f"{call.name} reads the stream without a norm"))
            if any(is_linear(m) for m in call.module.modules()) or _same(call.input, call.output):
                continue  # a part with linears of its own, or dropout
            if call.output is None or not _fits(call.output, call.input):
                raise SettingError(self._no(f"{call.name} reads the stream and is no norm"))
            norm = _as_norm(call)
            if norm is None:
                raise SettingError(self._no(f"{call.name} reads the stream and is neither an RMSNorm nor a LayerNorm"))
            self.anatomy.norms[norm.name] = norm
            found.append((norm, call.output))
        return found

    def _readers(self, norms: list[tuple[Norm, Tensor]], calls: list[Call]) -> None:
        """The linears that read a norm. Nothing else with parameters may."""
        for call in calls:
            norm = next((norm for norm, output in norms if _same(call.input, output)), None)
            if norm is None:
                continue
            if is_linear(call.module):
                self.anatomy.reads[call.name] = norm.name
            elif next(call.module.parameters(recurse=False), None) is not None:
                raise SettingError(self._no(f"{call.name} reads {norm.name} and is no linear"))

    def _heads(self, calls: list[Call]) -> None:
        """The linear of a block whose columns are heads, by what the first token passes through attention."""
        count = getattr(self.source.config.get_text_config(), "num_attention_heads", None)
        linears = [call for call in calls if is_linear(call.module)]
        found: dict[str, Heads] = {}
        for i, call in enumerate(linears):
            width = 0 if call.input is None or not count else call.input.shape[1] // count
            if call.input is None or width < 2 or width * count != call.input.shape[1]:
                continue
            origins = [_origin(part, linears[:i]) for part in call.input[0].split(width)]
            if all(origins):
                found[call.name] = Heads(width, tuple(origin for origin in origins if origin))
        self.anatomy.heads.append(found)
        if len(found) != 1 and self.anatomy.no_heads is None:
            name = self.names[len(self.anatomy.heads) - 1]
            self.anatomy.no_heads = self._no(f"in {name} {len(found)} linears read attention's values head by head, not one")


def _origin(values: Tensor, linears: list[Call]) -> tuple[str, int] | None:
    """The linear, and its first row, whose output at the first token these values are."""
    for call in linears:
        if call.output is None:
            continue
        y, size = call.output[0], float(values.abs().max())
        for row in ((y - values[0]).abs() <= SAME * size).nonzero().flatten().tolist():
            part = y[row : row + len(values)]
            if len(part) == len(values) and float((part - values).abs().max()) <= SAME * size:
                return call.name, row
    return None


def _as_norm(call: Call) -> Norm | None:
    """What kind of norm a module is, by how it acts; None if it is none."""
    module, own = call.module, dict(call.module.named_parameters())
    assert call.input is not None
    if set(own) - {"weight", "bias"} or any(p.shape != call.input.shape[1:] for p in own.values()):
        return None
    x = torch.randn(5, call.input.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    x, saved = x.to(call.input), {name: p.data for name, p in own.items()}
    zero = torch.zeros_like(x[0])
    weight, bias = saved.get("weight"), saved.get("bias", zero)
    actual = module(x)
    try:
        for unit in (1.0, 0.0) if weight is not None else (1.0,):
            for name, p in own.items():
                p.data = torch.full_like(p, unit if name == "weight" else 0.0)
            plain = module(x)
            scale = 1 if weight is None else weight + (1 - unit)
            for centred in (False, True):
                bare = x - x.mean(1, keepdim=True) if centred else x
                size = (plain * bare).sum(1, keepdim=True) / bare.square().sum(1, keepdim=True)
                if _same(plain, bare * size) and _same(actual, plain * scale + bias):
                    return Norm(call.name, weight is not None, "bias" in own, unit, centred)
    finally:
        for name, p in own.items():
            p.data = saved[name]
    return None


def _shares(total: Tensor, parts: list[Any]) -> list[float] | None:
    """Weights of a sum of ``parts`` that is ``total``, zero where a part does not count; None if there is no such sum."""
    if not parts:
        return None
    size = total.norm(dim=1, keepdim=True).clamp_min(1e-30)
    columns = torch.stack([(part / size).flatten() for part in parts], 1).double()
    wanted = (total / size).flatten().double()
    length = columns.norm(dim=0).clamp_min(1e-30)
    share = torch.linalg.lstsq(columns / length, wanted[:, None], driver="gelsd").solution[:, 0] / length
    if not _same(total, sum((part * float(c) for part, c in zip(parts, share, strict=True)), torch.zeros_like(total))):
        return None
    amount = [float(c) * float(n) for c, n in zip(share, length, strict=True)]
    return [float(c) if abs(a) > COUNTS else 0.0 for c, a in zip(share, amount, strict=True)]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal up to rounding, token by token."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(((a - b).norm(dim=1) <= SAME * b.norm(dim=1)).all())


def _fits(a: Tensor | None, like: Tensor) -> bool:
    return a is not None and a.shape == like.shape


def _rows(x: Tensor) -> Tensor:
    """A copy, its rows tokens."""
    return x.detach().reshape(-1, x.shape[-1]).clone()


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[Call]]:
    """Every call of a module that takes and returns tensors, in the order in which calls begin."""
    calls: list[Call] = []
    hooks = []
    for name, module in model.named_modules():

        def before(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            at = _rows(x) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 else None
            calls.append(Call(name, m, at, None))

        def after(m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1:
                number = max((i for i, call in enumerate(calls) if call.name == name), default=None)
                if number is not None:
                    calls[number] = calls[number]._replace(output=_rows(output))

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after))
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()
