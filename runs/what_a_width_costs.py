"""Which error foretells what rounding one unit costs the model: each unit rounded by itself, its KL divergence beside two errors.

    python runs/what_a_width_costs.py [--blocks 0 1 3 6 9 11 12 15 18 21 24 27 28 29] [--bits 3]

Units are those of a budget (``nearplane/run/budget.py``), solved by GPTQ, group 64 asymmetric, on 8 x 512 tokens of the
embedded text.
``output`` is ‖(Q-W)X‖²/‖WX‖² summed over the unit's linears, ``stream`` what ``--budget`` measures, and KL that of the whole
model's next tokens with the unit rounded, on 128 tokens of another draw. The last lines: how log KL correlates with the log
of each. Some minutes of one core.
"""

import argparse
import json

import torch

import nearplane
from nearplane import GPTQ, Calibration, Grid
from nearplane.machine.ranks import ALONE
from nearplane.run import budget
from nearplane.run.measure import energy
from nearplane.run.plan import make_plan


def kl(model: torch.nn.Module, ids: torch.Tensor, was: torch.Tensor) -> float:
    now = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return float((was.exp() * (was - now)).sum(-1).mean())


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1, 3, 6, 9, 11, 12, 15, 18, 21, 24, 27, 28, 29])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default=None, help="instead of the embedded one")
    parser.add_argument(
        "--tokens", type=int, nargs=3, default=[8, 512, 128], help="windows, their length, those judged by"
    )
    args = parser.parse_args(words)
    windows, seqlen, judged = args.tokens
    nearplane.run.stream.BATCH_TOKENS = seqlen  # so that every fourth window is judged by
    calibration = Calibration(dataset=args.text, nsamples=windows, seqlen=seqlen)
    grid = Grid(bits=args.bits, group_size=64, sym=False)
    plan = make_plan(
        args.model, method=GPTQ(), grid=grid, calibration=calibration, device="cpu", budget=8.0, widths=[args.bits]
    )
    other = Calibration(dataset=args.text, nsamples=1, seqlen=judged, seed=1).load(plan.source.tokenizer, seqlen)
    whole = nearplane.load(args.model, packed=False)
    was = whole(input_ids=other.ids, use_cache=False).logits.log_softmax(-1)
    rows = []
    for block in plan.stream():
        if block.k not in args.blocks:
            continue
        before = budget.outputs(block)
        for stage in block.stages:
            found: dict[int, list[budget.Candidate]] = {}
            budget.solve_widths(plan, block, stage, stage, (args.bits,), found, ALONE)
            H = block.observe(stage, plan.method.needs).H
            output, kept = 0.0, {site.name: block.weight(site).clone() for site in stage}
            for some in found[args.bits]:
                block.replace(some.site, some.quantized, some.grid)
                weight = kept[some.site.name]
                output += energy(block.weight(some.site) - weight, H) / energy(weight, H)
                whole.get_submodule(some.site.name).weight.copy_(block.weight(some.site))
            row = {"unit": stage[0].name, "output": output, "stream": budget.lost(block, before, ALONE)}
            rows.append({**row, "kl": kl(whole, other.ids, was)})
            print(json.dumps(rows[-1]), flush=True)
            for site in stage:
                site.weight(plan.source.model).copy_(kept[site.name])
                whole.get_submodule(site.name).weight.copy_(kept[site.name])
    logs = torch.tensor([[row[key] for row in rows] for key in ("output", "stream", "kl")]).log()
    for name, correlation in zip(("output", "stream"), torch.corrcoef(logs)[2], strict=False):
        print(f"{name}: correlation {float(correlation):.2f} with KL over {len(rows)} units, in logarithms")


if __name__ == "__main__":
    main()
