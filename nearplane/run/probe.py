"""What a method asks of a stage: measured on small stages of random numbers, then enlarged to the size of real ones.

A dispatch mode sees each operation of ``prepare`` and ``solve``, and each tensor while it lives. No method is named here.

- Memory. Tensors are told apart by the place in the code that makes them. A stage with other rows and one with other
  inputs show how the bytes of a place grow: as ``m^a n^b``, or not at all, like scratch of a fixed size. The tensors that
  live at each moment of the first stage are enlarged so; the peak of a real stage is its largest moment.
- Work. Calls of operations, numbers that they read or write, and FLOPs of linear algebra are counted in four stages,
  and polynomials in m and n are fitted to the counts.
- Time. FLOPs go at the rate of a matrix product. Calls and numbers go at rates fitted to the method's own seconds.

A tall stage may be solved in another way than a wide one, and one that adds to the residual stream has other moments:
each kind is probed by itself. A stage no larger than the first probe is probed as it is.
"""

import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import accumulate
from math import log
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid
from nearplane.core.moments import Moments
from nearplane.methods.base import Method, Need
from nearplane.run.observe import Measuring

# Seconds after which nothing is timed again.
LONG = 0.3
# At 256 panels, chunks and samples of rows have their fixed size; a slow method gets the small unit.
UNIT, SMALL_UNIT = 256, 64
# Rows and inputs of the probed stages, in units: the first, one with other rows, one with other inputs, one more for the
# polynomials.
TALL, WIDE = ((4, 2), (3, 2), (4, 1), (3, 1)), ((2, 3), (1, 3), (2, 4), (2, 2))
# The same from BLOCKED units of 256 inputs on, where factors are formed in blocks (``core/dense.py``) and products are others.
BLOCKED, BLOCKED_TALL, BLOCKED_WIDE = 3, ((5, 3), (4, 3), (5, 4), (6, 4)), ((2, 3), (1, 3), (2, 4), (1, 4))
# A method is slow if it makes more calls, or reads more numbers, on a stage of 64 x 64.
MOST_CALLS, MOST_NUMBERS = 16384, 3e7
TOKENS = 512
# Numbers for each weight and for each entry of H that are taken to be plenty for any method: a guess, not a bound.
AMPLE = 1000
# Stages that are timed, the smallest among them.
TIMED = 5


class Products(NamedTuple):
    """FLOPs by how a processor does them, or the seconds of one of each."""

    plain: float  # of torch's default library, and all of linear algebra beside products
    wide: float  # of products in ``full_width``
    coarse: float  # of products in 16 bits


# FLOPs beside those of matrix products: a share of (numbers of one argument) x (order of another).
LINEAR_ALGEBRA = {
    "linalg_cholesky_ex": (1 / 3, 0, 0),
    "cholesky_inverse": (2 / 3, 0, 0),
    "cholesky_solve": (2.0, 0, 1),
    "linalg_solve_triangular": (1.0, 1, 0),
    "linalg_inv_ex": (2.0, 0, 0),
    "_linalg_eigh": (9.0, 0, 0),
    "_linalg_svd": (20.0, 0, 0),
}
# The same of the operations of ``core/columns.py``.
COMPILED: dict[str, Callable[..., float]] = {
    "nearplane::columns": lambda value, *_, **__: value.numel() * (len(value) - 1.0),
}
TERMS: dict[str, Callable[[int, int], list[float]]] = {
    "calls": lambda m, n: [1, n, m, m * n],
    "numbers": lambda m, n: [m * n, n**2, m * n**2, n**3, m * n**3],
    **dict.fromkeys(Products._fields, lambda m, n: [m * n, n**2, m * n**2, n**3]),
}


class Size(NamedTuple):
    """The size of a stage."""

    m: int  # outputs, of all linears
    n: int  # inputs
    adds: bool = False  # a lone linear that adds to the residual stream, for a method with R


class Held(NamedTuple):
    """Bytes beside the weight and the moments."""

    prepare: float  # the most during ``prepare``
    state: float  # what ``prepare`` leaves
    solve: float  # the most during ``solve``, the state apart
    result: float  # what ``solve`` leaves


class Work(NamedTuple):
    """The work of one step."""

    calls: float
    numbers: float
    plain: float  # FLOPs, as in ``Products``
    wide: float
    coarse: float

    @property
    def flops(self) -> float:
        """Return all FLOPs, of whatever kind."""
        return self.plain + self.wide + self.coarse

    def seconds(self, call: float, number: float, flop: Products) -> float:
        """Return the seconds of this work, given those of a call, of a number and of a FLOP of each kind."""
        return call * self.calls + number * self.numbers + self.busy(flop)

    def busy(self, flop: Products) -> float:
        """Return the seconds of its FLOPs alone."""
        return sum(rate * count for rate, count in zip(flop, self[2:], strict=True))


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the tensors that are made and freed inside, and count the work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []  # place, and bytes made there, or freed, below 0
        self.calls = self.numbers = 0
        self.flops = Counter[str]()  # as in ``Products``
        self._live: dict[int, tuple[int, int]] = {}

    @property
    def work(self) -> "Work":
        """Return the work that was counted."""
        return Work(self.calls, self.numbers, *(self.flops[kind] for kind in Products._fields))

    def most(self) -> dict[int, int]:
        """Return the most bytes of each place that live at once."""
        now, most = Counter[int](), Counter[int]()
        for place, size in self.events:
            now[place] += size
            most[place] = max(most[place], now[place])
        return most

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside, and the guard against it imports the compiler

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.calls += 1
        view, in_place, flops = _kind(function)
        if view:
            return result
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        made = [
            value for value in (result if isinstance(result, tuple | list) else [result]) if isinstance(value, Tensor)
        ]
        self.numbers += max((value.numel() for value in (*given, *made)), default=0)
        if flops is not None:
            self.flops[_sort(given)] += int(flops(*args, **kwargs, out_val=result))
        known = {value.untyped_storage()._cdata for value in given}
        for storage in [] if in_place else [value.untyped_storage() for value in made]:
            key = storage._cdata
            if key not in known and key not in self._live:
                self._live[key] = _place(), storage.nbytes()
                self.events.append(self._live[key])
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        place, size = self._live.pop(key)
        self.events.append((place, -size))


def _sort(given: list[Tensor]) -> str:
    """Return which of ``Products`` an operation on these tensors belongs to."""
    if any(value.dtype in (torch.bfloat16, torch.float16) for value in given):
        return "coarse"
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return "wide" if getattr(setting, "fp32_precision", "none") == "bf16" else "plain"


@cache
def _kind(function: Any) -> tuple[bool, bool, Callable[..., float] | None]:
    """Return whether an operation makes a view, whether it works in place, and what counts its FLOPs."""
    schema = function._schema
    aliases = any(value.alias_info is not None for value in schema.returns)
    name = schema.name.removeprefix("aten::").rstrip("_")
    flops = COMPILED.get(name) or flop_registry.get(getattr(torch.ops.aten, name, None))
    if name in LINEAR_ALGEBRA:
        share, numbers, order = LINEAR_ALGEBRA[name]
        flops = lambda *args, **_: share * args[numbers].numel() * args[order].shape[-1]  # noqa: E731
    return aliases and not schema.is_mutable, aliases and schema.is_mutable, flops


def _place() -> int:
    """Return a number for the lines of code that are at work, up to ``trace``."""
    frame, found = sys._getframe(2), []
    while frame is not None and frame.f_code is not trace.__code__:
        found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return hash(tuple(found))


def trace(method: Method, size: Size, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Trace, Trace]:
    """Solve a stage of random numbers; return the traces of ``prepare`` and ``solve``."""
    weight, moments = made_up(method.needs, size, dtype)
    prepare, solve, state = Trace(), Trace(), None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            if method.needs:
                with prepare:
                    state = method.prepare(moments)
            prepared = len(prepare.events)
            with solve:
                solved = method.solve(weight, state, grid)
        except NearplaneError as error:
            name = f"{type(method).__name__} cannot solve a stage of random numbers, {size.m} x {size.n}"
            raise SettingError(f"{name}, by which its cost is estimated: {error}") from error
    lived = len(solve.events)
    del solved, state  # what is freed from here on is no part of a step
    del prepare.events[prepared:], solve.events[lived:]
    return prepare, solve


def made_up(
    needs: frozenset[Need], size: Size, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Any]:
    """Return a random weight, and the moments of random inputs that correlate and drift, as those of a model do."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    m, n, adds = size
    weight = draw(m, n)
    if not needs:
        return weight, None
    few = max(1, n // 8)
    mix = draw(few, n)
    xhat = draw(TOKENS, few) @ mix + draw(TOKENS, n)
    behind = 0.1 * (draw(TOKENS, m) + xhat @ draw(n, m) / n**0.5) if adds else None
    x = None
    if "D" in needs and not adds:
        x = xhat + 0.1 * (xhat @ draw(n, few) @ mix / (n * few**0.5) + draw(TOKENS, n))
    measuring = Measuring(needs, n, m if adds else None, weight, 8)
    measuring.add(torch.Size([8, TOKENS // 8]), 0, xhat, x, behind)
    moments: Moments = measuring.result()
    return weight, moments


class Probe:
    """A method on a grid, and the small stages that it has solved."""

    def __init__(self, method: Method, grid: Grid, dtype: torch.dtype = torch.float32) -> None:
        self.method, self.grid, self.dtype = method, grid, dtype
        width = 1 << grid.group_size.bit_length() - 1 if 0 < grid.group_size <= UNIT else -1
        self.even = replace(grid, group_size=width)  # its groups divide every probed stage
        self._traces: dict[tuple[Size, Grid], tuple[Trace, Trace]] = {}
        self.memory, self.work = cache(self._memory), cache(self._work)

    def _memory(self, size: Size) -> Held:
        """Return the bytes of ``prepare`` and ``solve``."""
        sizes, grid = self._like(size)
        prepare, solve = (_enlarged([self._trace(s, grid)[i] for s in sizes[:3]], sizes, size) for i in (0, 1))
        return Held(max(prepare), prepare[-1], max(solve), solve[-1])

    def _work(self, size: Size) -> tuple[Work, Work]:
        """Return the work of ``prepare`` and of ``solve``."""
        sizes, grid = self._like(size)
        prepare, solve = (_extrapolated([self._trace(s, grid)[i] for s in sizes], sizes, size) for i in (0, 1))
        return prepare, solve

    def rates(
        self, clock: Callable[[Callable[[], Any]], float], flop: Products, device: torch.device | str = "cpu"
    ) -> tuple[float, float]:
        """Return the seconds of a call and of a number, where FLOPs take the seconds ``flop``.

        Args:
            clock: returns the seconds of a function, given the function. It gets ``prepare`` and ``solve`` of stages that
                were probed before.
        """
        self._unit()
        rows, left = [], []
        for (size, grid), traces in list(self._traces.items())[:TIMED]:
            weight, moments = made_up(self.method.needs, size, self.dtype, device)
            state = self.method.prepare(moments) if self.method.needs else None
            steps = partial(self.method.prepare, moments), partial(self.method.solve, weight, state, grid)
            for done, step in zip(traces, steps, strict=True):
                if done.calls:
                    seconds = max(1e-9, clock(step))
                    rows.append([done.calls / seconds, done.numbers / seconds])
                    left.append(max(0.0, 1 - done.work.busy(flop) / seconds))
        call, number = non_negative(rows, left)
        return call, number

    def _like(self, size: Size) -> tuple[list[Size], Grid]:
        """Return the stages to probe in place of one of this size, and their grid."""
        unit = UNIT if size.m * size.n <= SMALL_UNIT**2 else self._unit()
        blocked = unit == UNIT and size.n >= BLOCKED * UNIT
        tall, wide = (BLOCKED_TALL, BLOCKED_WIDE) if blocked else (TALL, WIDE)
        kinds = tall if size.m > size.n else wide
        first = Size(kinds[0][0] * unit, kinds[0][1] * unit)
        if size.m * size.n <= first.m * first.n and size.n <= first.n:
            return [size], self.grid
        return [Size(m * unit, n * unit, size.adds) for m, n in kinds], self.even

    def _unit(self) -> int:
        prepare, solve = self._trace(Size(SMALL_UNIT, SMALL_UNIT), self.even)
        slow = prepare.calls + solve.calls > MOST_CALLS or prepare.numbers + solve.numbers > MOST_NUMBERS
        return SMALL_UNIT if slow else UNIT

    def _trace(self, size: Size, grid: Grid) -> tuple[Trace, Trace]:
        if (size, grid) not in self._traces:
            self._traces[size, grid] = trace(self.method, size, grid, self.dtype)
        return self._traces[size, grid]


class Ample(Probe):
    """A generous guess in place of a probe, far above what any known method takes: where it fits, nothing is probed."""

    def _memory(self, size: Size) -> Held:
        most = AMPLE * (size.m + size.n) * size.n * self.dtype.itemsize
        return Held(most, 0.0, most, 0.0)


def _enlarged(traces: list[Trace], sizes: list[Size], real: Size) -> list[float]:
    """Return the bytes that live after each event of the first trace, as they would be in the ``real`` stage."""
    most = traces[0].most()
    growth = dict.fromkeys(most, 1.0)
    for axis, other, done in zip((0, 1), sizes[1:], traces[1:], strict=False):
        there, step = done.most(), log(other[axis] / sizes[0][axis])
        for place, size in most.items():
            # A place that the other stage did not reach is taken to grow like the weight.
            power = log(there[place] / size) / step if size and there.get(place) else 1.0
            growth[place] *= (real[axis] / sizes[0][axis]) ** min(1 + axis, max(0, round(power)))
    return list(accumulate((size * growth[place] for place, size in traces[0].events), initial=0.0))


def _extrapolated(traces: list[Trace], sizes: list[Size], real: Size) -> Work:
    """Return the work of the ``real`` stage, by polynomials through that of the probed ones."""
    found = []
    for key, terms in TERMS.items():
        counted = np.array([getattr(done.work, key) for done in traces], dtype=float)
        if len(traces) > 1 and counted.any():
            weight = 1 / np.maximum(counted, 1e-6 * counted.max())
            rows = np.array([terms(m, n) for m, n, _ in sizes]) * weight[:, None]
            # The first panel of a sweep looks back at nothing, so that lower terms of FLOPs may be below 0.
            fit = least_squares if key in Products._fields else non_negative
            fitted = fit(rows, counted * weight)
            counted = np.array([max(0.0, float(np.dot(fitted, terms(real.m, real.n))))])
        found.append(float(counted[0]))
    return Work(*found)


def non_negative(rows: Any, wanted: Any) -> Any:
    """Return the x ≥ 0 of least ``‖rows x - wanted‖``, with columns brought to one length."""
    from scipy.optimize import nnls

    matrix = np.asarray(rows, dtype=float)
    length = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    return nnls(matrix / length, np.asarray(wanted, dtype=float))[0] / length


def least_squares(rows: Any, wanted: Any) -> Any:
    """Return the x of least ``‖rows x - wanted‖``, with columns brought to one length."""
    length = np.linalg.norm(rows, axis=0)
    return np.linalg.lstsq(rows / length, wanted, rcond=None)[0] / length


def median_seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """Return the median seconds of three runs after a first one; those of the first if it is long."""
    times: list[float] = []
    while len(times) < 4 and sum(times) < LONG:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:] or times)
