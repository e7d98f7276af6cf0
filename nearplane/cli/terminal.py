"""What a run says while it works: the head, one line per stage that a person can judge, the summary."""

from collections.abc import Iterable
from typing import Any

from nearplane.machine.progress import CONSOLE, bar
from nearplane.models.discover import Block, Stage
from nearplane.run.events import BlockDone, Event, StageDone
from nearplane.run.measure import LinearRow
from nearplane.run.report import Report
from nearplane.run.stage import by_layer, is_expert

# The middle 80% of linears of SmolLM2-135M under GPTQ, group 64, min-max (runs/usual_error.py): what "usual" means.
USUAL: dict[int | str, tuple[float, float]] = {
    2: (0.014, 0.095),
    3: (0.0019, 0.014),
    4: (0.00036, 0.003),
    8: (1.3e-6, 1e-5),
}


def announce(report: Report, blocks: list[Block], done: int = 0, *, resume: bool = False) -> None:
    """Say what is about to happen, and what "error" means. ``resume``: whether to go on was asked for."""
    settings, data = report.settings, report.data
    method, grid = dict(settings["method"]), settings["grid"]
    say = CONSOLE.print
    say(f"{report.model}: {sum(len(b.sites) for b in blocks)} linears in {len(blocks)} blocks -> {report.out}")
    say(" ".join(["method", method.pop("name"), *(f"{k}={v}" for k, v in method.items())]))
    say(f"grid bits={grid['bits']} group_size={grid['group_size']} sym={grid['sym']} fit={grid['fit']}")
    tokens, turned = settings.get("activations"), settings.get("rotate")
    if tokens is not None:
        say(
            f"activations bits={tokens['bits']} sym={tokens['sym']} clip={tokens['clip']:g}; each code is stored as an int8"
        )
    if turned is not None:
        say(f"rotate {','.join(turned['kinds'])} seed={turned['seed']}")
    for some in settings.get("override", ()):
        say(" ".join(["override", repr(some["pattern"]), *(f"{k}={v}" for k, v in some.items() if k != "pattern")]))
    for pattern in settings.get("ignore", ()):
        say(f"ignore {pattern!r}: left dense")
    for line in choice_table(settings):
        say(line)
    amount = f": {data['windows']} windows of {data['seqlen']} tokens" if "seqlen" in data else ""
    say(f"calibration {data['origin']}{amount}")
    if "windows" in data:
        say("error: ‖(Q-W)X̂‖²/‖WX̂‖², the worst linear of the stage; (rtn): every weight rounded to nearest instead")
        usual = USUAL.get(grid["bits"]) if "choices" not in settings else None
        if usual is not None:
            say(f"usual at {grid['bits']} bits: {usual[0]:g} to {usual[1]:g}; near or above rtn something is wrong,")
            say("unless α > 0: such a linear leaves its weight on purpose, to repair the drift of what came before")
    else:
        say("weight error: ‖Q-W‖²/‖W‖², the worst linear of the stage")
    for event in report.events:
        say(f"note: {event}")
    if done:
        say(f"{done} of {len(blocks)} blocks are done; the hidden states run through them again")
    elif resume:
        say(f"{report.out} holds no finished block to go on after: a new run begins")


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


def stage_line(block: Block, stage: Stage, rows: list[LinearRow], mixed: bool = False) -> str:
    """One line a person can judge; ``mixed``: linears differ in their grids, so the line says which this stage has."""
    leaves = [site.name.removeprefix(block.name + ".").split(".") for site in stage]
    # BERT calls three of a block's linears "dense"
    names = "+".join(".".join(leaf[-2:] if leaf[-1] == "dense" else leaf[-1:]) for leaf in leaves)
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


def summary(report: Report) -> str:
    """What came of it."""
    totals, size = report.totals, report.bytes
    lines = [
        f"{report.out}: {totals['linears']} linears at {totals['bits_per_weight']:.2f} bits per weight",
        f"size {size['before'] / 1e6:.1f} MB -> {size['after'] / 1e6:.1f} MB ({size['dense'] / 1e6:.1f} MB of it dense)",
    ]
    if totals["mean_error"] is not None:
        lines.append(f"mean error {totals['mean_error']:.4f} (rtn {totals['mean_rtn_error']:.4f}), over all linears")
    if totals["rounds"] or totals["rejected_rounds"]:
        lines.append(
            f"refinement rounds: {totals['rounds']} kept, {totals['rejected_rounds']} rejected on held-out tokens"
        )
    lines.append("time " + ", ".join(f"{phase} {seconds:.1f}s" for phase, seconds in report.seconds.items()))
    lines += [f"note: {event}" for event in report.events]
    return "\n".join(lines)


def expert_lines(rows: Iterable[LinearRow]) -> list[str]:
    """One line for the experts of a layer, in place of one for each stage."""
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


class Terminal:
    """Tells a person at a terminal what a run does."""

    def __init__(self) -> None:
        self.display = bar(True)
        self.mixed = False
        self.rows: list[LinearRow] = []

    def begin(self, report: Report, blocks: list[Block], done: int, *, resume: bool, mixed: bool) -> None:
        """Say what is about to happen."""
        announce(report, blocks, done, resume=resume)
        self.mixed = mixed
        self.display.start()
        self.task = self.display.add_task("quantize", total=sum(len(block.stages) for block in blocks))

    def take(self, event: Event) -> None:
        """Say what was done."""
        if isinstance(event, StageDone):
            self.display.advance(self.task)
            if not is_expert(event.stage):
                self.display.console.print(stage_line(event.block, event.stage, event.rows, self.mixed))
            self.rows += event.rows
        elif isinstance(event, BlockDone):
            if event.replayed:
                self.display.advance(self.task, len(event.block.stages))
            for line in expert_lines(self.rows):
                self.display.console.print(line)
            self.rows = []

    def end(self) -> None:
        """Stop drawing."""
        self.display.stop()
