"""What a run says while it works: the events that ``walk`` yields, read by the report, the saver and the terminal.

A walk yields, in order: ``Noted`` and ``Solved`` for every linear of a stage, ``StageDone``, and after a block's last
stage ``BlockDone``; before the last of these, ``Compared``. Of a resumed run, finished blocks come first, as ``BlockDone``
with ``replayed``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from nearplane.core.grid import Course, Grid, Quantized
from nearplane.models.discover import Block, Site, Stage
from nearplane.run.measure import BlockRow, LinearRow


@dataclass(frozen=True)
class Noted:
    """A sentence for the report: something that is no error, and not as asked."""

    text: str


@dataclass(frozen=True)
class Solved:
    """One weight, solved and put in place."""

    site: Site
    quantized: Quantized
    grid: Grid
    row: LinearRow
    """Its errors, as the report lists them."""
    nbytes: int
    """Of the tensors that it is stored in."""


@dataclass(frozen=True)
class StageDone:
    """All linears that read one input are solved."""

    block: Block
    stage: Stage
    rows: list[LinearRow]
    courses: tuple[Course, ...]
    """How a method that judges its steps went about it, once for each grid."""
    last: bool
    """Whether the stage is its block's last."""


@dataclass(frozen=True)
class BlockDone:
    """A block is finished; what was solved since the last one can be sealed."""

    block: Block
    number: int
    """Counted from 0."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent since the block before, by phase: forward, observe, prepare, solve, measure."""
    replayed: bool = False
    """Finished by an earlier session; its codes were put back."""
    behind: BlockRow | None = None
    """Errors of the hidden state behind it; None: the run is not checked, or the block is the output head."""


@dataclass(frozen=True)
class Compared:
    """The whole quantized model is compared with its original; comes before the last block is done."""

    record: dict[str, Any]


Event = Noted | Solved | StageDone | BlockDone | Compared


class Show(Protocol):
    """Shows a run to a person (``cli/terminal.py``). A context, so that an error leaves nothing behind on a screen."""

    silent: bool
    """Say nothing at all; a rank that does not speak for the run."""

    def __enter__(self) -> "Show":
        """Start."""

    def __exit__(self, *error: Any) -> None:
        """Stop, however the run ends."""

    def waiting(self, words: str) -> AbstractContextManager[object]:
        """Show what is being waited for while the block inside runs."""

    def counting(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Show a count of its own while the block inside runs; gives the function that advances it."""

    def begin(self, report: Any, blocks: list[Block], done: int, *, resume: bool, mixed: bool) -> None:
        """Say what is about to happen; ``done``: blocks that an earlier session finished."""

    def take(self, event: Event) -> None:
        """Show an event of the walk."""

    def end(self) -> None:
        """Show nothing more."""
