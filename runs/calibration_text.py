"""What a model is calibrated on: KL to the original on four domains, for the embedded text, the model's own samples, and mixes.

    python runs/calibration_text.py --wikitext wikitext2-test.raw.txt --shakespeare tinyshakespeare.txt
        [--model demo] [--datasets embedded self embedded:1,self:1] [--nsamples 32] [--seeds 0 1 2] [--ignore REGEX] [--table]

Domains: both texts; sources of the standard library of the Python that runs (``MODULES``); and the dialogs of the embedded
text's held-out part, written by the model's chat template. Each text is cut into windows of EVAL_SEQLEN tokens, of which
the first WINDOWS are read. The dialogs have the author of the embedded text that is calibrated on, and are few. 3 bits in
groups of 64, asymmetric, NearPlane as it comes. ``--ignore`` leaves blocks dense, where time is short. One line of OUT.jsonl
per finished cell; an interrupted study goes on where it was. ``--table`` prints the table of what is there, and runs nothing.
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

from nearplane import Calibration, load, quantize
from nearplane.data.text import read_text
from nearplane.evaluation.perplexity import evaluate
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer

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


def cell(dataset: str, nsamples: int, seed: int, original: Remembered, args: argparse.Namespace) -> Found:
    """Quantize on one dataset and measure all domains."""
    draw = Calibration(dataset, nsamples=nsamples, seqlen=args.seqlen, seed=seed)
    settings: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size, "sym": False, "ignore": args.ignore}
    with tempfile.TemporaryDirectory(prefix="nearplane-") as folder:
        start = time.perf_counter()
        report = quantize(args.model, Path(folder) / "out", calibration=draw, progress=False, **settings)
        seconds = time.perf_counter() - start
        tokenizer = load_tokenizer(Path(folder) / "out")
        found = measured(load(Path(folder) / "out", packed=False), tokenizer, domains(args, tokenizer), args, original)
    data = {name: report.data[name] for name in ("tokens", "sha256", "sources", "recipe") if name in report.data}
    return {"domains": found, "data": data, "seconds": round(seconds, 1), **common(args)}


def common(args: argparse.Namespace) -> Found:
    """What a cell was run with, beside its name."""
    return {"threads": args.threads, "python": platform.python_version(), "ignore": args.ignore, "commit": commit()}


def table(kept: Kept, model: str) -> str:
    """Markdown: a row for each dataset and number of windows; KL by domain, mean over draws ± half their range."""
    cells = {tuple(key.split("|")): cell for key, cell in kept.cells.items() if key.startswith(f"{model}|")}
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["domains"]))
    lines = ["| calibrated on | windows | tokens | draws | " + " | ".join(names) + " | mean KL |"]
    lines.append("|" + "---|" * (5 + len(names)))
    rows = dict.fromkeys((key[1], key[2]) for key in cells if len(key) == 4)
    for dataset, windows in rows:
        draws = [cell for key, cell in cells.items() if key[1:3] == (dataset, windows)]
        kls = [[draw["domains"][name]["kl"] for draw in draws] for name in names]
        means = [sum(each) / len(each) for each in zip(*kls, strict=True)]
        figures = " | ".join(spread(found, 3) for found in [*kls, means])
        lines.append(f"| {dataset} | {windows} | {draws[0]['data']['tokens']} | {len(draws)} | {figures} |")
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
    parser.add_argument("--bits", type=int, default=3)
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
    for windows, seed, dataset in product(args.nsamples, args.seeds, args.datasets):
        key = f"{name}|{dataset}|{windows}|{seed}"
        if key not in kept.cells:
            kept.keep(key, cell(dataset, windows, seed, original, args))
    print(table(kept, name))


if __name__ == "__main__":
    main()
