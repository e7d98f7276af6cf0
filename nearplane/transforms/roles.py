"""What a rotation has to know of a model: which tensors make up the residual stream, and who reads and writes it.

Nothing is listed by model: one forward over a few tokens is watched, block by block, and every claim is checked by values.
The stream enters the first block as a weighted sum of embedding rows; a linear writes to it if the stream further on is a
weighted sum of the stream before and outputs of linears; a norm reads it; linears read the norm. Whose columns are
attention heads is found at the first token, which attends to itself alone: what goes into the output projection there
*is* the value projection's output, head by head. Whatever does not fit is a SettingError that says what.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.core.errors import SettingError
from nearplane.models.discover import (
    SAME,
    Call,
    fits,
    head_name,
    hidden_of,
    load_outside,
    output_hidden,
    patched,
    rows_of,
    same,
    shares_of,
    watching,
)
from nearplane.models.inputs import is_causal
from nearplane.models.source import Source
from nearplane.models.towers import is_linear, main_tower

TOKENS = 16


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
    heads: dict[str, Heads] = field(default_factory=dict)  # by linear, one a block


def probe_tokens(source: Source) -> Tensor:
    """The tokens that are watched, seeded."""
    vocabulary = source.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def block_names(source: Source) -> list[str]:
    """Names of the blocks of a language model, which has one tower. SettingError for any other model."""
    if not is_causal(source.model):
        raise SettingError(f"rotations are for language models, which {type(source.model).__name__} is not.")
    return main_tower(source)


def logits(source: Source, device: torch.device, watch: "_Watch | None" = None) -> Tensor:
    """Logits of the probe tokens in float32, in the memory of one block and what is outside of the blocks."""
    names, dtype, head = block_names(source), torch.float32, head_name(source)

    def run(k: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        source.load(names[k], device, dtype)
        hidden = hidden_of(args, kwargs)
        before = None if hidden is None else hidden.clone()
        output = original(*args, **kwargs)
        after = output_hidden(output)
        if watch is not None and before is not None and after is not None:
            watch.block(k, before, after)
        source.unload(names[k])
        return output

    tokens = probe_tokens(source).to(device)
    if head is not None and is_tied(source):  # then all rows of the embedding run
        source.load("", device, dtype, skip=[*names, head])
    else:
        load_outside(source, names, device, dtype, {"input_ids": tokens})
    if head is not None:
        source.load(head, device, dtype)
        if is_tied(source):
            lend(source.model.get_submodule(head), source.model.get_input_embeddings().weight)  # type: ignore[operator]
    with patched(source.model, names, run):
        found = source.model(input_ids=tokens, use_cache=False).logits
        if watch is not None:
            watch.outside()
    source.unload("")
    if head is not None and is_tied(source):
        lend(source.model.get_submodule(head), None)
    assert isinstance(found, Tensor)
    return found.cpu()


def lend(head: nn.Module, weight: Tensor | None) -> None:
    """Give a tied head the embedding's weight, or take it back."""
    value = torch.empty(0, device="meta") if weight is None else weight
    head.weight = nn.Parameter(value, requires_grad=False)


def is_tied(source: Source) -> bool:
    """Whether the output head has no weight of its own: it is the input embedding's."""
    head = head_name(source)
    return head is not None and f"{head}.weight" not in source.names


def examine(source: Source, device: torch.device, *, stream: bool, heads: bool) -> tuple[Anatomy, Tensor]:
    """Watch a forward of the whole model; its logits, and as much of its anatomy as is asked for: who touches the
    ``stream``, whose columns are ``heads``. SettingError, with the reason, where that cannot be told."""
    with watching(source.model) as calls:
        watch = _Watch(source, block_names(source), calls, stream, heads)
        found = logits(source, device, watch)
    return watch.anatomy, found


class _Watch:
    """Follows the stream through a forward as its calls come in."""

    def __init__(self, source: Source, names: list[str], calls: list[Call], stream: bool, heads: bool) -> None:
        self.source, self.names, self.calls = source, names, calls
        self.wants_stream, self.wants_heads = stream, heads
        self.anatomy = Anatomy(0)
        self.stream: Tensor | None = None  # behind the last block seen

    def block(self, k: int, before: Tensor, after: Tensor) -> None:
        """Look at a block that has run; ``calls`` holds what ran since the block before."""
        name = self.names[k]
        inside = [call for call in self.calls if call.name.startswith(name + ".")]
        outside = [call for call in self.calls if not call.name.startswith(name)]
        self.calls.clear()
        self._reached(name, inside)
        if self.wants_stream:
            self._through(name, rows_of(before), rows_of(after), inside, outside)
        if self.wants_heads:
            self._heads(name, inside)

    def _through(self, name: str, x: Tensor, after: Tensor, inside: list[Call], outside: list[Call]) -> None:
        """Follow the stream through a block."""
        if self.stream is None:
            self.anatomy.width = x.shape[1]
            self._embed(x, outside)
        elif not same(x, self.stream):
            raise SettingError(self._no(f"what {name} is given is not what the block before returned"))
        known, writers = self._follow(name, x, inside, after)
        self._readers(self._norms(known, inside), inside)
        self.anatomy.writes += [call.name for call in writers]
        self.stream = after

    def outside(self) -> None:
        """What comes behind the last block: a norm and the head that reads it."""
        stream, head = self.stream, head_name(self.source)
        if not self.wants_stream:
            return
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
        found = [c for c in calls if isinstance(c.module, nn.Embedding) and fits(c.output, x)]
        shares = shares_of(x, [c.output for c in found])
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
            if at is not None and fits(at, x) and not any(same(at, old) for old in known):
                shares = shares_of(at, [known[-1], *(c.output for c in free)])
                if shares is not None and shares[0] and any(shares[1:]):
                    known.append(at)
                    writers += [c for c, share in zip(free, shares[1:], strict=True) if share]
                    free = [c for c in free if c not in writers]
            if is_linear(call.module) and fits(call.output, x):
                free.append(call)
        if not same(known[-1], end):
            raise SettingError(
                self._no(
                    f"what {name} adds to the stream are not outputs of its linears as they are, perhaps normalized"
                )
            )
        return known, writers

    def _norms(self, stream: list[Tensor], calls: list[Call]) -> list[tuple[Norm, Tensor]]:
        """The norms that read the stream, with their outputs. Nothing else may read it."""
        found = []
        for call in calls:
            if call.input is None or not any(same(call.input, x) for x in stream):
                continue
            if is_linear(call.module):
                raise SettingError(self._no(f"{call.name} reads the stream without a norm"))
            if any(is_linear(m) for m in call.module.modules()) or same(call.input, call.output):
                continue  # a part with linears of its own, or dropout
            if call.output is None or not fits(call.output, call.input):
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
            norm = next((norm for norm, output in norms if same(call.input, output)), None)
            if norm is None:
                continue
            if is_linear(call.module):
                self.anatomy.reads[call.name] = norm.name
            elif next(call.module.parameters(recurse=False), None) is not None:
                raise SettingError(self._no(f"{call.name} reads {norm.name} and is no linear"))

    def _heads(self, name: str, calls: list[Call]) -> None:
        """The linear of a block whose columns are heads, by what the first token passes through attention."""
        count = getattr(self.source.config.get_text_config(), "num_attention_heads", None)
        linears = [call for call in calls if is_linear(call.module)]
        found: dict[str, Heads] = {}
        for i, call in enumerate(linears):
            if call.input is None or not count or call.input.shape[1] % count or call.input.shape[1] < 2 * count:
                continue
            width = call.input.shape[1] // count
            origins = [_origin(part, linears[:i]) for part in call.input[0].reshape(count, width)]
            if all(origins):
                found[call.name] = Heads(width, tuple(origin for origin in origins if origin))
        if len(found) != 1:
            raise SettingError(
                self._no(f"in {name} {len(found)} linears read attention's values head by head, not one")
            )
        self.anatomy.heads |= found


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
                if same(plain, bare * size) and same(actual, plain * scale + bias):
                    return Norm(call.name, weight is not None, "bias" in own, unit, centred)
    finally:
        for name, p in own.items():
            p.data = saved[name]
    return None
