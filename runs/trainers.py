"""Training against solving: auto-round, NearPlane, `--tune`, and the tuning's tokens given to the solver instead.

    python runs/trainers.py --calibration wikitext2-valid.txt --wikitext wikitext2-test.raw.txt --shakespeare tinyshakespeare.txt
        [--model demo] [--blocks 3] [--bits 3 2] [--seeds 0 1 2] [--rows ROW ...] [--envs ~/.cache/nearplane-peers] [--table]

The first ``--blocks`` blocks are quantized and the others stay dense; 0: all of them, for which auto-round is left out. Every row
reads the same calibration windows. A tuning also reads fresh windows, and the row ``more windows`` gives the solver these very
windows beside the others. Its loss is that of the whole model, but only numbers of the quantized blocks move; ``every norm`` is
`--tune` as it comes, which moves the dense blocks' norms as well.

auto-round runs in an environment of its own, with its defaults. Its codes, scales and zero points are put into the original
model as float32 weights. KL to the original and perplexity: the first WINDOWS windows of three texts, as in
calibration_text.py; ``--texts embedded`` is the held-out part of the embedded text. CPU seconds: from opening the model to what
is stored, without the import of libraries.
One line of OUT.jsonl per finished cell; an interrupted study goes on where it was. ``--table`` prints what is there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from calibration_text import common, domains, measured
from cells import Found, Kept, spread
from quality import Remembered
from safetensors.torch import load_file

from nearplane import Calibration, load, quantize
from nearplane.data.fresh import rows_of, set_aside
from nearplane.data.samples import gather
from nearplane.models.discover import discover
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer, open_source
from nearplane.run import student

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"
sys.path.append(str(PEERS))
ROWS = ("auto-round", "NearPlane", "NearPlane, tuned", "NearPlane, more windows")
TEXTS = ("wikitext", "shakespeare", "python")
MORE = ("NearPlane, tuned, every norm", "auto-round, symmetric", "NearPlane, symmetric")


def blocks_of(model: str, count: int) -> tuple[list[str], list[str]]:
    """The names of the blocks that are quantized, and of the others."""
    names = [block.name for block in discover(open_source(model))]
    return (names[:count], names[count:]) if count else (names, [])


def auto_round(draw: Calibration, bits: int, sym: bool, args: argparse.Namespace) -> tuple[Any, Found]:
    """auto-round's 200 iterations; the model with its weights, and what its run says."""
    from peers import environment

    python = environment("autoround", args.envs)
    tokens = draw.load(open_source(args.model).tokenizer)
    with tempfile.TemporaryDirectory(prefix="nearplane-") as folder:
        windows, out = Path(folder) / "windows.json", Path(folder) / "out"
        windows.write_text(json.dumps(tokens.ids.tolist()))
        command = [str(python), str(PEERS / "autoround_run.py"), str(locate(args.model)), str(windows), str(out)]
        command += [str(bits), str(args.group_size), str(args.iters), "--blocks", str(args.blocks)]
        threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        before = cpu_seconds()
        done = subprocess.run(
            command + ["--sym"] * sym, check=False, capture_output=True, text=True, env=os.environ | threads
        )
        whole = cpu_seconds() - before
        if done.returncode:
            raise SystemExit(f"auto-round ended with {done.returncode}:\n{done.stderr[-3000:]}")
        laps = json.loads(re.findall(r"^laps (.*)$", done.stdout, re.MULTILINE)[-1])
        model, solved = load(args.model), load_file(out / "linears.safetensors")
    for name, weight in solved.items():
        model.get_parameter(name).data = weight
    told = re.findall(r"loss iter[^\x1b\r\n]*", done.stdout + done.stderr)
    versions = subprocess.run([str(python), "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.split()
    spent = {"cpu_seconds": round(sum(cpu for _, cpu in laps.values()), 1), "whole_process": round(whole, 1)}
    return model, {**spent, "linears": len(solved), "loss": told, "versions": versions, "sha256": tokens.sha256}


VERSIONS = """
from importlib.metadata import version
print(*(f"{name}={version(name)}" for name in ("auto-round", "torch", "transformers")))
"""


def near_plane(draw: Calibration, args: argparse.Namespace, **settings: Any) -> tuple[Any, Found]:
    """A run of nearplane; the model, and what its report says."""
    _, dense = blocks_of(args.model, args.blocks)
    settings = {
        "group_size": args.group_size,
        "sym": False,
        "ignore": [rf"{re.escape(name)}\." for name in dense],
    } | settings
    with tempfile.TemporaryDirectory(prefix="nearplane-") as folder:
        before = cpu_seconds()
        report = quantize(args.model, Path(folder) / "out", calibration=draw, progress=False, **settings)
        spent = cpu_seconds() - before
        model = load(Path(folder) / "out", packed=False)
        size = sum(path.stat().st_size for path in (Path(folder) / "out").glob("*.safetensors"))
    found = {"cpu_seconds": round(spent, 1), "linears": len(report.linears), "bytes": size}
    found |= {name: report.data[name] for name in ("windows", "tokens", "sha256") if name in report.data}
    found["seconds"] = {phase: round(wall, 1) for phase, wall in report.seconds.items()}
    return model, found | ({"tuning": told(report.tuning)} if settings.get("tune") else {})


def told(tuning: Found) -> Found:
    """What a report says of a tuning, without the path of the text."""
    judged = {row["step"]: round(sum(row["kl"].values()) / len(row["kl"]), 5) for row in tuning["judged"]}
    return {"judged": judged, **{name: tuning[name] for name in ("kept", "windows", "moved")}}


def tuned(draw: Calibration, bits: int, args: argparse.Namespace) -> tuple[Any, Found]:
    """`--tune`, where nothing of a dense block moves."""
    quantized, _ = blocks_of(args.model, args.blocks)
    every = student.movable

    def inside(plan: Any) -> dict[str, str]:
        names = tuple(f"{name}." for name in quantized)
        return {name: disk for name, disk in every(plan).items() if not args.blocks or name.startswith(names)}

    with patch.object(student, "movable", inside):
        return near_plane(draw, args, bits=bits, tune=args.tune)


def more_windows(draw: Calibration, bits: int, args: argparse.Namespace) -> tuple[Any, Found]:
    """No tuning; the solver reads the windows that a tuning would read beside its own."""
    source = open_source(args.model)
    used, fresh = set_aside(source, draw, gather(source, draw), student.fresh_windows(args.tune, draw.seqlen))
    batches = [batch for batch in (used and used.arguments, fresh.more) if batch is not None]
    rows = [row.tolist() for batch in batches for row in rows_of(batch)]
    both = Calibration(rows, nsamples=len(rows), seqlen=draw.seqlen, seed=draw.seed)
    return near_plane(both, args, bits=bits)


def made(row: str, bits: int, draw: Calibration, args: argparse.Namespace) -> tuple[Any, Found]:
    """The model of a row."""
    kinds: dict[str, Callable[[], tuple[Any, Found]]] = {
        "auto-round": lambda: auto_round(draw, bits, False, args),
        "auto-round, symmetric": lambda: auto_round(draw, bits, True, args),
        "NearPlane": lambda: near_plane(draw, args, bits=bits),
        "NearPlane, tuned": lambda: tuned(draw, bits, args),
        "NearPlane, tuned, every norm": lambda: near_plane(draw, args, bits=bits, tune=args.tune),
        "NearPlane, more windows": lambda: more_windows(draw, bits, args),
        "NearPlane, symmetric": lambda: near_plane(draw, args, bits=bits, sym=True),
    }
    return kinds[row]()


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def table(kept: Kept, model: str) -> str:
    """Markdown: a row for each number of blocks, width and row; means over draws ± half their range."""
    cells = {tuple(key.split("|")): cell for key, cell in kept.cells.items() if key.startswith(f"{model}|")}
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["domains"]))
    head = ["blocks", "bits", "windows", "row", "draws", *(f"KL, {name}" for name in names), "mean KL", "CPU s"]
    lines = [
        "| " + " | ".join([*head, *(f"perplexity, {name}" for name in names)]) + " |",
        "|" + "---|" * (len(head) + len(names)),
    ]
    for kind in dict.fromkeys(key[1:5] for key in cells if len(key) == 6):
        draws = [cell for key, cell in cells.items() if key[1:5] == kind]
        kls = [[draw["domains"][name]["kl"] for draw in draws] for name in names]
        figures = [spread(found, 4) for found in [*kls, [sum(each) / len(each) for each in zip(*kls, strict=True)]]]
        figures.append(spread([draw["cpu_seconds"] for draw in draws], 0))
        figures += [spread([draw["domains"][name]["perplexity"] for draw in draws], 2) for name in names]
        lines.append("| " + " | ".join([*kind, str(len(draws)), *figures]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration")
    parser.add_argument("--wikitext")
    parser.add_argument("--shakespeare")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *MORE], default=list(ROWS))
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tune", type=int, default=16, help="steps of the tuned rows")
    parser.add_argument("--iters", type=int, default=200, help="of auto-round")
    parser.add_argument("--texts", nargs="+", choices=[*TEXTS, "embedded"], default=list(TEXTS), help="to judge by")
    parser.add_argument("--eval-seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="of each domain")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "nearplane-peers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/trainers")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    args.ignore = []
    torch.set_num_threads(args.threads)
    kept, name = Kept(Path(args.out + ".jsonl")), Path(args.model).name
    if args.table:
        print(table(kept, name))
        return
    tokenizer, original = load_tokenizer(locate(args.model)), Remembered(load(args.model))
    known = {**domains(args, tokenizer), "embedded": None}
    texts = {domain: text for domain, text in known.items() if domain in args.texts}
    if f"{name}|original" not in kept.cells:
        kept.keep(f"{name}|original", {"domains": measured(original, tokenizer, texts, args, None), **common(args)})
    for seed, bits, row in product(args.seeds, args.bits, args.rows):
        key = f"{name}|{args.blocks or 'all'}|{bits}|{args.nsamples}|{row}|{seed}"
        if key in kept.cells or (row.startswith("auto-round") and not args.blocks):
            continue
        model, found = made(row, bits, Calibration(args.calibration, args.nsamples, args.seqlen, seed), args)
        start = time.perf_counter()
        found["domains"] = measured(model, tokenizer, texts, args, original)
        kept.keep(key, found | common(args) | {"evaluation_seconds": round(time.perf_counter() - start, 1)})
        del model
    print(table(kept, name))


if __name__ == "__main__":
    main()
