"""Wall and CPU seconds of the parts of a peer's run, printed as its last line for timing.py."""

import json
import os
import time


class Laps:
    """``lap`` ends a part."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float]] = {}
        self.mark = self._now()

    def lap(self, name: str) -> None:
        """What went by since the last one was ``name``."""
        now = self._now()
        self.parts[name] = (now[0] - self.mark[0], now[1] - self.mark[1])
        self.mark = now

    def show(self) -> None:
        """Print them all."""
        print("\nlaps " + json.dumps(self.parts), flush=True)

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])
