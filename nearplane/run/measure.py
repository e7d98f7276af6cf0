"""Errors of one solved weight on the calibration tokens, beside those of rounding to nearest; the clock of a run's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nearplane.core.certificate import ratio
from nearplane.core.factor import Factor
from nearplane.core.grid import Grid, Quantized, dequantize, round_to_nearest
from nearplane.core.moments import LEAF, Moments
from nearplane.core.target import pull
from nearplane.machine.ranks import ALONE, Ranks
from nearplane.models.experts import EXPERT

# Numbers of a weight that are measured at a time.
MEASURED_AT_ONCE = 1 << 22
# Rows of a weight that its errors are taken from: three products with H for all rows cost more than GPTQ's sweep.
MEASURED_ROWS = 1024


@dataclass(frozen=True)
class LinearRow:
    """One solved weight, as the report lists it."""

    name: str
    shape: tuple[int, int]
    error: float | None
    """‖(Q-W)X̂‖² / ‖WX̂‖² on the quantized model's inputs, of at most 1024 rows; None: no data was read."""
    rtn_error: float | None  # the same with every weight rounded to nearest on the same scales
    weight_error: float  # ‖Q-W‖² / ‖W‖²
    loss: float | None  # Σ_j d_j (v_j - q_j)² over all rows: what the sweep minimized
    bound: float | None  # Babai's bound on it (core/certificate.py)
    bound_ratio: float | None  # loss / bound; rows with clipped codes may exceed 1
    clipped: int | None  # codes that would have left the grid before clipping
    damp_percent: float | None
    damp_raised: int
    alpha: float | None  # share of the exact target's step that held-out tokens wanted
    rounds: int | None  # refinement rounds kept, of all linears that read this input on this grid together
    rejected: int | None  # refinement rounds undone: they raised the held-out loss
    residual: bool  # the target answers the drift of the residual stream, too
    tokens: int
    dropped: int
    seconds: float
    bits: int | str | None = None  # None in the records of runs that were begun by a version that did not write it
    group_size: int | None = None
    rounded: bool = False  # to nearest in place of the method: no token reached it, or only zeros


@dataclass(frozen=True)
class BlockRow:
    """The hidden state behind one block, as the report lists it."""

    name: str
    error: float | None
    """‖x̂-x‖²/‖x‖² of a token of the checked windows, the mean over tokens; None: no token's is finite."""
    rtn_error: float | None
    """The same where every weight up to here is rounded to nearest, on min-max ranges; None: it cannot be."""


class Clock:
    """Seconds spent, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the seconds counted since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


class Knowledge(NamedTuple):
    """The input of a stage, as its solving knew it."""

    moments: Moments | None = None
    """None: the method reads no data, or no token arrived."""
    factor: Factor | None = None
    rounded: bool = False
    """True where weights were rounded to nearest for want of tokens."""


def measure(
    name: str,
    weight: Tensor,
    quantized: Quantized,
    grid: Grid,
    known: Knowledge,
    *,
    seconds: float = 0.0,
    ranks: Ranks = ALONE,
) -> tuple[LinearRow, list[str]]:
    """Measure one solved weight against its original; every rank takes some rows, and all call this.

    Args:
        name: of the linear.
        weight: (out, in), the original.
        quantized: what was solved for it, on ``grid``.
        known: what its solving knew.
        seconds: what the solving took.

    Returns:
        The row of the report, and sentences about what a person should look at.
    """
    moments, notes = known.moments, list[str]()
    found = _measure(weight, quantized, grid, moments, ranks)
    error = rtn_error = None
    if moments is not None:
        error, rtn_error = (e / found.power if found.power > 0 else 0.0 for e in (found.error, found.rtn))
        # A method that corrects drift leaves W on purpose: it is judged on what it minimizes.
        worse = found.error - 2 * found.answered > found.rtn - 2 * found.rtn_answered
        if worse and rtn_error > 0:
            notes.append(
                f"{name}: serves its objective worse than rounding to nearest (error {error:.3g}, rtn {rtn_error:.3g})"
            )
    certificate, course, factor = quantized.certificate, quantized.course, known.factor
    row = LinearRow(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        error=error,
        rtn_error=rtn_error,
        weight_error=found.moved / found.norm if found.norm > 0 else 0.0,
        loss=None if certificate is None else float(certificate.loss.sum()),
        bound=None if certificate is None else float(certificate.bound.sum()),
        bound_ratio=None if certificate is None else ratio(certificate),
        clipped=None if certificate is None else int(certificate.clipped.sum()),
        damp_percent=course.damp_percent if course else factor.damp_percent if factor else None,
        damp_raised=course.damp_raised if course else factor.raised if factor else 0,
        alpha=None if course is None else course.alpha,
        rounds=None if course is None else course.rounds,
        rejected=None if course is None else course.rejected,
        residual=moments is not None and moments.R is not None,
        tokens=0 if moments is None else moments.tokens,
        dropped=0 if moments is None else moments.dropped,
        seconds=seconds,
        bits=grid.bits,
        group_size=grid.group_size,
        rounded=known.rounded,
    )
    if row.bound_ratio is not None and row.bound_ratio > 1:
        notes.append(f"{name}: loss {row.bound_ratio:.1f} times Babai's bound, {row.clipped} codes clipped")
    return row, notes


class _Measured(NamedTuple):
    """Sums over the rows of a weight W and its solution Q: norms over all rows, the rest over the measured rows.

    Energies are ‖· X̂‖² per token.
    """

    norm: float = 0.0  # ‖W‖²
    moved: float = 0.0  # ‖Q-W‖²
    power: float = 0.0  # of W
    error: float = 0.0  # of Q-W
    rtn: float = 0.0  # of the weight rounded to nearest, less W
    answered: float = 0.0  # how much Q-W gives of what the drift asks
    rtn_answered: float = 0.0


def measured_rows(rows: int) -> slice:
    """Slice at most ``MEASURED_ROWS`` rows of a weight, evenly spaced: errors are measured on them."""
    return slice(None, None, -(-rows // MEASURED_ROWS))


def _measure(weight: Tensor, quantized: Quantized, grid: Grid, moments: Moments | None, ranks: Ranks) -> _Measured:
    """Measure by chunks of this rank's rows: whole copies of the weight would be the largest arrays of a run."""
    step = max(1, MEASURED_AT_ONCE // weight.shape[1])

    def chunks(rows: int) -> list[slice]:
        mine = ranks.part(rows)
        return [slice(first, min(first + step, mine.stop)) for first in range(mine.start, mine.stop, step)]

    norm = moved = 0.0
    for part in chunks(len(weight)):
        norm += float(weight[part].square().sum())
        moved += float(dequantize(quantized.rows(part), grid).to(weight.dtype).sub_(weight[part]).square().sum())
    total = _Measured(norm, moved)
    if moments is not None:
        rows = measured_rows(len(weight))
        weight, quantized = weight[rows], quantized.rows(rows)
        R, gain = (None if each is None else each[rows] for each in (moments.R, moments.gain))
        for part in chunks(len(weight)):
            w, q = weight[part], quantized.rows(part)
            delta, rtn = dequantize(q, grid).to(w.dtype).sub_(w), _rounded(w, q, grid).sub_(w)
            wanted = pull(w, moments.D, None if R is None else R[part])
            if gain is not None:  # behind the norm an output's error is so many times as large
                w, delta, rtn, wanted = (each * gain[part, None].to(w.dtype) for each in (w, delta, rtn, wanted))
            energies = [energy(each, moments.H) for each in (w, delta, rtn)]
            found = [0.0, 0.0, *energies, *(float((each * wanted).sum()) for each in (delta, rtn))]
            total = _Measured(*(a + b for a, b in zip(total, found, strict=True)))
    return _Measured(*ranks.total(torch.tensor(total, dtype=torch.float64)).tolist())


def observed(name: str, moments: Moments, power: int) -> list[str]:
    """List sentences about the tokens of a stage; ``power``: of 2, by which the moments were scaled.

    An expert of few tokens is told of with its layer's others (``run/stage.py``).
    """
    events = []
    if power:
        events.append(f"{name}: extreme activations, moments scaled by 2^{power}; so are its loss and bound")
    if moments.dropped:
        events.append(f"{name}: {moments.dropped} calibration tokens left out, NaN or Inf in the activation")
    if EXPERT.fullmatch(name) is None and moments.held is not None and not 0 < moments.held.tokens < moments.tokens:
        events.append(f"{name}: too few tokens to hold any out, so none could judge")
    return events


def energy(weight: Tensor, H: Tensor) -> float:
    """Return ``tr(W H Wᵀ)``, the mean squared output over the calibration tokens, by halves of the symmetric H."""
    half = len(H) // 2
    if half < LEAF:
        return float((weight @ H).mul_(weight).sum())
    parts = (slice(0, half), slice(half, None))
    across = float((weight[:, :half] @ H[:half, half:]).mul_(weight[:, half:]).sum())
    return sum(energy(weight[:, part], H[part, part]) for part in parts) + 2 * across


def _rounded(weight: Tensor, quantized: Quantized, grid: Grid) -> Tensor:
    """Round the weight to nearest on the scales of the solution."""
    return dequantize(round_to_nearest(weight, quantized.scale.to(weight.dtype), quantized.zero, grid), grid)
