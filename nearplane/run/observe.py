"""The moments of one stage's input. Rows are tokens, in the order in which the model shows them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nearplane.core.moments import Moments
from nearplane.methods.base import Method, Need

# One token of HELD_OUT is held out where a method needs held-out tokens.
HELD_OUT = 4
# With fewer sequences than HELD_OUT, whole sequences cannot be set apart: runs of this many tokens are.
RUN = 32
# A norm whose gain of an output is a smaller share of its gains' root mean square lets nothing of that output through.
LEAST_GAIN = 1e-2
# A token with more than SINK times the median energy of the stream is an attention sink.
SINK = 100.0


# Bits up to which the reference stream may be coarse: rounding weights then moves far more than it does. At 4 bits the error at
# the end of four blocks was the same but for noise, at 8 bits it was 5 to 9% larger (docs/LOG.md).
COARSE_BITS = 5


def needed(method: Method, bits: int) -> frozenset[Need]:
    """Return what is measured for a method where the least width of a weight is so many bits."""
    return method.needs if bits <= COARSE_BITS else method.needs - {"coarse"}


class Measuring:
    """Sums up the moments of one stage, those of held-out tokens apart."""

    def __init__(
        self,
        needs: frozenset[Need],
        width: int,
        residual: int | None,
        like: Tensor,
        sequences: int,
        seen: int = 0,
        gain: Tensor | None = None,
    ) -> None:
        """Start with no token.

        Args:
            needs: what the method needs measured.
            width: inputs of the stage.
            residual: width of the stream whose drift R is measured in place of D; None: D.
            like: gives dtype and device.
            sequences: of the whole calibration, over all ranks.
            seen: rows that other ranks cut into runs before the first row here.
            gain: (out,), of a norm behind the linear, where tokens come with weights; None: no norm.
        """
        drift = "D" in needs and residual is None

        def empty() -> Moments:
            found = Moments.zeros(
                width,
                drift=drift,
                residual=residual,
                weighted=gain is not None,
                magnitude="magnitude" in needs,
                coarse="coarse" in needs,
                dtype=like.dtype,
                device=like.device,
            )
            found.gain = gain
            return found

        self._empty = empty
        self.fit, self.held = empty(), [empty()] if "held_out" in needs else []
        self.sequences = sequences
        self.before = self.seen = seen  # rows cut into runs so far
        self.quarters: Quarters | None = None  # of a mix: a quarter of each source is held out
        self.period: int | None = None  # of the pattern in which runs are held out; None where sequences are

    def split(self, quarters: "Quarters") -> None:
        """Hold out a quarter of each source of a mix, and keep the moments of each one's held-out tokens apart."""
        self.quarters = quarters
        if self.held:
            self.held = [self._empty() for _ in range(1 + max(quarters.sources))]

    def add(
        self,
        batch: torch.Size,
        first: int,
        xhat: Tensor,
        x: Tensor | None,
        residual: Tensor | None,
        real: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Add the tokens of a batch.

        Args:
            batch: (sequences, positions).
            first: number of the batch's first sequence.
            xhat, x: (tokens, in), inputs in the quantized and in the reference stream.
            residual: (tokens, out), the drift of the residual stream, and the linear's output in the reference stream.
            real: (tokens,), false at padding; None: no padding.
            weight: (tokens,), where a norm follows.
        """
        if not self.held and real is None:
            self.fit.add(xhat, x, residual, weight)
            return
        part = self._part(batch, first, len(xhat), real)
        for number, moments in enumerate([self.fit, *self.held]):
            mask = part == number
            rows = _rows(mask, xhat.device) if real is None else mask.to(xhat.device) & real
            moments.add(xhat[rows], *(None if each is None else each[rows] for each in (x, residual, weight)))

    def subtract(self, weight: Tensor) -> None:
        """Subtract ``W H`` from R, to which tokens were added with what the original linear makes of the reference stream.

        ``r + W X - r̂ - W X̂`` by X̂ᵀ: the last term needs no product of its own with the tokens.

        Args:
            weight: (out, in), the original W.
        """
        for moments in (self.fit, *self.held):
            assert moments.R is not None
            moments.R.addmm_(weight, moments.H, alpha=-1)

    def misses(self, seen: int) -> bool:
        """Tell whether other tokens would be held out if ``seen`` rows came before."""
        return self.period is not None and (seen - self.before) % self.period != 0

    def result(self) -> Moments:
        """Return the moments of all tokens, with those of the held-out tokens beside them."""
        return self.fit.join(*self.held) if self.held else self.fit

    def _part(self, batch: torch.Size, first: int, rows: int, real: Tensor | None) -> Tensor:
        """Number the moments that each row (rows,) counts for: 0, or behind it those of a source's held-out tokens.

        Of a module that is shown some tokens only, all held-out tokens count as the first source's.
        """
        if not self.held:
            return torch.zeros(rows, dtype=torch.long)
        held = self._apart(batch, first, rows, real).long()
        return held if self.quarters is None or rows != batch.numel() else held * self.quarters.numbers(batch, first)

    def _apart(self, batch: torch.Size, first: int, rows: int, real: Tensor | None = None) -> Tensor:
        """Mask the held-out rows: every fourth sequence, or every fourth run of tokens where sequences are few."""
        if rows == batch.numel() and self.quarters is not None:
            return self.quarters.of(batch, first)
        if rows == batch.numel() and self.sequences >= HELD_OUT:
            token, run = first * batch[1] + torch.arange(rows), batch[1]
        else:
            run = max(1, min(RUN, self.sequences * batch[1] // HELD_OUT))
            order = torch.arange(rows) if real is None else real.cpu().long().cumsum(0) - 1
            token = (self.seen + order).clamp(min=0)
            self.seen += rows if real is None else int(real.sum())
            self.period = HELD_OUT * run
        return token // run % HELD_OUT == HELD_OUT - 1


def _rows(mask: Tensor, device: torch.device) -> slice | Tensor:
    """Return what picks the masked rows (rows,): a slice, which copies nothing, where they follow each other."""
    count = int(mask.sum())
    first = int(mask.long().argmax()) if count else 0
    return slice(first, first + count) if bool(mask[first : first + count].all()) else mask.to(device)


class Quarters:
    """The held-out tokens of a mix: a quarter of each source, whatever its share.

    Of every four sequences of a source the last is held out. Of the one to three that are left over, every fourth run of
    tokens is, as where all sequences are few. So the sources weigh among held-out tokens as they do among all.
    """

    def __init__(self, sources: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Number the sequences of each source.

        Args:
            sources: the number of each sequence's source.
            lengths: real tokens of each sequence; None: no padding.
        """
        self.sources, self.lengths = sources, lengths
        self.whole = [False] * len(sources)  # sequences that are held out
        self.left: dict[int, list[int]] = {}  # by sequence that is left over, all of its source that are
        for source in set(sources):
            numbers = [number for number, other in enumerate(sources) if other == source]
            fours = len(numbers) - len(numbers) % HELD_OUT
            for number in numbers[HELD_OUT - 1 : fours : HELD_OUT]:
                self.whole[number] = True
            self.left |= dict.fromkeys(numbers[fours:], numbers[fours:])

    def of(self, batch: torch.Size, first: int) -> Tensor:
        """Mask the held-out tokens (tokens,) of a batch (sequences, positions) that begins with sequence ``first``."""
        masks = []
        for number in range(first, first + batch[0]):
            mask = torch.full((batch[1],), self.whole[number])
            if number in self.left:
                left = self.left[number]
                run = max(1, min(RUN, self._tokens(left, batch[1]) // HELD_OUT))
                token = self._tokens([other for other in left if other < number], batch[1]) + torch.arange(batch[1])
                mask = token // run % HELD_OUT == HELD_OUT - 1
            masks.append(mask)
        return torch.cat(masks)

    def numbers(self, batch: torch.Size, first: int) -> Tensor:
        """Number the source of each token (tokens,) of such a batch, from 1."""
        found = torch.as_tensor(self.sources[first : first + batch[0]]) + 1
        return found.repeat_interleave(batch[1])

    def _tokens(self, numbers: Sequence[int], positions: int) -> int:
        """Count the real tokens of some sequences."""
        return len(numbers) * positions if self.lengths is None else sum(self.lengths[number] for number in numbers)


def residual_drift(r: Tensor, rhat: Tensor, real: Tensor | None = None) -> Tensor:
    """Return ``r - r̂`` of a stream (tokens, width), zero at attention sinks.

    A window's first token can carry hundreds of times the energy of any other, and would own the moment. The median energy
    is that of the ``real`` rows, padding left out.
    """
    energy = rhat.float().square().sum(1)
    sink = energy > SINK * (energy if real is None else energy[real]).nanmedian()
    return (r - rhat).masked_fill(sink[:, None], 0)


def before_norm(drift: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
    """Return what an output must add before a norm, so that the norm adds ``drift`` (tokens, out) to the stream.

    Args:
        drift: of the stream.
        gain: (out,), the norm's factor of each output; where the factor is next to nothing, so is what the output can add.
        scale: (tokens,), the norm's factor of each token.
    """
    least = LEAST_GAIN * float(gain.square().mean().sqrt())
    inverse, each = torch.where(gain.abs() > least, 1 / gain, 0.0), torch.where(scale > 0, 1 / scale, 0.0)
    return drift * inverse * each[:, None]
