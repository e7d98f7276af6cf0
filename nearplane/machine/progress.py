"""Progress on the terminal: lines on standard error, and a bar with the time that is left. Imports rich where it is used."""

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor


def wrapped(words: str, width: int, indent: str = "  ") -> str:
    """Break a text at words into lines of at most ``width`` columns; lines after the first begin with ``indent``."""
    broken = textwrap.wrap(words, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return "\n".join(broken)


def printed(text: object) -> None:
    """Print a text on standard output; on a terminal its lines are broken at words, elsewhere they stay whole."""
    lines, width = str(text).splitlines(), shutil.get_terminal_size().columns
    if sys.stdout.isatty():
        lines = [
            wrapped(line, max(20, width - 1), " " * (2 + len(line) - len(line.lstrip())))
            if len(line) >= width
            else line
            for line in lines
        ]
    print("\n".join(lines))


def _console(stream: TextIO) -> "Console":
    """Return the console of a stream, one for each, so that lines go above its bar."""
    return _made(getattr(stream, "rich_proxied_file", stream))  # what stands in for the stream while a bar is shown


@lru_cache(maxsize=2)
def _made(stream: TextIO) -> "Console":
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True)


def console() -> "Console":
    """Return the console on standard error."""
    return _console(sys.stderr)


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook, whose standard error is no terminal and still shows widgets."""
    return type(getattr(sys.stderr, "rich_proxied_file", sys.stderr)).__module__.startswith("ipykernel")


def live() -> bool:
    """Tell whether a bar can be drawn: on a terminal, and in a notebook that has ipywidgets."""
    return sys.stderr.isatty() or (in_notebook() and find_spec("ipywidgets") is not None)


def say(words: str, stream: TextIO | None = None) -> None:
    """Print a line on standard error, above the bar if one is shown; on a terminal broken at words, elsewhere whole."""
    stream = stream or sys.stderr
    if not stream.isatty():
        print(words, file=stream, flush=True)
        return
    width = shutil.get_terminal_size().columns
    for line in words.splitlines():
        _console(stream).print(wrapped(line, max(20, width - 1)) if len(line) >= width else line)


def waiting(words: str, enabled: bool = True) -> AbstractContextManager[object]:
    """Say on a terminal what is being waited for, while the block inside runs; nothing in a log file."""
    if not enabled or not sys.stderr.isatty():  # in a notebook a display would swallow the lines printed meanwhile
        return nullcontext()
    from rich.text import Text

    return console().status(Text(words))


def bar(enabled: bool = True) -> "Progress":
    """Make a progress display on standard error; a silent one when not enabled."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console(),
        disable=not enabled or (in_notebook() and not live()),
        # Ten lines a second would flood a log file: there the lines of blocks tell the story.
        auto_refresh=live(),
    )


def track(windows: "Tensor", description: str, *, enabled: bool) -> "Iterator[Tensor]":
    """Iterate over the first dimension behind a bar."""
    with bar(enabled) as progress:
        yield from progress.track(windows, total=len(windows), description=description)
