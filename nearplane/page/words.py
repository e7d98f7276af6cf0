"""What came of a run, in plain words: the terminal's summary and the report page say the same, and say it here.

Decides what is usual, what notes mean and what to do about them, and how numbers are written. Reads plain dictionaries.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The middle 80% of linears of SmolLM2-135M under GPTQ, group 64, min-max, embedded text v1 (runs/usual_error.py): "usual".
USUAL: dict[int | str, tuple[float, float]] = {
    2: (0.015, 0.11),
    3: (0.0023, 0.017),
    4: (0.00049, 0.0037),
    8: (1.7e-6, 1.3e-5),
}
# What a note about one linear says, what many of them say together, and what to do.
NOTHING = "nothing to do"
MORE = "give more --nsamples"
SCALED = "have scaled input channels"
# Kinds of what was not scaled that a line names.
MOST_LEFT = 3
NOTES = (
    ("serves its objective worse", "serve their objective worse than rounding to nearest",
     f"{MORE}, or a larger --damp-percent"),
    ("loss .* Babai's bound", "lose more than Babai's bound, because codes were clipped", NOTHING),
    ("damping raised", "needed more damping than was set", f"{NOTHING}; more --nsamples make it rarer"),
    ("extreme activations", "have extreme activations; moments, losses and bounds are scaled", NOTHING),
    (r"\d+ calibration tokens left out", "left out calibration tokens, NaN or Inf",
     "look for broken text, or for overflow in the model's dtype"),
    ("too few tokens to hold any out", "had too few tokens to hold any out, so none could judge", MORE),
    (r"\d+ of \d+ experts were reached by no token", "have experts that no token reached, which are rounded to nearest",
     f"{MORE}, or --all-experts"),
    ("was reached by no token", "were reached by no token, or by zeros only, and are rounded to nearest",
     f"{MORE}, or look whether the model uses them at all"),
    (r"\d+ of \d+ experts were shown fewer", "have experts that few tokens reached, damped by count",
     f"{MORE}, or --all-experts"),
    ("scaled: ", SCALED, ""),
    ("not scaled: ", "have no scaled input channels", ""),
    ("the probe forward did not reach it", "were not reached by the probe forward and stay dense", NOTHING),
)  # fmt: skip


def grouped(events: Iterable[str]) -> list[str]:
    """Return notes with what to do about them; equal ones about several linears become one."""
    together: dict[tuple[str, str], list[str]] = {}
    said: list[str] = []
    for event in events:
        name, _, text = event.partition(": ")
        known = next(((many, advice) for start, many, advice in NOTES if re.match(start, text)), None)
        if known is None or not re.fullmatch(r"[\w.]+", name):
            said.append(event)
        else:
            together.setdefault(known, []).append(event)
    for (many, advice), same in together.items():
        names = [event.partition(": ")[0] for event in same]
        what = "layers" if "experts" in many else "blocks" if "channels" in many else "linears"
        first = f"{len(names)} {what} {many} ({names[0]}, ...)"
        if len(names) == 1 and "not scaled: " in same[0]:  # which says what and why
            said.append(same[0])
        else:
            said.append(f"{first if len(names) > 1 else same[0]}: {advice or unscaled(same)}")
    return said


def unscaled(events: Sequence[str]) -> str:
    """Say what of some blocks was left out of the scaling, and why.

    Args:
        events: a note about each block, as the scaling writes them (``run/scale.py``).
    """
    found: dict[tuple[str, str], int] = {}
    for event in events:
        for names, why in re.findall(r"not scaled: (.+?) \((.+?)\)(?=; not scaled: |$)", event):
            found[names, why] = found.get((names, why), 0) + 1
    if not found:
        return "nothing was left out"
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    shown = [f"{names} ({why}) in {many(count, 'block')}" for (names, why), count in ranked[:MOST_LEFT]]
    more = len(ranked) - MOST_LEFT
    return f"left out: {'; '.join(shown)}" + (f"; and {more} more, listed in report.json" if more > 0 else "")


def check_lines(check: Mapping[str, Any]) -> list[str]:
    """Return lines on the whole model against its original: the headline, and what its answers lost."""
    where = "held-out" if check["held_out"] else "calibration"
    lines = []
    if check.get("error") is not None:
        rtn = "" if check.get("rtn_error") is None else f" (rtn {check['rtn_error']:.4f})"
        lines.append(f"error {check['error']:.4f}{rtn} of the hidden state behind {check['block']}, on {where} windows")
    if "kl" not in check:
        return [*lines, f"no KL to the original: {check['unanswered']}"] if "unanswered" in check else lines
    said = f"KL to the original {check['kl']:.4g} nats a token, top-1 {100 * check['top1']:.1f}%"
    if "perplexity" in check and "reference_perplexity" in check:
        said += f", perplexity {check['reference_perplexity']:.4g} -> {check['perplexity']:.4g}"
    chose = ", which judged the tuning" if check.get("judged_tuning") else ""
    return [*lines, f"{said}, on {check['tokens']} {where} tokens of {check['origin']}{chose}"]


def tuning_line(record: Mapping[str, Any]) -> str:
    """Return one line on a tuning that helped."""
    before, after = record["before"], record["after"]
    change = "; ".join(
        f"{before[name]:.4g} -> {after[name]:.4g}" + (f" ({name})" if len(before) > 1 else "") for name in before
    )
    return f"tuned: held-out KL {change}, by step {record['kept']} of {record['steps']}; codes and sizes are the same"


def usual_of(settings: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the usual errors at a run's bits, where all linears have them and data is read.

    Args:
        settings: of the run, as ``report.json`` has them.
        data: what is recorded of the calibration data.
    """
    one = "choices" not in settings and not settings.get("override") and "windows" in data
    grid = settings.get("grid")
    bits = grid.get("bits") if isinstance(grid, Mapping) else None
    return USUAL.get(bits) if one and isinstance(bits, int | str) else None


def against_usual(error: float, usual: tuple[float, float], bits: int | str) -> str:
    """Say how an error compares with what is usual at so many bits."""
    low, high = usual
    word = "less than usual" if error < low else "usual" if error <= high else "more than usual"
    return f"{word} for {bits} bits"


def times(value: float) -> str:
    """Return a factor in words a person says: 6.6 times, or 1.0 times."""
    return f"{value:.0f} times" if value >= 10 else f"{value:.1f} times"


def percent(share: float) -> str:
    """Return a share in percent: 0.041%, 8.8%, 130%."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 10 else f"{value:.2g}%"


def many(count: int, one: str, more: str = "") -> str:
    """Return a count with its noun: 1 linear, 12 linears."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def number_of(value: float) -> str:
    """Return an error in few characters: 0.0119, 0.00036, 2.3e-06."""
    if value >= 100:
        return f"{value:.3g}"
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.5f}" if value >= 0.0001 else f"{value:.1e}"


def rough(value: float) -> str:
    """Return an error in two figures: 0.012."""
    return f"{value:.3g}" if value >= 10 else f"{value:#.2g}"


def size_of(count: float) -> str:
    """Return bytes as people write them: 640 kB, 100.4 MB, 14.2 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count >= 100 * unit else f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 2:04 or 1:02:04."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


# What a report's ``config`` holds beside settings; settings that take several words, and those that are given once a value.
BESIDE, SEVERAL, REPEATED = ("nearplane", "model", "not_kept"), ("widths",), ("override", "ignore")


def options_in(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of a report's ``config`` as words of the command line."""
    words: list[str] = []
    for name, value in config.items():
        flag = "--" + str(name).replace("_", "-")
        if name in BESIDE or value is None or value == []:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif not isinstance(value, list):
            words += [flag, str(value)]
        elif name in REPEATED:
            words += [f"{flag}={each}" for each in value]
        elif name == "dataset":
            words += [flag, ",".join(_source(*each) for each in value)]
        else:
            words += [flag, *map(str, value)] if name in SEVERAL else [flag, ",".join(map(str, value))]
    return words


def _source(name: str, weight: float) -> str:
    """Return a source of a mix; quotes enclose a name that a mix would read otherwise."""
    return (f'"{name}"' if set(name) & set(":,") else name) + f":{weight:g}"
