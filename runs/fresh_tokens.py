"""What a choice inside a method is worth on tokens that had no part in it, linear by linear: minutes instead of hours.

    python runs/fresh_tokens.py --text wikitext2-valid.txt [--model demo] [--bits 3] [--blocks 1 12 24] [--variants ...]

Two walks over the same model in lockstep, one on calibration windows, one on others. At the chosen blocks every variant
solves each linear with the first walk's moments and is judged on the second's: ‖Q X̂ - W X - R‖², as its change against the
first variant in percent of plain GPTQ's error of that linear, mean over the blocks. Less is better. Both walks go on with
GPTQ's weights, so that every variant sees the same streams. Perplexity decides; this tells where to look.
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, Method, Moments, NearPlane
from nearplane.core.grid import Quantized, dequantize
from nearplane.core.target import pull
from nearplane.methods.base import Need
from nearplane.models.discover import discover
from nearplane.models.source import open_source
from nearplane.run.stream import Place, stream

VARIANTS: dict[str, tuple[Method, str]] = {
    "NearPlane": (NearPlane(), "hessian"),
    "RTN": (RTN(), "mse"),
    "GPTQ": (GPTQ(), "hessian"),
    "GPTAQ": (GPTAQ(), "hessian"),
    "GPTAQ, mse grid": (GPTAQ(), "mse"),
    "mse grid": (NearPlane(), "mse"),
    "no residual target": (NearPlane(residual=False), "hessian"),
    "one share": (NearPlane(shrink="linear"), "hessian"),
    "one share per row": (NearPlane(shrink="row"), "hessian"),
    "the full step": (NearPlane(shrink="none"), "hessian"),
    "damping 0.01": (NearPlane(damping="fixed"), "hessian"),
    "damping 0.1": (NearPlane(damping="fixed", damp_percent=0.1), "hessian"),
    "no refinement": (NearPlane(rounds=0), "hessian"),
    "4 rounds": (NearPlane(rounds=4), "hessian"),
    "pivot order": (NearPlane(order="pivot"), "hessian"),
    "beam 4": (NearPlane(beam=4), "hessian"),
}
WITH_D: frozenset[Need] = frozenset({"H", "D", "held_out"})
WITH_R: frozenset[Need] = WITH_D | {"R"}  # in place of D, where a linear adds to the residual stream


def loss(solved: Quantized, grid: Grid, weight: Tensor, fresh: Moments) -> float:
    """``‖Q X̂ - W X - R‖²`` on the fresh tokens, less what no Q changes."""
    delta = dequantize(solved, grid).to(weight.dtype) - weight
    wanted = pull(weight, fresh.D, fresh.R)
    return float((delta * (delta @ fresh.H)).sum() - 2 * (delta * wanted).sum())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 12, 24])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--nsamples", type=int, default=16, help="windows of 512 tokens, for either walk")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    grids = {
        fit: Grid(bits=args.bits, group_size=args.group_size, sym=False, fit=fit, scale_dtype="float16")
        for fit in ("mse", "hessian")
    }
    walks = []
    for seed in (0, 1):
        source = open_source(args.model)
        draw = Calibration(dataset=args.text, nsamples=args.nsamples, seqlen=512, seed=seed).load(source.tokenizer)
        cpu = torch.device("cpu")
        walks.append(stream(source, discover(source), draw.ids, place=Place(cpu, torch.float32), reference=True))
    change: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in args.variants}
    plain = GPTQ()
    for number, (block, other) in enumerate(zip(*walks, strict=True)):
        for stage, same in zip(block.stages, other.stages, strict=True):
            moments, fresh = block.observe(stage, WITH_R), other.observe(same, WITH_R)
            plainer = moments if moments.R is None or number not in args.blocks else block.observe(stage, WITH_D)
            stacked = torch.cat([block.weight(site) for site in stage])  # solved together, as in a run
            current = plain.solve(stacked, plain.prepare(moments), grids["hessian"])
            answers = {}
            if number in args.blocks:
                for name in args.variants:
                    method, fit = VARIANTS[name]
                    given = moments if "R" in method.needs else plainer
                    answers[name] = method.solve(stacked, method.prepare(given), grids[fit])
            done = 0
            for site, twin in zip(stage, same, strict=True):
                part = slice(done, done := done + site.shape[0])
                weight, solved = stacked[part], current.rows(part)
                delta = dequantize(solved, grids["hessian"]) - weight
                unit = float((delta * (delta @ fresh.H)).sum()) / 100
                losses = {
                    name: loss(answer.rows(part), grids[VARIANTS[name][1]], weight, fresh)
                    for name, answer in answers.items()
                }
                for name, found in losses.items():
                    change[name][site.name.rpartition(".")[2]].append((found - losses[args.variants[0]]) / unit)
                block.replace(site, solved, grids["hessian"])
                other.replace(twin, solved, grids["hessian"])
        if number == max(args.blocks):
            break
    kinds = list(change[args.variants[0]])
    print("| variant | " + " | ".join(kinds) + " |\n|---" + "|---" * len(kinds) + "|")
    for name, by_kind in change.items():
        print(f"| {name} | " + " | ".join(f"{sum(v) / len(v):+.1f}" for v in by_kind.values()) + " |")


if __name__ == "__main__":
    main()
