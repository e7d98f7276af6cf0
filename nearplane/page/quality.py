"""Is it good, and where is it bad: the first two sections of the page, in words that a run's figures allow.

Decides which figures stand on top, what is said of them, which linears are the worst, and which option would help them.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nearplane.formats.fused import fused
from nearplane.page.facts import Linear, Run, mapping, text, whole, width
from nearplane.page.words import against_usual, number_of, percent, size_of, times, usual_of

# How many of the worst linears are listed.
WORST = 10
# The next width that is worth its bytes, by width; 8 bits have none.
WIDER: Mapping[int | str, int] = {"ternary": 4, 2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8}
# Formats of one width alone.
FIXED = ("awq",)
# Methods that leave a weight on purpose, to answer what earlier layers changed.
MOVES = ("NearPlane", "GPTAQ", "ResComp")
EXPERTS = re.compile(r"(.*\bexperts)\.\d+\.")


class Tile(NamedTuple):
    """One figure on top of the page."""

    label: str
    value: str
    note: str = ""


class Bad(NamedTuple):
    """One of the worst linears."""

    linear: Linear
    option: str
    """The words to add to the command."""
    reach: int
    """How many linears the option reaches."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation was measured by."""

    amount: int
    what: str
    origin: str

    def __str__(self) -> str:
        return f"{self.amount:,} {self.what} of {self.origin}"


def tiles(run: Run) -> list[Tile]:
    """Return the figures that a person asks for first."""
    found = []
    kl, top1 = run.checked("kl"), run.checked("top1")
    if kl is not None:
        found.append(Tile("KL to the original", f"{kl:.3g}", "nats a token; 0 is the same model"))
    if top1 is not None:
        found.append(Tile("same next token", f"{100 * top1:.1f}%", "of all predictions"))
    before, after = run.checked("reference_perplexity"), run.checked("perplexity")
    if after is not None:
        change = f"from {before:.4g} ({100 * (after / before - 1):+.1f}%)" if before else ""
        found.append(Tile("perplexity", f"{after:.4g}", change))
    error, rtn = run.checked("error"), _rounding(run)
    if kl is None and error is not None:
        found.append(
            Tile("error behind the last block", number_of(error), f"rounding: {number_of(rtn)}" if rtn else "")
        )
    elif kl is None and run.mean_error is not None:
        found.append(Tile("mean error of linears", number_of(run.mean_error)))
    size = run.bytes
    if size.get("after"):
        share = f"from {size_of(size['before'])}" if size.get("before") else ""
        found.append(Tile("size", size_of(size["after"]), share))
    if run.bits_per_weight:
        found.append(Tile("bits per weight", f"{run.bits_per_weight:.2f}", "of quantized weights, with scales"))
    return found


def verdict(run: Run) -> list[str]:
    """Say whether a run is good, in sentences."""
    said = _answers(run)
    error, rtn, block = run.checked("error"), _rounding(run), text((run.check or {}).get("block"))
    if error is not None:
        line = f"Behind {block or 'the last block'}, the hidden state moved by {percent(error)} of its energy."
        if rtn and error > 0:
            better = rtn >= error
            line += f" Rounding every weight to nearest would have moved it by {percent(rtn)}, "
            line += f"{times(rtn / error)} as much." if better else "which is less."
        said.append(line)
    said += _linears(run)
    return said


def _rounding(run: Run) -> float | None:
    """Return the error of rounding to nearest; None for a run that did only that, and would be compared with itself."""
    changed = mapping(run.settings.get("scale")) or mapping(run.settings.get("rotate"))
    return run.checked("rtn_error") if run.method != "RTN" or changed else None


def measured_by(run: Run) -> Measured | None:
    """Return what the check was measured by; None where there was none."""
    check = run.check or {}
    amount = next(((name, count) for name in ("tokens", "windows") if (count := whole(check.get(name)))), None)
    if amount is None:
        return None
    where = "held-out" if check.get("held_out") else "calibration"
    return Measured(amount[1], f"{where} {amount[0]}", text(check.get("origin")) or "a text")


def _answers(run: Run) -> list[str]:
    """Say what the model's answers lost, or why that is not known."""
    check = run.check or {}
    kl, top1 = run.checked("kl"), run.checked("top1")
    if kl is None:
        if "unanswered" in check:
            return [f"There is no KL to the original: {text(check['unanswered'])}."]
        if "check" not in run.raw:
            return ["What the model's answers lost is not recorded: the version that wrote this report did not check."]
        return ["What the model's answers lost was not measured in this run."]
    said = f"On average a token's prediction differs from the original's by {kl:.3g} nats (KL divergence)."
    if top1 is not None:
        said += f" At {100 * (1 - top1):.1f}% of positions another token is now the likeliest."
    if check.get("judged_tuning"):
        said += " These windows also judged the tuning, which flatters them a little."
    return [said]


def _linears(run: Run) -> list[str]:
    """Say how the errors of linears compare: with rounding to nearest, and with what is usual."""
    mean, rtn = run.mean_error, run.mean_rtn_error
    if mean is None:
        if not run.linears:
            return ["No linear was quantized."]
        return [f"{run.method} read no data, so that only the change of the weights themselves is known."]
    line = f"A linear loses {number_of(mean)} of its output's energy on average"
    line += f", and would lose {number_of(rtn)} if it were rounded to nearest on the same scales." if rtn else "."
    said = [line]
    usual = usual_of(run.settings, run.data)
    if usual is not None and run.bits is not None:
        low, high = usual
        line = f"That is {against_usual(mean, usual, run.bits)}: of SmolLM2-135M's linears under GPTQ in groups of 64, "
        said[-1] += f" {line}the middle 80% lose {low:g} to {high:g}."
    return said


def caution(run: Run) -> str:
    """Say what a single linear's error does not mean for methods that move weights on purpose; empty for others."""
    if run.method not in MOVES or not run.measured or mapping(run.settings.get("method")).get("target") is False:
        return ""
    return (
        f"{run.method} moves weights on purpose, to answer what earlier layers changed. So a single linear's error near or "
        "above that of rounding is no fault by itself; what counts is the model as a whole."
    )


def worst(run: Run) -> list[Bad]:
    """Return the worst linears with what would help each."""
    known = [linear for linear in run.linears if run.value(linear)]
    ranked = sorted(known, key=lambda linear: run.value(linear) or 0.0, reverse=True)[:WORST]
    groups = fused([linear.name for linear in run.linears])
    return [Bad(linear, *option(run, linear, groups)) for linear in ranked]


def option(run: Run, linear: Linear, groups: list[list[str]]) -> tuple[str, int]:
    """Return the option that would help a linear, and how many linears it reaches.

    Linears that engines fuse into one get it together, since a run with only one of them would be refused.

    Args:
        run: gives format and widths.
        linear: to be helped.
        groups: linears that engines fuse.
    """
    names, grown = {linear.name}, True
    while grown:  # an expert's siblings are fused with all experts of the layer
        more = {name for group in groups if names & set(group) for name in group} | names
        names, grown = more, len(more) > len(names)
    pattern = _pattern(linear.name, names)
    if run.format == "gguf":
        return _written("--override", f"{pattern}=gguf_type=Q8_0"), len(names)
    bits = WIDER.get(linear.bits) if linear.bits is not None and run.format not in FIXED else None
    if bits is None:
        return _written("--ignore", pattern), len(names)
    return _written("--override", f"{pattern}=bits={bits}"), len(names)


def _pattern(name: str, names: set[str]) -> str:
    """Return a regular expression that finds these names and no others."""
    experts = EXPERTS.match(name)
    if experts and all(each.startswith(f"{experts[1]}.") for each in names):
        return f"^{re.escape(experts[1])}\\."
    parent = name.rpartition(".")[0]
    leaves = sorted(each.rpartition(".")[2] for each in names)
    leaf = re.escape(leaves[0]) if len(leaves) == 1 else f"({'|'.join(map(re.escape, leaves))})"
    return f"^{re.escape(parent)}\\.{leaf}$" if parent else f"^{leaf}$"


def _written(flag: str, value: str) -> str:
    return f"{flag} {shlex.quote(value)}"


def says(run: Run, linear: Linear) -> str:
    """Return a linear with its figures, as a cell of the heat map says them."""
    value = run.value(linear)
    said = linear.name
    if value is not None:
        said += f": {'error' if run.measured else 'weight error'} {number_of(value)}"
    if linear.ratio is not None:
        said += f", {linear.ratio:.2f} of rounding to nearest"
    return said + (f", {width(linear.bits)}" if linear.bits is not None else "")


def grid_words(run: Run) -> str:
    """Return the run in one line: method, grid, format."""
    budget = run.settings.get("budget")
    chosen = f"a budget of {budget:g} bits" if isinstance(budget, int | float) else run.grid
    rotated = mapping(run.settings.get("rotate")).get("kinds")
    turned = f"rotated ({', '.join(map(str, rotated))})" if isinstance(rotated, list) else ""
    tokens = mapping(run.settings.get("activations")).get("bits")
    rounded = f"activations of {tokens} bits" if tokens else ""
    return " · ".join(part for part in (run.method, chosen, turned, rounded, run.format) if part)


def figures(linear: Linear) -> list[Any]:
    """Return the columns of the table of linears."""
    shape = "" if linear.shape is None else f"{linear.shape[0]} × {linear.shape[1]}"
    numbers = [linear.error, linear.rtn_error, linear.ratio, linear.weight_error]
    shown = ["" if value is None else number_of(value) for value in numbers]
    return [linear.name, shape, "" if linear.bits is None else linear.bits, *shown, " ".join(flags(linear))]


def flags(linear: Linear) -> list[str]:
    """Return what happened to a linear, in a word each."""
    found = ["rounded"] if linear.rounded else []
    if linear.damp_raised and linear.damp_percent is not None:
        found.append(f"damping {linear.damp_percent:g}")
    return [*found, f"{linear.dropped:,} tokens dropped"] if linear.dropped else found
