"""Find the roles that a rotation needs: which tensors make up the residual stream, and which modules read and write it.

No model is listed. One forward over a few tokens is recorded block by block, and every role is proved by values. The stream
enters the first block as a weighted sum of embedding rows. A linear writes to the stream if the stream later on is a
weighted sum of the stream before and linears' outputs. Norms read the stream, and linears read norms. The first token
attends to itself alone: there the output projection's input is the value projection's output, head by head. A model that
fits no such description is refused with the reason.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.core.errors import SettingError
from nearplane.models.discover import head_name, load_outside
from nearplane.models.handed import hidden_of, output_hidden
from nearplane.models.inputs import is_causal
from nearplane.models.record import SAME, Call, fits, patched, rows_of, same, shares_of, watching
from nearplane.models.source import Source
from nearplane.models.towers import is_linear, main_tower

TOKENS = 16


@dataclass(frozen=True)
class Norm:
    """A norm of the stream: ``u ∘ s + b`` with x's direction u, and a scale s and a shift b of its own."""

    name: str
    weight: bool
    bias: bool
    unit: float  # the weight at which s = 1: 1, or 0 if s = 1 + weight
    centred: bool  # x is centred before: a LayerNorm


@dataclass(frozen=True)
class Heads:
    """Where the columns of an output projection come from, head by head: (linear, first row) of each head's values."""

    width: int
    sources: tuple[tuple[str, int], ...]


@dataclass
class Anatomy:
    """Modules that touch the residual stream of ``width``, by name."""

    width: int
    embeddings: list[str] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)  # linear, or output head -> the norm that it reads
    writes: list[str] = field(default_factory=list)  # linears that add to the stream
    heads: dict[str, Heads] = field(default_factory=dict)  # by output projection, one a block


def examine(source: Source, device: torch.device, *, stream: bool, heads: bool) -> tuple[Anatomy, Tensor]:
    """Record a forward of the whole model, and find the roles of its modules.

    Args:
        source: a language model.
        device: where to compute.
        stream: find the modules that touch the residual stream.
        heads: find the linears whose columns are attention heads.

    Returns:
        The roles, and the logits (1, tokens, vocabulary) of the probe tokens.

    Raises:
        SettingError: a rotation cannot pass through this architecture, with the reason.
    """
    with watching(source.model) as calls:
        watch = _Watch(source, block_names(source), calls, stream, heads)
        result = logits(source, device, watch)
    return watch.anatomy, result


def logits(source: Source, device: torch.device, watch: "_Watch | None" = None) -> Tensor:
    """Compute the logits of the probe tokens, with one block at a time in memory.

    Args:
        source: a language model.
        device: where to compute.
        watch: is called after each block, and at the end.

    Returns:
        Logits (1, tokens, vocabulary), float32, on the CPU.
    """
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
    if head is not None and is_tied(source):  # the head needs all rows of the embedding
        source.load("", device, dtype, skip=[*names, head])
    else:
        load_outside(source, names, device, dtype, [{"input_ids": tokens}])
    if head is not None:
        source.load(head, device, dtype)
        if is_tied(source):
            lend(source.model.get_submodule(head), source.model.get_input_embeddings().weight)  # type: ignore[operator]
    with patched(source.model, names, run):
        result = source.model(input_ids=tokens, use_cache=False).logits
        if watch is not None:
            watch.outside()
    source.unload("")
    if head is not None and is_tied(source):
        lend(source.model.get_submodule(head), None)
    assert isinstance(result, Tensor)
    return result.cpu()


def probe_tokens(source: Source) -> Tensor:
    """Draw the seeded tokens (1, TOKENS) of the recorded forward."""
    vocabulary = source.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def block_names(source: Source) -> list[str]:
    """List the blocks of a language model. SettingError for any other model."""
    if not is_causal(source.model):
        raise SettingError(f"rotations are for language models, which {type(source.model).__name__} is not.")
    return main_tower(source)


def is_tied(source: Source) -> bool:
    """Return whether the output head's weight is the input embedding's."""
    head = head_name(source)
    return head is not None and f"{head}.weight" not in source.names


def lend(head: nn.Module, weight: Tensor | None) -> None:
    """Set a tied head's weight to the embedding's, or to an empty one on the meta device if ``weight`` is None."""
    value = torch.empty(0, device="meta") if weight is None else weight
    head.weight = nn.Parameter(value, requires_grad=False)


class _Watch:
    """Follows the residual stream through a forward as calls are recorded."""

    def __init__(self, source: Source, names: list[str], calls: list[Call], stream: bool, heads: bool) -> None:
        self.source, self.names, self.calls = source, names, calls
        self.wants_stream, self.wants_heads = stream, heads
        self.anatomy = Anatomy(0)
        self.stream: Tensor | None = None  # behind the last block that has run

    def block(self, k: int, before: Tensor, after: Tensor) -> None:
        """Examine block k, which has run. ``calls`` holds the calls since the block before."""
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
        """Examine what follows the last block: a norm, and the head that reads the norm."""
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
        """Write the refusal of the model."""
        return f"{self.source.folder} ({self.source.config.model_type}) cannot be rotated: {reason}."

    def _embed(self, x: Tensor, calls: list[Call]) -> None:
        """Find the embeddings of which the first block's input is a weighted sum."""
        embeddings = [c for c in calls if isinstance(c.module, nn.Embedding) and fits(c.output, x)]
        shares = shares_of(x, [c.output for c in embeddings])
        if shares is None:
            raise SettingError(self._no("its first block is not given a sum of embeddings"))
        self.anatomy.embeddings = [c.name for c, share in zip(embeddings, shares, strict=True) if share]

    def _reached(self, name: str, calls: list[Call]) -> None:
        """Refuse the model unless every linear of a block runs exactly once."""
        ran = [call.name for call in calls if is_linear(call.module)]
        for path, module in self.source.model.get_submodule(name).named_modules():
            full = f"{name}.{path}"
            if is_linear(module) and ran.count(full) != 1:
                times = "did not reach it" if full not in ran else "reached it more than once"
                raise SettingError(self._no(f"nothing is known of {full}, the probe forward {times}"))

    def _follow(self, name: str, x: Tensor, calls: list[Call], end: Tensor) -> tuple[list[Tensor], list[Call]]:
        """Return the stream at every point of a block, and the linears that write to the stream."""
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
        """Return the norms that read the stream, with their outputs. No other module may read the stream."""
        norms = []
        for call in calls:
            if call.input is None or not any(same(call.input, x) for x in stream):
                continue
            if is_linear(call.module):
                raise SettingError(self._no(f"{call.name} reads the stream without a norm"))
            if any(is_linear(m) for m in call.module.modules()) or same(call.input, call.output):
                continue  # a module with linears inside, or dropout
            if call.output is None or not fits(call.output, call.input):
                raise SettingError(self._no(f"{call.name} reads the stream and is no norm"))
            norm = as_norm(call)
            if norm is None:
                raise SettingError(self._no(f"{call.name} reads the stream and is neither an RMSNorm nor a LayerNorm"))
            self.anatomy.norms[norm.name] = norm
            norms.append((norm, call.output))
        return norms

    def _readers(self, norms: list[tuple[Norm, Tensor]], calls: list[Call]) -> None:
        """Find the linears that read a norm. No other module with parameters may read a norm."""
        for call in calls:
            norm = next((norm for norm, output in norms if same(call.input, output)), None)
            if norm is None:
                continue
            if is_linear(call.module):
                self.anatomy.reads[call.name] = norm.name
            elif next(call.module.parameters(recurse=False), None) is not None:
                raise SettingError(self._no(f"{call.name} reads {norm.name} and is no linear"))

    def _heads(self, name: str, calls: list[Call]) -> None:
        """Find the one linear of a block whose columns are heads, by its input at the first token."""
        count = getattr(self.source.config.get_text_config(), "num_attention_heads", None)
        linears = [call for call in calls if is_linear(call.module)]
        heads: dict[str, Heads] = {}
        silent = [call.name for call in linears if call.input is not None and not bool(call.input[0].any())]
        for i, call in enumerate(linears):
            if call.name in silent:  # zeros are like any zeros, and tell no origin
                continue
            if call.input is None or not count or call.input.shape[1] % count or call.input.shape[1] < 2 * count:
                continue
            width = call.input.shape[1] // count
            origins = [_origin(part, linears[:i]) for part in call.input[0].reshape(count, width)]
            if all(origins):
                heads[call.name] = Heads(width, tuple(origin for origin in origins if origin))
        if len(heads) != 1:
            raise SettingError(
                self._no(
                    f"in {name} {len(heads)} linears read attention's values head by head, not one"
                    + (f"; {silent[0]} reads zeros only, so that its role does not show" if silent else "")
                )
            )
        self.anatomy.heads |= heads


def _origin(values: Tensor, linears: list[Call]) -> tuple[str, int] | None:
    """Find the linear, and its first row, whose output at the first token equals ``values``; None if there is none."""
    for call in linears:
        if call.output is None:
            continue
        y, size = call.output[0], float(values.abs().max())
        for row in ((y - values[0]).abs() <= SAME * size).nonzero().flatten().tolist():
            part = y[row : row + len(values)]
            if len(part) == len(values) and float((part - values).abs().max()) <= SAME * size:
                return call.name, row
    return None


def as_norm(call: Call) -> Norm | None:
    """Identify a norm by its outputs at three settings of its parameters; None for any other module."""
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
