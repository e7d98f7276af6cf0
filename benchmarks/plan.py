"""Compare what ``plan`` predicts with what the run then takes: seconds and peak memory (RSS), each in its own process.

    python benchmarks/plan.py [--threads 1] [--settings rtn gptq nearplane] [--layers 30] [--json plan.json]
    python benchmarks/plan.py --growth [--settings gptq nearplane] [--depths 2 4 8 16] [--widths 512 1024 2048 4096]
        [--json growth.json]

The model is the demo model, SmolLM2-135M, or its first ``--layers`` blocks. Time is that around ``quantize`` and nothing
else, on the wall, or with one thread of the process, which other work on the machine changes less. The plan runs right
before its run. Memory is the peak of the whole process. A run whose freed blocks of memory return to the system at once is
what the plan predicts; where memory is plenty they stay for a while, and that run's peak stands in a column of its own.

``--growth`` quantizes random Llamas, of 512 inputs at each depth, and of one block at each width (inner width 2.75 times
that). It prints the exponents of what a run takes beyond its start, and of what it holds beyond its base, beside those of
theory and of the plan. Theory: over depth, time 1, memory 0. Over width, time 2 to 3, memory 2 and what tokens hold, 1.
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

import large
from solver import slope
from sweep import record
from transformers import LlamaConfig

SETTINGS: dict[str, list[str]] = {
    "rtn": ["--method", "rtn", "--group-size", "64", "--fit", "minmax"],
    "gptq": ["--method", "gptq", "--group-size", "64", "--nsamples", "8", "--seqlen", "256"],
    "nearplane": ["--method", "nearplane", "--group-size", "64", "--nsamples", "8", "--seqlen", "512"],
}
# Of --growth, the same tokens for all methods.
TOKENS = ["--nsamples", "8", "--seqlen", "256"]
DEPTH_WIDTH = 512
# Exponents: of seconds, and of bytes.
THEORY = {"depth": ("1", "0"), "width": ("2 to 3", "1 to 2")}
# In a fresh process: the command line's own code, then its seconds, peak memory and what it held before as the last line.
RUN = """
import sys, time
import torch
threads, tight = int(sys.argv[1]), sys.argv[2] == "tight"
torch.set_num_threads(threads)
if threads == 1:
    time.perf_counter = time.process_time
from nearplane.cli.main import main
from nearplane.machine.memory import peak_resident
from nearplane.run import estimate
start = time.perf_counter()
held, resident = [], estimate.resident
estimate.resident = lambda: held.append(resident()) or held[-1]
if tight:
    estimate.PLENTY = float("inf")
status = main(sys.argv[3:])
spent = time.perf_counter() - start
print()
print(status, spent, peak_resident(), held[-1])
"""


def run(threads: int, words: list[str], tight: bool = False) -> tuple[str, float, float, float]:
    """Return what a command prints, its seconds, its peak memory and what it held before the walk, in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", RUN, str(threads), "tight" if tight else "as found", *words]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True, env=environment
    )
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    status, seconds, peak, base = last.split()
    assert status == "0", words
    return printed, float(seconds), float(peak), float(base)


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


def random_llama(width: int, layers: int, folder: Path) -> Path:
    """Write a random Llama with few words, so that its blocks are nearly all of it."""
    inner, heads = width * 11 // 4, width // 64
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 128}
    settings = {"max_position_embeddings": 512, "tie_word_embeddings": False, "dtype": "bfloat16"}
    large.make(folder, LlamaConfig(**sizes, **settings, architectures=["LlamaForCausalLM"]))
    return folder


def compare(name: str, model: str, flags: list[str], threads: int) -> dict[str, Any]:
    """Plan and run one setting, as this machine's memory allows, and as if there were just enough."""
    printed, planning, _, _ = run(threads, ["plan", model, *flags, "--json"])
    plan = json.loads(printed)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        _, seconds, peak, base = run(threads, ["quantize", model, str(out), *flags])
        report = json.loads((out / "report.json").read_text())
        _, _, tight, tight_base = run(threads, ["quantize", model, str(out) + "-tight", *flags], tight=True)
    memory, spent, predicted = plan["memory"][0], report["seconds"], plan["seconds"]
    return {
        "setting": name,
        "flags": " ".join(flags),
        "seconds": seconds,
        "seconds predicted": predicted["total"],
        "seconds of plan": planning,
        "seconds beyond the start": sum(spent.values()),
        "seconds beyond the start predicted": predicted["total"] - predicted["start"],
        "RSS": tight,
        "RSS predicted": memory["peak"],
        "RSS where memory is plenty": peak,
        "bytes beyond the base": tight - tight_base,
        "bytes beyond the base predicted": memory["peak"] - memory["base"],
        "bytes beyond the base where memory is plenty": peak - base,
        "where": memory["where"],
        "disk": report["bytes"]["after"],
        "disk predicted": plan["disk"]["quantized"] + plan["disk"]["dense"],
        "time ratio": predicted["total"] / seconds,
        "memory ratio": memory["peak"] / tight,
        "phases": spent,
        "phases predicted": predicted,
        "load": os.getloadavg()[0],
    }


def print_growth(settings: list[str], sizes: dict[str, list[int]], threads: int, path: str | None) -> None:
    """Print a table of runs, one of exponents, and write both."""
    print("| over | size | setting | seconds | predicted | ratio | MB | predicted | ratio | MB, plenty | load |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows, exponents = list[dict[str, Any]](), list[dict[str, Any]]()
    for axis, values in sizes.items():
        for size in values:
            width, layers = (DEPTH_WIDTH, size) if axis == "depth" else (size, 1)
            with tempfile.TemporaryDirectory() as scratch:
                model = str(random_llama(width, layers, Path(scratch) / "model"))
                for name in settings:
                    flags = ["--method", name, "--group-size", "64", *TOKENS]
                    row = {"over": axis, "size": size, **compare(name, model, flags, threads)}
                    rows.append(row)
                    cells = [f"{axis} | {size} | {name}", *_pair(row, "seconds beyond the start", 1, 2)]
                    cells += [*_pair(row, "bytes beyond the base", 1e6, 0)]
                    cells += [f"{row['bytes beyond the base where memory is plenty'] / 1e6:.0f}", f"{row['load']:.1f}"]
                    print("| " + " | ".join(cells) + " |", flush=True)
                    if path:
                        record(path, rows, threads)
    print("| over | setting | seconds, exponent | of the plan | theory | bytes, exponent | of the plan | theory |")
    print("|---|---|---|---|---|---|---|---|")
    for axis, values in sizes.items():
        for name in settings:
            mine = [row for row in rows if (row["over"], row["setting"]) == (axis, name)]
            keys = ("seconds beyond the start", "bytes beyond the base")
            found = [slope(values, [row[key + end] for row in mine]) for key in keys for end in ("", " predicted")]
            time, memory = THEORY[axis]
            exponents.append({"over": axis, "sizes": values, "setting": name, "exponents": found})
            print(
                f"| {axis} | {name} | {found[0]:.2f} | {found[1]:.2f} | {time} | {found[2]:.2f} | {found[3]:.2f} | {memory} |"
            )
    if path:
        record(path, [*rows, *exponents], threads)


def _pair(row: dict[str, Any], key: str, unit: float, digits: int) -> list[str]:
    """Cells of what was found, what was predicted, and their ratio."""
    found, predicted = row[key], row[key + " predicted"]
    return [f"{found / unit:.{digits}f}", f"{predicted / unit:.{digits}f}", f"{predicted / found:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="of --growth, methods; all")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--growth", action="store_true", help="random models of several depths and widths")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16], metavar="BLOCKS")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="INPUTS")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.growth:
        sizes = {"depth": args.depths, "width": args.widths}
        print_growth(args.settings or ["gptq", "nearplane"], sizes, args.threads, args.json)
        return
    print("| setting | seconds | predicted | ratio | RSS, MB | predicted | ratio | RSS, plenty | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = str(cut(args.layers, Path(scratch)))
        for name in args.settings or SETTINGS:
            row = compare(name, model, SETTINGS[name], args.threads)
            rows.append(row | {"layers": args.layers})
            print(f"| {name} | {row['seconds']:.1f} | {row['seconds predicted']:.1f} | {row['time ratio']:.2f} | "
                  f"{row['RSS'] / 1e6:.0f} | {row['RSS predicted'] / 1e6:.0f} | {row['memory ratio']:.2f} | "
                  f"{row['RSS where memory is plenty'] / 1e6:.0f} | {row['load']:.1f} |", flush=True)  # fmt: skip
            if args.json:
                record(args.json, rows, args.threads)


if __name__ == "__main__":
    main()
