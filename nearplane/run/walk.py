"""The walk: open every block in turn, solve its stages, advance, say what was done. Writing and telling are others' work."""

from collections.abc import Iterator, Sequence
from itertools import count

from nearplane.core.attention import fast_forwards
from nearplane.machine.ranks import ALONE, Ranks
from nearplane.run.check import Check
from nearplane.run.events import BlockDone, Compared, Event, Noted, Solved
from nearplane.run.measure import Clock, LinearRow
from nearplane.run.plan import Plan
from nearplane.run.resume import Done, replay
from nearplane.run.stage import solve_stage, told


def walk(plan: Plan, done: Sequence[Done] = (), ranks: Ranks = ALONE) -> Iterator[Event]:
    """Solve every linear of a plan, block by block, and yield what was done.

    Args:
        plan: a model, opened, with every choice settled (``make_plan``).
        done: blocks that an earlier session finished; their codes are put back, not solved again.
        ranks: the processes that share the run; all of them walk alike.

    Yields:
        Noted, Solved, StageDone, Compared and BlockDone (``run/events.py``), in the order of the work. What is yielded is in
        place already: later stages are observed behind it.

    Raises:
        NumericalError: numbers that cannot be solved, with the name of the linear.
        SettingError: settings that cannot work, or weights that are not those which ``done`` was made of.
    """
    if len(done) == len(plan.walked):  # nothing is left to solve: no block is opened
        yield from (BlockDone(block, number, replayed=True) for number, block in enumerate(plan.walked))
        return
    clock, blocks, check = Clock(), plan.stream(ranks), None
    for number in count():
        with clock("forward"):  # opening a block, and running the one before it over every sample
            block = next(blocks, None)
        if block is None:
            return
        if plan.checked is not None:
            with clock("check"), fast_forwards(plan.device):
                check = check or Check(plan, plan.checked)
                check.open(block)
        rows: list[LinearRow] = []
        if number < len(done):
            replay(plan, done[number], block)
        else:
            for stage in block.stages:
                for event in solve_stage(plan, block, stage, ranks, clock):
                    rows += [event.row] if isinstance(event, Solved) else []
                    yield event
            yield from map(Noted, told(rows))
        behind = None
        if check is not None:
            with clock("check"), fast_forwards(plan.device):
                behind = check.close(block)
                last = number == len(plan.walked) - 1
                if last:
                    block.drop()  # nothing goes on behind the last block, and logits take memory
                record = check.finish(block) if last else None
            if record is not None:
                yield Compared(record)
        yield BlockDone(block.block, number, clock.take(), number < len(done), behind)
