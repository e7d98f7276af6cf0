"""A report's dictionary as plain facts: what is missing, damaged or not finite is None, and never an error.

Decides how a linear's name is split into block and part. ``report.json`` may be of an earlier version, or hold NaN; a
section of the page says "not recorded" where a fact is None. What is no report at all is refused.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nearplane.core.errors import NearplaneError

# Up to the first number of a name: model.layers.3 of model.layers.3.mlp.up_proj.
BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")

# Beyond it a number is taken for damage.
MOST = 1e300


class Linear(NamedTuple):
    """One quantized linear."""

    name: str
    block: str
    """Name of its block; empty: outside of all."""
    part: str
    """Its name within the block."""
    error: float | None
    """Share of output energy lost on calibration inputs; None: no data was read."""
    rtn_error: float | None
    weight_error: float | None
    bits: int | str | None
    group_size: int | None
    shape: tuple[int, int] | None
    tokens: int | None
    dropped: int
    damp_percent: float | None
    damp_raised: int
    rounded: bool
    alpha: float | None

    @property
    def ratio(self) -> float | None:
        """The error over that of rounding to nearest; None where there is nothing to divide by."""
        if self.error is None or not self.rtn_error or self.rtn_error < 0:
            return None
        return self.error / self.rtn_error


class Behind(NamedTuple):
    """The hidden state behind a block."""

    name: str
    error: float | None
    rtn_error: float | None


@dataclass(frozen=True)
class Run:
    """One run, as its report tells."""

    model: str
    out: str
    method: str
    bits: int | str | None
    group_size: int | None
    sym: bool | None
    format: str
    """Of the folder, as it is now."""
    made_as: str
    """The format that the run wrote, where a conversion changed it."""
    linears: list[Linear]
    blocks: list[Behind]
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    events: list[str]
    check: Mapping[str, Any] | None
    bytes: dict[str, float]
    seconds: dict[str, float]
    raw: Mapping[str, Any] = field(repr=False)
    """The whole report."""

    @property
    def measured(self) -> bool:
        """Whether linears were measured on data: then ``error`` is theirs, else ``weight_error``."""
        return any(linear.error is not None for linear in self.linears)

    def value(self, linear: Linear) -> float | None:
        """Return the error that the page ranks linears by."""
        return linear.error if self.measured else linear.weight_error

    @property
    def mean_error(self) -> float | None:
        """The mean over linears that have an error."""
        return _mean(linear.error for linear in self.linears)

    @property
    def mean_rtn_error(self) -> float | None:
        """The same of rounding to nearest."""
        return _mean(linear.rtn_error for linear in self.linears if linear.error is not None)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits that a quantized weight takes, scales and zeros included."""
        found = number(mapping(self.raw.get("totals")).get("bits_per_weight"))
        weights = sum(linear.shape[0] * linear.shape[1] for linear in self.linears if linear.shape is not None)
        if found is None and weights and self.bytes.get("quantized"):
            found = 8 * self.bytes["quantized"] / weights
        return found

    @property
    def title(self) -> str:
        """The last part of the model's name."""
        return re.split(r"[/\\]", self.model.rstrip("/\\"))[-1] or "a model"

    @property
    def grid(self) -> str:
        """The grid in words: 3 bits, groups of 64, asymmetric."""
        bits = {linear.bits for linear in self.linears if linear.bits is not None}
        words = [width(self.bits)] if len(bits) <= 1 else [f"{', '.join(sorted(map(str, bits)))} bits"]
        if self.group_size is not None:
            words.append("one scale per row" if self.group_size == -1 else f"groups of {self.group_size}")
        if self.sym is not None:
            words.append("symmetric" if self.sym else "asymmetric")
        return ", ".join(word for word in words if word)

    def checked(self, name: str) -> float | None:
        """Return a figure of the check: kl, top1, perplexity, reference_perplexity, error, rtn_error."""
        return number((self.check or {}).get(name))


def width(bits: int | str | None) -> str:
    """Return bits in words."""
    return "" if bits is None else f"{bits} bits" if isinstance(bits, int) else str(bits)


def facts(report: Any, where: str = "the report") -> Run:
    """Read a report's dictionary.

    Args:
        report: the content of ``report.json``, or ``Report.as_dict()``.
        where: what to call it in an error.

    Raises:
        NearplaneError: it is no report of a run.
    """
    rows = report.get("linears") if isinstance(report, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and text(row.get("name")) for row in rows):
        raise NearplaneError(f"{where} is not the report of a quantization: it lists no linears with their names.")
    settings = mapping(report.get("settings"))
    grid, check = mapping(settings.get("grid")), report.get("check")
    blocks = [
        Behind(text(row["name"]), number(row.get("error")), number(row.get("rtn_error")))
        for row in listing(report.get("blocks"))
        if isinstance(row, Mapping) and text(row.get("name"))
    ]
    now = mapping(report.get("converted"))
    known = sorted({row.name for row in blocks}, key=len, reverse=True)
    return Run(
        model=text(report.get("model")) or "a model",
        out=text(now.get("out")) or text(report.get("out")),
        method=text(mapping(settings.get("method")).get("name")) or "a method",
        bits=_bits(grid.get("bits")),
        group_size=whole(grid.get("group_size")),
        sym=grid["sym"] if isinstance(grid.get("sym"), bool) else None,
        format=text(now.get("format")) or text(settings.get("format")),
        made_as=text(settings.get("format")) if now else "",
        linears=[_linear(row, known) for row in rows],
        blocks=blocks,
        settings=settings,
        data=mapping(report.get("data")),
        events=[text(event) for event in listing(report.get("events")) if text(event)],
        check=check if isinstance(check, Mapping) else None,
        bytes=numbers(report.get("bytes")),
        seconds=numbers(report.get("seconds")),
        raw=report,
    )


def split(name: str, blocks: list[str]) -> tuple[str, str]:
    """Split a linear's name into its block's and its own.

    Args:
        name: of the linear.
        blocks: names of the blocks as far as the report lists them, the longest first.
    """
    own = next((block for block in blocks if name.startswith(f"{block}.")), None)
    if own is None:
        match = BLOCK.match(name)
        own = match.group() if match else ""
    return own, name[len(own) :].lstrip(".") or name


def _linear(row: Mapping[str, Any], blocks: list[str]) -> Linear:
    name, shape = text(row["name"]), [whole(size) for size in listing(row.get("shape"))]
    block, part = split(name, blocks)
    return Linear(
        name, block, part, number(row.get("error")), number(row.get("rtn_error")), number(row.get("weight_error")),
        _bits(row.get("bits")), whole(row.get("group_size")),
        (shape[0], shape[1]) if len(shape) == 2 and shape[0] is not None and shape[1] is not None else None,
        whole(row.get("tokens")), whole(row.get("dropped")) or 0, number(row.get("damp_percent")),
        whole(row.get("damp_raised")) or 0, row.get("rounded") is True, number(row.get("alpha")),
    )  # fmt: skip


def _bits(value: Any) -> int | str | None:
    return text(value) or whole(value)


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: Any) -> float | None:
    """Return a finite number, else None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST  # NaN is not
    return float(value) if known else None


def whole(value: Any) -> int | None:
    """Return a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST else None


def text(value: Any) -> str:
    """Return a text that UTF-8 can hold, else an empty one."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a dictionary, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def listing(value: Any) -> list[Any]:
    """Return a list, else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def numbers(value: Any) -> dict[str, float]:
    """Return the finite numbers of a dictionary."""
    return {str(key): found for key, part in mapping(value).items() if (found := number(part)) is not None}
