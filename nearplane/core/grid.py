"""The grid: the values that a weight may become, and which weights share a scale.

``levels`` and ``scales`` decide the values, ``group_size`` the sharing. A code's value is ``scale * (level - zero)``; for
the integer grids the level is the code. Here are a grid's settings, the fitting of scales, and rounding to nearest.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int, Shaped, UInt8
from torch import Tensor

from nearplane.core.errors import NumericalError, SettingError, plain_numbers
from nearplane.core.levels import FP4, NF4, Levels, Shifted, Uniform
from nearplane.core.nested import Nested
from nearplane.core.scales import Affine, PowerOfTwo, Scales, Signed, Stored
from nearplane.core.scales import ScaleDtype as ScaleDtype  # noqa: PLC0414 - others import it from here
from nearplane.core.search import longer_side, of_range, refit, search

Fit = Literal["auto", "minmax", "mse", "hessian"]

# Weights per chunk of rows in the search: few enough for a core's caches, enough to outweigh the cost of a call.
# A GPU needs more to be busy.
CHUNK_WEIGHTS, CHUNK_WEIGHTS_GPU = 1 << 19, 1 << 23


class Certificate(NamedTuple):
    """Babai's certificate of one solved weight, see ``core/certificate.py``."""

    loss: Float[Tensor, "out"]  # achieved, per row: ||q - w*||^2 in the metric H + damping, w* the (moved) target
    bound: Float[Tensor, "out"]  # sum_j d_j (half_gap s_j)^2, an upper limit where no code was clipped
    clipped: Int[Tensor, "out"]  # codes of the row that would have left the range before clipping


class Course(NamedTuple):
    """Choices that a method made for one weight by held-out tokens."""

    alpha: float  # share of the target's full step that was taken, mean over rows
    damp_percent: float
    damp_raised: int  # times the damping had to be raised
    rounds: int  # refinement rounds kept
    rejected: int  # rounds undone because the held-out loss rose


class Quantized(NamedTuple):
    """A solved weight. Formats pack these codes and never round again."""

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"] | Float32[Tensor, "out groups"]  # a code, or a real number where offsets are free
    certificate: Certificate | None = None
    course: Course | None = None

    def rows(self, part: slice) -> "Quantized":
        """Return some of the rows."""
        certificate = None if self.certificate is None else Certificate(*(value[part] for value in self.certificate))
        return Quantized(self.codes[part], self.scale[part], self.zero[part], certificate, self.course)


@dataclass(frozen=True)
class Grid:
    """The values a weight may become, and who shares a scale: an integer grid, unless ``of`` or ``named`` made it."""

    bits: int | Literal["ternary"] = 4
    """Bits per weight: 2 to 8, or "ternary" (three levels on the 2-bit storage)."""
    group_size: int = 128
    """Input columns that share one scale; -1: one scale per output row. Where none is given and 128 does not divide the
    inputs of every linear, a run takes 64 or 32 if that does."""
    sym: bool = True
    """Symmetric grid around zero; --no-sym stores a zero point per group."""
    fit: Fit = "auto"
    """How a group's range is chosen: minmax, its extremes; mse, least weight error; hessian, least error weighted
    by what it costs the layer's output; auto, hessian where the method reads data, else minmax with least-squares scales."""
    scale_dtype: ScaleDtype = "float32"
    """Set by the run: the dtype scales are stored in. They are rounded to it before a code is chosen."""
    negative_scales: bool = True
    """Let the scale of a symmetric group be negative where that fits better: its codes reach one step further on the
    other side. Engines were run with them on CPUs only; --no-negative-scales is for a GPU kernel that mistakes them."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.bits != "ternary" and (not isinstance(self.bits, int) or not 2 <= self.bits <= 8):
            raise SettingError(f"bits must be 2 to 8, or ternary; got {self.bits!r}.")
        if type(self.group_size) is not int or not isinstance(self.sym, bool):
            raise SettingError(
                f"group_size must be a whole number and sym True or False; got {self.group_size!r} and {self.sym!r}."
            )
        if self.group_size != -1 and self.group_size < 1:
            raise SettingError(f"group_size must be positive, or -1 for one scale per row; got {self.group_size}.")
        if self.bits == "ternary" and not self.sym:
            raise SettingError("a ternary grid {-s, 0, s} is symmetric by definition; use --sym.")
        if not isinstance(self.negative_scales, bool):
            raise SettingError(f"negative_scales must be True or False; got {self.negative_scales!r}.")
        for field, allowed in (("fit", get_args(Fit)), ("scale_dtype", get_args(ScaleDtype))):
            if getattr(self, field) not in allowed:
                raise SettingError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}.")

    @staticmethod
    def of(levels: Levels | None = None, scales: Scales | None = None, **fields: Any) -> "Grid":
        """Make a grid of any levels and scales.

        Args:
            levels: None for integers, from ``bits`` and ``sym``.
            scales: None for scales in ``scale_dtype``.
            fields: The other fields of ``Grid``.
        """
        if levels is not None:
            fields = {"bits": levels.bits, "sym": levels.sym, **fields}
        elif scales is not None and scales.free:
            fields = {"sym": False, **fields}
        return CustomGrid(**fields, own_levels=levels, own_scales=scales)

    @staticmethod
    def named(name: str, **fields: Any) -> "Grid":
        """Make a preset of ``PRESETS``, other ``fields`` as given. Raises SettingError for an unknown name."""
        if name not in PRESETS:
            raise SettingError(f"there is no grid named {name!r}, only {', '.join(PRESETS)}.")
        return Grid.of(**{**PRESETS[name], **fields})

    @property
    def levels(self) -> Levels:
        """The levels in units of the scale, and the rounding to them."""
        if self.bits == "ternary":
            return Uniform(2, 1, 3)
        return Uniform(self.bits, 0, 2**self.bits - 1, self.sym)

    @property
    def scales(self) -> Scales:
        """The values that scales and offsets are rounded to."""
        return Stored(self.scale_dtype, self.negative_scales and self.sym and self.bits != "ternary")

    def stored_zero(self, zero: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Return zeros as a ``Quantized`` holds them: codes, or real numbers where offsets are free."""
        return zero.to(torch.float32 if self.scales.free else torch.uint8)

    @property
    def held_in(self) -> ScaleDtype:
        """The dtype that holds the scales exactly."""
        return self.scales.held_in or self.scale_dtype

    @property
    def storage_bits(self) -> int:
        """Bits one code takes on disk."""
        return self.levels.bits

    @property
    def code_range(self) -> tuple[int, int]:
        """Least and greatest code that may occur."""
        return self.levels.code_range

    def group_width(self, in_features: int) -> int:
        """Return the columns per group of a weight with ``in_features`` columns; its last group may be smaller."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def group_count(self, in_features: int) -> int:
        """Return the groups per row, a smaller last one counted."""
        return -(-in_features // self.group_width(in_features))


@dataclass(frozen=True)
class CustomGrid(Grid):
    """A grid whose levels or scales are its own; made by ``Grid.of`` and ``Grid.named``."""

    own_levels: Levels | None = None
    own_scales: Scales | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own_levels is not None and (self.bits, self.sym) != (self.own_levels.bits, self.own_levels.sym):
            raise SettingError(f"bits and sym belong to the levels, {self.own_levels.bits} and {self.own_levels.sym}.")
        if self.scales.free and (self.sym or self.own_levels is not None):
            name = type(self.own_scales).__name__
            raise SettingError(
                f"{name} scales store an offset, so the levels are integers and sym is False (--no-sym)."
            )

        if self.scales.either_sign and not self.sym:
            name = type(self.own_scales).__name__
            raise SettingError(f"{name} scales have a sign, which turns a symmetric grid round; sym must be True.")
        if self.own_scales is not None and self.scales.either_sign and not self.negative_scales:
            name = type(self.own_scales).__name__
            raise SettingError(f"{name} scales have a sign of their own; leave out --no-negative-scales.")

    @property
    def levels(self) -> Levels:
        if self.own_scales is not None and self.own_scales.free and self.bits != "ternary":
            return Shifted(self.bits, 0, 2**self.bits - 1)
        return self.own_levels or super().levels

    @property
    def scales(self) -> Scales:
        if self.own_scales is None and self.own_levels is not None:
            return Stored(self.scale_dtype)
        return self.own_scales or super().scales


PRESETS: dict[str, dict[str, Any]] = {
    "nf4": {"levels": NF4, "group_size": 64},
    "mxfp4": {"levels": FP4, "scales": PowerOfTwo(), "group_size": 32},
    # llama.cpp's types, each as its blocks store it
    "q4_0": {"bits": 4, "group_size": 32, "scales": Signed("float16")},
    "q5_0": {"bits": 5, "group_size": 32, "scales": Signed("float16")},
    "q8_0": {"bits": 8, "group_size": 32, "scales": Signed("float16")},
    "q2_0": {"bits": 2, "group_size": 64, "scales": Signed("float16")},
    "q4_1": {"bits": 4, "group_size": 32, "scales": Affine("float16")},
    "q5_1": {"bits": 5, "group_size": 32, "scales": Affine("float16")},
    "q2_k": {"bits": 2, "group_size": 16, "scales": Nested(16, 4)},
    "q3_k": {"bits": 3, "group_size": 16, "scales": Nested(16, 6, signed=True, minima=False)},
    "q4_k": {"bits": 4, "group_size": 32, "scales": Nested(8, 6)},
    "q5_k": {"bits": 5, "group_size": 32, "scales": Nested(8, 6)},
    "q6_k": {"bits": 6, "group_size": 16, "scales": Nested(16, 8, signed=True, minima=False)},
}


def encode(
    value: Float[Tensor, "*shape"], scale: Float[Tensor, "*#shape"], zero: Float[Tensor, "*#shape"], grid: Grid
) -> Float[Tensor, "*shape"]:
    """Return the nearest code to each value, in the value's own floating dtype."""
    return grid.levels.encode_(value / scale, zero)


def decode(
    code: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*#shape"],
    zero: Float[Tensor, "*#shape"],
    grid: Grid | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the value of each code; without a grid, of an integer grid."""
    level = code if grid is None else grid.levels.decode(code, code.dtype)
    return (level - zero) * scale


def dequantize(quantized: Quantized, grid: Grid) -> Float[Tensor, "out in"]:
    """Return the weight that the codes stand for, in the dtype of the scales."""
    dtype, n = quantized.scale.dtype, quantized.codes.shape[1]
    work = (
        torch.promote_types(dtype, torch.float32) if grid.scales.free else dtype
    )  # few digits do not hold a real zero
    scale, zero = (by_column(part.to(work), grid, n) for part in (quantized.scale, quantized.zero))
    return decode(quantized.codes.to(work), scale, zero, grid).to(dtype)


def round_to_nearest(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: Shaped[Tensor, "out groups"], grid: Grid
) -> Quantized:
    """Round every weight to the nearest value of its group."""
    s, z = (by_column(part.to(weight.dtype), grid, weight.shape[1]) for part in (scale, zero))
    return Quantized(encode(weight, s, z, grid).to(torch.uint8), scale, grid.stored_zero(zero))


def by_column(value: Shaped[Tensor, "out groups"], grid: Grid, n: int) -> Shaped[Tensor, "out n"]:
    """Repeat a value per group for each of the group's columns, ``n`` in all."""
    return value.repeat_interleave(grid.group_width(n), 1)[:, :n]


def group_index(order: Int[Tensor, "in"], grid: Grid) -> Int[Tensor, "in"]:
    """Return the group of the column at each solve position: groups are contiguous on disk, whatever the order."""
    return order // grid.group_width(len(order))


def fit(
    weight: Float[Tensor, "*batch n"], grid: Grid, importance: Float[Tensor, "#*batch n"] | None = None
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Fit the scale and zero of groups of ``n`` weights each, each group on its own.

    Args:
        weight: The groups, along the last dimension.
        grid: ``grid.fit`` says by which measure.
        importance: Weight of each column's squared error (``column_cost``) where ``grid.fit`` is "hessian" or "auto".

    Returns:
        Scales and zeros, the zeros in the floating dtype of the weight.

    Raises:
        NumericalError: The weight holds NaN or Inf, or a scale is too large to be stored.
        SettingError: ``grid.fit`` is "hessian" and there is no ``importance``.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    if grid.fit == "hessian" and importance is None:
        raise SettingError("fit='hessian' weights errors by what they cost, and this method reads no calibration data.")
    if importance is not None:
        weighted = grid.fit in ("hessian", "auto")
        importance = importance.to(rows.dtype).expand_as(weight).reshape(rows.shape) if weighted else None
    low, high = grid.scales.span(rows.amin(1), rows.amax(1))
    if not bool((high - low).isfinite().all()):
        raise NumericalError("the weights to be quantized hold NaN or Inf.")
    scale, zero = of_range(low, high, grid.levels, grid.scales)
    if grid.fit != "minmax" or grid.scales.either_sign:
        step = max(1, (CHUNK_WEIGHTS if rows.device.type == "cpu" else CHUNK_WEIGHTS_GPU) // rows.shape[1])
        for a in range(0, len(rows), step):
            part = slice(a, a + step)
            if grid.fit == "minmax":
                scale[part] = longer_side(rows[part], scale[part], zero[part], grid.levels, grid.scales)
                continue
            if grid.fit == "auto" and importance is None:
                scale[part], zero[part] = refit(rows[part], low[part], high[part], grid.levels, grid.scales)
                continue
            weights = None if importance is None else importance[part]
            scale[part], zero[part] = search(rows[part], low[part], high[part], grid.levels, grid.scales, weights)
    if not bool(scale.isfinite().all()):
        raise NumericalError(_too_large(grid))
    return scale.reshape(weight.shape[:-1]), zero.reshape(weight.shape[:-1])


def fit_groups(
    weight: Float[Tensor, "out in"], grid: Grid, importance: Float[Tensor, "in"] | None = None
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Fit the scale and zero of every group of a weight ("static groups"), as ``fit`` does.

    A smaller last group is fitted on its own. Scales that are stored together are then rounded together.

    Raises:
        SettingError: The scales are stored together, and a row does not divide into what is.
    """
    width = grid.group_width(weight.shape[1])
    full = weight.shape[1] // width * width
    reason = grid.scales.row_reason(weight.shape[1], width)
    if reason is not None:
        raise SettingError(reason + ".")

    def part(a: int, b: int, size: int) -> tuple[Tensor, Tensor]:
        weights = None if importance is None else importance[a:b].reshape(-1, size)
        return fit(weight[:, a:b].reshape(len(weight), -1, size), grid, weights)

    scale, zero = part(0, full, width)
    if full < weight.shape[1]:
        tail = part(full, weight.shape[1], weight.shape[1] - full)
        scale, zero = torch.cat([scale, tail[0]], 1), torch.cat([zero, tail[1]], 1)
    if not grid.scales.joint:
        return scale, zero
    pad = (0, -weight.shape[1] % width)
    weights = None if importance is None or grid.fit in ("minmax", "mse") else importance
    if grid.fit in ("auto", "mse") and weights is None:
        weights = torch.ones_like(weight[0])
    if weights is not None:
        weights = torch.nn.functional.pad(weights, pad).reshape(-1, width)
    groups = torch.nn.functional.pad(weight, pad).reshape(len(weight), -1, width)
    scale, zero = grid.scales.fit_rows(groups, scale, zero, grid.levels, weights)
    if not bool(scale.isfinite().all()):
        raise NumericalError(_too_large(grid))
    return scale, zero


def spoiled_groups(
    weight: Float[Tensor, "out in"], grid: Grid
) -> tuple[Bool[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Find the groups whose scale cannot be stored: rounding the scale moves the largest weight by more than one step.

    A float16 below 6e-5 has few digits, none below 3e-8, and ends at 65504. Scales are those of the whole range (``minmax``).

    Args:
        weight: The weight; a group of zeros is never spoiled.
        grid: With ``scale_dtype`` as scales will be stored.

    Returns:
        Which groups are spoiled, and the sum of squares of every group.
    """
    width, columns = grid.group_width(weight.shape[1]), weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -columns % width)).reshape(len(weight), -1, width)
    scale = grid.levels.scale(groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0))
    stored = grid.scales.nearest(scale)
    steps = (stored - scale).abs() / scale * (1 << (grid.storage_bits - 1))
    return (scale > 0) & ~(steps <= 1), groups.square().sum(2)


def _too_large(grid: Grid) -> str:
    """Tell that a scale cannot be stored."""
    if isinstance(grid.scales, Stored):
        return f"a scale leaves the range of {grid.scale_dtype}; use --format compressed-tensors with --dtype bfloat16."
    return f"a scale leaves the range of {type(grid.scales).__name__} scales in {getattr(grid.scales, 'dtype', 'float32')}."
