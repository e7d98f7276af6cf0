"""What the report page tells of the original model: its size, and what of it stayed dense. Reads headers, no tensor.

Nothing is downloaded: a hub id must be in the local cache.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from nearplane.formats.store import Store
from nearplane.models.locate import locate
from nearplane.page.facts import Run, facts, listing, mapping, number, text
from nearplane.page.words import many, size_of

# Dense parameters with a row of their own.
LISTED = 8
# A share by which the size may differ from the one that the report has.
SAME_SIZE = 0.001


def original_facts(model: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Look up what the page says of the original.

    Args:
        model: a folder, ``demo``, or a hub id that is in the local cache, which may end in ``@revision``.
        reports: contents of ``report.json`` of the runs on the page.

    Raises:
        NearplaneError: no such model here, or its files cannot be read.
    """
    store = Store(locate(model, download=False))
    runs = [facts(report) for report in reports]
    kinds: Counter[str] = Counter()
    for name in store.names:
        kinds[str(store.dtype(name)).removeprefix("torch.")] += store.nbytes(name)
    return {
        "name": model,
        "bytes": store.total,
        "size": size_of(store.total),
        "tensors": f"{len(store.names):,}",
        "dtypes": ", ".join(f"{size_of(size)} {kind}" for kind, size in kinds.most_common()),
        "says": _doubt(store, runs),
        "rows": _rows(store, runs[0]) if len(runs) == 1 else [],
    }


def _doubt(store: Store, runs: Sequence[Run]) -> str:
    """Say whether this may be another model than the one that was quantized."""
    sizes = {size for run in runs if (size := run.bytes.get("before"))}
    other = [size for size in sizes if abs(size - store.total) > SAME_SIZE * store.total]
    if other:
        return f"The report names an original of {size_of(other[0])}: this may be another model or revision."
    return "That is the size that the report names." if sizes else ""


def _rows(store: Store, run: Run) -> list[tuple[str, str, str]]:
    """Return rows: a part of the model, its size in the original, and in the checkpoint."""
    held = {f"{linear.name}.weight" for linear in run.linears} & store.names
    before = sum(store.nbytes(name) for name in held)
    missing = [
        prod(linear.shape) for linear in run.linears if linear.shape and f"{linear.name}.weight" not in store.names
    ]
    about = ""
    if missing:  # stored fused or under other names: by count, at the size that most numbers have
        widths: Counter[int] = Counter()
        for name in store.names:
            widths[store.dtype(name).itemsize] += prod(store.shape(name))
        before, about = before + sum(missing) * widths.most_common(1)[0][0], "about "
    quantized, dense = run.bytes.get("quantized"), run.bytes.get("dense")
    shown = ["not recorded" if size is None else size_of(size) for size in (quantized, dense)]
    rows = [
        (many(len(run.linears), "quantized linear"), about + size_of(before), shown[0]),
        ("all that stays dense", about + size_of(max(0, store.total - before)), shown[1]),
    ]
    left = [row for row in map(mapping, listing(run.raw.get("dense"))) if text(row.get("name"))]
    left.sort(key=lambda row: -(number(row.get("bytes")) or 0))
    for row in left[:LISTED]:
        name, size = text(row["name"]), number(row.get("bytes"))
        was = size_of(store.nbytes(name)) if name in store.names else "under another name"
        rows.append((f"  {name}: {text(row.get('reason'))}", was, "not recorded" if size is None else size_of(size)))
    return rows
