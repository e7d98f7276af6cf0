"""How long a run will take here: counted work, at rates measured in a few seconds on this machine.

Counted, per token of each stream: a block's forward is 2 FLOPs a weight and 2 seqlen x hidden for causal attention, H
costs n² (half of it is mirrored), D 2 n², R 4 m n. Per stage: a factor n³/3, a sweep m n², and for NearPlane what its
steps and rounds multiply (``solving``). Report.add takes 6 m n², and 2 m n² for the drift. All of that goes at the rate
of a matrix product. What it does not explain, column loops, the search for scales, rounding, is fitted as
``a n + b m n + c n²`` to the method's own ``solve`` on small random problems, and as ``b n²`` to ``prepare``. The rest is
per number: reading and widening a weight, activations, packing, and writing at the rate of a file of 32 MB. A run opens
the model as the plan did, which was timed. Files are not read ahead: where the checkpoint comes from a slow disk, reading
it takes longer than is said here.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from nearplane.core.moments import Moments, all_finite
from nearplane.data.text import read_text, tokenize
from nearplane.methods import OBQ, RTN, Method, NearPlane
from nearplane.methods.nearplane import DAMPINGS, TRIAL_ROWS
from nearplane.run.estimate import Estimate
from nearplane.run.measure import Knowledge, measure, measured_rows
from nearplane.run.observe import Measuring
from nearplane.run.plan import Plan
from nearplane.run.workspace import Shape, pushes, stage_shape

# Small problems (out, in), the smallest first; no new one is begun after BUDGET seconds.
PROBLEMS = [(64, 512), (1024, 256), (512, 512), (512, 1024)]
TINY = [(16, 64), (64, 64), (128, 32), (32, 128)]  # of OBQ, which costs out in³
BUDGET = 6.0
TOKENS = 1024
DISK_BYTES = 32 << 20
SAMPLE = 100_000  # characters


@dataclass(frozen=True)
class Rates:
    """Seconds per unit of work."""

    flop: float  # of a matrix product in the compute dtype
    solver_flop: float  # the same in float32
    element: float  # a number through an activation
    load: float  # a stored number, checked and widened
    gram: float  # a FLOP of moments
    prepare: float  # n² of prepare, beyond its FLOPs
    column: float  # n of solve
    weight: float  # m n of solve
    square: float  # n² of solve
    measure: float  # m n of Report.add
    pack: float  # a weight
    disk: float  # a byte


def pace(plan: Plan, found: Estimate, opening: float) -> dict[str, float]:
    """Seconds of each phase of a run, after measuring this machine; ``opening``: what it took to make the plan."""
    phases = seconds(plan, found, rates(plan))
    phases["start"] += opening + (reading(plan) if plan.method.needs else 0.0)
    return phases


def seconds(plan: Plan, found: Estimate, rates: Rates) -> dict[str, float]:
    """Seconds of each phase at these rates."""
    needs, method = plan.method.needs, plan.method
    windows, seqlen = found.windows
    hidden = plan.hidden
    tokens = float(windows * seqlen)
    phases = dict.fromkeys(("start", "forward", "observe", "prepare", "solve", "measure", "write"), 0.0)
    stored = sum(plan.source.store.nbytes(name) for name in plan.source.store.names) / plan.source.dtype.itemsize
    inside = float(sum(s.shape[0] * s.shape[1] for b in plan.blocks for s in b.sites))
    phases["start"] = rates.load * (2 * (stored - inside) + inside / len(plan.blocks))
    phases["forward"] = rates.load * inside
    for number, block in enumerate(plan.blocks):
        shapes = [stage_shape(stage, found.streams == 2) for stage in block.stages]
        reached, costs = 0.0, []  # seconds of a token's forward up to each stage
        for place, s in enumerate(shapes):
            if place == 1:
                reached += rates.flop * 2 * seqlen * hidden
            costs.append(reached)
            reached += rates.flop * 2 * s.m * s.n + rates.element * (s.m + s.n + 2 * hidden)
        last = number == len(plan.blocks) - 1
        runs = (
            (0.0 if last else reached) + sum(costs) if not found.kept else max(costs, default=0.0) if last else reached
        )
        phases["forward"] += tokens * found.streams * runs
        for s in shapes:
            weights = s.m * s.n
            if needs:
                phases["observe"] += rates.gram * tokens * observing(method, s)
                phases["prepare"] += rates.solver_flop * preparing(method, s.n) + rates.prepare * s.n**2
            phases["solve"] += rates.solver_flop * solving(method, s) + rates.column * s.n + rates.weight * weights
            phases["solve"] += rates.square * s.n**2
            phases["measure"] += rates.measure * weights
            if needs:
                products = 3 + bool(needs & {"D"} and not s.point)
                phases["measure"] += rates.solver_flop * products * 2 * s.judged * s.n**2
            phases["write"] += rates.pack * weights
    phases["write"] += rates.disk * sum(found.disk.values())
    return phases


def observing(method: Method, shape: Shape) -> float:
    """FLOPs of the moments, per token."""
    needs = method.needs
    drift = 4 * shape.m * shape.n if shape.point and "R" in needs else 2 * shape.n**2 if "D" in needs else 0
    return float(shape.n**2 + drift)


def preparing(method: Method, n: int) -> float:
    """FLOPs of ``prepare``: a factor, and two triangular solves for each push; OBQ inverts."""
    if isinstance(method, NearPlane | RTN):
        return 0.0
    return (4.0 if isinstance(method, OBQ) else 1 / 3 + 2 * pushes(method)) * n**3


def solving(method: Method, shape: Shape) -> float:
    """FLOPs of ``solve`` in matrix products and factors."""
    m, n = float(shape.m), float(shape.n)
    if isinstance(method, RTN) or not method.needs:
        return 0.0
    if isinstance(method, OBQ):
        return 4 * m * n**3
    if not isinstance(method, NearPlane):
        return (1 + pushes(method)) * m * n * n
    rows = m if method.shrink == "row" else min(m, float(TRIAL_ROWS))
    ridges = {"none": 0, "spectral": 2}.get(method.shrink, 1) if method.target else 0
    judged = max(ridges, 1 + len(DAMPINGS) if method.damping == "held_out" else 0)
    judging = judged * n**3 / 3 + (4 * ridges + 1) * rows * n * n
    step = 0.0
    if method.target:
        step = 0.0 if shape.point else 2 * m * n * n
        used = max(1, ridges)
        step += used * n**3 + 2 * m * n * n if m > n else used * (n**3 / 3 + 2 * m * n * n)
    refining = method.rounds * (2 * m + 2 * rows * method.gate) * n * n
    return judging + step + n**3 / 3 + method.beam * m * n * n + refining


def rates(plan: Plan) -> Rates:
    """Measure this machine: about BUDGET seconds, and one more problem."""
    device, solver = plan.device, torch.float64 if plan.compute == torch.float64 else torch.float32
    began = time.perf_counter()
    clock = _Clock(device)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = solver) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight = draw(TOKENS, 1024, dtype=plan.compute), draw(1024, 1024, dtype=plan.compute)
    flop = clock(lambda: x @ weight.T) / (2 * TOKENS * 1024**2)
    y, square = draw(TOKENS, 1024), draw(1024, 1024)
    solver_flop = flop if plan.compute == solver else clock(lambda: y @ square.T) / (2 * TOKENS * 1024**2)
    element = clock(lambda: torch.nn.functional.silu(x).mul_(x)) / x.numel()
    stored = torch.zeros(1 << 22, dtype=plan.source.dtype)
    load = clock(lambda: all_finite(stored) and stored.to(device, plan.compute)) / stored.numel()
    found: list[tuple[int, int, float]] = []
    gram = prepare = pack = 0.0
    method, grid = plan.method, plan.grid
    for m, n in TINY if isinstance(method, OBQ) else PROBLEMS:
        weight = draw(m, n)
        moments, state = None, None
        if method.needs:
            gram, moments = _moments(method, n, draw, clock)
            prepare = clock(partial(method.prepare, moments)) - solver_flop * preparing(method, n)
            prepare = max(0.0, prepare) / n**2
            state = method.prepare(moments)
        taken = clock(partial(method.solve, weight, state, grid))
        found.append((m, n, taken - solver_flop * solving(method, Shape(m, n, m, False))))
        if time.perf_counter() - began > BUDGET:
            break
    solved = method.solve(weight, state, grid)
    taken = clock(lambda: measure("", weight, solved, grid, Knowledge(moments)))
    taken -= solver_flop * 6 * len(range(m)[measured_rows(m)]) * n * n if method.needs else 0.0
    pack = clock(lambda: plan.format.pack("x", solved, grid)) / (m * n)
    column, each, rest = _fit(found)
    return Rates(
        flop, solver_flop, element, load, gram, prepare, column, each, rest, max(0.0, taken) / (m * n), pack, _disk()
    )


def reading(plan: Plan) -> float:
    """Seconds to load the tokenizer and tokenize the calibration text, from its first SAMPLE characters.

    0 where there is no tokenizer yet, or the text would have to be downloaded.
    """
    dataset, start = plan.calibration.dataset, time.perf_counter()
    if not (plan.source.folder / "tokenizer_config.json").exists() or not (dataset is None or Path(dataset).is_file()):
        return 0.0
    text, tokenizer = read_text(dataset, "calibration"), plan.source.tokenizer
    loaded = time.perf_counter()
    tokenize(tokenizer, text._replace(content=text.content[:SAMPLE]))
    share = max(1.0, len(text.content) / SAMPLE)
    return loaded - start + share * (time.perf_counter() - loaded)


class _Clock:
    """Seconds of a call: the median of up to three, once warm; a long one is timed once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], Any]) -> float:
        first = self._once(run)
        if first > 1.0:
            return first
        return sorted(self._once(run) for _ in range(3))[1]

    def _once(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def _moments(method: Method, n: int, draw: Callable[..., torch.Tensor], clock: _Clock) -> tuple[float, Moments]:
    """Moments of a random input with drift, and the seconds that a FLOP of them takes."""
    needs = method.needs - {"R"}
    xhat = draw(TOKENS, n) @ draw(n, n)
    x = xhat + draw(TOKENS, n) if "D" in needs else None
    measuring = Measuring(needs, n, None, xhat, 8)
    taken = clock(lambda: measuring.add(torch.Size([8, TOKENS // 8]), 0, xhat, x, None))
    return taken / (TOKENS * observing(method, Shape(n, n, n, False))), measuring.result()


def _fit(found: list[tuple[int, int, float]]) -> tuple[float, float, float]:
    """``a n + b m n + c n²`` through what is left of each time, least squares of the relative error, none below 0.

    The least over numbers that are not negative is the least of some subset of the terms: all are tried.
    """
    rows = torch.tensor([[n, m * n, n * n] for m, n, _ in found], dtype=torch.float64)
    left = torch.tensor([max(1e-9, taken) for *_, taken in found], dtype=torch.float64)
    rows, ones = rows / left[:, None], torch.ones(len(found), dtype=torch.float64)
    best, result = torch.inf, [0.0, 0.0, 0.0]
    for count in range(1, min(3, len(found)) + 1):
        for terms in combinations(range(3), count):
            chosen = rows[:, list(terms)]
            size = chosen.norm(dim=0)
            found_here = torch.linalg.lstsq(chosen / size, ones[:, None]).solution[:, 0] / size
            missed = float((chosen @ found_here - ones).norm())
            if bool((found_here >= 0).all()) and missed < best:
                best, result = missed, [0.0, 0.0, 0.0]
                for term, value in zip(terms, found_here.tolist(), strict=True):
                    result[term] = value
    return result[0], result[1], result[2]


def _disk() -> float:
    """Seconds per byte of a file, written and forced to disk; where the working folder is, else for temporary files."""
    block = bytes(DISK_BYTES)
    for folder in (Path.cwd(), None):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                start = time.perf_counter()
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
                return (time.perf_counter() - start) / DISK_BYTES
        except OSError:
            continue
    return 0.0
