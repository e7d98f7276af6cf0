"""Ctrl-C and SIGTERM while a run works: the first asks it to stop where nothing is half done, the second stops at once."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run stopped because it was asked to; ``signal`` says by what."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class Stop:
    """Whether somebody asked."""

    signal: int | None = None

    def check(self) -> None:
        """Raise Interrupted if so."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch both signals while inside; in other threads than the main one they cannot be caught, and are left alone."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise Interrupted(number)
        stop.signal = number
        print("nearplane: stopping after this stage; once more to stop at once", file=sys.stderr, flush=True)

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
