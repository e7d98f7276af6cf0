"""The loops of a solver that are compiled (``columns.cpp``); torch does the same where they are not, and for other levels.

Columns one after the other: complete each by what those before it passed on, round it, pass on its error. These are the inner
loops of the sweep (``core/sweep.py``) and of the descent (``core/refine.py``). With torch a column is a dozen calls of some
microseconds each; compiled, a panel is one call. Errors of rounding: torch passes ten times over the weights for one try of
the search for scales (``core/search.py``). Threads share outputs and rows; no result depends on their number.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library, impl

from nearplane.core import compiled
from nearplane.core.levels import Levels, Shifted, Uniform

MOST = 256  # columns of a call


class _Columns(ctypes.Structure):
    """The struct NearplaneColumns of columns.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("value", "steps", "passed", "scale", "low", "high", "feedback")),
        *((name, ctypes.c_int64) for name in ("columns", "out")),
        *((name, ctypes.c_int32) for name in ("doubles", "shifted", "descent")),
    )


def fits(levels: Levels, like: Tensor) -> bool:
    """Tell whether C++ can round to these levels in this dtype, on this device; a subclass may round in its own way."""
    known = type(levels) in (Uniform, Shifted) and like.dtype in (torch.float32, torch.float64)
    return known and like.device.type == "cpu" and compiled.best() is not None


def sweep_columns(
    levels: Levels,
    value: Tensor,
    steps: Tensor,
    error: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    feedback: Tensor,
) -> None:
    """Round columns that ``fits``, as ``core/sweep.py`` does; all (columns, out), but for ``feedback``.

    Args:
        levels: Of the grid.
        value: In, complete but for the error of these columns; out, complete.
        steps: Out, the rounded steps.
        error: In, the targets; out, targets less rounded weights.
        scale, low, high: The scale, the least and the greatest step of each column's groups.
        feedback: (columns, columns), read above the diagonal.
    """
    torch.ops.nearplane.columns(value, steps, error, scale, low, high, feedback, type(levels) is Shifted, False)


def descend_columns(
    levels: Levels, wanted: Tensor, moved: Tensor, steps: Tensor, coupling: Tensor, low: Tensor, high: Tensor
) -> None:
    """Round columns of one group that ``fits``, as ``core/refine.py`` does; all (columns, out), but for the last three.

    Args:
        levels: Of the grid.
        wanted: In, the steps of least loss but for the moves of these columns; out, rounded.
        moved: Out, steps of before less steps of now.
        steps: The steps of before.
        coupling: (columns, columns), read above the diagonal.
        low, high: (out,), the least and the greatest step.
    """
    torch.ops.nearplane.columns(wanted, steps, moved, None, low, high, coupling, type(levels) is Shifted, True)


def weighted_errors(levels: Levels, rows: Tensor, scale: Tensor, zero: Tensor, importance: Tensor) -> Tensor:
    """Return the weighted squared error (rows,) of rounding groups (rows, n) that ``fits`` to nearest (``core/search.py``)."""
    ends = levels.code_range
    found: Tensor = torch.ops.nearplane.weighted_errors(rows, scale, zero, importance, *ends, type(levels) is Shifted)
    return found


# Known to torch as operations, so that what counts a method's work sees them (``run/probe.py``).
_OPERATIONS = Library("nearplane", "DEF")  # type: ignore[no-untyped-call]
_OPERATIONS.define(  # type: ignore[no-untyped-call]
    "columns(Tensor(a!) value, Tensor(b!) steps, Tensor(c!) passed, Tensor? scale, Tensor low, Tensor high, Tensor feedback, "
    "bool shifted, bool descent) -> ()"
)
_OPERATIONS.define(  # type: ignore[no-untyped-call]
    "weighted_errors(Tensor rows, Tensor scale, Tensor zero, Tensor importance, int least, int greatest, bool shifted) -> Tensor"
)


@impl(_OPERATIONS, "columns", "CPU")
def _columns(
    value: Tensor,
    steps: Tensor,
    passed: Tensor,
    scale: Tensor | None,
    low: Tensor,
    high: Tensor,
    feedback: Tensor,
    shifted: bool,
    descent: bool,
) -> None:
    if not all(part.is_contiguous() for part in (value, steps, passed)):
        raise ValueError("columns that are written to must lie one behind the other in memory.")
    columns, out = value.shape
    one = (out,) if descent else value.shape
    _check(value, (steps, value.shape), (passed, value.shape), (low, one), (high, one), (feedback, (columns, columns)))
    if not descent:
        _check(value, (scale, value.shape))
    held = [None if part is None else part.contiguous() for part in (value, steps, passed, scale, low, high, feedback)]
    where = (None if part is None else part.data_ptr() for part in held)
    given = _Columns(*where, columns, out, value.dtype == torch.float64, shifted, descent)
    if _library().nearplane_columns(ctypes.byref(given), torch.get_num_threads()):
        raise ValueError(f"at most {MOST} columns can be rounded at a time; got {columns}.")


@impl(_OPERATIONS, "weighted_errors", "CPU")
def _weighted_errors(
    rows: Tensor, scale: Tensor, zero: Tensor, importance: Tensor, least: int, greatest: int, shifted: bool
) -> Tensor:
    _check(rows, (importance, rows.shape), (scale, rows.shape[:1]), (zero, rows.shape[:1]))
    error, doubles = torch.empty_like(scale), rows.dtype == torch.float64
    held = [part.contiguous() for part in (rows, importance, scale, zero)]
    where = (part.data_ptr() for part in (*held, error))
    _library().nearplane_errors(*where, *rows.shape, least, greatest, doubles, shifted, torch.get_num_threads())
    return error


def _check(like: Tensor, *given: tuple[Tensor | None, Sequence[int]]) -> None:
    """Raise ValueError for a tensor of another dtype, or of another shape than stands beside it: C++ sees addresses only."""
    for part, shape in given:
        if part is None or part.dtype != like.dtype or part.shape != torch.Size(shape):
            found = "none" if part is None else f"{list(part.shape)} in {part.dtype}"
            raise ValueError(f"a tensor must be {list(shape)} in {like.dtype}; got {found}.")


def _library() -> ctypes.CDLL:
    isa = compiled.best()
    kernel = None if isa is None else compiled.library(isa)
    assert kernel is not None
    return kernel
