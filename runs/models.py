"""Which model types work: every type of the installed transformers, as a tiny random model, from folder to 8 bits and back.

    python runs/models.py [TYPE ...] [--rows rows.jsonl] [--table runs/models.md]

Each type in a process of its own, with a limit of time. Rows already in the file are not measured again; the
table is made of the file. A type passes if its towers are found, its checkpoint loads packed, and what that model makes of
the median token is within a tenth of the original's.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
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
from nearplane.models.towers import linears_besides

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

SECONDS = 60
LARGEST = 30_000_000  # parameters; a type whose sizes go by other names stays large


def config_of(kind: str) -> Any:
    """The smallest configuration that the usual names of sizes give."""
    default, usual = transformers.AutoConfig.for_model(kind), {**tiny.SIZES, **tiny.EXPERTS}
    sizes = {k: v for k, v in usual.items() if hasattr(default, k) and k not in tiny.REFUSED.get(kind, ())}
    sizes |= _heads(default)
    for name, part in vars(default).items():
        if isinstance(part, transformers.PreTrainedConfig):
            inner = {k: v for k, v in usual.items() if hasattr(part, k)}
            sizes[name] = {"model_type": part.model_type, **inner, **_heads(part)}
    own = {**tiny.EXTRA.get(kind, {}), **tiny.MIXTURES.get(kind, {})}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **own})
    if kind in tiny.CLASSES:
        config.architectures = [tiny.CLASSES[kind]]
    return config


def _heads(part: Any) -> dict[str, Any]:
    """Sizes that follow from those of a head: of latent attention, of positions in three dimensions."""
    found = dict(tiny.LATENT) if hasattr(part, "kv_lora_rank") else {}
    rope = getattr(part, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        found["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}  # half of a head of 16
    return found


def features(model: Any) -> dict[str, torch.Tensor]:
    """What the model makes of the probe."""
    batch = classes.probe(model, "")
    with torch.no_grad():
        if classes.is_causal(model):
            return {"logits": model(**batch, **classes.options(model)).logits}
        return final_states(model, batch)


def measure(kind: str, folder: Path, note: Callable[[dict[str, Any]], None]) -> None:
    """One row, noted as it grows: ``step`` is what is tried next."""
    row: dict[str, Any] = {"type": kind}

    def begin(step: str) -> None:
        row["step"] = step
        note(row)

    begin("configuration")
    config = config_of(kind)
    begin("class")
    pair = hasattr(config, "text_config") and (hasattr(config, "vision_config") or hasattr(config, "audio_config"))
    if (
        pair
        and type(config) not in classes.CAUSAL._model_mapping
        and type(config) in transformers.AutoModel._model_mapping
    ):
        config.architectures = [
            transformers.AutoModel._model_mapping[type(config)].__name__
        ]  # both towers, not one's head
    build = classes.builder(config)
    if build is None:
        raise NearplaneError("no model class of text, images or speech")
    begin("model")
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in build(config_of(kind)).parameters())
    if size > LARGEST:
        raise NearplaneError(f"{size / 1e6:.0f} million parameters at the sizes asked for")
    model = tiny.with_experts(build(config).float().eval())
    row["class"] = type(model).__name__
    tiny.save(model, folder / "model")
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
    wanted, found = features(model), features(nearplane.load(folder / "out"))
    row["error"] = max(_apart(found[name], value) for name, value in wanted.items())
    begin("passes" if row["error"] < 0.1 else "round trip")


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error of the median token: of a mixture, a single one may be routed to other experts."""
    tokens = (found - wanted).flatten(0, -2).norm(dim=-1) / wanted.flatten(0, -2).norm(dim=-1)
    return float(tokens.median())


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
        row: dict[str, Any] = json.loads(path.read_text())
        if row["step"] != "passes" and "error" not in row:
            lines = said.read_text(errors="replace").strip().splitlines()
            last = (lines or ["ended without a word"])[-1].replace(folder, "").replace(sys.prefix, "")[:160]
            row["reason"] = f"over {SECONDS} s of one CPU, or killed" if os.WIFSIGNALED(status) else last
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """The page."""
    good, bad = [r for r in rows if r["step"] == "passes"], [r for r in rows if r["step"] != "passes"]
    lines = [
        "# Model types",
        "",
        f"Generated by `python runs/models.py` with transformers {transformers.__version__}, from {len(rows)} model types as",
        f"tiny random models. {len(good)} of them pass the round trip at 8 bits. To pass, the packed checkpoint's features or",
        "logits must be within a tenth of the original's (the relative error of the median token).",
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
    at = Counter(row["step"] for row in bad)
    tiny_fails = at["configuration"] + at["model"]
    lines += [
        "",
        "## What does not work, and why",
        "",
        f"{len(bad)} types do not pass. {at['class']} of them have no class that reads text, images or sound by itself. Most of",
        f"those are parts of a model that has a row of its own. transformers makes no tiny model of {tiny_fails} types at the",
        f"script's sizes. In {at['discovery']} types the probe fails or finds no blocks.",
        f"{at['round trip']} types do not come back.",
        "",
        "| model type | fails at | reason |",
        "|---|---|---|",
    ]
    for r in bad:
        reason = r.get("reason") or f"features differ by {r.get('error', float('nan')):.3g}"
        reason = " ".join(
            reason.replace("|", "/").replace(sys.prefix, "").removeprefix("nearplane.core.errors.").split()
        )
        lines.append(f"| {r['type']} | {r['step']} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("rows.jsonl"))
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    for kind in args.types or sorted(CONFIG_MAPPING_NAMES):
        if kind not in {row["type"] for row in rows}:
            rows.append(apart(kind))
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(kind, rows[-1]["step"], rows[-1].get("reason", ""), flush=True)
    if args.table is not None:
        args.table.write_text(table(sorted(rows, key=lambda row: str(row["type"]))))


if __name__ == "__main__":
    main()
