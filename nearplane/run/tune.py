"""``--tune``: after the codes stand, move scales and norms for a few steps, so that logits come nearer to the original's.

The loss is KL(original ‖ quantized) per token, end to end, on fresh windows, each read about twice. Where the text has too few
of them, windows that calibration has used come by turns with them.
Held-out windows, which neither calibration nor the tuning has seen, judge what is to be stored, rounded as it is stored.
The best of what they judged is kept, and what was solved where nothing is better. The order of windows follows from the
calibration's seed. A tuning that was ended goes on where it was judged last.

Related: mlx-lm's DWQ tunes scales by KL; EfficientQAT (arXiv 2407.11062) trains scales end to end; tuning only norms is a
published finish of post-training quantization (docs/tuning.md).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.fresh import Fresh, fresh_shares, join
from nearplane.data.samples import Batch, cut, masks
from nearplane.formats.journal import STATE, sync
from nearplane.formats.parts import Writer
from nearplane.models.inputs import is_causal
from nearplane.models.locate import first_line
from nearplane.run.check import Answers, Shift
from nearplane.run.plan import Plan
from nearplane.run.student import AT_ONCE, Move, Student, Tuned, counted, fresh_windows, step_windows

# A run is judged about so many times, and not before so many steps; it ends early after so many that were no better.
JUDGED, APART, PATIENCE = 16, 4, 2
FILE = "tuning.safetensors"


def apart(steps: int) -> int:
    """Return after how many steps a tuning is judged again."""
    return max(APART, -(-steps // JUDGED))


def forwards(plan: Plan) -> int:
    """Count the tokens that a tuning runs through the model: a step is about six forwards, a judgement two."""
    steps, seqlen = plan.job.tune, plan.windows[1] or plan.calibration.seqlen
    judged = 1 + -(-steps // apart(steps))
    held = sum(count for count, _ in fresh_shares(plan.calibration, 0))
    return seqlen * (6 * steps * step_windows(seqlen) + 2 * judged * held)


@dataclass
class Progress:
    """What a tuning has done so far."""

    step: int = 0
    kept: int = 0
    """The step whose numbers are best; 0: none is better than what was solved."""
    judged: list[dict[str, Any]] = field(default_factory=list)
    """KL of each source after some steps, the first before any."""

    @property
    def stale(self) -> int:
        """How many judgements in a row were no better."""
        return sum(row["step"] > self.kept for row in self.judged)

    def take(self, step: int, found: dict[str, float]) -> bool:
        """Note what the held-out windows say, and tell whether it is the best so far: no source may be worse than before."""
        self.step = step
        self.judged.append({"step": step, "kl": found})
        first = self.judged[0]["kl"]
        best = next(row["kl"] for row in self.judged if row["step"] == self.kept)
        sound = all(isfinite(value) and value <= first[name] for name, value in found.items())
        if step and sound and _score(found) < _score(best):
            self.kept = step
            return True
        return False

    def record(self) -> dict[str, Any]:
        """Return the KL before and after, and the way there, for the report."""
        after = next(row["kl"] for row in self.judged if row["step"] == self.kept)
        return {
            "done": self.step,
            "kept": self.kept,
            "before": self.judged[0]["kl"],
            "after": after,
            "judged": self.judged,
        }


def _score(found: dict[str, float]) -> float:
    """Return the mean of the logarithms: each source counts by its share."""
    return sum(log(max(value, 1e-30)) for value in found.values()) / len(found)


def tune(
    plan: Plan, fresh: Fresh, writer: Writer, advance: Callable[[], None], check: Callable[[], None]
) -> tuple[Tuned | None, dict[str, Any]]:
    """Tune a run whose blocks are all finished.

    Args:
        plan: of the run.
        fresh: windows that calibration has not used.
        writer: holds the solved weights; the state of the tuning is kept in its folder.
        advance: called after each step.
        check: called where the tuning may be interrupted.

    Returns:
        What is to be stored, None where nothing was better; and the record of the tuning, for the report.
    """
    steps = plan.job.tune
    try:
        student = Student(plan, (writer.part(record) for record in writer.records))
        with student.at_work():
            work = _Work(student, fresh, _Kept(writer, plan, fresh))
            course = work.run(steps, advance, check)
            tuned = student.tuned() if course.kept else None
            checked = _check(student, work.at_once) if course.kept and plan.checked is not None else None
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the model's own code has no gradient; the report says so
        return None, {"steps": steps, "kept": 0, "failed": first_line(error)}
    held, more = fresh.counts
    found = {
        "steps": steps,
        **course.record(),
        "windows": {"held_out": held, "fresh": more, "calibration": work.calibrated},
    }
    found |= {"moved": counted(student.moves)}
    return tuned, found if checked is None else found | {"check": checked}


def _check(student: Student, at_once: int) -> dict[str, Any]:
    """Check the tuned model on the windows that a run is checked on, as ``run/check.py`` does; nothing where it is not."""
    plan = student.plan
    assert plan.checked is not None
    answers, shift = Answers(plan.checked, is_causal(plan.source.model)), Shift()
    for windows in _grouped(list(_windows(plan.checked.batch)), at_once):
        batch = _placed(windows, plan.device)
        (target, x), (found, other) = student.both(batch)
        answers.add(batch, target, found)
        shift.add(x, other, next((mask for mask in masks(batch) if mask.shape == x.shape[:-1]), None))
    return {"error": shift.mean, **answers.record()}


def refuse_ranks(steps: int, world: int) -> None:
    """Raise SettingError where several processes would tune."""
    if steps and world > 1:
        raise SettingError("tune runs in one process; start the run without torchrun, or without --tune.")


def refused(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence where a tuning changed nothing."""
    if "failed" in record:
        return [f"tune: the model cannot be tuned ({record['failed']}); what was solved is kept"]
    if record["kept"]:
        return []
    least = min(record["judged"][1:], key=lambda row: _score(row["kl"]))["kl"]
    change = "; ".join(f"{record['before'][name]:.4g}, then {least[name]:.4g} at best" for name in least)
    return [f"tune: {record['done']} steps did not help (held-out KL {change}); they are undone"]


class _Work:
    """The loop over steps."""

    def __init__(self, student: Student, fresh: Fresh, kept: "_Kept") -> None:
        plan = student.plan
        self.student, self.fresh, self.kept, self.moves = student, fresh, kept, student.moves
        seqlen, steps = plan.windows[1] or plan.calibration.seqlen, plan.job.tune
        self.size, self.at_once = step_windows(seqlen), max(1, AT_ONCE // seqlen)
        # Calibration windows teach less: codes and scales fit them already (docs/tuning.md).
        samples = plan.samples if fresh.counts[1] < fresh_windows(steps, seqlen) else None
        pools = [*([] if fresh.more is None else [fresh.more]), *([] if samples is None else [samples.arguments])]
        self.windows = _by_turns([list(_windows(pool)) for pool in pools], plan.calibration.seed)
        self.calibrated = 0 if samples is None else samples.number
        deltas = [{"params": [move.delta], "lr": move.rate} for move in self.moves]
        self.optimizer = torch.optim.Adam(deltas)
        self.best = [torch.zeros_like(move.delta.data) for move in self.moves]

    def run(self, steps: int, advance: Callable[[], None], check: Callable[[], None]) -> Progress:
        """Take the steps, and leave the student with the best numbers."""
        course = self.kept.read(self.moves, self.optimizer, self.best) or Progress()
        if not course.judged:
            course.take(0, self._judge())
        self.student.settle()
        for _ in range(course.step):
            self._batch()
            advance()
        for step in range(course.step + 1, steps + 1):
            check()
            if course.stale >= PATIENCE:
                break
            self._step(min(1.0, 2 * (1 - (step - 1) / steps)))
            advance()
            if step % apart(steps) == 0 or step == steps:
                if course.take(step, self._judge()):
                    self.best = [move.delta.data.clone() for move in self.moves]
                self.kept.write(course, self.moves, self.optimizer, self.best)
        for move, best in zip(self.moves, self.best, strict=True):
            move.delta.data.copy_(best)
        self.student.settle()
        return course

    def _batch(self) -> list[Batch]:
        return [next(self.windows) for _ in range(self.size)]

    def _step(self, share: float) -> None:
        """Take one step of Adam, at a share of its rates."""
        for windows in _grouped(self._batch(), self.at_once):
            batch = _placed(windows, self.student.plan.device)
            (self.student.divergence(batch) * len(windows) / self.size).backward()  # type: ignore[no-untyped-call]
        self.student.collect()
        for group, move in zip(self.optimizer.param_groups, self.moves, strict=True):
            group["lr"] = share * move.rate
        self.optimizer.step()
        self.student.settle()

    def _judge(self) -> dict[str, float]:
        """Return the KL of each source's held-out windows, with what would be stored now."""
        found, device = {}, self.student.plan.device
        with torch.no_grad():
            for name, batch in self.fresh.held.items():
                groups = _grouped(list(_windows(batch)), self.at_once)
                values = [len(some) * float(self.student.divergence(_placed(some, device))) for some in groups]
                found[name] = sum(values) / sum(map(len, groups))
        return found


class _Kept:
    """The state of a tuning, in the run's folder until the run is finished."""

    def __init__(self, writer: Writer, plan: Plan, fresh: Fresh) -> None:
        self.path = writer.out / STATE / FILE
        solved = [record["shards"] for record in writer.records]
        batches = [*fresh.held.values(), *([] if fresh.more is None else [fresh.more])]
        batches += [] if plan.samples is None else [plan.samples.arguments]
        read = [value.numpy().tobytes() for batch in batches for value in batch.values()]
        known = json.dumps([plan.settings, plan.job.tune, solved]).encode()
        self.of = hashlib.sha256(b"".join([known, *read])).hexdigest()

    def read(self, moves: list[Move], optimizer: torch.optim.Adam, best: list[Tensor]) -> Progress | None:
        """Take over what an ended tuning has left; None where there is nothing, or it was another tuning's."""
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            with safe_open(self.path, "pt") as file:
                stated = file.metadata() or {}
                if stated.get("of") != self.of:
                    return None
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            for number, (move, kept) in enumerate(zip(moves, best, strict=True)):
                state = {key: found[f"{key}.{number}"] for key in ("exp_avg", "exp_avg_sq")}
                move.delta.data.copy_(found[f"delta.{number}"])
                kept.copy_(found[f"best.{number}"])
                optimizer.state[move.delta] = {
                    "step": found["step"].clone(),
                    **{key: value.to(move.delta.device) for key, value in state.items()},
                }
            return Progress(**json.loads(stated["course"]))
        return None

    def write(self, course: Progress, moves: list[Move], optimizer: torch.optim.Adam, best: list[Tensor]) -> None:
        """Write the state, all of it or nothing. Raises NearplaneError where the disk refuses."""
        tensors = {"step": optimizer.state[moves[0].delta]["step"].detach().cpu()}
        for number, (move, kept) in enumerate(zip(moves, best, strict=True)):
            tensors |= {f"delta.{number}": move.delta.data.cpu(), f"best.{number}": kept.cpu()}
            state = optimizer.state[move.delta]
            tensors |= {f"{key}.{number}": state[key].cpu() for key in ("exp_avg", "exp_avg_sq")}
        stated = {"of": self.of, "course": json.dumps(course.__dict__)}
        temporary = Path(f"{self.path}.tmp")
        try:
            save_file(tensors, temporary, metadata=stated)
            sync(temporary)
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise NearplaneError(f"the state of the tuning cannot be written to {self.path}: {error}.") from error


def _windows(batch: Batch) -> Iterator[Batch]:
    """Cut samples into batches of one."""
    for number in range(len(next(iter(batch.values())))):
        yield {name: value[number : number + 1] for name, value in batch.items()}


def _placed(windows: Sequence[Batch], device: torch.device) -> Batch:
    """Put windows on a device as one batch, without columns that are all padding."""
    return cut(join(windows), 0, len(windows), device)


def _grouped(windows: list[Batch], size: int) -> list[list[Batch]]:
    """Split windows into groups of a size; the last may be smaller."""
    return [windows[first : first + size] for first in range(0, len(windows), size)]


def _by_turns(pools: list[list[Batch]], seed: int) -> Iterator[Batch]:
    """Yield windows of each pool by turns, for ever; each pool in a new seeded order whenever it is used up."""

    def endless(pool: list[Batch], number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed((seed + number) % 2**63)
        while True:
            for i in torch.randperm(len(pool), generator=generator).tolist():
                yield pool[i]

    queues = [endless(pool, number) for number, pool in enumerate(pools)]
    while True:
        yield from (next(queue) for queue in queues)
