"""The report page: one self-contained HTML file, made of ``report.json`` alone. No network, readable without JavaScript.

Decides what stands where; words and geometry come from the other files of this folder. Every text is escaped by the
template engine.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearplane.core.errors import NearplaneError
from nearplane.formats.store import PAGE
from nearplane.page import charts, compare, course, quality
from nearplane.page.facts import Run, facts, listing, mapping, number, text
from nearplane.page.words import many

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "template"
# What a report can make the page's code raise, if it holds what no version has written.
DAMAGED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)


def page(report: Any, *, original: Mapping[str, Any] | None = None, where: str = "the report") -> str:
    """Return the page of one run.

    Args:
        report: the content of ``report.json``, or ``Report.as_dict()``.
        original: what is known of the original model's folder, as ``original_facts`` gives it.
        where: what to call the report in an error.

    Raises:
        NearplaneError: no report of a run, or jinja2 is missing.
    """
    run = facts(report, where)
    with _whole(where):
        made = _template().render(title=f"{run.title}: report", run=run, **_sections(run, original))
    return _encodable(made)


def comparison(reports: Sequence[Any], names: Sequence[str], original: Mapping[str, Any] | None = None) -> str:
    """Return the page that compares several runs; the first is what others are compared with.

    Args:
        reports: two or more, as ``page`` takes them.
        names: what to call each in an error.
        original: as for ``page``.

    Raises:
        NearplaneError: one is no report of a run, or jinja2 is missing.
    """
    runs = [facts(report, name) for report, name in zip(reports, names, strict=True)]
    with _whole(", ".join(names)):
        found = compare.compared(runs, number((original or {}).get("bytes")))
        made = _template().render(title=f"{len(runs)} runs compared", runs=runs, found=found, original=original)
    return _encodable(made)


def page_or_reason(report: Any) -> tuple[str | None, str]:
    """Return the page of a run that ends, or why there is none: a checkpoint is never lost for its page.

    Returns:
        The page, and an empty text; or None, and a sentence without its full stop.
    """
    try:
        return page(report), ""
    except NearplaneError as error:
        return None, f"{PAGE} was not written: {error}"


def _encodable(made: str) -> str:
    """Return a page that UTF-8 can hold: JSON can write half a character."""
    return made.encode("utf-8", "replace").decode()


@contextmanager
def _whole(where: str) -> Iterator[None]:
    """Raise NearplaneError for what facts let through and no version writes."""
    try:
        yield
    except DAMAGED as error:
        raise NearplaneError(
            f"{where} holds what no report of this version has ({type(error).__name__}: {error}); is it damaged?"
        ) from error


@cache
def _template() -> "Template":
    """Return the template; jinja2 is imported where a page is made."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise NearplaneError(
            "the report page needs jinja2, which cannot be imported: pip install jinja2, then nearplane report OUT."
        ) from error
    loader = FileSystemLoader(TEMPLATES, encoding="utf-8")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"css": _file("page.css"), "js": _file("page.js"), "many": many}
    return made.get_template("page.html")


def _file(name: str) -> str:
    return (TEMPLATES / name).read_text("utf-8")


def _sections(run: Run, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the template needs of one run."""
    bad = quality.worst(run)
    marked, says = {one.linear.name for one in bad}, partial(quality.says, run)
    scale = charts.error_scale(value for linear in run.linears if (value := run.value(linear)) is not None)
    ratios = charts.Scale(charts.RATIOS)
    maps = charts.heat_maps(run, run.value, scale, says, marked)
    beside = charts.heat_maps(run, lambda linear: linear.ratio, ratios, says, marked) if run.measured else []
    dense, more = course.dense(run)
    return {
        "grid": quality.grid_words(run),
        "out": shlex.quote(run.out or "OUT"),
        "model": shlex.quote(run.model),
        "tiles": quality.tiles(run),
        "verdict": quality.verdict(run),
        "measured": quality.measured_by(run),
        "behind": charts.behind(run),
        "maps": [heat for heat in maps if heat.cells],
        "ratios": [heat for heat in beside if heat.cells],
        "scale": scale,
        "ratio_scale": ratios,
        "worst": bad,
        "caution": quality.caution(run),
        "rows": [quality.figures(linear) for linear in run.linears],
        "phases": course.phases(run),
        "total": course.total_time(run),
        "memory": course.memory(run),
        "happened": course.happened(run),
        "notes": course.notes(run),
        "dense": dense,
        "more_dense": more,
        "engines": course.engines(run),
        "repeat": course.repeat(run),
        "settings": course.settings(run),
        "commands": course.commands(run),
        "not_kept": [text(name) for name in listing(mapping(run.raw.get("config")).get("not_kept"))],
        "original": original,
    }
