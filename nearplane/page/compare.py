"""Several runs side by side: their figures, size against quality, and the errors of each linear.

Decides which figure of quality all runs can be compared by, and how the differences of linears are shown. Linears are the
same where their names are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nearplane.page.charts import Heat, Plot, Scale, difference_scale, heat_maps, scatter
from nearplane.page.course import total_time
from nearplane.page.facts import Linear, Run, width
from nearplane.page.quality import caution, grid_words, measured_by
from nearplane.page.words import listed, number_of, size_of

# Figures of quality, the one that says most first: a name, words, and whether windows must be the same.
QUALITIES = (
    ("kl", "KL to the original, nats a token"), ("perplexity", "perplexity"),
    ("error", "error behind the last block"), ("mean_error", "mean error of linears"),
)  # fmt: skip


class Row(NamedTuple):
    """A linear in all runs."""

    name: str
    cells: list[str]
    """Of each run, bits and error."""
    change: str
    """The last run's error over the first one's."""


@dataclass(frozen=True)
class Difference:
    """A run's errors over the first run's."""

    label: str
    maps: list[Heat]


@dataclass(frozen=True)
class Comparison:
    """What the page shows of several runs."""

    labels: list[str]
    table: list[tuple[str, list[str]]]
    notes: list[str]
    quality: str
    plot: Plot | None
    differences: list[Difference]
    scale: Scale
    rows: list[Row]


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run: its folder's last part, or more of it where these are the same."""
    outs = [run.out.rstrip("/\\") or run.title for run in runs]
    short = [out.replace("\\", "/").rpartition("/")[2] for out in outs]
    names = short if len(set(short)) == len(short) else outs
    return [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names, 1)]


def compared(runs: Sequence[Run], original: float | None = None) -> Comparison:
    """Compare runs; the first is what others are compared with.

    Args:
        runs: two or more.
        original: bytes of the original model, where they are known.
    """
    labels, scale = labels_of(runs), difference_scale()
    figures = {name: [figure(run, name) for run in runs] for name, _ in QUALITIES}
    name, words = next(
        ((name, words) for name, words in QUALITIES if sum(v is not None for v in figures[name]) >= 2), ("", "")
    )
    points = [
        (size, value, label)
        for run, value, label in zip(runs, figures.get(name, []), labels, strict=False)
        if value is not None and (size := run.bytes.get("after"))
    ]
    ideal = {"kl": 0.0, "perplexity": runs[0].checked("reference_perplexity")}.get(name)
    if points and original is not None and ideal is not None:
        points.append((original, ideal, "original"))
    pairs = list(zip(runs, labels, strict=True))
    differences = [Difference(label, _maps(run, runs[0], scale)) for run, label in pairs[1:]]
    return Comparison(
        labels,
        _table(runs),
        _notes(runs, labels),
        words,
        scatter(points, words) if len(points) > 1 else None,
        [some for some in differences if any(heat.cells for heat in some.maps)],
        scale,
        _rows(runs),
    )


def figure(run: Run, name: str) -> float | None:
    """Return a figure of quality."""
    return run.mean_error if name == "mean_error" else run.checked(name)


def change(run: Run, linear: Linear, base: Run, first: dict[str, Linear]) -> float | None:
    """Return a linear's error over that in the first run; None where the two cannot be compared."""
    before = first.get(linear.name)
    if before is None or run.measured != base.measured:
        return None
    was, now = base.value(before), run.value(linear)
    return now / was if was and now is not None else None


def _maps(run: Run, base: Run, scale: Scale) -> list[Heat]:
    """Return the heat maps of a run's errors over those of another run."""
    first = {linear.name: linear for linear in base.linears}

    def value(linear: Linear) -> float | None:
        return change(run, linear, base, first)

    def says(linear: Linear) -> str:
        before, found, now = first.get(linear.name), value(linear), run.value(linear)
        was = None if before is None else base.value(before)
        if found is None or was is None or now is None:
            return linear.name
        return f"{linear.name}: error {number_of(now)}, was {number_of(was)}: {found:.2f} of it"

    return heat_maps(run, value, scale, says, set())


def _table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return a row for each figure, with a cell for each run."""

    def cell(value: float | None, form: str = "{:.4g}") -> str:
        return "not recorded" if value is None else form.format(value)

    rows = [
        ("model", [run.model for run in runs]),
        ("how", [grid_words(run) for run in runs]),
        ("bits per weight", [cell(run.bits_per_weight, "{:.2f}") for run in runs]),
        ("size", [size_of(run.bytes["after"]) if run.bytes.get("after") else "not recorded" for run in runs]),
        ("KL to the original", [cell(run.checked("kl")) for run in runs]),
        ("same next token", [cell(run.checked("top1"), "{:.1%}") for run in runs]),
        ("perplexity", [cell(run.checked("perplexity")) for run in runs]),
        ("perplexity of the original", [cell(run.checked("reference_perplexity")) for run in runs]),
        ("error behind the last block", [cell(run.checked("error"), "{:.4f}") for run in runs]),
        ("mean error of linears", [number_of(v) if (v := run.mean_error) is not None else "not recorded" for run in runs]),
        ("measured on", [str(measured_by(run) or "not recorded") for run in runs]),
        ("time", [total_time(run) or "not recorded" for run in runs]),
    ]  # fmt: skip
    return [(name, cells) for name, cells in rows if set(cells) != {"not recorded"}]


def _notes(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Say what makes figures of these runs no comparison."""
    said = []
    models = list(dict.fromkeys(run.model for run in runs))
    if len(models) > 1:
        said.append(
            f"These runs are of several models ({listed(models)}): their figures are no comparison of settings."
        )
    texts = {str(measured_by(run)) for run in runs if measured_by(run) is not None}
    if len(texts) > 1:
        said.append("The runs were not checked on the same tokens, so that KL and perplexity compare only roughly.")
    if any(map(caution, runs)) and len({run.method for run in runs}) > 1:
        said.append(
            "Errors of linears rank no methods: some move weights on purpose. KL and the error behind the last block do."
        )
    if len({run.measured for run in runs if run.linears}) > 1:
        said.append("Some runs read no data: their linears have no error on it, and no difference is shown.")
    return said


def _rows(runs: Sequence[Run]) -> list[Row]:
    """Return every linear of any run."""
    held = [{linear.name: linear for linear in run.linears} for run in runs]
    found = []
    for name in dict.fromkeys(name for some in held for name in some):
        cells = []
        for run, some in zip(runs, held, strict=True):
            linear = some.get(name)
            value = None if linear is None else run.value(linear)
            bits = "" if linear is None else width(linear.bits)
            words = "dense" if linear is None else "not recorded" if value is None else number_of(value)
            cells.append(", ".join(word for word in (words, bits) if word))
        last = held[-1].get(name)
        ratio = None if last is None else change(runs[-1], last, runs[0], held[0])
        found.append(Row(name, cells, "" if ratio is None else f"{ratio:.2f}"))
    return found
