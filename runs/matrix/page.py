"""docs/engines.md, and the list of what was run that verdicts read, made of the rows."""

import json
import re
from pathlib import Path
from typing import Any

import transformers_types
from matrix.cases import LLAMA, MLX, ONNX, OPENVINO, TRANSFORMERS, VLLM
from matrix.rows import described_of

ROOT = Path(__file__).resolve().parents[2]
PAGE, HEAD = ROOT / "docs" / "engines.md", ROOT / "runs" / "engines" / "page.md"
COLUMNS = (VLLM, TRANSFORMERS, LLAMA, MLX, ONNX, OPENVINO)


def ran(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """List, by engine, the kinds of weights that were run, with the version; a refusal counts as run.

    Where the products of no row of a kind were the engine's own, the version says so.
    """
    found: dict[str, dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: "reference" not in row.get("arithmetic", "")):  # the engine's own come last
        reference = (
            " (its loader, with the products of a reference)" if "reference" in row.get("arithmetic", "") else ""
        )
        for kind in described_of(row).kinds:
            if row["outcome"] != "refused" or kind not in found.get(row["engine"], {}):
                found.setdefault(row["engine"], {})[kind] = row["version"] + reference
    return {engine: dict(sorted(kinds.items())) for engine, kinds in sorted(found.items())}


def cell(row: dict[str, Any] | None) -> str:
    """Write a cell of the table."""
    if row is None:
        return "not run here"
    if row["outcome"] == "refused":
        return "refused: " + re.sub(r"\s+", " ", row["reason"]).replace("|", "/")[:110]
    if row["outcome"] == "garbage":
        return "loads, and computes something else"
    parts = [f"ran: log-probabilities differ by {row['mean']:.1g}", _tokens(row.get("greedy"))]
    parts += ["products by a reference"] if "reference" in row["arithmetic"] else []
    wide = f"; by {row['widened']:.1g} with its weights in float32" if "widened" in row else ""
    return ", ".join(parts) + wide


def _tokens(greedy: dict[str, Any] | None) -> str:
    """Tell how many of the tokens that an engine chose are nearplane's."""
    if greedy is None:
        return "first tokens equal"  # an earlier run, which compared no more
    ties = greedy["ties"]
    told = f"{greedy['equal']} of {greedy['tokens']} tokens equal"
    return f"{told}, {ties} tie{'s' if ties > 1 else ''}" if ties else told


def page(rows: list[dict[str, Any]]) -> str:
    """Write docs/engines.md."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["engine"]] = row
    columns = [engine for engine in COLUMNS if any(engine in some for some in found.values())]
    versions = {
        engine: sorted({row["version"] for row in rows if row["engine"] == engine and row["version"]})
        for engine in columns
    }
    heads = [f"{engine}: {', '.join(versions[engine])}" for engine in columns]
    lines = [*HEAD.read_text().rstrip().splitlines(), "", "<!-- engines -->"]
    lines += [f"| model | format | weights | {' | '.join(heads)} |", "|---" * (3 + len(columns)) + "|"]
    for case, some in found.items():
        model, format, grid = case.split(" | ")
        kind = next(iter(some.values()))["kind"]
        cells = [cell(some.get(engine)) for engine in columns]
        lines.append(f"| {model} ({kind}) | {format} | {grid} | {' | '.join(cells)} |")
    stored = [json.loads(line) for line in (ROOT / "runs" / "transformers_types.jsonl").read_text().splitlines()]
    lines += ["", "## Model types in plain transformers", "", transformers_types.table(stored)]
    return "\n".join(lines).rstrip() + "\n<!-- engines -->\n"
