"""The geometry of the page's charts: heat maps block × linear, lines behind blocks, and a scatter of runs.

Decides rows, columns, positions and shades; the template draws them as SVG. Shades are numbers whose colours the style
sheet knows, one set for a light page and one for a dark. What a shade says is also in words at every cell, and in a table.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor, log2, log10
from typing import NamedTuple

from nearplane.page.facts import Linear, Run
from nearplane.page.words import number_of

# Shades of a heat map, from little to much.
SHADES = 8
# More rows than these are folded: the experts of a layer share one.
MOST_ROWS = 24
# Pixels: of a row, of all columns together, of a column at least and at most, above a map and left of it.
ROW, WIDE, NARROWEST, WIDEST, ABOVE = 22, 860, 4, 26, 30
# Pixels of a letter of a row's label, and the longest label.
LETTER, LONGEST = 6.6, 40
# The scale of a ratio: bounds between shades. Above 1 rounding to nearest does better.
RATIOS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.5)


class Cell(NamedTuple):
    """One cell of a heat map."""

    x: float
    y: float
    shade: int
    label: str
    """The linear and its figures, in words."""
    marked: bool
    """Whether the linear is among the worst ten."""


class Label(NamedTuple):
    """A text beside a chart."""

    at: float
    text: str


@dataclass(frozen=True)
class Heat:
    """A heat map of one list of blocks."""

    title: str
    cells: list[Cell]
    rows: list[Label]
    columns: list[Label]
    step: float
    """Width of a column."""
    left: float
    width: float
    height: float


class Key(NamedTuple):
    """One shade of the legend."""

    shade: int
    text: str


@dataclass(frozen=True)
class Scale:
    """Numbers to shades, by bounds in rising order."""

    bounds: tuple[float, ...]

    def shade(self, value: float) -> int:
        """Return the shade of a number, from 0."""
        return sum(value > bound for bound in self.bounds)

    @property
    def legend(self) -> list[Key]:
        """What the shades stand for."""
        words = [f"to {number(bound)}" for bound in self.bounds]
        return [Key(shade, word) for shade, word in enumerate([*words, f"above {number(self.bounds[-1])}"])]


def number(value: float) -> str:
    """Return a bound of a scale."""
    return number_of(value) if value < 0.01 else f"{value:.3g}"


def error_scale(values: Iterable[float]) -> Scale:
    """Return even steps of the logarithm between the least and the largest error above 0."""
    known = [value for value in values if value > 0]
    low, high = (min(known), max(known)) if known else (1e-3, 1.0)
    if high / low < 1.0001:
        low, high = low / 2, high * 2
    step = (log10(high) - log10(low)) / SHADES
    return Scale(tuple(float(f"{10 ** (log10(low) + step * k):.2g}") for k in range(1, SHADES)))


def heat_maps(
    run: Run, value: Callable[[Linear], float | None], scale: Scale, says: Callable[[Linear], str], worst: set[str]
) -> list[Heat]:
    """Return a map for each list of blocks of a model: encoder and decoder have one each.

    Args:
        run: gives the linears.
        value: of a linear; None: no cell.
        scale: of the values.
        says: the words at a linear's cell.
        worst: names of the linears that are marked.
    """
    lists: dict[str, list[Linear]] = {}
    for linear in run.linears:
        lists.setdefault(stem(linear.block), []).append(linear)
    return [_heat(title, linears, value, scale, says, worst) for title, linears in lists.items()]


def stem(block: str) -> str:
    """Return a block's name without its number; empty for a linear outside of all blocks."""
    return re.sub(r"\.?\d+$", "", block) if block else ""


def _heat(
    title: str, linears: Sequence[Linear], value: Callable[[Linear], float | None], scale: Scale,
    says: Callable[[Linear], str], worst: set[str],
) -> Heat:  # fmt: skip
    blocks = list(dict.fromkeys(linear.block for linear in linears))
    rows = list(dict.fromkeys(linear.part for linear in linears))
    fold = len(rows) > MOST_ROWS
    rows = list(dict.fromkeys(_folded(row) for row in rows)) if fold else rows
    left = min(LONGEST, max(map(len, rows))) * LETTER + 14
    step = min(WIDEST, max(NARROWEST, floor(WIDE / len(blocks))))
    places: dict[tuple[str, str], list[Linear]] = {}
    for linear in linears:
        places.setdefault((linear.block, _folded(linear.part) if fold else linear.part), []).append(linear)
    row_at, column_at = {row: i for i, row in enumerate(rows)}, {block: i for i, block in enumerate(blocks)}
    cells = []
    for (block, row), held in places.items():
        known = [(found, linear) for linear in held if (found := value(linear)) is not None]
        if known:
            most, linear = max(known, key=lambda pair: pair[0])
            label = f"{says(linear)}" + (f" (the most of {len(held)})" if len(held) > 1 else "")
            marked = any(each.name in worst for each in held)
            x, y = left + column_at[block] * step, ABOVE + row_at[row] * ROW
            cells.append(Cell(x, y, scale.shade(most), label, marked))
    height = ABOVE + len(rows) * ROW
    return Heat(
        title or "outside the blocks",
        cells,
        [Label(ABOVE + (i + 0.5) * ROW, _short(row)) for i, row in enumerate(rows)],
        [Label(left + (i + 0.5) * step, name) for i, name in _ticks(blocks, step)],
        step, left, max(left + len(blocks) * step, 560), height + 20,
    )  # fmt: skip


def _folded(part: str) -> str:
    """Return a name with its numbers replaced: experts.3.up_proj as experts.*.up_proj."""
    return re.sub(r"\b\d+\b", "*", part)


def _short(row: str) -> str:
    return row if len(row) <= LONGEST else f"…{row[1 - LONGEST :]}"


def _ticks(blocks: Sequence[str], step: float) -> list[tuple[int, str]]:
    """Return the numbers of as many blocks as there is room for."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= 22)
    names = [block.rpartition(".")[2] for block in blocks]
    return [(i, name) for i, name in enumerate(names) if i % every == 0 and name]


class Point(NamedTuple):
    """A point of a chart."""

    x: float
    y: float
    label: str
    name: str = ""


@dataclass(frozen=True)
class Plot:
    """A chart with two axes."""

    across: list[Label]
    up: list[Label]
    lines: list[list[Point]]
    left: float = 64
    right: float = 760
    top: float = 14
    bottom: float = 240


def behind(run: Run) -> Plot | None:
    """Return the errors behind each block beside those of rounding to nearest; None where fewer than two are known."""
    pairs = [(row.error, row.rtn_error) for row in run.blocks]
    errors = [value for pair in pairs for value in pair if value is not None and value > 0]
    if len(run.blocks) < 2 or len(errors) < 2:
        return None
    low, high = _decades(min(errors), max(errors))
    plot = Plot([], [], [])
    names = [row.name for row in run.blocks]
    x = _axis(0, len(names) - 1, plot.left + 12, plot.right - 12)
    y = _axis(log10(low), log10(high), plot.bottom - 8, plot.top + 8)
    for which, kind in enumerate(("error", "rounding to nearest")):
        found = [(i, pair[which]) for i, pair in enumerate(pairs)]
        line = [
            Point(x(i), y(log10(v)), f"{names[i]}: {kind} {number_of(v)}") for i, v in found if v is not None and v > 0
        ]
        plot.lines.append(line)
    plot.across.extend(Label(x(i), name) for i, name in _ticks(names, x(1) - x(0)))
    plot.up.extend(Label(y(log10(tick)), f"{tick:g}") for tick in _log_ticks(low, high))
    return plot


def scatter(points: Sequence[tuple[float, float, str]], unit: str) -> Plot:
    """Return runs by size and quality.

    Args:
        points: bytes, figure and label of each run.
        unit: words behind a figure, for the labels.
    """
    sizes, figures = [size / 1e6 for size, _, _ in points], [figure for _, figure, _ in points]
    plot = Plot([], [], [], bottom=300)
    across, up = _linear_ticks(sizes), _linear_ticks([0.0, *figures])
    x = _axis(across[0], across[-1], plot.left + 10, plot.right - 10)
    y = _axis(up[0], up[-1], plot.bottom, plot.top + 6)
    plot.across.extend(Label(x(tick), f"{tick:g}") for tick in across)
    plot.up.extend(Label(y(tick), f"{tick:g}") for tick in up)
    for size, figure, label in points:
        words = f"{label}: {size / 1e6:.1f} MB, {unit} {number_of(figure)}"
        plot.lines.append([Point(x(size / 1e6), y(figure), words, label)])
    return plot


def _axis(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Return a function from numbers to pixels."""
    span = (high - low) or 1.0
    return lambda value: round(first + (value - low) / span * (last - first), 1)


def _decades(low: float, high: float) -> tuple[float, float]:
    return low / 1.2, high * 1.2


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers on a logarithmic axis."""
    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    ticks = [10.0**power * digit for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: max(1, len(inside) // 5)]


def _linear_ticks(values: Sequence[float]) -> list[float]:
    """Return four to seven round numbers that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** floor(log10(span / 4))
    step = next(power * digit for digit in (1, 2, 5, 10) if span / (power * digit) <= 5)
    first, last = floor(low / step), -floor(-high / step)
    return [float(f"{k * step:.6g}") for k in range(first, max(last, first + 1) + 1)]


def difference_scale() -> Scale:
    """Return the scale of one run's error over another's, by powers of 2; the middle is 1."""
    return Scale(tuple(2.0**power for power in (-2, -1, -log2(1.1), log2(1.1), 1, 2)))
