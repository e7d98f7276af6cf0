"""Nested scales, those of K-quants: a super-block of some groups stores one scale, each group a small integer beside it.

The scale of a group is ``d sub``, ``d`` a float of the super-block and ``sub`` an integer of the group. Where there are
minima, the offset is ``dmin sub_min`` in the same way. All of them are rounded before a code is chosen: ``fit_rows``
chooses them by what they cost the weights. A round of refinement moves the integers, and leaves ``d`` and ``dmin``.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from jaxtyping import Float, Float32, Int32, Shaped
from torch import Tensor

from nearplane.core.errors import NearplaneError, NumericalError, SettingError
from nearplane.core.levels import Levels
from nearplane.core.line import Line
from nearplane.core.scales import (
    MOST_ZERO,
    Affine,
    Beside,
    ScaleDtype,
    Scales,
    Signed,
    keep_sign,
    least_of,
    real_zero,
    rounded,
)

# Super-scales that are tried: the largest scale over so many, in multiples of the greatest integer.
TRIED = [1 + i / 32 for i in range(-14, 5)]
# Integers around each that are tried at last.
AROUND = (-4, -3, -2, -1, 0, 1, 2, 3, 4)
# Times that the integers, the super-scales and the codes are chosen in turn.
TURNS = 4
# Weights per chunk of rows: few enough for a core's caches, enough to outweigh the cost of a call.
CHUNK_WEIGHTS, CHUNK_WEIGHTS_GPU = 1 << 17, 1 << 23
# Least weight of a column's error, as a share of the mean: a group that no input reaches is rounded like any other.
LEAST_SHARE = 1e-6


Where = tuple[Tensor, Tensor]  # rows and super-blocks


class Parts(NamedTuple):
    """What a file stores of nested scales: ``scale = super_scale sub_scale``, ``offset = super_offset sub_offset``."""

    super_scale: Float32[Tensor, "out supers"]
    sub_scale: Int32[Tensor, "out groups"]
    super_offset: Float32[Tensor, "out supers"] | None
    sub_offset: Int32[Tensor, "out groups"] | None


@dataclass(frozen=True)
class Nested(Scales):
    """Scales of super-blocks: ``groups`` of them share a float, and each has an integer of ``bits`` bits."""

    groups: int = 16
    bits: int = 4
    signed: bool = False
    """Whether the integers of scales have a sign."""
    minima: bool = True
    """Whether a super-block also has an offset, of which each group has a multiple; else zeros are the middle code."""
    dtype: ScaleDtype = "float16"
    kind: str = field(default="nested", init=False)
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.groups < 1 or not 2 <= self.bits <= 8:
            raise SettingError(
                f"nested scales have groups of at least 1 and 2 to 8 bits; got {self.groups} and {self.bits}."
            )
        if self.signed and self.minima:
            raise SettingError("nested scales have either a sign or a minimum; signed and minima are both True.")

    @property
    def free(self) -> bool:
        return self.minima

    @property
    def either_sign(self) -> bool:
        return self.signed

    @property
    def held_in(self) -> ScaleDtype | None:
        return "float32"

    @property
    def most(self) -> tuple[int, int]:
        """Least and greatest integer of a scale; 0 is left out."""
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.signed else (1, 2 * half - 1)

    @property
    def reach(self) -> int:
        """Greatest size of an integer."""
        return max(-self.most[0], self.most[1])

    def nearest(self, scale: Tensor) -> Tensor:
        """Return what is possible beside any other group: a float32 number within the reach of the integers."""
        size = scale.abs().float().to(scale.dtype).clamp_min(least_of(self.dtype))
        limit = torch.finfo(getattr(torch, self.dtype)).max * self.most[1]
        return keep_sign(size.masked_fill(size > limit, torch.inf), scale if self.signed else size)

    def round(self, scale: Tensor, offset: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        if not self.minima:
            return super().round(scale, offset, levels)
        offset = offset.clamp_min(0)
        scale = self.nearest(torch.maximum(scale, offset / MOST_ZERO))
        return scale, real_zero(offset, scale)

    def span(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low.clamp_(max=0), high if self.minima else high.clamp_(min=0)

    def row_reason(self, columns: int, width: int) -> str | None:
        if columns % (self.groups * width) == 0:
            return None
        return f"a super-block is {self.groups} groups of {width} inputs, and does not divide the {columns} inputs of a row"

    def fit_rows(
        self, groups: Tensor, scale: Tensor, zero: Tensor, levels: Levels, importance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose super-scales and integers by the weighted squared error of the weights."""
        out, count, width = groups.shape
        weight = torch.ones_like(groups[0]) if importance is None else importance
        mean = weight.mean()
        weight = weight + LEAST_SHARE * mean if bool(mean > 0) else torch.ones_like(weight)
        chunk = CHUNK_WEIGHTS if groups.device.type == "cpu" else CHUNK_WEIGHTS_GPU
        step = max(1, chunk // (count * width))
        fitted = [
            _Blocks(self, groups[a : a + step], weight, levels).fit(
                scale[a : a + step], zero[a : a + step], 0 if importance is None else TURNS
            )
            for a in range(0, out, step)
        ]
        return torch.cat([part[0] for part in fitted]), torch.cat([part[1] for part in fitted])

    def integer(
        self,
        scale: Float[Tensor, "*#shape"],
        unit: Float[Tensor, "*#shape"],
        whole: Callable[[Tensor], Tensor] = torch.round,
    ) -> Float[Tensor, "*#shape"]:
        """Return the integer of a scale beside its super-scale, never 0, of the sign of the scale."""
        least, greatest = self.most
        count = whole(scale / unit).clamp(least, greatest)
        return torch.where(count == 0, keep_sign(torch.ones_like(count), scale * unit), count)

    def minimum(
        self, offset: Float[Tensor, "*#shape"], unit: Float[Tensor, "*#shape"], scale: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "*#shape"]:
        """Return the integer of an offset beside its super-offset."""
        most = (1 << self.bits) - 1
        count = torch.where(unit > 0, offset / unit, torch.zeros_like(offset)).round().clamp_(0, most)
        limit = torch.where(unit > 0, MOST_ZERO * scale / unit, torch.full_like(scale, most))
        return torch.minimum(count, limit.floor())

    def parts(
        self, scale: Float[Tensor, "out groups"], zero: Shaped[Tensor, "out groups"]
    ) -> Parts:
        """Find what a file stores; the product of the parts is bit for bit the scale, and gives the zero.

        Of several super-scales that do, the finest is taken.

        Args:
            scale: Scales of a solved weight.
            zero: Its zeros.

        Raises:
            NumericalError: The scales are no multiples of any one number of ``dtype``.
        """
        blocks = scale.double().unflatten(1, (-1, self.groups))
        signs = (1, -1) if self.signed else (1,)
        tops = [sign * k for sign in signs for k in range(1 << self.bits, 0, -1)]
        least, greatest = self.most

        def scales(unit: Tensor, part: Where) -> tuple[Tensor, Tensor]:
            count = (blocks[part] / unit).round()
            inside = (count >= least) & (count <= greatest) & (count != 0)
            return count, (inside & (count * unit == blocks[part])).all(-1)

        unit, count = _divide(blocks, tops, self.dtype, scales)
        if not self.minima:
            return Parts(unit, count, None, None)
        zeros = zero.float().unflatten(1, (-1, self.groups))
        most = (1 << self.bits) - 1

        def offsets(unit: Tensor, part: Where) -> tuple[Tensor, Tensor]:
            count = (zeros[part].double() * blocks[part] / unit).round()
            again = real_zero((count * unit).float(), blocks[part].float())
            return count, ((count >= 0) & (count <= most) & (again == zeros[part])).all(-1)

        super_offset, sub_offset = _divide(zeros.double() * blocks, list(range(most, 0, -1)), self.dtype, offsets)
        return Parts(unit, count, super_offset, sub_offset)

    def beside(self, scale: Tensor, zero: Tensor) -> Beside:
        return _NestedBeside(self, scale, zero)


KINDS: dict[str, type[Signed] | type[Affine] | type[Nested]] = {"signed": Signed, "affine": Affine, "nested": Nested}
"""The scales that are no plain floats, by the ``kind`` under which parts and reports record them."""


def described(scales: Scales) -> dict[str, Any]:
    """Return scales of ``KINDS`` as fields for JSON."""
    if not isinstance(scales, tuple(KINDS.values())):
        raise SettingError(f"scales of type {type(scales).__name__} have no description on disk.")
    return asdict(scales)


def scales_of(told: Mapping[str, Any], where: str) -> Scales:
    """Make scales of what ``described`` returned. Raises NearplaneError, beginning with ``where``, if they are unknown."""
    kind = KINDS.get(str(told.get("kind")))
    known = {} if kind is None else {part.name: part.default for part in fields(kind) if part.init}
    given = {key: value for key, value in told.items() if key != "kind"}
    same = given.keys() == known.keys() and all(type(given[key]) is type(known[key]) for key in known)
    if kind is None or not same or given["dtype"] not in get_args(ScaleDtype):
        raise NearplaneError(f"{where}: nearplane knows no scales {dict(told)!r}.")
    return kind(**given)


def _divide(
    products: Tensor, tops: list[int], dtype: ScaleDtype, proves: Callable[[Tensor, Where], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Find the number of ``dtype`` whose multiples the products of each super-block are.

    Args:
        products: (out, supers, groups), float64, the largest of each super-block up to a rounding of float32.
        tops: Multiples to try for the largest product, the first that will do wins.
        dtype: Of the number.
        proves: Takes numbers (blocks, 1) and where they stand, and returns the multiples and whether they are right.

    Returns:
        The numbers, (out, supers) in float32, and the multiples, (out, supers * groups) in int32.
    """
    out, supers, groups = products.shape
    found = products.new_zeros(out, supers)
    multiples = products.new_zeros(out, supers, groups)
    top = products.gather(2, products.abs().argmax(2, keepdim=True))[:, :, 0]
    open_ = top != 0
    for k in tops:
        unit = rounded(top / k, dtype)
        near = open_ & (((unit * k - top).abs() <= top.abs() * 2.0**-22) & (unit != 0))
        where = near.nonzero()
        if not len(where):
            continue
        part = where[:, 0], where[:, 1]
        count, right = proves(unit[part][:, None], part)
        part = part[0][right], part[1][right]
        found[part], multiples[part] = unit[part], count[right]
        open_[part] = False
    if bool(open_.any()):
        row, block = (int(i) for i in open_.nonzero()[0])
        raise NumericalError(
            f"row {row}, super-block {block}: the scales or offsets are no multiples of one {dtype} number."
        )
    return found.float(), multiples.flatten(1).int()


class _NestedBeside(Beside):
    """Integers that move while the super-scales stay."""

    scales: Nested

    def __init__(self, scales: Nested, scale: Tensor, zero: Tensor) -> None:
        super().__init__(scales, scale)
        parts = scales.parts(scale.T, zero.T)
        self.unit = parts.super_scale.to(scale.dtype).T
        self.step = self.unit if parts.super_offset is None else parts.super_offset.to(scale.dtype).T

    def scale(self, wanted: Tensor, group: int) -> Tensor:
        unit = self.unit[group // self.scales.groups]
        return self.scales.integer(wanted, unit) * unit

    def around(self, wanted: Tensor, group: int) -> list[Tensor]:
        unit = self.unit[group // self.scales.groups]
        return [self.scales.integer(wanted, unit, whole) * unit for whole in (torch.floor, torch.ceil)]

    def zero(self, offset: Tensor, scale: Tensor, group: int) -> Tensor:
        step = self.step[group // self.scales.groups]
        return real_zero(self.scales.minimum(offset, step, scale) * step, scale)


class _Blocks:
    """The super-blocks of some rows while their scales are fitted: (out, supers, groups, width)."""

    def __init__(self, scales: Nested, groups: Tensor, weight: Tensor, levels: Levels) -> None:
        self.scales, self.levels = scales, levels
        self.x = groups.unflatten(1, (-1, scales.groups))
        self.weight = weight.unflatten(0, (-1, scales.groups))
        self.live = (self.x != 0).any(-1)

    def fit(self, scale: Tensor, zero: Tensor, turns: int) -> tuple[Tensor, Tensor]:
        """Round fitted scales and zeros to what is stored; ``turns`` times better them, each no worse than the last."""
        s, z = (part.unflatten(1, (-1, self.scales.groups)) for part in (scale, zero))
        o = s * z if self.scales.minima else torch.zeros_like(s)
        line, _ = self.line(s, o, z)
        s, o = (torch.where(self.live, part, torch.zeros_like(part)) for part in (s, o))
        step = self.move(line) if turns else torch.zeros_like(s)
        wanted = torch.where((s + step) * s > 0, s + step, s)
        d = self.unit(wanted, line.stiffness() if self.scales.minima else line.a, self.scales.integer)
        now = d * self.scales.integer(wanted, d)
        dmin, m = torch.ones_like(d), torch.zeros_like(s)
        if self.scales.minima:
            offset = (o + line.offset(now - s)).clamp_min_(0) if turns else o
            offset = torch.where(self.live, offset, torch.zeros_like(offset))
            count = lambda value, unit: self.scales.minimum(value, unit, now)  # noqa: E731
            dmin = self.unit(offset, line.c, count)
            m = count(offset, dmin)
        state = d, now / d, dmin, m
        for _ in range(turns):
            state = self.turn(*state, z)
        if turns:
            state = self.beside(*self.turn(*self.beside(*state, z), z), z)
        d, sub, dmin, m = state
        scale = (d * sub).flatten(1)
        return scale, real_zero((dmin * m).flatten(1), scale) if self.scales.minima else zero

    def line(self, s: Tensor, o: Tensor, z: Tensor) -> tuple[Line, Tensor]:
        """Round the weights to these scales and offsets (or zeros); return the line about them and the error."""
        s, o, z = (part[..., None] for part in (s, o, o / s if self.scales.minima else z))
        level = self.levels.decode(self.levels.encode_(self.x / s, z), s.dtype)
        if not self.scales.minima:
            level = level - z
        error = torch.addcmul(self.x + o, level, s, value=-1)
        return Line.of(error, level, self.weight), (error.square_() * self.weight).sum(-1)

    def move(self, line: Line) -> Tensor:
        """Return the best change of each scale while its codes stay."""
        if self.scales.minima:
            return line.scale()
        return torch.where(line.a > 0, line.p / line.a, torch.zeros_like(line.p))

    def unit(self, wanted: Tensor, cost: Tensor, integer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the super-scale whose multiples are cheapest in place of what is wanted: (out, supers, 1).

        Args:
            wanted: Scales, or offsets.
            cost: Of a squared change of each.
            integer: Which multiple stands for a value.
        """
        top = wanted.abs().amax(-1, keepdim=True)
        most = self.scales.reach
        best, least = torch.full_like(top, torch.nan), torch.full_like(top, torch.inf)
        for sign in (1, -1) if self.scales.signed else (1,):
            for share in TRIED:
                unit = sign * rounded(top / (most * share), self.scales.dtype).clamp_min(least_of(self.scales.dtype))
                unit = torch.where(top > 0, unit, torch.ones_like(unit))
                lost = (cost * (integer(wanted, unit) * unit - wanted).square()).sum(-1, keepdim=True)
                better = (lost < least) | best.isnan()
                best, least = torch.where(better, unit, best), torch.where(better, lost, least)
        return best

    def turn(self, d: Tensor, sub: Tensor, dmin: Tensor, m: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Round the weights, then move the integers and the super-scales, while codes stay."""
        s, o = d * sub, dmin * m
        line, _ = self.line(s, o, z)
        wanted, best = s + self.move(line), torch.zeros_like(s)
        wanted = torch.where(wanted * s > 0, wanted, s)
        new, low = sub, m
        for whole in (torch.floor, torch.ceil):
            count = self.scales.integer(wanted, d, whole)
            least = m
            if self.scales.minima:
                least = self.scales.minimum(o + line.offset(count * d - s), dmin, count * d)
            cost = line.cost(count * d - s, least * dmin - o)
            new, low = torch.where(cost < best, count, new), torch.where(cost < best, least, low)
            best = torch.minimum(cost, best)
        d, dmin = self.supers(line, (s, o), (d, new, dmin, low))
        return d, new, dmin, low

    def supers(self, line: Line, at: tuple[Tensor, Tensor], state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the super-scales of least error beside these integers, the old ones where rounding leaves no gain."""
        (s, o), (d, sub, dmin, m) = at, state
        total = lambda part: part.sum(-1, keepdim=True)  # noqa: E731
        A, P = total(line.a * sub * sub), total(sub * (line.a * s - line.b * o + line.p))
        new, least = P / A, dmin
        if self.scales.minima:
            B, C, Q = total(line.b * sub * m), total(line.c * m * m), total(m * (line.c * o - line.b * s - line.q))
            determinant = A * C - B * B
            new = torch.where(determinant > 1e-5 * A * C, (C * P + B * Q) / determinant, (P + B * dmin) / A)
        new = torch.where(new * d > 0, new, d)
        new = keep_sign(rounded(new.abs(), self.scales.dtype).clamp_min(least_of(self.scales.dtype)), new)
        if self.scales.minima:
            least = torch.where(C > 0, (Q + B * new) / C, dmin).clamp_min(least_of(self.scales.dtype))
            least = rounded(least, self.scales.dtype)
        cost = lambda d, dmin: total(line.cost(d * sub - s, dmin * m - o))  # noqa: E731
        better = cost(new, least) < cost(d, dmin)
        return torch.where(better, new, d), torch.where(better, least, dmin)

    def beside(self, d: Tensor, sub: Tensor, dmin: Tensor, m: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Try the integers around each scale's, codes and minimum chosen for each."""
        best = self.line(d * sub, dmin * m, z)[1]
        start, low, first = sub, m, m
        for change in AROUND:
            count = self.scales.integer((start + change) * d, d)
            s, least = count * d, first
            # the middle of the range stays where it was
            if self.scales.minima:
                middle = (self.levels.ends[1] - self.levels.ends[0]) / 2
                least = self.scales.minimum(dmin * first + (s - start * d) * middle, dmin, s)
                line, _ = self.line(s, dmin * least, z)
                least = self.scales.minimum(dmin * least + line.offset(torch.zeros_like(s)), dmin, s)
            cost = self.line(s, dmin * least, z)[1]
            better = (cost < best) & (count * start > 0)
            sub, low = torch.where(better, count, sub), torch.where(better, least, low)
            best = torch.where(better, cost, best)
        return d, sub, dmin, low
