"""``Terminal``: shows a run while it works. A head, one line per block that a person can judge, a summary with advice.

Numbers are those of the report's rows. Lines of blocks have at most 78 columns; with ``verbose`` every stage has a line, too.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from nearplane.cli.fields import NO_DEFAULT, fields_of, methods
from nearplane.cli.summary import summary
from nearplane.machine import progress
from nearplane.page.words import clock, grouped, number_of, rough, usual_of

if TYPE_CHECKING:  # a terminal is made before torch is imported
    from nearplane.models.discover import Block, Stage
    from nearplane.run.events import BlockDone, Event
    from nearplane.run.measure import LinearRow
    from nearplane.run.report import Report

COLUMNS = 78
# Characters of a linear's name that still tell it from others.
ENOUGH = 8


class Terminal:
    """Shows one run on a stream: begin, take every event, end. A context, so that an error leaves no bar behind.

    Example:
        >>> with Terminal(quiet=True) as show:
        ...     report = nearplane.quantize("demo", "out", show=show)  # doctest: +SKIP
    """

    def __init__(
        self, *, verbose: bool = False, quiet: bool = False, silent: bool = False, stream: TextIO | None = None
    ) -> None:
        """Args:
        verbose: a line per stage, every setting and every note.
        quiet: nothing but the summary, which is the caller's to print.
        silent: nothing at all; a rank that does not speak for the run.
        stream: none: standard error, as it is when a line is printed.
        """
        self.verbose, self.quiet, self.silent = verbose, quiet, silent
        self._stream = stream
        self._bar: Any = None
        self._task: Any = None
        self._rows: list[LinearRow] = []
        self._full: list[bool] = []  # by block: whether it holds anything to quantize
        self._spent, self._worked = 0.0, 0  # seconds on such blocks, and their number
        self._mixed = False
        self._last = time.perf_counter()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def _shown(self) -> bool:
        return not (self.quiet or self.silent)

    @property
    def _live(self) -> bool:
        """Whether a bar can be drawn."""
        return self._shown and self._stream is None and sys.stderr.isatty()

    def say(self, words: str) -> None:
        """Print a line, broken at words on a terminal."""
        if self._shown:
            progress.say(words, self._stream)

    def waiting(self, words: str) -> AbstractContextManager[object]:
        """Show on a terminal what is being waited for."""
        return progress.waiting(words, self._live)

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar of its own while the block inside runs, for the measuring before a run; yields what advances it."""
        with progress.bar() if self._live else nullcontext() as display:
            if display is None:
                yield lambda: None
                return
            task = display.add_task(name, total=total)
            yield lambda: display.advance(task)

    def begin(
        self, report: "Report", blocks: "list[Block]", done: int = 0, *, resume: bool = False, mixed: bool = False
    ) -> None:
        """Say what is about to happen, and what the fields of a block's line are.

        Args:
            report: with the settings, the data and the notes known before.
            blocks: the blocks that are run.
            done: blocks that an earlier session finished.
            resume: whether to go on was asked for.
            mixed: whether linears differ in their grids.
        """
        self._full, self._last, self._mixed = [bool(b.stages) for b in blocks], time.perf_counter(), mixed
        for line in head(report, blocks, verbose=self.verbose):
            self.say(line)
        if done:
            again = "; the hidden states run through them again" if done < len(blocks) else ""
            self.say(f"{done} of {len(blocks)} blocks are done{again}")
        elif resume:
            self.say(f"{report.out} holds no finished block to go on after: a new run begins")
        if self._live:
            self._bar = progress.bar()
            self._bar.start()
            self._task = self._bar.add_task("quantize", total=sum(len(block.stages) for block in blocks))

    def take(self, event: "Event") -> None:
        """Show an event: a line for a finished block, with ``verbose`` one for a stage and a note."""
        from nearplane.run.events import BlockDone, Noted, StageDone
        from nearplane.run.stage import is_expert

        if isinstance(event, StageDone):
            self._rows += event.rows
            if self.verbose and not is_expert(event.stage):
                self.say(stage_line(event.block, event.stage, event.rows, self._mixed))
            if self._bar is not None:
                self._bar.advance(self._task)
        elif isinstance(event, Noted) and self.verbose:
            self.say(f"note: {event.text}")
        elif isinstance(event, BlockDone):
            self._block_done(event)

    def _block_done(self, event: "BlockDone") -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rows, self._rows = self._rows, []
        if event.replayed:
            if self._bar is not None:
                self._bar.advance(self._task, len(event.block.stages))
            return
        if self._full[event.number]:  # others are run in no time, and would make the time left look short
            self._spent, self._worked = self._spent + seconds, self._worked + 1
        left = self._spent / self._worked * sum(self._full[event.number + 1 :]) if self._worked else None
        for line in expert_lines(rows) if self.verbose else ():
            self.say(line)
        self.say(block_line(event, len(self._full), rows, seconds, left, self._mixed))

    def end(self) -> None:
        """Take the bar away, however the run ends. ``summary(report)`` is the text to print then."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def summary(self, report: "Report") -> str:
        """The summary of a finished run, broken at words on a terminal."""
        text = summary(report, verbose=self.verbose)
        if not sys.stdout.isatty():
            return text
        return "\n".join(progress.wrapped(line, COLUMNS) for line in text.splitlines())


def head(report: "Report", blocks: "list[Block]", *, verbose: bool = False) -> list[str]:
    """What is about to happen, in lines."""
    settings, data = report.settings, report.data
    method, grid = dict(settings["method"]), settings["grid"]
    lines = [f"{report.model}: {sum(len(b.sites) for b in blocks)} linears in {len(blocks)} blocks -> {report.out}"]
    name = method.pop("name")
    shown = method if verbose else _changed(name, method)
    lines.append(" ".join(["method", name, *(f"{key}={value}" for key, value in shown.items())]))
    lines.append(f"grid bits={grid['bits']} group_size={grid['group_size']} sym={grid['sym']} fit={grid['fit']}")
    tokens, turned = settings.get("activations"), settings.get("rotate")
    if tokens is not None:
        rounded = f"activations bits={tokens['bits']} sym={tokens['sym']} clip={tokens['clip']:g}"
        lines.append(f"{rounded}; each code is stored as an int8")
    if turned is not None:
        lines.append(f"rotate {','.join(turned['kinds'])} seed={turned['seed']}")
    if settings.get("scale") is not None:
        lines.append("scale awq")
    for some in settings.get("override", ()):
        fields = (f"{key}={value}" for key, value in some.items() if key != "pattern")
        lines.append(" ".join(["override", repr(some["pattern"]), *fields]))
    lines += [f"ignore {pattern!r}: left dense" for pattern in settings.get("ignore", ())]
    lines += choice_table(settings) if verbose else _choices(settings)
    amount = f": {data['windows']} windows of {data['seqlen']} tokens" if "seqlen" in data else ""
    begun = f", each begins with {data['opening']}" if data.get("opening") else ""
    sources = data.get("sources", ())
    lines.append(f"calibration {'a mix' if sources else data['origin']}{amount}{begun}")
    for row in sources:
        kind = f" ({row['origin']})" if row["origin"] != row["source"] else ""
        lines.append(f"  {row['source']}, weight {row['weight']:g}: {row['windows']} windows{kind}")
    lines += [f"note: {note}" for note in (report.events if verbose else grouped(report.events))]
    # Where only the scales of channels read data, linears have no errors of their outputs.
    read, checked = "windows" in data and name != "RTN", report.check
    if checked is not None:
        kind = "held-out" if checked["held_out"] else "calibration"
        lines.append("a block's line: error, ‖x̂-x‖²/‖x‖² of the hidden state behind it, by tokens")
        lines.append(f"of {kind} windows; (rtn), that of rounding to nearest on min-max ranges;")
        lines.append(f"its worst linear, by {'‖(Q-W)X̂‖²/‖WX̂‖²' if read else '‖Q-W‖²/‖W‖²'}; time taken; eta, time left")
    elif read:
        lines.append("a block's line: linears, the mean of their ‖(Q-W)X̂‖²/‖WX̂‖²; (rtn), that of")
        lines.append("rounding to nearest; the worst linear; time taken; eta, time left")
    else:
        lines.append("a block's line: weight error, the mean of its linears' ‖Q-W‖²/‖W‖²;")
        lines.append("its worst linear; time taken; eta, time left")
    if read and {"target", "shrink"} <= method.keys() and method["target"]:
        lines.append("α, the share of the drift that is repaired: such linears leave their weights")
        lines.append("on purpose, so a linear's error near or above rtn is no fault where α > 0")
    usual = usual_of(settings, data)
    return [*lines, f"usual at {grid['bits']} bits: {usual[0]:g} to {usual[1]:g} for a linear"] if usual else lines


def _changed(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a known method that have other values than by default."""
    reference = methods().get(name.lower())
    known = {} if reference is None else {field.name: field.default for field in fields_of(reference)}
    return {key: value for key, value in options.items() if known.get(key, NO_DEFAULT) != value}


def _choices(settings: dict[str, Any]) -> list[str]:
    """What a budget has chosen, counted."""
    rows = settings.get("choices") or []
    counts: dict[Any, int] = {}
    for row in rows:
        counts[row["bits"]] = counts.get(row["bits"], 0) + len(row["linears"])
    chosen = ", ".join(f"{count} linears at {bits} bits" for bits, count in sorted(counts.items()))
    return [f"budget {settings['budget']:g} bits per weight, scales counted: {chosen}"] if rows else []


def choice_table(settings: dict[str, Any]) -> list[str]:
    """What a budget has chosen, and the errors that it chose by."""
    rows = settings.get("choices") or []
    if not rows:
        return []
    labels = ["+".join([row["linears"][0], *(n.rpartition(".")[2] for n in row["linears"][1:])]) for row in rows]
    wide = max(map(len, labels))
    lines = [f"budget {settings['budget']:g} bits per weight, scales counted; bits chosen, error at each width"]
    for label, row in zip(labels, rows, strict=True):
        errors = "  ".join(f"{bits}: {error:.2e}" for bits, error in row["errors"].items())
        lines.append(f"{label:<{wide}}  {row['bits']} bits  {errors}")
    return lines


def block_line(
    done: "BlockDone", total: int, rows: "list[LinearRow]", seconds: float, left: float | None, mixed: bool = False
) -> str:
    """One line for a finished block, of at most 78 columns.

    Args:
        done: the event, with the block and the errors behind it.
        total: blocks of the run.
        rows: its linears, as the report has them.
        seconds: spent on the block.
        left: seconds that the run will take yet; None: not known.
        mixed: whether linears differ in their grids, so that the line says how many bits its codes have on average.
    """
    block, number = done.block.name, done.number + 1
    start = f"block {number:>{len(str(total))}}/{total}  "
    end = f"  {seconds:.1f}s" if seconds < 100 else f"  {clock(seconds)}"
    end += f"  eta {clock(left)}" if number < total and left is not None else ""
    if not rows:
        return f"{start}no linear{end}"[:COLUMNS]
    read = [row for row in rows if row.error is not None]
    behind = None if done.behind is None else done.behind.error
    if behind is not None and done.behind is not None:
        rtn = done.behind.rtn_error
        start += f"error {number_of(behind)}" + (f" (rtn {rough(rtn)})" if rtn is not None else "")
    if read:
        worst = max(read, key=lambda row: row.error or 0.0)
        if behind is None:
            mean, rtn = (sum(error or 0.0 for error in errors) / len(read) for errors in _errors(read))
            start += f"linears {number_of(mean)} (rtn {rough(rtn)})"
        aimed = [row.alpha for row in read if row.alpha is not None]
        start += f"  α {sum(aimed) / len(aimed):.2f}".replace("0.", ".") if any(aimed) else ""
        most = rough(worst.error or 0.0)
    else:
        worst = max(rows, key=lambda row: row.weight_error)
        if behind is None:
            start += f"weight error {number_of(sum(row.weight_error for row in rows) / len(rows))}"
        most = rough(worst.weight_error)
    weights = sum(row.shape[0] * row.shape[1] for row in rows)
    bits = sum(_width(row.bits) * row.shape[0] * row.shape[1] for row in rows) / weights
    name = _short(worst.name.removeprefix(f"{block}."))
    words = ("  ",) if "α" in start else ("  worst ", "  ")
    for more, word in product([f"  {bits:.1f} bits{end}"] * mixed + [end], words):
        room = COLUMNS - len(f"{start}{word} {most}{more}")
        if room >= len(name) or (room >= ENOUGH and word == "  "):
            return f"{start}{word}{name if len(name) <= room else '…' + name[1 - room :]} {most}{more}"
    return f"{start}{end}"[:COLUMNS]


def _errors(rows: "list[LinearRow]") -> tuple[list[float | None], list[float | None]]:
    return [row.error for row in rows], [row.rtn_error for row in rows]


def _width(bits: int | str | None) -> float:
    return 2.0 if isinstance(bits, str) else float(bits or 0)


def _short(name: str) -> str:
    """The end of a linear's name that tells it from others of its block: an expert's number; BERT calls three "dense"."""
    parts = name.split(".")
    if len(parts) > 2 and parts[-2].isdigit():
        return ".".join(parts[-2:])
    return ".".join(parts[-2:] if parts[-1] == "dense" else parts[-1:])


def stage_line(block: "Block", stage: "Stage", rows: "list[LinearRow]", mixed: bool = False) -> str:
    """One line for a stage; ``mixed``: linears differ in their grids, so the line says which this stage has."""
    names = "+".join(_short(site.name.removeprefix(block.name + ".")) for site in stage)
    if mixed:
        grids = dict.fromkeys(f"{row.bits}/{row.group_size}" for row in rows)
        names = f"{names:<28} bits/group {', '.join(grids)} "
    seconds = sum(row.seconds for row in rows)
    if rows[0].error is None:
        return f"{block.name} {names:<28} weight error {max(r.weight_error for r in rows):.4f}  {seconds:.1f}s"
    worst = max(rows, key=lambda row: row.error or 0.0)
    line = f"{block.name} {names:<28} error {worst.error:.4f} (rtn {worst.rtn_error:.4f})"
    if worst.clipped is not None:
        weights = sum(row.shape[0] * row.shape[1] for row in rows)
        line += f"  clipped {100 * sum(row.clipped or 0 for row in rows) / weights:.1f}%"
    if worst.bound_ratio is not None:
        line += f"  loss/bound {worst.bound_ratio:.2f}"
    if worst.alpha is not None:
        line += f"  α {worst.alpha:.2f}"
    if rows[0].rejected:
        line += "  a round rejected"
    return f"{line}  {worst.tokens} tokens  {seconds:.1f}s"


def expert_lines(rows: "list[LinearRow]") -> list[str]:
    """One line for the experts of a layer, in place of one for each stage."""
    from nearplane.run.stage import by_layer

    found = []
    for layer, experts in by_layer(rows).items():
        of = [row for expert in experts.values() for row in expert]
        errors = [(row.error, row.rtn_error or 0.0, row.tokens) for row in of if row.error is not None]
        line = f"{layer} {len(experts)} experts, "
        if errors:
            worst = max(errors)
            line += f"the worst error {worst[0]:.4f} (rtn {worst[1]:.4f}) after {worst[2]} tokens, "
            line += f"{min(row.tokens for row in of)} to {max(row.tokens for row in of)} tokens"
        else:
            line += f"weight error {max(row.weight_error for row in of):.4f}"
        found.append(f"{line}  {sum(row.seconds for row in of):.1f}s")
    return found
