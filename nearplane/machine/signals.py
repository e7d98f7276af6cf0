"""How a run was started, and how it is stopped: Ctrl-C and SIGTERM while it works.

The first signal asks the run to stop where nothing is half done, the second stops it at once. Imports no torch.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The end of a run by the signal number ``signal``."""

    told = False  # whether another rank tells the user

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """A request to stop, set by a signal."""

    signal: int | None = None

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        """Take ``agree``, which combines the signals of all ranks (0: none), so that all stop at the same place."""
        self.agree = agree or (lambda number: number)

    def check(self) -> None:
        """Raise Interrupted if a stop is requested."""
        number = self.agree(self.signal or 0)
        if number:
            raise Interrupted(number)


@contextmanager
def stoppable(agree: Callable[[int], int] | None = None, *, quiet: bool = False) -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM while inside. In other threads than the main one, signals are left alone.

    Args:
        agree: see ``Stop``.
        quiet: print nothing at a signal.
    """
    stop = Stop(agree)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise Interrupted(number)
        stop.signal = number
        if not quiet:
            print("nearplane: stopping after this stage; once more to stop at once", file=sys.stderr, flush=True)

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def is_first() -> bool:
    """Whether this process speaks for the run, as far as torchrun's environment tells."""
    return int(os.environ.get("RANK", "0")) == 0


def started() -> tuple[list[str], int]:
    """The words before a command's own that start this run again, and how many machines they are given on."""
    world, nodes = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        return ["nearplane"], 1
    size = ["--nnodes", str(nodes)] if nodes > 1 else []
    each = os.environ.get("LOCAL_WORLD_SIZE", str(world))
    return ["torchrun", *size, "--nproc-per-node", each, "-m", "nearplane"], nodes
