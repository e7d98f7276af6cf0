"""The walk by hand: the loop inside nearplane.quantize, written by a user who wants to see every layer.

``walk`` opens, observes, solves and replaces by itself. ``follow`` lets ``nearplane.walk`` do that, and reads its events.

python examples/own_loop.py MODEL [TEXT_FILE]
"""

import sys
from typing import Any

import nearplane
from nearplane import GPTQ, Calibration, Grid, discover, open_source, stream


def walk(model: str, text: str | None = None, nsamples: int = 4, seqlen: int = 128) -> list[tuple[str, float]]:
    """Solve every linear and return (name, loss over Babai's bound); writes nothing."""
    source = open_source(model)
    tokens = Calibration(dataset=text, nsamples=nsamples, seqlen=seqlen).load(source.tokenizer)
    method, grid = GPTQ(), Grid(bits=4, group_size=32)
    results = []
    for block in stream(source, discover(source), tokens.ids):
        for stage in block.stages:
            moments = block.observe(stage, method.needs)  # one pass over the samples
            state = method.prepare(moments)  # factor once ...
            for site in stage:  # ... solve q, k and v
                quantized = method.solve(block.weight(site), state, grid)
                block.replace(site, quantized, grid)  # later stages see the rounded weight
                if quantized.certificate is not None:
                    loss, bound, _ = quantized.certificate
                    results.append((site.name, float(loss.sum() / bound.sum())))
    return results


def follow(model: str, **settings: Any) -> list[tuple[str, float | None]]:
    """Return (name, error) of every linear, as the package's own walk yields them; writes nothing."""
    plan = nearplane.make_plan(model, **settings)
    return [(event.site.name, event.row.error) for event in nearplane.walk(plan) if isinstance(event, nearplane.Solved)]


if __name__ == "__main__":
    for name, value in walk(*sys.argv[1:3]):
        print(f"{name:<48} loss / bound {value:.3f}")
