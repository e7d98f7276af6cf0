"""Which model types work: every type of the installed transformers, as a tiny random model, from folder to 8 bits and back.

    python runs/models.py [TYPE ...] [--rows rows.jsonl] [--table runs/models.md]

Each type in a process of its own, with a limit of time. Rows already in the file are not measured again; the table, and the
counts in docs/models.md, are made of the file. A type passes if its towers are found, its checkpoint loads packed, and what
that model makes of the median token is within a tenth of the original's. Sizes are found by ``tiny_models.py``. Types with
timm inside need timm (``PYTHONPATH=.venv/timm``).
"""

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import nearplane
from nearplane import RTN, Grid
from nearplane.core.errors import NearplaneError
from nearplane.evaluation.features import final_states
from nearplane.models import inputs as classes
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.models.towers import is_list, linears_besides

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import tiny
import tiny_models
from model_causes import CAUSES, OTHER_INPUTS

SECONDS = 60
DOCS = Path(__file__).parents[1] / "docs" / "models.md"  # where counts are written, too
# Why a type does not pass: what follows its number, and the heading of its table.
SORTS = {
    "part": ("are parts of a model that has a row of its own, and do not run by themselves.", "Parts of other models"),
    "inputs": (
        "read inputs on which nearplane does not calibrate: videos, time series, boxes, prompts, codes of sound.",
        "Other inputs",
    ),
    "no linears": ("have no linears inside blocks: convolutions, for the most part.", "No linears in blocks"),
    "fails": ("fail.", "Failures"),
}
ASLEEP = 1e-9  # the largest number of an output that cannot be compared


def features(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What the model makes of the probe."""
    batch = classes.probe(model, folder)
    torch.manual_seed(0)  # a model may draw which patches it masks
    with torch.no_grad():
        if classes.is_causal(model):
            return {"logits": model(**batch, **classes.options(model)).logits}
        try:
            return dict(_tensors("", final_states(model, batch)))
        except (NearplaneError, AttributeError):  # maps of features or depth, waves of sound
            torch.manual_seed(0)
            output = model(**batch, **classes.options(model))
            return dict(_tensors("", dict(output) if isinstance(output, dict) else output))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of floats in an output, however deep."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
        yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from _tensors(f"{name}.{key}", inner)


def saved(found: Any, folder: Path) -> Any:
    """The model of a ``tiny_models.Tiny``, written to ``folder/model`` beside what was made for it."""
    torch.manual_seed(0)
    model = tiny.with_experts(found.build(found.config).float().eval())
    for file in folder.glob("*.json"):
        (folder / "model").mkdir(exist_ok=True)
        file.rename(folder / "model" / file.name)
    tiny.save(_awake(model, folder / "model") if found.step == "runs" else model, folder / "model")
    return model


def measure(kind: str, folder: Path, note: Callable[[dict[str, Any]], None]) -> None:
    """One row, noted as it grows: ``step`` is what is tried next."""
    row: dict[str, Any] = {"type": kind}

    def begin(step: str) -> None:
        row["step"] = step
        note(row)

    begin("configuration")
    found = tiny_models.tiny_model(kind, folder)
    row["sizing"] = found.sizing
    begin(found.step if found.step != "runs" else "model")
    if found.build is None:
        raise found.error or NearplaneError("transformers has no class of its own for this configuration")
    if found.step == "model" and found.error is not None:
        raise found.error
    model = saved(found, folder)
    row["class"], row["lists"] = type(model).__name__, sum(is_list(module) for module in model.modules())
    begin("discovery")
    source = open_source(folder / "model")
    blocks = discover(source)
    row["towers"] = {tower: sum(b.tower == tower for b in blocks) for tower in dict.fromkeys(b.tower for b in blocks)}
    row["stages"] = [[len(s) for s in next(b for b in blocks if b.tower == t).stages] for t in row["towers"]]
    sites = {site.name for block in blocks for site in block.sites}
    row["linears"], row["unreached"] = len(sites), sum(len(b.unreached) for b in blocks)
    row["dense"] = len(linears_besides(source.model, sites)) - row["unreached"]
    begin("round trip")
    # Conv1D's weights lie the other way round: one format says so.
    format = "gptq" if any(site.transposed for block in blocks for site in block.sites) else "compressed-tensors"
    settings: dict[str, Any] = {
        "method": RTN(),
        "grid": Grid(8, 32),
        "format": format,
        "progress": False,
        "force": True,
    }
    nearplane.quantize(folder / "model", folder / "out", **settings)
    wanted, packed = features(model, folder / "model"), features(nearplane.load(folder / "out"), folder / "model")
    row["error"] = max(_apart(packed[name], value) for name, value in wanted.items())
    begin("passes" if row["error"] < 0.1 else "round trip")


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error of the median token that is not zero: of a mixture, a single one may be routed to other experts."""
    size = wanted.flatten(0, -2).norm(dim=-1)
    tokens = (found - wanted).flatten(0, -2).norm(dim=-1)[size > 0] / size[size > 0]
    return float(tokens.median())


def _awake(model: Any, folder: Path) -> Any:
    """The model; with larger weights where its batch norms, which no training has set, make nothing of the probe."""
    if all(x.abs().max() > ASLEEP for x in features(model, folder).values()):
        return model
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() > 1 and not isinstance(module, torch.nn.Embedding):
                weight.normal_(std=1.5 / weight[0].numel() ** 0.5)
    return model


def write(path: Path, row: dict[str, Any]) -> None:
    """A row so far."""
    path.write_text(json.dumps(row))


def apart(kind: str) -> dict[str, Any]:
    """``measure`` in a process of its own, ended after a while; what ended it, if it did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        path, said, child = Path(folder) / "row.json", Path(folder) / "said", os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            try:
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
                os.dup2(2, 1)
                measure(kind, Path(folder), partial(write, path))
            finally:
                if sys.exc_info()[0]:
                    traceback.print_exc()
                os._exit(0)
        _, status = os.waitpid(child, 0)
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"type": kind, "step": "configuration"}
        if row["step"] != "passes" and "error" not in row:
            lines = said.read_text(errors="replace").strip().splitlines()
            last = (lines or ["ended without a word"])[-1].replace(folder, "").replace(sys.prefix, "")[:240]
            row["reason"] = f"over {SECONDS} s of one CPU, or killed" if os.WIFSIGNALED(status) else last
        return row


def sort_of(row: dict[str, Any], wholes: dict[str, list[str]]) -> tuple[str, str]:
    """Why a type does not pass: one of ``SORTS``, and the cause in words."""
    kind, said = row["type"], row.get("reason") or f"features differ by {row.get('error', float('nan')):.3g}"
    said = said.replace("|", "/").replace(sys.prefix, "")
    said = " ".join(
        re.sub(r"^nearplane[.\w]*\.(\w+: )", r"\1", said).replace("/model: ", "").replace("/model ", "").split()
    )
    inputs = "part" if kind in wholes else "inputs"
    unmade = re.search(r"reads ([\w, ]+); nearplane makes", said)
    found = ("fails", f"{row['step']}: {said}")
    if kind in CAUSES:
        found = CAUSES[kind]
    elif kind in OTHER_INPUTS:
        found = (inputs, OTHER_INPUTS[kind])
    elif row["step"] == "class":
        found = ("part", "transformers exports no class of its own")
    elif unmade:
        found = (inputs, f"reads {unmade[1]}")
    elif "reads videos" in said:
        found = (inputs, "reads videos")
    elif "no list of" in said and not row.get("lists"):
        found = ("no linears", "no list of modules with linears inside")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The page."""
    wholes = tiny_models.wholes()
    good, bad = [r for r in rows if r["step"] == "passes"], [r for r in rows if r["step"] != "passes"]
    lines = [
        "# Model types",
        "",
        f"Generated by `python runs/models.py` with transformers {transformers.__version__}, from {len(rows)} model types as",
        "tiny random models:",
        "",
        *counts(rows),
        "",
        "To pass, the packed checkpoint's features, logits or other outputs must be within a tenth of the original's",
        "(the relative error of the median token).",
        "",
        "Stages: how many linears read one tensor, for each stage of a tower's first block. Dense: linears outside the blocks",
        "(embeddings, poolers, heads, projections between towers). Unreached: linears of a block that the probe did not call.",
        "",
        "| model type | class | towers (blocks) | stages | linears | dense | unreached | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in good:
        towers = ", ".join(f"{name} ({count})" for name, count in r["towers"].items())
        stages = "; ".join(" ".join(map(str, stage)) for stage in r["stages"])
        cells = [r["type"], r["class"], towers, stages, r["linears"], r["dense"], r["unreached"], f"{r['error']:.4f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    sorted_rows = [(row, *sort_of(row, wholes)) for row in bad]
    lines += ["", "## What does not pass, and why"]
    for sort, (_, heading) in SORTS.items():
        lines += [
            "",
            f"### {heading}",
            "",
            "| model type | part of | cause |" if sort == "part" else "| model type | cause |",
        ]
        lines.append("|---|---|---|" if sort == "part" else "|---|---|")
        for row, found, cause in sorted_rows:
            if found == sort:
                whole = [", ".join(wholes.get(row["type"], ["-"]))] if sort == "part" else []
                lines.append("| " + " | ".join([row["type"], *whole, cause]) + " |")
    return "\n".join(lines) + "\n"


def counts(rows: list[dict[str, Any]]) -> list[str]:
    """How many types pass, and how many do not for each sort of cause, as a list."""
    wholes = tiny_models.wholes()
    good = [row for row in rows if row["step"] == "passes"]
    parts = sum(row["type"] in wholes for row in good)
    count = Counter(sort_of(row, wholes)[0] for row in rows if row["step"] != "passes")
    first = f"- {len(good)} of {len(rows)} types pass; {parts} of these name a part of another type."
    return [first, *(f"- {count[sort]} {sentence}" for sort, (sentence, _) in SORTS.items())]


def declare_operators() -> None:
    """Let timm be imported beside a torchvision of another build, as ``tests/conftest.py`` does."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("rows.jsonl"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    declare_operators()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:  # imports once what every process would import
        measure("llama", Path(folder), lambda row: None)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    for kind in args.types or sorted(CONFIG_MAPPING_NAMES):
        if kind not in {row["type"] for row in rows}:
            rows.append(apart(kind))
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(kind, rows[-1]["step"], rows[-1].get("reason", ""), flush=True)
    if args.table is not None:
        args.table.write_text(table(sorted(rows, key=lambda row: str(row["type"]))))
        begin, end = "<!-- counts: begin -->\n", "<!-- counts: end -->"
        before, _, rest = DOCS.read_text().partition(begin)
        DOCS.write_text(before + begin + "\n".join(counts(rows)) + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
