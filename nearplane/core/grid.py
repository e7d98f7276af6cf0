"""The grid: which integers a weight may become, and who shares a scale.

Decides the scale and zero of every group (``fit``), the rounding itself (``encode``) and its inverse
(``decode``, ``dequantize``). A code is an unsigned integer, its value is ``scale * (code - zero)``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from nearplane.core.errors import NumericalError, SettingError

Fit = Literal["auto", "minmax", "mse", "hessian"]
ScaleDtype = Literal["float32", "float16", "bfloat16"]

# The search of the published GPTQ code (arXiv 2210.17323, "--mse"): shrink the range to 1 - i/100, i = 0..79,
# keep the least sum of |error|**2.4.
SHRINK_STEPS, SHRINK_GRAIN, MSE_NORM = 80, 100, 2.4
# The weighted search tries the middle of every five of these steps first, then the others of the best five.
COARSE = 5
# Rows are searched in chunks of about this many weights: little enough for a core's caches, enough for what a call costs;
# on a GPU enough to fill it.
CHUNK_WEIGHTS, CHUNK_WEIGHTS_GPU = 1 << 17, 1 << 23


class Certificate(NamedTuple):
    """Babai's certificate of one solved weight (``core/certificate.py`` says what it means)."""

    loss: Float[Tensor, "out"]  # achieved, per row: ||q - w*||^2 in the metric H + damping, w* the (moved) target
    bound: Float[Tensor, "out"]  # 1/4 sum_j d_j s_j^2, an upper limit where no code was clipped
    clipped: Int[Tensor, "out"]  # codes of the row that would have left the range before clipping


class Course(NamedTuple):
    """How a method that judges its steps on held-out tokens went about one weight."""

    alpha: float  # share of the target's full step that was taken, mean over rows
    damp_percent: float
    damp_raised: int  # times the damping had to be raised
    rounds: int  # refinement rounds kept
    rejected: int  # rounds undone because the held-out loss rose


class Quantized(NamedTuple):
    """A solved weight. The codes are the truth from the moment they are solved; formats only pack them."""

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    certificate: Certificate | None = None
    course: Course | None = None

    def rows(self, part: slice) -> "Quantized":
        """Some of the rows."""
        certificate = None if self.certificate is None else Certificate(*(value[part] for value in self.certificate))
        return Quantized(self.codes[part], self.scale[part], self.zero[part], certificate, self.course)


@dataclass(frozen=True)
class Grid:
    """The integers a weight may become, and who shares a scale."""

    bits: int | Literal["ternary"] = 4
    """Bits per weight: 2 to 8, or "ternary" (three levels on the 2-bit storage)."""
    group_size: int = 128
    """Input columns that share one scale; -1: one scale per output row."""
    sym: bool = True
    """Symmetric grid around zero; --no-sym stores a zero point per group."""
    fit: Fit = "auto"
    """How a group's range is chosen: minmax, its extremes; mse, least weight error; hessian, least error weighted
    by what it costs the layer's output; auto, hessian where the method reads data and mse where it does not."""
    scale_dtype: ScaleDtype = "float32"
    """Set by the run: the dtype scales are stored in. They are rounded to it before a code is chosen."""

    def __post_init__(self) -> None:
        if self.bits != "ternary" and (not isinstance(self.bits, int) or not 2 <= self.bits <= 8):
            raise SettingError(f"bits must be 2 to 8, or ternary; got {self.bits!r}.")
        if self.group_size != -1 and self.group_size < 1:
            raise SettingError(f"group_size must be positive, or -1 for one scale per row; got {self.group_size}.")
        if self.bits == "ternary" and not self.sym:
            raise SettingError("a ternary grid {-s, 0, s} is symmetric by definition; use --sym.")
        for field, allowed in (
            ("fit", get_args(Fit)),
            ("scale_dtype", get_args(ScaleDtype)),
        ):
            if getattr(self, field) not in allowed:
                raise SettingError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}.")

    @property
    def storage_bits(self) -> int:
        """Bits one code takes on disk."""
        return 2 if self.bits == "ternary" else self.bits

    @property
    def code_range(self) -> tuple[int, int]:
        """Least and greatest code that may occur."""
        return (1, 3) if self.bits == "ternary" else (0, 2**self.bits - 1)

    def group_width(self, in_features: int) -> int:
        """Columns per group of a weight with ``in_features`` columns (its last group may be smaller)."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def group_count(self, in_features: int) -> int:
        """Groups per row, a smaller last one counted."""
        return -(-in_features // self.group_width(in_features))


def encode(
    value: Float[Tensor, "*shape"], scale: Float[Tensor, "*#shape"], zero: Float[Tensor, "*#shape"], grid: Grid
) -> Float[Tensor, "*shape"]:
    """Nearest code to each value, clamped to the grid; returned in the value's own floating dtype."""
    return (value / scale).round_().add_(zero).clamp_(*grid.code_range)


def decode(
    code: Float[Tensor, "*shape"], scale: Float[Tensor, "*#shape"], zero: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """Value of each code."""
    return (code - zero) * scale


def dequantize(quantized: Quantized, grid: Grid) -> Float[Tensor, "out in"]:
    """The weight that the codes stand for, in the dtype of the scales."""
    dtype, n = quantized.scale.dtype, quantized.codes.shape[1]
    scale, zero = (by_column(part, grid, n) for part in (quantized.scale, quantized.zero.to(dtype)))
    return decode(quantized.codes.to(dtype), scale, zero)


def by_column(value: Shaped[Tensor, "out groups"], grid: Grid, n: int) -> Shaped[Tensor, "out n"]:
    """What each of ``n`` columns has of a value per group."""
    return value.repeat_interleave(grid.group_width(n), 1)[:, :n]


def fit(
    weight: Float[Tensor, "*batch n"], grid: Grid, importance: Float[Tensor, "#*batch n"] | None = None
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Scale and zero of groups of ``n`` weights each (last dimension), zeros as floats.

    ``importance`` (``column_cost``) weights the squared error of each column where ``grid.fit`` is "hessian" or "auto".
    Raises NumericalError where a scale does not fit ``grid.scale_dtype``.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    if grid.fit == "hessian" and importance is None:
        raise SettingError("fit='hessian' weights errors by what they cost, and this method reads no calibration data.")
    if importance is not None:
        weighted = grid.fit in ("hessian", "auto")
        importance = importance.expand_as(weight).reshape(rows.shape) if weighted else None
    low, high = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
    if not bool((high - low).isfinite().all()):
        raise NumericalError("the weights to be quantized hold NaN or Inf.")
    if grid.sym:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _grid_of_range(low, high, grid)
    if grid.fit != "minmax":
        step = max(1, (CHUNK_WEIGHTS if rows.device.type == "cpu" else CHUNK_WEIGHTS_GPU) // rows.shape[1])
        for a in range(0, len(rows), step):
            part = slice(a, a + step)
            weights = None if importance is None else importance[part]
            scale[part], zero[part] = _search(rows[part], low[part], high[part], grid, weights)
    if not bool(scale.isfinite().all()):
        raise NumericalError(
            f"a scale leaves the range of {grid.scale_dtype}; use --format compressed-tensors with --dtype bfloat16."
        )
    return scale.reshape(weight.shape[:-1]), zero.reshape(weight.shape[:-1])


def fit_groups(
    weight: Float[Tensor, "out in"], grid: Grid, importance: Float[Tensor, "in"] | None = None
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero of every group of a weight ("static groups"); a smaller last group is fitted on its own."""
    width = grid.group_width(weight.shape[1])
    full = weight.shape[1] // width * width

    def part(a: int, b: int, size: int) -> tuple[Tensor, Tensor]:
        weights = None if importance is None else importance[a:b].reshape(-1, size)
        return fit(weight[:, a:b].reshape(len(weight), -1, size), grid, weights)

    scale, zero = part(0, full, width)
    if full < weight.shape[1]:
        tail = part(full, weight.shape[1], weight.shape[1] - full)
        scale, zero = torch.cat([scale, tail[0]], 1), torch.cat([zero, tail[1]], 1)
    return scale, zero


def _grid_of_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero that cover [low, high]; an empty range gets scale 1."""
    least, greatest = grid.code_range
    scale = (high - low) / (greatest - least)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    scale = round_scale(scale, grid)
    if grid.sym:
        return scale, torch.full_like(scale, 2 ** (grid.storage_bits - 1))
    return scale, (-low / scale).round_().clamp_(least, greatest)


def round_scale(scale: Float[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """Scales as the checkpoint will hold them: rounded to ``grid.scale_dtype``, never to zero."""
    stored: torch.dtype = getattr(torch, grid.scale_dtype)
    least = torch.finfo(stored).smallest_normal
    if stored == torch.float16:  # weights below 1e-4 are common enough to need its subnormals
        least *= torch.finfo(stored).eps
    return scale.to(stored).to(scale.dtype).clamp_min(least)


def _search(rows: Tensor, low: Tensor, high: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shrink each row's range while its error falls."""
    penalty: Callable[[Tensor], Tensor]
    if importance is None:
        # |error|**2.4, in a third of the time that pow takes
        penalty = lambda error: error.abs_().log2_().mul_(MSE_NORM).exp2_().sum(1)  # noqa: E731
    else:
        penalty = lambda error: error.square_().mul_(importance).sum(1)  # noqa: E731
    best_scale, best_zero = _grid_of_range(low, high, grid)
    best, best_p = torch.full_like(low, torch.inf), torch.ones_like(low)

    def attempt(p: Tensor) -> None:
        scale, zero = _grid_of_range(p * low, p * high, grid)
        code = encode(rows, scale[:, None], zero[:, None], grid)
        error = penalty(code.sub_(zero[:, None]).mul_(scale[:, None]).sub_(rows))
        better = error < best
        for kept, new in ((best, error), (best_p, p), (best_scale, scale), (best_zero, zero)):
            torch.where(better, new, kept, out=kept)

    if importance is None:
        tried: Iterable[int] = range(SHRINK_STEPS)
    else:
        tried = (0, *range(COARSE // 2, SHRINK_STEPS, COARSE))
    for i in tried:
        attempt(torch.full_like(low, 1 - i / SHRINK_GRAIN))
    middle = best_p.clone()
    for i in range(1, COARSE // 2 + 1) if importance is not None else ():
        attempt(middle - i / SHRINK_GRAIN)
        attempt((middle + i / SHRINK_GRAIN).clamp_(max=1))
    return best_scale, best_zero


def group_index(order: Int[Tensor, "in"], grid: Grid) -> Int[Tensor, "in"]:
    """Group of the column at each solve position: groups are contiguous on disk, whatever the order."""
    return order // grid.group_width(len(order))
