"""What a whole run costs by method: CPU seconds of a process by phase, on the demo model, and over the first method's.

    python benchmarks/whole.py [--methods GPTQ NearPlane] [--blocks 30] [--bits 3] [--threads 1] [--json FILE.json]

Each method runs in a process of its own, from its imports to the finished checkpoint, without the check on fresh windows.
Calibrated on 32 x 512 tokens of the embedded text, asymmetric groups of 64. Blocks behind the first --blocks stay dense.
Phases are wall seconds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

METHODS = ("RTN", "GPTQ", "GPTAQ", "ResComp", "NearPlane")


def measure(method: str, blocks: int, bits: int) -> dict[str, Any]:
    """Quantize in this process; return its CPU seconds and those of the phases."""
    import torch

    import nearplane

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    late = "|".join(map(str, range(blocks, 30)))
    settings: dict[str, Any] = {"ignore": [rf"re:model\.layers\.({late})\..*"]} if late else {}
    with tempfile.TemporaryDirectory() as folder:
        report = nearplane.quantize(
            "demo", Path(folder) / "out", method=method.lower(), bits=bits, group_size=64, sym=False, nsamples=32, seqlen=512,
            check=False, progress=False, **settings,
        )  # fmt: skip
    used = os.times()
    return {"method": method, "cpu": used.user + used.system, "phases": report.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["GPTQ", "NearPlane"])
    parser.add_argument("--blocks", type=int, choices=range(1, 31), default=30, metavar="1..30")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.blocks, args.bits)))
        return
    rows: list[dict[str, Any]] = []
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for method in args.methods:
        command = [sys.executable, __file__, "--one", method, "--blocks", str(args.blocks), "--bits", str(args.bits)]
        row = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        rows.append(
            {**row, "over the first": row["cpu"] / (rows[0]["cpu"] if rows else row["cpu"]), "load": os.getloadavg()[0]}
        )
        phases = ", ".join(f"{name} {spent:.1f}" for name, spent in row["phases"].items())
        print(f"{method}: {row['cpu']:.1f} CPU s, {rows[-1]['over the first']:.2f} ({phases})", flush=True)
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout
        made = {
            "commit": commit.strip(),
            "date": str(date.today()),
            "machine": platform.platform(),
            "threads": args.threads,
        }
        made |= {"cpu": cpu_name(), "blocks": args.blocks, "bits": args.bits}
        Path(args.json).write_text(json.dumps({"rows": rows, **made}, indent=1) + "\n")


def cpu_name() -> str:
    """Return the processor's name, family and model, where the system tells."""
    there = Path("/proc/cpuinfo")
    lines = there.read_text().splitlines() if there.exists() else []
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    return ", ".join(
        f"{key.strip()} {known[key].strip()}" for key in known if key.strip() in ("model name", "cpu family", "model")
    )


if __name__ == "__main__":
    main()
