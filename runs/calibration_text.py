"""What a model is calibrated on: KL to the original on four domains, for the embedded text, the model's own samples, and mixes.

    python runs/calibration_text.py --wikitext wikitext2-test.raw.txt --shakespeare tinyshakespeare.txt
        [--model demo] [--datasets embedded self embedded:1,self:1] [--nsamples 32] [--seeds 0 1 2] [--bits 3 2]
        [--rows NearPlane GPTAQ ...] [--ignore REGEX] [--table]

Domains: both texts; sources of the standard library of the Python that runs (``MODULES``); and the dialogs of the embedded
text's held-out part, written by the model's chat template. Each text is cut into windows of EVAL_SEQLEN tokens, of which
the first WINDOWS are read. The dialogs have the author of the embedded text that is calibrated on, and are few. A row is a
method with its grid (``ROWS``), in groups of 64; without ``--rows``, NearPlane on an asymmetric one. ``--ignore`` leaves blocks
dense, where time is short. One line of OUT.jsonl per finished cell; an interrupted study goes on where it was. ``--table``
prints the table of what is there, and runs nothing.
"""

import argparse
import platform
import re
import sysconfig
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import Found, Kept, spread
from quality import Remembered, commit

from nearplane import AWQ, GPTAQ, GPTQ, RTN, Calibration, Grid, Method, NearPlane, ResComp, load, quantize
from nearplane.data.text import read_text
from nearplane.evaluation.perplexity import evaluate
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer

# A method, and what is said of its grid beside bits and group size; and of the scales of channels.
ROWS: dict[str, tuple[Method, Found]] = {
    "NearPlane": (NearPlane(), {"sym": False}),
    "NearPlane, symmetric": (NearPlane(), {"sym": True}),
    "NearPlane, symmetric, scales above 0": (NearPlane(), {"sym": True, "negative_scales": False}),
    "GPTAQ": (GPTAQ(), {"sym": False, "fit": "mse"}),
    "ResComp": (ResComp(), {"sym": False, "fit": "mse"}),
    "RTN": (RTN(), {"sym": False}),
    "AWQ": (AWQ(), {"sym": False}),
    "AWQ's scales, then RTN": (RTN(), {"sym": False, "scale": "awq"}),
    "AWQ's clipping alone": (AWQ(), {"sym": False, "scale": "none"}),
    "GPTQ": (GPTQ(), {"sym": False}),
    "AWQ, then GPTQ": (GPTQ(), {"sym": False, "scale": "awq"}),
    "AWQ, then NearPlane": (NearPlane(), {"sym": False, "scale": "awq"}),
}
DATASETS = ("embedded", "self", "embedded:1,self:1")
MODULES = ("argparse", "heapq", "textwrap", "statistics", "tarfile", "sched")
ROLES = {"User": "user", "Assistant": "assistant"}


def dialogs() -> list[list[dict[str, str]]]:
    """The conversations of the held-out part: paragraphs that begin with a role, one after the other."""
    found: list[list[dict[str, str]]] = [[]]
    for paragraph in read_text(None, "evaluation").content.split("\n\n"):
        role, _, content = paragraph.partition(": ")
        if role not in ROLES:
            found += [[]] if found[-1] else []
            continue
        if ROLES[role] == "user" and found[-1] and found[-1][-1]["role"] == "user":
            found.append([])
        if found[-1] or ROLES[role] == "user":
            found[-1].append({"role": ROLES[role], "content": content})
    return [messages for messages in found if len(messages) > 1]


def domains(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The texts, by name, as ``evaluate`` takes them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    found: dict[str, Any] = {"wikitext": args.wikitext, "shakespeare": args.shakespeare, "python": [sources]}
    if getattr(tokenizer, "chat_template", None):
        found["chat"] = [{"messages": messages} for messages in dialogs()]
    return {name: text for name, text in found.items() if text is not None}


def measured(
    model: Any, tokenizer: Any, texts: dict[str, Any], args: argparse.Namespace, original: Remembered | None
) -> Found:
    """Perplexity of every domain, and KL where there is an original."""
    found: Found = {}
    for name, text in texts.items():
        settings: dict[str, Any] = {"seqlen": args.eval_seqlen, "windows": args.windows, "reference": original}
        result = evaluate(model, tokenizer, dataset=text, **settings)
        found[name] = {
            "perplexity": result.perplexity,
            "kl": result.kl,
            "tokens": result.tokens,
            "sha256": result.sha256,
        }
    return found


def cell(row: str, bits: int, draw: Calibration, original: Remembered, args: argparse.Namespace) -> Found:
    """Quantize with one draw of one dataset and measure all domains."""
    method, more = ROWS[row]
    more = {**more}
    settings: dict[str, Any] = {
        "method": method,
        "ignore": args.ignore,
        "scale": more.pop("scale", "auto"),
        "check": False,
    }
    settings["grid"] = Grid(bits=bits, group_size=args.group_size, **more)
    with tempfile.TemporaryDirectory(prefix="nearplane-") as folder:
        start = time.perf_counter()
        report = quantize(args.model, Path(folder) / "out", calibration=draw, progress=False, **settings)
        seconds = time.perf_counter() - start
        tokenizer = load_tokenizer(Path(folder) / "out")
        found = measured(load(Path(folder) / "out", packed=False), tokenizer, domains(args, tokenizer), args, original)
    data = {name: report.data[name] for name in ("tokens", "sha256", "sources", "recipe") if name in report.data}
    return {"domains": found, "data": data, "seconds": round(seconds, 1), "spent": report.seconds, **common(args)}


def common(args: argparse.Namespace) -> Found:
    """What a cell was run with, beside its name."""
    return {"threads": args.threads, "python": platform.python_version(), "ignore": args.ignore, "commit": commit()}


def table(kept: Kept, model: str) -> str:
    """Markdown: a row for each method, width, dataset and number of windows; KL by domain, mean over draws ± half their range."""
    cells = {tuple(key.split("|")): cell for key, cell in kept.cells.items() if key.startswith(f"{model}|")}
    cells = {key: cell for key, cell in cells.items() if len(key) == 6}
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["domains"]))
    lines = ["| row | bits | calibrated on | windows | tokens | draws | " + " | ".join(names) + " | mean KL |"]
    lines.append("|" + "---|" * (7 + len(names)))
    for row, bits, dataset, windows in dict.fromkeys(key[1:5] for key in cells):
        draws = [cell for key, cell in cells.items() if key[1:5] == (row, bits, dataset, windows)]
        kls = [[draw["domains"][name]["kl"] for draw in draws] for name in names]
        means = [sum(each) / len(each) for each in zip(*kls, strict=True)]
        figures = " | ".join(spread(found, 3) for found in [*kls, means])
        about = f"{row} | {bits} | {dataset} | {windows} | {draws[0]['data']['tokens']}"
        lines.append(f"| {about} | {len(draws)} | {figures} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext")
    parser.add_argument("--shakespeare")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--nsamples", type=int, nargs="+", default=[32])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["NearPlane"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--ignore", nargs="*", default=[], help="leave dense the linears in whose names REGEX is found")
    parser.add_argument("--eval-seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="of each domain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="runs/calibration_text")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    kept, name = Kept(Path(args.out + ".jsonl")), Path(args.model).name
    for pattern in args.ignore:
        re.compile(pattern)
    if args.table:
        print(table(kept, name))
        return
    original = Remembered(load(args.model))
    if f"{name}|original" not in kept.cells:
        tokenizer = load_tokenizer(locate(args.model))
        texts = domains(args, tokenizer)
        kept.keep(
            f"{name}|original", {"domains": measured(original.model, tokenizer, texts, args, None), **common(args)}
        )
    for windows, seed, dataset, bits, row in product(args.nsamples, args.seeds, args.datasets, args.bits, args.rows):
        key = f"{name}|{row}|{bits}|{dataset}|{windows}|{seed}"
        if key not in kept.cells:
            draw = Calibration(dataset, nsamples=windows, seqlen=args.seqlen, seed=seed)
            kept.keep(key, cell(row, bits, draw, original, args))
    print(table(kept, name))


if __name__ == "__main__":
    main()
