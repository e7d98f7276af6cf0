"""The quality study: every method on real models, the same bits, order and grid fit, several calibration draws.

    python runs/quality.py --calibration wikitext2-valid.txt --test wikitext2-test.txt --second tinyshakespeare.txt
        [--models demo /path/to/whisper] [--bits 3 2 4] [--seeds 0 1 2] [--rows GPTAQ ...] [--nsamples 4 32] [--threads 2]

Calibrates on 32 x 512 tokens (fewer where the model reads fewer); perplexity on 32k tokens of the test text and of the
second domain, if there is one, KL to the original on the first 8 windows of the test text. Evaluation computes in
float32 (cells of SmolLM2 without "dtype" in bfloat16: the original has 24.014 there and 24.011 here). One line of OUT.jsonl
per finished cell, with its commit: an interrupted study goes on where it was, and several processes may share it if they
are given different cells. Cells of before 2026-11-29 have NearPlane's former least damping, 0.01.
A finished cell is not run again, whatever has changed since: delete its line for that. OUT.md
is written from whatever is there; see runs/second_model.py for the second model.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearplane import AWQ, GPTAQ, GPTQ, RTN, Calibration, Grid, Method, NearPlane, ResComp, load, quantize
from nearplane.evaluation.perplexity import evaluate
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer

# Each row: the method and the fit of its grid. NearPlane's parts are added in turn.
ROWS: dict[str, tuple[Method, str]] = {
    "RTN": (RTN(), "mse"),
    "AWQ": (AWQ(), "auto"),
    "GPTQ": (GPTQ(), "mse"),
    "GPTAQ": (GPTAQ(), "mse"),
    "GPTAQ released": (GPTAQ(variant="released"), "mse"),
    "ResComp": (ResComp(), "mse"),
    "ResComp released": (ResComp(variant="released"), "mse"),
    "GPTQ, our grid": (GPTQ(), "hessian"),
    "GPTAQ, our grid": (GPTAQ(), "hessian"),
    "ResComp, our grid": (ResComp(), "hessian"),
    "exact target, all of it": (NearPlane(shrink="none", damping="fixed", residual=False, rounds=0), "mse"),
    "exact target, one share": (NearPlane(shrink="linear", damping="fixed", residual=False, rounds=0), "mse"),
    "+ spectral shares": (NearPlane(damping="fixed", residual=False, rounds=0), "mse"),
    "+ damping": (NearPlane(residual=False, rounds=0), "mse"),
    "+ residual stream": (NearPlane(rounds=0), "mse"),
    "+ our grid": (NearPlane(rounds=0), "hessian"),
    "+ refinement = NearPlane": (NearPlane(), "hessian"),
    "AWQ, then NearPlane": (NearPlane(), "hessian"),
    "NearPlane, mse grid": (NearPlane(), "mse"),
    "NearPlane, no target": (NearPlane(target=False), "hessian"),
    "NearPlane, damping fixed": (NearPlane(damping="fixed"), "hessian"),
    "NearPlane, share per row": (NearPlane(shrink="row"), "hessian"),
    "NearPlane, pivot order": (NearPlane(order="pivot"), "hessian"),
    "NearPlane, beam 4": (NearPlane(beam=4), "hessian"),
    "NearPlane, ungated": (NearPlane(gate=False), "hessian"),
}
# Rows of which channels are scaled first; AWQ asks for that itself.
SCALED = ("AWQ, then NearPlane",)
WINDOWS_TOKENS, KL_WINDOWS = 32768, 8


def commit() -> str:
    """The commit that produced a number."""
    result = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


class Remembered(nn.Module):
    """A model that reads each window once, such as the original, which every cell is compared with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.answers = model, model.config, {}
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        key = b"".join(value.numpy().tobytes() for value in inputs.values() if isinstance(value, torch.Tensor))
        if key not in self.answers:
            self.answers[key] = self.model(**inputs)
        return self.answers[key]


def measured(path: str | Path, original: Remembered, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on both texts and KL to the original."""
    model = original.model if path == args.model else load(path, packed=False)  # float32, as the table says
    settings: dict[str, Any] = {"seqlen": args.eval_seqlen, "windows": math.ceil(WINDOWS_TOKENS / args.eval_seqlen)}
    same: dict[str, Any] = {} if path == args.model else {"reference": original, "compared": KL_WINDOWS}
    test = evaluate(model, tokenizer, dataset=args.test, **settings, **same)
    found: dict[str, Any] = {"test": test.perplexity, "dtype": "float32"}
    if args.second:
        found["second"] = evaluate(model, tokenizer, dataset=args.second, **settings).perplexity
    return found | ({"kl": test.kl, "top1": test.top1} if same else {})


def cell(
    bits: int | str, group: int, windows: int, row: str, seed: int, original: Remembered, args: argparse.Namespace
) -> dict[str, Any]:
    """Quantize with one draw of calibration windows and measure the checkpoint."""
    method, fit = ROWS[row]
    scratch = Path(tempfile.mkdtemp())
    try:
        grid = Grid(bits=bits, group_size=group, sym=bits == "ternary", fit=fit)  # type: ignore[arg-type]
        draw = Calibration(dataset=args.calibration, nsamples=windows, seqlen=512, seed=seed)
        settings: dict[str, Any] = {"method": method, "grid": grid, "scale": "awq" if row in SCALED else "auto"}
        report = quantize(args.model, scratch / "model", calibration=draw, progress=False, **settings)
        found = measured(scratch / "model", original, load_tokenizer(scratch / "model"), args)
    finally:
        shutil.rmtree(scratch)
    totals = report.totals
    return found | {
        "mean_error": totals["mean_error"],
        "rejected_rounds": totals["rejected_rounds"],
        "tokens": report.data.get("tokens", 0),
        "seconds": report.seconds,
        "threads": args.threads,
        "commit": commit(),
    }


OURS, LEAST = "+ refinement = NearPlane", "GPTQ"  # the two that are compared by calibration tokens
Cells = dict[str, dict[str, Any]]


def of(cells: Cells, *key: str) -> Cells:
    """By seed, what one row has."""
    start = "|".join(key) + "|"
    return {name.removeprefix(start): cell for name, cell in cells.items() if name.startswith(start)}


def mean(rows: Cells, name: str) -> float:
    """Over the seeds that measured it."""
    return statistics.mean(found) if (found := [row[name] for row in rows.values() if name in row]) else math.nan


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def spread(rows: Cells, name: str) -> str:
    """Mean over seeds ± half their range."""
    found = [row[name] for row in rows.values()]
    return number(mean(rows, name)) + (f" ± {(max(found) - min(found)) / 2:.2f}" if len(found) > 1 else "")


def order(key: tuple[str, ...]) -> tuple[Any, ...]:
    model, bits, group, windows = key
    return model, -int(bits) if bits.isdigit() else 0, -int(group), int(windows)


def summary(cells: Cells, groups: list[tuple[str, ...]]) -> list[str]:
    """NearPlane's gap to the original beside that of the better of GPTAQ and ResComp, over the seeds that all three have."""
    lines = ["| model | bits | group | tokens | seeds | original | GPTAQ | ResComp | NearPlane | its gap / the better's | KLs |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for key in groups:
        rows = [of(cells, *key, row) for row in ("GPTAQ", "ResComp", OURS)]
        seeds = sorted(set.intersection(*map(set, rows)))
        if not seeds:
            continue
        rows = [{seed: row[seed] for seed in seeds} for row in rows]
        original = cells[f"{key[0]}|original"]["test"]
        best = min(mean(row, "test") for row in rows[:2]) - original
        share = (mean(rows[2], "test") - original) / best if best > 0 else None
        model, bits, group, _ = key
        tests = " | ".join(spread(row, "test") for row in rows)
        kl = " / ".join(number(mean(row, "kl"), 3) for row in rows)
        what = f"{model} | {bits} | {group if group != '-1' else 'row'} | {rows[0][seeds[0]]['tokens']} | {len(seeds)}"
        lines.append(f"| {what} | {original:.2f} | {tests} | {number(share)} | {kl} |")
    return lines


def details(cells: Cells, key: tuple[str, ...]) -> list[str]:
    """Every row of one model, bits, group and number of windows."""
    original = cells[f"{key[0]}|original"]
    rows = {row: found for row in ROWS if (found := of(cells, *key, row))}
    model, bits, group, windows = key
    lines = ["", f"{model}, {bits} bits, group {group}, {windows} windows. Original: test {original['test']:.2f}, "
                 f"second domain {number(original.get('second'))}.", "",
             "| method | seeds | test: mean | each | second domain | KL | top-1 |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row, mine in rows.items():
        each = ", ".join(f"{mine[seed]['test']:.1f}" for seed in sorted(mine))
        figures = f"{number(mean(mine, 'second'))} | {number(mean(mine, 'kl'), 3)} | {100 * mean(mine, 'top1'):.1f}%"
        lines.append(f"| {row} | {len(mine)} | {number(mean(mine, 'test'))} | {each} | {figures} |")
    return lines


def by_tokens(cells: Cells, groups: list[tuple[str, ...]]) -> list[str]:
    """GPTQ and NearPlane as calibration grows, over the seeds that both have."""
    lines: list[str] = []
    for kind in sorted({key[:3] for key in groups}):
        found = []
        for key in groups:
            pair = [of(cells, *key, LEAST), of(cells, *key, OURS)]
            seeds = set(pair[0]) & set(pair[1])
            if key[:3] == kind and seeds:
                found.append([{seed: row[seed] for seed in seeds} for row in pair])
        if len(found) > 1:
            lines += ["", f"{kind[0]}, {kind[1]} bits, group {kind[2]}, by calibration tokens: test (KL).", "",
                      "| tokens | seeds | GPTQ | NearPlane |", "|---|---|---|---|"]  # fmt: skip
        for pair in found if len(found) > 1 else ():
            numbers = [f"{mean(rows, 'test'):.2f} ({mean(rows, 'kl'):.3f})" for rows in pair]
            lines.append(f"| {next(iter(pair[0].values()))['tokens']} | {len(pair[0])} | " + " | ".join(numbers) + " |")
    return lines


def table(cells: Cells) -> str:
    """Markdown: the summary, the rows by calibration tokens, then everything."""
    groups = sorted({tuple(key.split("|")[:4]) for key in cells if key.count("|") == 5}, key=order)
    lines = summary(cells, groups) + by_tokens(cells, groups)
    for key in groups:
        lines += details(cells, key)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--second")
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--bits", nargs="+", default=["3", "2", "4", "ternary"])
    parser.add_argument("--groups", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nsamples", type=int, nargs="+", default=[32], help="windows of calibration")
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="runs/quality")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    path = Path(args.out + ".jsonl")

    def kept() -> dict[str, dict[str, Any]]:
        lines = path.read_text().splitlines() if path.exists() else []
        return {record.pop("cell"): record for record in map(json.loads, lines)}

    def keep(key: str, found: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"cell": key, **found}) + "\n")
        print(key, {k: v for k, v in found.items() if k != "seconds"}, flush=True)

    for model in args.models:
        args.model, name = model, Path(model).name
        original = Remembered(load(args.model))
        if f"{name}|original" not in kept():
            keep(f"{name}|original", measured(args.model, original, load_tokenizer(locate(args.model)), args))
        for bits, group, windows, seed, row in product(args.bits, args.groups, args.nsamples, args.seeds, args.rows):
            key = f"{name}|{bits}|{group}|{windows}|{row}|{seed}"
            if key not in kept() and not (row == "RTN" and seed != args.seeds[0]):
                keep(key, cell(bits if bits == "ternary" else int(bits), group, windows, row, seed, original, args))
    Path(args.out + ".md").write_text(table(kept()))
    print(table(kept()))


if __name__ == "__main__":
    main()
