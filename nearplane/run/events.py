"""What a run says while it works: the events that ``walk`` yields, read by the report, the saver and the terminal.

A walk yields, in order: ``Noted`` and ``Solved`` for every linear of a stage, ``StageDone``, and after a block's last
stage ``BlockDone``. Of a resumed run, finished blocks come first, as ``BlockDone`` with ``replayed``.
"""

from dataclasses import dataclass, field

from nearplane.core.grid import Grid, Quantized
from nearplane.models.discover import Block, Site, Stage
from nearplane.run.report import LinearRow


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


@dataclass(frozen=True)
class StageDone:
    """All linears that read one input are solved."""

    block: Block
    stage: Stage
    rows: list[LinearRow]
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


Event = Noted | Solved | StageDone | BlockDone
