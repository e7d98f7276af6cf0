"""A grid of your own: levels that are powers of two, so that a product is a shift of bits.

Solves the linears of a model on it and on a uniform grid of as many bits; writes nothing, since no format holds it.

    python examples/own_grid.py MODEL [TEXT_FILE]
"""

import sys

import torch

from nearplane import GPTQ, Calibration, Grid, Moments, discover, open_source, stream
from nearplane.core.grid import dequantize
from nearplane.core.levels import Codebook

POWERS = Codebook("powers", (-1.0, -0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.0))
GRIDS = {"powers": Grid.of(POWERS, group_size=32), "uniform": Grid(bits=3, group_size=32)}


def compare(model: str, text: str | None = None, nsamples: int = 4, seqlen: int = 128) -> dict[str, dict[str, float]]:
    """Return the error of every linear of the first block, by grid and name."""
    source, method = open_source(model), GPTQ()
    tokens = Calibration(dataset=text, nsamples=nsamples, seqlen=seqlen).load(source.tokenizer)
    errors: dict[str, dict[str, float]] = {name: {} for name in GRIDS}
    for block in stream(source, discover(source)[:1], tokens.ids):
        for stage in block.stages:
            moments = block.observe(stage, method.needs)
            state = method.prepare(moments)
            for site in stage:
                weight = block.weight(site)
                for name, grid in GRIDS.items():
                    solved = method.solve(weight, state, grid)
                    errors[name][site.name] = share_lost(weight, dequantize(solved, grid), moments)
    return errors


def share_lost(weight: torch.Tensor, rounded: torch.Tensor, moments: Moments) -> float:
    """Return tr[(Q-W)H(Q-W)ᵀ] / tr[WHWᵀ]: the share of the output's energy that is lost."""
    lost, all_ = ((part @ moments.H * part).sum() for part in (rounded - weight, weight))
    return float(lost / all_)


if __name__ == "__main__":
    for name, errors in compare(*sys.argv[1:3]).items():
        print(f"{name:<8} mean error {sum(errors.values()) / len(errors):.4f}")
