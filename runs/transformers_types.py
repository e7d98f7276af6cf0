"""Which quantized model types transformers loads: every type that ``runs/models.py`` passes, tried as a tiny checkpoint.

    python runs/transformers_types.py [TYPE ...] [--rows runs/transformers_types.jsonl]

``runs/engines.py`` puts the rows into docs/engines.md.

Each type in a process of its own. It is quantized to 4 bits, and loaded by transformers with the package compressed-tensors
as it is, and with ``dequantize=True``. What the loaded model computes is compared with nearplane's dense model.
"Said" is the verdict of ``nearplane verify --engine transformers``; a row where it differs from what happened is marked.
"""

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.engines import described, verdict
from nearplane.core.errors import NearplaneError
from nearplane.formats.read import open_checkpoint
from nearplane.models import inputs as classes
from nearplane.models.locate import BAD_CONFIG
from nearplane.models.source import open_skeleton

SECONDS = 120
# What transformers, or a model's own code, raises where it does not load or run.
RAISED = (*classes.FORWARD_ERRORS, *BAD_CONFIG, OSError, ImportError, NearplaneError)
PLAIN, DENSE, NO = "as it is", "dequantize=True", "no"


def types(table: Path) -> list[str]:
    """The types of the first table in ``runs/models.md``: those that pass its round trip."""
    lines = table.read_text().partition("## What does not work")[0].splitlines()
    return [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:]


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """One row: how transformers loads a checkpoint of this type, and what was said of it before."""
    from models import features, saved, tiny_models  # here: runs/engines.py wants the table alone

    found = tiny_models.tiny_model(kind, folder)
    if found.step != "runs":
        return {"type": kind, "skipped": f"no tiny model runs ({found.step})"}
    model = saved(found, folder)
    try:
        nearplane.quantize(folder / "model", folder / "out", method=RTN(), grid=Grid(4, -1), progress=False, force=True)
    except NearplaneError as error:
        return {"type": kind, "skipped": str(error).replace(str(folder), "")[:120]}
    said = verdict("transformers", described(open_checkpoint(folder / "out"), open_skeleton(folder / "out")[1]))
    row: dict[str, Any] = {"type": kind, "class": type(model).__name__}
    row["said"] = NO if said.refusals else DENSE if any(DENSE in caveat for caveat in said.caveats) else PLAIN
    wanted = features(nearplane.load(folder / "out", packed=False), folder / "model")
    ways: dict[str, dict[str, Any]] = {
        PLAIN: {},
        DENSE: {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)},
    }
    for way, options in ways.items():
        row[way] = tried(type(model), folder / "out", options, wanted).replace(str(folder), "")
    row["works"] = next((way for way in ways if row[way] == "equal"), NO)
    return row


def tried(kind: Any, folder: Path, options: dict[str, Any], wanted: dict[str, torch.Tensor]) -> str:
    """Load by transformers; "equal", or what was wrong."""
    from models import features

    try:
        loaded = kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
        found = features(loaded, folder.parent / "model")
    except RAISED as error:  # the finding
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    errors = [float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()]
    return "equal" if max(errors) < 1e-3 else f"other numbers, apart by {max(errors):.2g}"


def apart(kind: str) -> dict[str, Any]:
    """``measure`` in a process of its own, ended after a while."""
    with tempfile.TemporaryDirectory() as folder:
        path, child = Path(folder) / "row.json", os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            row: dict[str, Any] = {"type": kind, "skipped": "over the limit of time"}
            try:
                row = measure(kind, Path(folder))
            except RAISED as error:  # a tiny model that cannot be built or run is runs/models.py's subject
                reason = (str(error).strip().splitlines() or [""])[0].replace(folder, "")[:120]
                row = {"type": kind, "skipped": f"{type(error).__name__}: {reason}"}
            finally:
                path.write_text(json.dumps(row))
                os._exit(0)
        os.waitpid(child, 0)
        found: dict[str, Any] = (
            json.loads(path.read_text()) if path.exists() else {"type": kind, "skipped": "ended early"}
        )
        return found


def table(rows: list[dict[str, Any]]) -> str:
    """Write the section of docs/engines.md."""
    done = [row for row in rows if "skipped" not in row]
    count = {way: sum(row["works"] == way for row in done) for way in (PLAIN, DENSE, NO)}
    lines = [
        f"{len(done)} model types were quantized as tiny random models to 4 bits, one scale per row, as compressed-tensors.",
        f"Plain transformers loads {count[PLAIN]} of them as they are, {count[DENSE]} more with",
        f"`quantization_config=CompressedTensorsConfig(dequantize=True)`, and {count[NO]} not. To load means that the model",
        "computes what nearplane's dense model does, within a thousandth.",
        "",
        "| model type | class | loads | as it is | with dequantize=True |",
        "|---|---|---|---|---|",
    ]
    for row in sorted((row for row in done if row["works"] != PLAIN), key=lambda row: str(row["type"])):
        cells = [row["type"], row["class"], row["works"], row[PLAIN], row[DENSE]]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    rest = [str(row["type"]) for row in done if row["works"] == PLAIN]
    lines += ["", f"As they are: {', '.join(sorted(rest))}.", ""]
    skipped = [row for row in rows if "skipped" in row]
    if skipped:
        named = "; ".join(f"{row['type']} ({row['skipped']})".replace("|", "/") for row in skipped)
        lines += [f"Not tried: {named}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    for kind in args.types or types(Path(__file__).parent / "models.md"):
        if kind not in {row["type"] for row in rows}:
            rows.append(apart(kind))
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(kind, rows[-1].get("works", rows[-1].get("skipped")), flush=True)


if __name__ == "__main__":
    main()
