"""Strong scaling over ranks: seconds by phase of one run on 1, 2, ... ranks of one thread each, and bytes that travel.

    python benchmarks/ranks.py [--ranks 1 2] [--layers 2] [--nsamples 16] [--clock cpu] [--json ranks.json]

The model is the demo model's first ``--layers`` blocks. Phases are
rank 0's: what it waits for others is in the phase that it waits in. ``--clock cpu`` counts its processor time instead, without
waiting: for a machine that does other work, too. Bytes handed to all_reduce and broadcasts are counted beside the formula of
docs/large_models.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plan import cut

METHODS = ("gptq", "nearplane")
GROUP = 64


def child(words: list[str]) -> None:
    """One rank: run, and say as the last line what was spent and sent."""
    import nearplane.api
    from nearplane.machine.ranks import Ranks, together
    from nearplane.machine.signals import is_first
    from nearplane.methods import METHODS as METHODS_OF

    found: list[Ranks] = []
    plans: list[Any] = []
    plan_of = nearplane.api.complete

    @contextmanager
    def watched(device: str) -> Iterator[Ranks]:
        with together(device) as ranks:
            found.append(ranks)
            yield ranks

    def complete(plan: Any) -> Any:
        plans.append(plan_of(plan))
        return plans[-1]

    nearplane.api.together, nearplane.api.complete = watched, complete
    model, out, method, nsamples, clock = words
    if clock == "cpu":
        nearplane.run.measure.time = SimpleNamespace(perf_counter=time.process_time)
    report = nearplane.quantize(
        model,
        out,
        method=METHODS_OF[method](),
        grid=nearplane.Grid(bits=4, group_size=GROUP, sym=False),
        calibration=nearplane.Calibration(nsamples=int(nsamples), seqlen=512),
        progress=False,
    )
    if is_first():
        expected = formula(plans[0]) if found[0].world > 1 else {"reduced": 0, "shared": 0}
        print(json.dumps({"seconds": report.seconds, "bytes": found[0].bytes, "formula": expected}))


def formula(plan: Any) -> dict[str, int]:
    """Bytes from the shapes alone."""
    reduced = shared = 0
    needs = plan.method.needs
    for stage in (stage for block in plan.blocks for stage in block.stages):
        n, m = stage[0].shape[1], sum(site.shape[0] for site in stage)
        joins = len(stage) == 1 and stage[0].adds_to is not None
        drift = m * n if "R" in needs and joins else n * n if "D" in needs else 0
        step = max(1, (1 << 24) // n)
        upper = sum((min(a + step, n) - a) * (n - a) for a in range(0, n, step))
        reduced += 8 * (upper + drift) * (2 if "held_out" in needs else 1)
        shared += m * n + 5 * m * plan.grid.group_count(n) + 16 * m  # codes; scales and zeros; the certificate
    return {"reduced": reduced, "shared": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        model = cut(args.layers, Path(scratch))
        for method in METHODS:
            for world in args.ranks:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
                words = [str(model), f"{scratch}/{method}-{world}", method, str(args.nsamples), args.clock]
                command = [sys.executable, *launcher, __file__, "child", *words]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
                row = {"method": method, "ranks": world, **json.loads(done.stdout.splitlines()[-1])}
                row["load"] = os.getloadavg()[0]
                results.append(row)
                phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds"].items())
                print(f"{method}, {world} ranks: {phases}; bytes {row['bytes']}, formula {row['formula']}", flush=True)
    if args.json:
        settings = {"layers": args.layers, "nsamples": args.nsamples, "clock": args.clock}
        args.json.write_text(json.dumps({**settings, "rows": results}, indent=2))


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
