"""The stream of blocks: open each block, observe its stages, advance the hidden states, free it.

Blocks come in the order in which the model runs them, tower by tower: a decoder's after all of its encoder's.

Two hidden states per batch start equal at the first block: the quantized stream runs through current weights, the
reference stream through the original weights. The model's *own* forward runs each block with the other blocks stubbed.
So masks, positions and the code between blocks are the model's own. The other outputs of a block are kept from its first
run.

A forward pauses where a stage begins and goes on when the stage is solved (``forward.py``), so that a block
costs each stream one forward, not one per stage. All batches are then on their way at once. Where they would hold more
than ``IN_FLIGHT_BYTES``, new forwards reach every stage instead, with the same result.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nearplane.core.activations import TokenGrid
from nearplane.core.attention import fast_forwards
from nearplane.core.dense import coarse_linears
from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized, dequantize
from nearplane.core.moments import Moments
from nearplane.data.samples import Batch, Samples, as_batch, cut, masks, positions, real
from nearplane.machine.ranks import ALONE, Ranks
from nearplane.methods.base import Need
from nearplane.models import discover
from nearplane.models.discover import Block, Site, Stage, passage_of, point_of
from nearplane.models.experts import experts_of
from nearplane.models.record import gain_of, scales_of
from nearplane.models.source import Source
from nearplane.run.forward import Forward, OnDisk, Stream, hooked
from nearplane.run.observe import HELD_OUT, Measuring, Quarters, before_norm, residual_drift

# Sequences are batched up to about this many tokens per forward: enough for the GEMMs, little to keep alive.
BATCH_TOKENS = 2048
# Numbers of a weight that are put in place at a time: their codes, scales and zeros as floats are five times as many.
PLACED_AT_ONCE = 1 << 22
# What paused forwards may hold: the stream, a stage's input and a few tensors of that width, per token and stream.
IN_FLIGHT_BYTES = 4 << 30


def batch_rows(seqlen: int) -> int:
    """Return how many sequences run in one forward."""
    return max(1, BATCH_TOKENS // seqlen)


def kept(blocks: list[Block], tokens: int, dtype: torch.dtype, streams: int) -> bool:
    """Tell whether all forwards of a block may wait in memory at once; else each stage is reached by new forwards."""
    width = max((site.shape[0] + site.shape[1] for block in blocks for site in block.sites), default=0)
    return tokens * width * 2 * dtype.itemsize * streams <= IN_FLIGHT_BYTES


def up_to_last(blocks: list[Block]) -> list[Block]:
    """Return the blocks that a walk opens: up to the last one that has a stage. Nothing reads what later blocks compute."""
    return blocks[: max((k for k, block in enumerate(blocks, 1) if block.stages), default=0)]


@dataclass(frozen=True)
class Place:
    """Where a walk computes and keeps its hidden states, and who shares the samples."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    offload: Path | None = None
    """A folder in which the streams are kept on disk meanwhile, instead of in memory."""
    ranks: Ranks = ALONE
    """Of several, each runs some of the samples."""


class OpenBlock:
    """A block while its weights are in memory, as ``stream`` yields it."""

    def __init__(self, walk: "Walk", k: int) -> None:
        self.walk, self.k = walk, k
        self.block: Block = walk.blocks[k]
        self.stages: list[Stage] = self.block.stages
        walk.source.load(self.block.name, walk.device, walk.dtype)
        model = walk.source.model
        self.original = {s.name: s.weight(model).clone() for s in self.block.sites} if len(walk.streams) == 2 else {}
        self.keep = walk.keep and self.block.calls == 1  # forwards pause, and go on when a stage is solved
        # Settled here: a resumed run puts weights in place before any forward, an uninterrupted one between two stages.
        self.coarse = walk.coarse and walk.replaced
        self.reached = -1  # the stage that the paused forwards stand at
        self.paused: dict[tuple[int, int], Forward] = {}  # by stream and batch
        self.hooks = ExitStack()
        points = {site.adds_to for site in self.block.sites if site.adds_to is not None}
        points |= {site.passage.adds_to for site in self.block.sites if site.passage is not None}
        # Where a stage begins; where inputs are rounded, all its linears are given them rounded.
        every = walk.activations is not None
        pauses = [site.name for stage in self.stages for site in (stage if every else stage[:1])]
        inside = {name: m for name, m in experts_of(model).items() if name.startswith(self.block.name + ".")}
        self.hooks.enter_context(hooked(model, pauses, sorted(points), inside))

    def weight(self, site: Site) -> Tensor:
        """Return the live weight (out, in), original until ``replace``; float32, or float64 in a float64 walk."""
        return site.weight(self.walk.source.model).to(self.walk.solve_dtype).contiguous()

    def observe(self, stage: Stage, needs: frozenset[Need]) -> Moments:
        """Measure the moments of the stage's common input over all samples, both streams in lockstep.

        With "R" in ``needs``, R stands in for D where the stage is one site that adds to the residual stream: the drift of
        the stream behind the site holds the site's own. With "held_out", the moments of every fourth sequence come apart.
        Every rank measures its own samples; the moments are those of all ranks.

        Raises:
            NumericalError: more than 5% of the tokens are NaN or Inf.
        """
        ranks, sequences = self.walk.ranks, self.walk.sequences
        # Where sequences are few, runs of tokens are held out: their place in the whole text follows from the sequence.
        few = sequences < HELD_OUT and bool(self.walk.firsts)
        with fast_forwards(self.walk.device):
            measuring = self._measure(stage, needs, self.walk.firsts[0] * self.walk.positions if few else 0)
            if "held_out" in needs and ranks.world > 1:
                seen = sum(ranks.values(measuring.seen - measuring.before)[: ranks.rank])
                if measuring.misses(
                    seen
                ):  # a module that is shown some tokens only: how many, ranks before this one knew
                    self.drop()
                    measuring = self._measure(stage, needs, seen)
        return ranks.reduce(measuring.result())

    def _measure(self, stage: Stage, needs: frozenset[Need], seen: int) -> Measuring:
        """Run this rank's batches up to a stage; ``seen`` as in ``Measuring``."""
        walk, number, site = self.walk, self.stages.index(stage), stage[0]
        if number <= self.reached:
            self.drop()
        point = point_of(stage, needs)
        # The drift behind a linear is the original's, also where a loop observes it again after its weight was replaced.
        original = self.original.get(site.name)
        weight = self.weight(site) if original is None else original.to(walk.solve_dtype)
        norm = self._norm(site, weight) if passage_of(stage, needs) else None
        bias = _bias(walk.source.model, site)
        out = site.shape[0] if point else None
        gain = None if norm is None else norm.gain
        measuring = Measuring(needs, site.shape[1], out, weight, walk.sequences, seen, gain)
        if walk.quarters is not None:
            measuring.split(walk.quarters)
        # R takes what the linear makes of the reference: that stream's own output, where forwards are in the solver's dtype.
        behind = point is not None and walk.dtype == walk.solve_dtype
        for batch in range(len(walk.batches)):
            current = self._forward(0, batch)
            given = current.reach(site.name)
            reference = self._forward(1, batch) if needs & {"D", "R"} else None
            others: list[Tensor] = []
            if reference is not None:
                with self._reference_weights():
                    others = reference.reach(site.name, behind)
            for call, xhat in enumerate(given):  # several, if the block is called several times
                # of an expert: other tokens are its router's own
                x = others[call][: len(xhat)] if call < len(others) else None
                scale = None if norm is None else norm.scales(xhat)
                drift = None
                mask = real(walk.batches[batch], current.leading, site.name)
                if point is not None and reference is not None and x is not None:
                    drift = residual_drift(reference.points[point], current.points[point], mask).to(weight.dtype)
                    drift = drift if norm is None or scale is None else before_norm(drift, norm.gain, scale)
                    if behind:
                        drift += x if bias is None else x - bias
                    else:
                        drift.addmm_(x.to(weight.dtype), weight.T)
                    x = None
                shape, first = walk.layout(batch, current), walk.firsts[batch]
                weights = None if scale is None else scale.square()
                measuring.add(shape, first, xhat, x if "D" in needs else None, drift, mask, weights)
            if not self.keep:
                self.drop(batch)
        if point is not None:
            measuring.subtract(weight)
        self.reached = number if self.keep else -1
        return measuring

    def _norm(self, site: Site, weight: Tensor) -> "Norm":
        """Return the norm behind a site; ``weight``: the site's original."""
        assert site.passage is not None
        model = self.walk.source.model
        return Norm(model.get_submodule(site.passage.norm), weight, _bias(model, site))

    def replace(self, site: Site, quantized: Quantized, grid: Grid) -> None:
        """Put the rounded weight in place: later stages and blocks see it."""
        self.walk.replaced = True
        weight = site.weight(self.walk.source.model)
        step = max(1, PLACED_AT_ONCE // site.shape[1])
        for first in range(0, site.shape[0], step):
            part = slice(first, first + step)
            weight[part] = dequantize(quantized.rows(part), grid).to(weight.dtype)
        if any(site in stage for stage in self.stages[: max(self.reached, 0)]):
            self.drop()  # the paused forwards have passed it with its former weight

    def output(self, batch: int) -> Tensor:
        """Run one of this rank's batches through the block, with its weights as they are now, and return the hidden state."""
        with fast_forwards(self.walk.device):
            output = Forward(self.walk.streams[0], self.k, batch).until(None)
        assert output is not None
        return output

    def advance(self) -> None:
        """Run the finished block over every batch, so that the streams stand before the next one.

        Batch by batch: experts of the reference stream follow the routing of the quantized stream's forward.
        """
        streams = self.walk.streams
        for batch in range(len(streams[0].batches) if streams else 0):
            for i, stream in enumerate(streams):
                with fast_forwards(self.walk.device), self._reference_weights() if i == 1 else nullcontext():
                    stream.hidden[self.block.tower][batch] = self._forward(i, batch).until(None)
            for i in range(len(streams)):
                self.paused.pop((i, batch))

    def close(self) -> None:
        """Free the block."""
        self.drop()
        self.hooks.close()
        self.walk.source.unload(self.block.name)

    def _forward(self, i: int, batch: int) -> Forward:
        """The paused forward of a batch of stream ``i``, or a new one."""
        forward = self.paused.get((i, batch))
        if forward is None or forward.dead:
            leader = None if i == 0 else lambda: self.paused.get((0, batch))
            forward = Forward(self.walk.streams[i], self.k, batch, leader)
            self.paused[i, batch] = forward
        return forward

    def drop(self, batch: int | None = None) -> None:
        """Give up the paused forwards, of one batch or of all."""
        for key in [key for key in self.paused if batch is None or key[1] == batch]:
            self.paused.pop(key).close()
        self.reached = -1

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Put the original weights in place while the reference stream runs."""
        sites, model = self.block.sites, self.walk.source.model
        parameters = [model.get_submodule(site.name).weight for site in sites]
        current = [parameter.data for parameter in parameters]
        for site, parameter in zip(sites, parameters, strict=True):
            original = self.original[site.name]
            parameter.data = original.T if site.transposed else original
        try:
            with coarse_linears(self.walk.device) if self.coarse else nullcontext():
                yield
        finally:
            for parameter, data in zip(parameters, current, strict=True):
                parameter.data = data


def _bias(model: nn.Module, site: Site) -> Tensor | None:
    """Return the bias (out,) of a site; None where it has none."""
    bias = model.get_submodule(site.name).bias
    return bias if isinstance(bias, Tensor) else None


class Norm:
    """A norm, or a scale, that a linear's output passes: factor of the token x gain of the output x output."""

    def __init__(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        """Prepare the norm ``module`` behind a linear of ``weight`` (out, in), in the dtype of that weight."""
        self.module, self.weight = copy.deepcopy(module).to(weight.dtype), weight
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.gain = gain_of(self.module, weight.T[:1])

    def scales(self, xhat: Tensor) -> Tensor:
        """Return the factor of each token, from what the linear with its original weight makes of ``xhat`` (tokens, in)."""
        y = nn.functional.linear(xhat.to(self.weight.dtype), self.weight, self.bias)
        return scales_of(y, self.module(y), self.gain)


class Walk:
    """The state of one walk over the blocks; ``stream`` drives it."""

    def __init__(
        self,
        source: Source,
        blocks: list[Block],
        samples: Tensor | Mapping[str, Tensor] | Samples | None,
        place: Place,
        reference: bool | Literal["coarse"],
        activations: TokenGrid | None,
        also: Batch | None = None,
    ) -> None:
        device, dtype, offload = place.device, place.dtype, place.offload
        self.ranks, self.activations = place.ranks, activations
        self.coarse, self.replaced = reference == "coarse", False  # replaced: any weight, so that the streams differ
        self.source, self.blocks, self.device, self.dtype = source, blocks, device, dtype
        self.solve_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.streams: list[Stream] = []
        self.batches: list[Batch] = []  # this rank's, whole ones of those that one rank would form
        self.firsts: list[int] = []  # number of each one's first sequence among all
        self.sequences, self.positions, self.keep = 0, 0, False
        self.quarters: Quarters | None = None  # of a mix, what is held out
        whole = None if samples is None else as_batch(samples)
        if whole is not None:
            self.sequences = len(next(iter(whole.values())))
            self.positions = positions([block.shape for block in blocks], whole)
            if isinstance(samples, Samples) and samples.sources:
                lengths = next((mask.sum(1).tolist() for mask in masks(whole)), None)
                self.quarters = Quarters(samples.sources, lengths)
            step = batch_rows(self.positions)
            firsts = range(0, self.sequences, step)
            self.firsts = list(firsts[self.ranks.part(len(firsts))])
            self.batches = [cut(whole, a, a + step, device) for a in self.firsts]
            for name in ("quantized", "reference")[: 2 if reference else 1]:
                rounded = activations if name == "quantized" else None
                self.streams.append(Stream(source.model, blocks, self.batches, self._keeper(offload, name), rounded))
            tokens = sum(len(next(iter(batch.values()))) for batch in self.batches) * self.positions
            self.keep = kept(blocks, tokens, dtype, len(self.streams))
        read = [some for some in (whole, also) if some is not None]
        discover.load_outside(source, [block.name for block in blocks], device, dtype, read)

    def layout(self, batch: int, forward: Forward) -> torch.Size:
        """Return (sequences, positions) of the input where a forward is paused, as a module that sees all tokens has it."""
        values = self.batches[batch].values()
        rows, found = len(next(iter(values))), len(forward.input if forward.input is not None else ())
        known = {value.shape[1] for value in values if value.dim() == 2} | {hidden := forward.shape[1:-1].numel()}
        return torch.Size((rows, found // rows if found % rows == 0 and found // rows in known else hidden))

    def _keeper(self, offload: Path | None, name: str) -> Callable[[str], OnDisk] | None:
        """Return the maker of lists that keep a tower's hidden states on disk."""
        return None if offload is None else lambda tower: OnDisk(offload, f"{name}-{tower}", len(self.batches))


def stream(
    source: Source,
    blocks: list[Block],
    samples: Tensor | Mapping[str, Tensor] | Samples | None,
    *,
    reference: bool | Literal["coarse"] = False,
    activations: TokenGrid | None = None,
    also: Batch | None = None,
    place: Place = Place(),
) -> Iterator[OpenBlock]:
    """Open each block in turn, hand it out, advance both streams through it, free it.

    Args:
        source: the model.
        blocks: its blocks, as ``discover`` finds them.
        samples: arguments of the model's forward, or token ids (samples, seqlen) alone, or both with the sources of a mix;
            None when the method reads no data. An argument called attention_mask says which positions are real: padding
            enters no moment.
        reference: keep the second stream, through the original weights. Its linears are exact, or coarse products in blocks
            behind the first one with a replaced weight: until then both streams are equal.
        activations: how inputs of sites are rounded in the quantized stream.
        also: arguments of other forwards that pass the open blocks (``run/check.py``).
        place: device, dtype, folder for the streams, ranks.

    Yields:
        Each block while its weights are in memory, in the order in which the model runs them, up to the last one with a stage.

    Raises:
        NearplaneError: every activation is NaN or Inf, or ``place.offload`` cannot be written to.
        NumericalError: a weight holds NaN or Inf.
    """
    with torch.no_grad(), _scratch(place.offload) as folder:
        walk = Walk(source, blocks, samples, replace(place, offload=folder), reference, activations, also)
        last = len(up_to_last(blocks)) - 1
        for k, block in enumerate(blocks[: last + 1]):
            opened = OpenBlock(walk, k)
            try:
                yield opened
                if k < last:
                    opened.advance()
                    _check_finite(walk, block)
            finally:
                opened.close()


@contextmanager
def _scratch(offload: Path | None) -> Iterator[Path | None]:
    """Make a folder of this run's own below ``offload``, removed afterwards."""
    if offload is None:
        yield None
        return
    try:
        offload.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=offload, prefix="nearplane-")
    except OSError as error:
        why = "it is a file" if offload.is_file() else error.strerror or str(error)
        raise NearplaneError(f"folder {offload} for hidden states cannot be written to: {why}.") from error
    with folder:
        yield Path(folder.name)


def _check_finite(walk: Walk, block: Block) -> None:
    """Raise NearplaneError where no activation behind a block is finite: nothing can be calibrated on them."""
    if not walk.streams:
        return
    hidden = (walk.streams[0].hidden[block.tower][batch] for batch in range(len(walk.batches)))
    finite = any(bool(h.isfinite().any()) for h in hidden if h is not None)
    if not walk.ranks.most(finite):
        raise NearplaneError(
            f"every activation after {block.name} is NaN or Inf; the model does not run in this dtype on this device."
        )
