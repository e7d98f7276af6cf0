"""What came of a run, in lines for the terminal. The words are those of the report page (``page/words.py``)."""

from typing import TYPE_CHECKING

from nearplane.page.words import check_lines, clock, grouped, tuning_line, usual_of

if TYPE_CHECKING:
    from nearplane.run.report import Report


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
        usual = usual_of(report.settings, report.data)
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
