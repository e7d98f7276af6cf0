"""The parts of a solver: process CPU seconds of each, and the FLOPs that it asks torch for.

The functions of a part are wrapped while they are timed. The time of one part inside another counts once, for the inner
one. FLOPs are those of dense linear algebra, by the shapes of its operands, counted in a run of their own.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from nearplane.core import heldout, target
from nearplane.core.refine import Refinement
from nearplane.methods import base, nearplane

# Where a function is looked up, its name there, and the part that it belongs to.
PARTS: list[tuple[Any, str, str]] = [
    (base, "factorize", "factors"),
    (nearplane, "factorize", "factors"),
    (target, "factorize", "factors"),
    (target, "damped_cholesky", "factors"),
    (nearplane, "pull", "pull"),
    (heldout, "pull", "pull of the trial"),
    (nearplane, "full_step", "steps of the trial"),
    (nearplane, "shares", "shares of the trial"),
    (heldout.Trial, "confirmed", "shares of the trial"),
    (heldout.Trial, "rounding", "dampings of the trial"),
    (heldout.Trial, "spread", "dampings of the trial"),
    (nearplane, "mixed_step", "step"),
    (base, "fit_groups", "fit of the groups"),
    (nearplane, "fit_groups", "fit of the groups"),
    (base, "sweep", "sweep"),
    (nearplane, "sweep", "sweep"),
    (nearplane, "sweep_with_slope", "sweep"),
    (Refinement, "__init__", "refinement"),
    (Refinement, "round", "refinement"),
    (heldout.Trial, "losses", "gate"),
]
# Operands of a product among the arguments of an operation.
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "mv": (0, 1), "addmv": (1, 2)}


class Clock:
    """CPU seconds and FLOPs by part; what no part claims is the rest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.stack, self.last = ["rest"], time.process_time()

    def tick(self) -> None:
        """Give the time since the last tick to the part of now."""
        now = time.process_time()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Run a part."""
        self.tick()
        self.stack.append(part)
        try:
            yield
        finally:
            self.tick()
            self.stack.pop()

    def wrapped(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the function as a part."""

        def inside(*args: Any, **options: Any) -> Any:
            with self.inside(part):
                return function(*args, **options)

        return inside


class Flops(TorchDispatchMode):
    """Counts FLOPs for the part that a clock is in."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, flops = function.overloadpacket.__name__.rstrip("_"), 0.0
        if name in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[name])
            flops = 2.0 * a.numel() * (b.shape[1] if b.dim() > 1 else 1)
        elif name == "linalg_cholesky_ex":
            flops = args[0].shape[-1] ** 3 / 3
        elif name == "linalg_solve_triangular":
            flops = float(args[1].numel() * args[0].shape[-1])
        elif name == "cholesky_inverse":
            flops = args[0].shape[-1] ** 3 * 2 / 3
        elif name == "columns":
            flops = args[0].numel() * (len(args[0]) - 1.0)
        self.clock.flops[self.clock.stack[-1]] += flops
        return function(*args, **(kwargs or {}))


def measure(work: Callable[[], Any], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median CPU seconds and the FLOPs of each part of ``work``, in the order in which parts began."""
    clocks = [Clock() for _ in range(rounds + 1)]
    for number, clock in enumerate(clocks):
        with ExitStack() as stack:
            for owner, name, part in PARTS:
                stack.enter_context(patch.object(owner, name, clock.wrapped(getattr(owner, name), part)))
            if number == rounds:
                stack.enter_context(Flops(clock))
            clock.last = time.process_time()
            work()
            clock.tick()
    *timed, counted = clocks
    return {part: (statistics.median(c.seconds[part] for c in timed), counted.flops[part]) for part in timed[0].seconds}
