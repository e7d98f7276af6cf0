"""What a method holds in memory while it works on one stage, counted in numbers of the solving dtype.

One stage has ``n`` inputs and ``m`` outputs, the rows of all its linears; ``r`` rows are those of its largest linear. A
uint8 counts as a quarter, a bool too. The counts are those of the code they name: ``tests/test_plan.py`` compares them
with the tensors that live while it runs.
"""

from dataclasses import dataclass

from nearplane.core.factor import STRIP
from nearplane.core.grid import CHUNK_WEIGHTS
from nearplane.core.sweep import ROWS
from nearplane.methods import GPTAQ, GPTQ, OBQ, RTN, Method, NearPlane, ResComp
from nearplane.methods.base import Need, Sweeping
from nearplane.methods.nearplane import TRIAL_ROWS
from nearplane.methods.obq import CHUNK_NUMBERS
from nearplane.models.discover import Stage
from nearplane.run.measure import MEASURED_AT_ONCE, measured_rows

BYTE = 0.25
# What the search for scales holds of a chunk of rows: the error of an attempt, its codes, what is best so far.
FITTING = 24.0 * CHUNK_WEIGHTS


@dataclass(frozen=True)
class Shape:
    """One stage."""

    m: int  # outputs, of all linears
    n: int  # inputs
    r: int  # outputs of the largest linear
    point: bool  # R stands in for D here: a lone linear that adds to the residual stream
    judged: int = 0  # rows, of all linears, that errors are measured on


def stage_shape(stage: Stage, two: bool) -> Shape:
    """Of a stage; ``two``: there is a reference stream."""
    rows = [site.shape[0] for site in stage]
    judged = sum(len(range(row)[measured_rows(row)]) for row in rows)
    point = two and len(stage) == 1 and stage[0].adds_to is not None
    return Shape(sum(rows), stage[0].shape[1], max(rows), point, judged)


@dataclass(frozen=True)
class Work:
    """Numbers held at each step of a stage, beside those that stay from an earlier one."""

    prepare: float  # the most during ``prepare``
    state: float  # what it leaves, beside the moments
    solve: float  # the most during ``solve``, the stacked weight apart
    measure: float  # the most during Report.add
    result: float  # codes, and scales as good as nothing


def moments(needs: frozenset[Need], shape: Shape) -> float:
    """``H``: n²; ``D``: n², or ``R``: m n in its place; all twice where tokens are held out."""
    if not needs:
        return 0.0
    point = shape.point and "R" in needs
    drift = shape.m * shape.n if point else shape.n**2 if "D" in needs else 0
    return float((shape.n**2 + drift) * (2 if "held_out" in needs else 1))


def observing(needs: frozenset[Need], shape: Shape, tokens: int) -> float:
    """Temporaries for ``tokens`` tokens at once: the two parts of the rows, the difference of streams, the drift behind."""
    wide = shape.n * (2 * bool(needs & {"D", "R"}) + bool("held_out" in needs))
    return float(tokens * (wide + 3 * shape.m * (shape.point and "R" in needs)))


def work(method: Method, shape: Shape) -> Work:
    """Of a method of the package, as it is written; of any other, as for GPTAQ if it reads D or R, else GPTQ."""
    m, n = shape.m, shape.n
    square, whole, largest = float(n * n), float(m * n), float(shape.r * n)
    reads = bool(method.needs)
    # Report.add: the error of the codes, then scale, zero, code, difference and product of rounding to nearest.
    measure = (6 if reads else 5.25) * min(largest, max(n, MEASURED_AT_ONCE))
    result = BYTE * whole
    if isinstance(method, RTN) or not reads:  # fitted chunk by chunk; scale, zero and code of every weight
        return Work(0.0, 0.0, 3 * whole + result + FITTING, measure, result)
    if isinstance(method, NearPlane):
        return Work(0.0, 0.0, _nearplane(method, shape), measure, result)
    if isinstance(method, OBQ):
        chunk = max(1, min(m, CHUNK_NUMBERS // n**2)) * square
        return Work(6 * square, 2 * square, 2 * whole + 4 * chunk, measure, result)
    count = pushes(method)
    # A factor takes the place of its input. A push: the factor, the ordered D and two solves; the push before it.
    prepare = (3.0 + count if count else 1.0) * square + min(n, STRIP) * n
    return Work(prepare, (1 + count) * square, swept(shape, 1.75 + count) + FITTING, measure, result)


def swept(shape: Shape, arrays: float) -> float:
    """A sweep's arrays of (in, out), the first of which is filled from a few rows at a time, transposed and in order."""
    return max(arrays * shape.m, shape.m + 2 * min(shape.m, ROWS)) * shape.n


def pushes(method: Method) -> int:
    """Matrices by which targets move during the sweep, each with its array of (in, out)."""
    if isinstance(method, ResComp):
        return 2
    if isinstance(method, GPTAQ) or (not isinstance(method, GPTQ | Sweeping) and method.needs & {"D", "R"}):
        return 1
    return 0


def _nearplane(method: NearPlane, shape: Shape) -> float:
    """The largest of four moments of ``solve``: judging, the step, the sweep, the refinement.

    Judging holds the Hessian of the tokens not held out, the factor before and the one in the making; the step a sum of
    inverses, one of them (or its two solutions, where rows are fewer than columns) and a factor; a sweep the moved target and
    GPTQ's arrays, once per answer of a beam; the refinement codes and errors as numbers.
    """
    m, n = shape.m, shape.n
    square, whole = float(n * n), float(m * n)
    trial = float(min(m, m if method.shrink == "row" else 2 * TRIAL_ROWS) * n)
    pull = whole if method.target and not (shape.point and method.residual) else 0.0
    judged = method.damping == "held_out" or (method.target and method.shrink != "none")
    judge = 3 * square + 4 * trial if judged else 0.0
    step = 0.0
    if method.target:
        step = pull + (max(3 * square, 2 * square + whole) if m > n else 2 * square + 3 * whole)
    target = whole if method.target else 0.0
    sweeping = square + target + (swept(shape, 1.75) if method.beam == 1 else (3 + 2.5 * method.beam) * whole)
    refining = 2 * square + target + 3.0 * whole if method.rounds else 0.0
    return max(judge, step, 2 * square + target, sweeping, refining) + trial + FITTING
