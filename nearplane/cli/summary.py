"""What came of a run, in lines for a person: the summary, its notes with advice, and how numbers are written."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearplane.run.report import Report

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
    ("the probe forward did not reach it", "were not reached by the probe forward and stay dense", NOTHING),
)  # fmt: skip


def grouped(events: list[str]) -> list[str]:
    """Notes with what to do about them; equal ones about several linears become one."""
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
        what = "layers" if "experts" in many else "linears"
        first = f"{len(names)} {what} {many} ({names[0]}, ...)"
        said.append(f"{first if len(names) > 1 else same[0]}: {advice}")
    return said


def summary(report: "Report", *, verbose: bool = False) -> str:
    """What came of a run, and what to do next.

    Args:
        report: of a finished run.
        verbose: every note by itself.
    """
    totals, size = report.totals, report.bytes
    lines = [
        f"{report.out}: {totals['linears']} linears at {totals['bits_per_weight']:.2f} bits per weight",
        f"size {size['before'] / 1e6:.1f} MB -> {size['after'] / 1e6:.1f} MB ({size['dense'] / 1e6:.1f} MB of it dense)",
    ]
    found = check_lines(report.check) if report.check is not None else []
    lines += found
    if totals["mean_error"] is not None and not found:
        usual = usual_of(report)
        range_ = f"; usual at {report.settings['grid']['bits']} bits {usual[0]:g} to {usual[1]:g}" if usual else ""
        errors = f"mean error of linears {totals['mean_error']:.4f} (rtn {totals['mean_rtn_error']:.4f})"
        lines.append(errors + range_)
    if totals["rounds"] or totals["rejected_rounds"]:
        rounds = f"refinement rounds: {totals['rounds']} kept, {totals['rejected_rounds']} rejected on held-out tokens"
        lines.append(rounds)
    if report.tuning is not None and report.tuning["kept"]:
        lines.append(tuning_line(report.tuning))
    phases = ", ".join(f"{phase} {spent:.1f}s" for phase, spent in report.seconds.items() if verbose or spent >= 0.05)
    lines.append(f"time {clock(totals['seconds'])}{f': {phases}' if phases else ''}")
    lines += [f"note: {note}" for note in (report.events if verbose else grouped(report.events))]
    lines.append(f"next: nearplane eval {report.out} --reference {report.model}")
    return "\n".join(lines)


def check_lines(check: Mapping[str, Any]) -> list[str]:
    """Lines on the whole model against its original: the headline, and what its answers lost."""
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
    """One line on a tuning that helped."""
    before, after = record["before"], record["after"]
    change = "; ".join(
        f"{before[name]:.4g} -> {after[name]:.4g}" + (f" ({name})" if len(before) > 1 else "") for name in before
    )
    return f"tuned: held-out KL {change}, by step {record['kept']} of {record['steps']}; codes and sizes are the same"


def usual_of(report: "Report") -> tuple[float, float] | None:
    """The usual errors at a run's bits, where all linears have them and data is read."""
    settings = report.settings
    one = "choices" not in settings and not settings.get("override") and "windows" in report.data
    return USUAL.get(settings["grid"]["bits"]) if one else None


def number_of(value: float) -> str:
    """An error in few characters: 0.0119, 0.00036, 2.3e-06."""
    if value >= 100:
        return f"{value:.3g}"
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.5f}" if value >= 0.0001 else f"{value:.1e}"


def rough(value: float) -> str:
    """An error in two figures: 0.012."""
    return f"{value:.3g}" if value >= 10 else f"{value:#.2g}"


def clock(seconds: float) -> str:
    """A duration as 0:07, 2:04 or 1:02:04."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
