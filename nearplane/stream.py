"""The walk over blocks: open, observe, hand out, advance, free. The only loop over blocks there is.

Two hidden-state streams start equal at the first block: the quantized stream runs through current weights, the
reference stream through the original ones. Each block is run by the model's *own* forward with the other blocks stubbed
out, so masks, positions and whatever a model does between blocks are its own; no call is imitated. What a block returns
beside its hidden state is kept from its first run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nearplane.calibrate.observe import capture
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized, dequantize
from nearplane.core.moments import Moments
from nearplane.methods.base import Need
from nearplane.models import discover
from nearplane.models.discover import Block, Site, Stage, Stop
from nearplane.models.source import Source

# Sequences are batched up to about this many tokens per forward: enough for the GEMMs, little to keep alive.
BATCH_TOKENS = 2048


class Stream:
    """One hidden state per batch, advanced block by block."""

    def __init__(self, model: nn.Module, names: list[str], batches: list[Tensor]) -> None:
        self.model, self.names, self.batches = model, names, batches
        self.hidden: list[Tensor | None] = [None] * len(batches)

    def run(self, k: int, batch: int, rests: list[Any]) -> Tensor:
        """Output of block ``k`` for one batch; ``rests[i]`` is what block i < k returns besides its hidden state.

        A hook may end the run early by raising Stop; its caller then has what it wanted.
        """
        result: list[Tensor] = []

        def block(i: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            if i < k:
                stored = self.hidden[batch]
                assert stored is not None
                return discover.with_rest(stored, rests[i])
            output = original(*args, **kwargs)
            if i == len(rests):
                rests.append(discover.output_rest(output))
            result.append(discover.output_hidden(output))
            raise Stop

        with discover.patched(self.model, self.names, block):
            try:
                self.model(input_ids=self.batches[batch], use_cache=False)
            except Stop:
                pass
        return result[0] if result else self.batches[batch].new_empty(0)


class OpenBlock:
    """A block while its weights are in memory: what the walk hands out."""

    def __init__(self, walk: "Walk", k: int) -> None:
        self.walk, self.k = walk, k
        self.block: Block = walk.blocks[k]
        self.stages: list[Stage] = self.block.stages
        walk.source.load(self.block.name, walk.device, walk.dtype)
        model = walk.source.model
        self.original = {s.name: s.weight(model).clone() for s in self.block.sites} if len(walk.streams) == 2 else {}

    def weight(self, site: Site) -> Tensor:
        """The weight as it stands, original until ``replace``: (out, in), float32 (float64 in a float64 walk)."""
        return site.weight(self.walk.source.model).to(self.walk.solve_dtype).contiguous()

    def observe(self, stage: Stage, needs: frozenset[Need]) -> Moments:
        """Moments of the stage's common input: one pass over the samples, both streams in lockstep."""
        walk, width = self.walk, stage[0].shape[1]
        moments = Moments.zeros(width, drift="D" in needs, dtype=walk.solve_dtype, device=walk.device)
        module = walk.source.model.get_submodule(stage[0].name)
        for batch in range(len(walk.streams[0].batches)):
            x = None
            if "D" in needs:
                with self._reference_weights(), capture(module) as seen:
                    walk.streams[1].run(self.k, batch, walk.rests)
                x = torch.cat(seen) if seen else None
            with capture(module) as seen:
                walk.streams[0].run(self.k, batch, walk.rests)
            if seen:
                moments.add(torch.cat(seen), x)
        return moments

    def replace(self, site: Site, quantized: Quantized, grid: Grid) -> None:
        """Put the rounded weight in place: later stages and blocks see it."""
        weight = site.weight(self.walk.source.model)
        weight.copy_(dequantize(quantized, grid).to(weight.dtype))

    def advance(self) -> None:
        """Run the finished block over every batch, so that the streams stand before the next one."""
        walk = self.walk
        for i, stream in enumerate(walk.streams):
            with self._reference_weights() if i == 1 else nullcontext():
                for batch in range(len(stream.batches)):
                    stream.hidden[batch] = stream.run(self.k, batch, walk.rests)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Original weights in place for the time of one run of the reference stream."""
        sites, model = self.block.sites, self.walk.source.model
        parameters = [model.get_submodule(site.name).weight for site in sites]
        current = [parameter.data for parameter in parameters]
        for site, parameter in zip(sites, parameters, strict=True):
            original = self.original[site.name]
            parameter.data = original.T if site.transposed else original
        try:
            yield
        finally:
            for parameter, data in zip(parameters, current, strict=True):
                parameter.data = data


class Walk:
    """State of one walk; ``stream`` drives it."""

    def __init__(
        self,
        source: Source,
        blocks: list[Block],
        tokens: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        reference: bool,
    ) -> None:
        self.source, self.blocks, self.device, self.dtype = source, blocks, device, dtype
        self.solve_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.rests: list[Any] = []
        self.streams: list[Stream] = []
        names = [block.name for block in blocks]
        if tokens is not None:
            step = max(1, BATCH_TOKENS // tokens.shape[1])
            batches = [tokens[a : a + step].to(device) for a in range(0, len(tokens), step)]
            self.streams = [Stream(source.model, names, batches) for _ in range(2 if reference else 1)]
        discover.load_outside(source, names, device, dtype)


def stream(
    source: Source,
    blocks: list[Block],
    tokens: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reference: bool,
) -> Iterator[OpenBlock]:
    """Open each block in turn, hand it out, advance both streams through it, free it.

    ``tokens`` (samples, seqlen), or None when the method reads no data. ``reference`` keeps the second stream.
    """
    with torch.no_grad():
        walk = Walk(source, blocks, tokens, device, dtype, reference)
        for k, block in enumerate(blocks):
            opened = OpenBlock(walk, k)
            yield opened
            if k + 1 < len(blocks):
                opened.advance()
                _check_finite(walk, block)
            source.unload(block.name)


def _check_finite(walk: Walk, block: Block) -> None:
    """A stream that is non-finite everywhere can calibrate nothing any more."""
    if walk.streams and not any(bool(h.isfinite().any()) for h in walk.streams[0].hidden if h is not None):
        raise NearplaneError(
            f"every activation after {block.name} is NaN or Inf; the model does not run in this dtype on this device."
        )
