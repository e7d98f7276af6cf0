"""Compare what ``plan`` predicts with what the run then takes: seconds and peak memory (RSS), each in its own process.

    python benchmarks/plan.py [--threads 1] [--settings rtn gptq nearplane] [--layers 30] [--json plan.json]

The model is the demo model, SmolLM2-135M, or its first ``--layers`` blocks. Time is wall time around ``quantize`` and around
nothing else; memory is the peak of the whole process. The plan runs right before its run: other work on the
machine shows in both, as far as it lasts.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sweep import record

SETTINGS: dict[str, list[str]] = {
    "rtn": ["--method", "rtn", "--group-size", "64", "--fit", "minmax"],
    "gptq": ["--method", "gptq", "--group-size", "64", "--nsamples", "8", "--seqlen", "256"],
    "nearplane": ["--method", "nearplane", "--group-size", "64", "--nsamples", "8", "--seqlen", "512"],
}
# In a fresh process: the command line's own code, then its wall seconds and peak memory as the last line.
RUN = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from nearplane.cli.main import main
from nearplane.machine.memory import peak_resident
start = time.perf_counter()
status = main(sys.argv[2:])
spent = time.perf_counter() - start
print()
print(status, spent, peak_resident())
"""


def run(threads: int, words: list[str]) -> tuple[str, float, float]:
    """Return what a command prints, its seconds and its peak memory in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", RUN, str(threads), *words]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=environment
    )
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    status, seconds, peak = last.split()
    assert status == "0", words
    return printed, float(seconds), float(peak)


def cut(layers: int, folder: Path) -> Path:
    """Write the demo model's first blocks to a folder."""
    from safetensors.torch import load_file, save_file

    from nearplane.models.locate import locate

    source = locate("demo")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = min(layers, config["num_hidden_layers"])
    config = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(source / "model.safetensors")
    kept = {k: v for k, v in state.items() if ".layers." not in k or int(k.split(".layers.")[1].split(".")[0]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def compare(name: str, model: str, threads: int, layers: int) -> dict[str, Any]:
    """Plan and run one setting."""
    printed, planning, _ = run(threads, ["plan", model, *SETTINGS[name], "--json"])
    plan = json.loads(printed)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        _, seconds, peak = run(threads, ["quantize", model, str(out), *SETTINGS[name]])
        report = json.loads((out / "report.json").read_text())
    predicted = plan["memory"][0]["peak"]
    return {
        "setting": name,
        "flags": " ".join(SETTINGS[name]),
        "layers": layers,
        "seconds": seconds,
        "seconds predicted": plan["seconds"]["total"],
        "seconds of plan": planning,
        "RSS": peak,
        "RSS predicted": predicted,
        "disk": report["bytes"]["after"],
        "disk predicted": plan["disk"]["quantized"] + plan["disk"]["dense"],
        "time ratio": plan["seconds"]["total"] / seconds,
        "memory ratio": predicted / peak,
        "phases": report["seconds"],
        "phases predicted": plan["seconds"],
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json")
    args = parser.parse_args()
    print("| setting | seconds | predicted | ratio | RSS, MB | predicted | ratio | load |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = str(cut(args.layers, Path(scratch)))
        for name in args.settings:
            row = compare(name, model, args.threads, args.layers)
            rows.append(row)
            print(f"| {name} | {row['seconds']:.1f} | {row['seconds predicted']:.1f} | {row['time ratio']:.2f} | "
                  f"{row['RSS'] / 1e6:.0f} | {row['RSS predicted'] / 1e6:.0f} | {row['memory ratio']:.2f} | "
                  f"{row['load']:.1f} |", flush=True)  # fmt: skip
            if args.json:
                record(args.json, rows, args.threads)


if __name__ == "__main__":
    main()
