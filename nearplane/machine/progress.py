"""Progress on the terminal: a bar with time left, and plain lines that survive in a log file."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


def waiting(words: str, enabled: bool = True) -> AbstractContextManager[object]:
    """Say on a terminal what is being waited for, while it lasts; nothing in a log file."""
    return CONSOLE.status(words) if enabled and CONSOLE.is_terminal else nullcontext()


def bar(enabled: bool = True) -> Progress:
    """A progress display on standard error; silent when not enabled."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=CONSOLE,
        disable=not enabled,
        # Ten lines a second would flood a log file: there the stage lines tell the story.
        auto_refresh=CONSOLE.is_terminal,
    )


def track(windows: Tensor, description: str, *, enabled: bool) -> Iterator[Tensor]:
    """Iterate over the first dimension behind a bar."""
    with bar(enabled) as progress:
        yield from progress.track(windows, total=len(windows), description=description)
