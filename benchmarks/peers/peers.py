"""Other toolkits on the same model, tokens, bits and group size, judged by our evaluator on the checkpoints they wrote.

    python benchmarks/peers/peers.py --calibration wikitext2-valid.txt --test wikitext2-test.txt [--peers gptqmodel-gptaq ...]
        [--envs ~/.cache/nearplane-peers] [--model demo] [--bits 3] [--nsamples 32] [--seeds 0]

Makes one virtual environment per toolkit (minutes, and gigabytes), runs it there on one CPU thread pool of --threads, with
3 bits, asymmetric groups of 64, activation order and its own search for scales where it has one, and measures perplexity
as runs/quality.py does: 32k tokens of the test text, KL on the first 8k. A result is one line of --out; what is there is not run
again. A toolkit that fails is reported and left out.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nearplane import Calibration, load
from nearplane.core.errors import NearplaneError
from nearplane.evaluation.perplexity import evaluate
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer, open_source

TORCH = "torch==2.13.0"
# Environment: what pip is asked for, step by step.
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "gptqmodel": [  # asks for a newer torch than there is for CPUs, so its requirements are named here
        [TORCH, "transformers", "accelerate", "datasets", "safetensors", "tokenicer", "device-smi", "logbar", "pypcre"],
        [
            "threadpoolctl",
            "pillow",
            "requests",
            "protobuf",
            "ninja",
            "torchao",
            "defuser",
            "dill",
            "setuptools",
            "wheel",
        ],
        ["--no-deps", "--no-build-isolation", "gptqmodel==7.7.0"],
    ],
    "llmcompressor": [[TORCH, "llmcompressor==0.14.0.1"]],
    "autoround": [[TORCH, "auto-round"]],
}
# Row: environment, and the last argument of its script.
PEERS: dict[str, tuple[str, str]] = {
    "gptqmodel-gptq": ("gptqmodel", "gptq"),
    "gptqmodel-gptaq": ("gptqmodel", "gptaq"),
    "llmcompressor-gptq": ("llmcompressor", "gptq"),
    "autoround-0": ("autoround", "0"),
    "autoround-200": ("autoround", "200"),
}
HERE = Path(__file__).parent
WINDOWS_TOKENS = 32768


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment, made when it is not there."""
    python = folder / name / "bin" / "python"
    done = folder / name / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        for step in ENVIRONMENTS[name]:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *step], check=True)
        done.touch()
    return python


def measure(peer: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize with a toolkit and evaluate what it wrote."""
    name, kind = PEERS[peer]
    python = environment(name, args.envs)
    draw = Calibration(dataset=args.calibration, nsamples=args.nsamples, seqlen=512, seed=seed)
    tokens = draw.load(open_source(args.model).tokenizer)
    scratch = Path(tempfile.mkdtemp())
    try:
        windows = scratch / "windows.json"
        windows.write_text(json.dumps(tokens.ids.tolist()))
        script = str(HERE / f"{name}_run.py")
        command = [str(python), script, str(locate(args.model)), str(windows), str(scratch / "out")]
        threads = {"OMP_NUM_THREADS": str(args.threads)}
        start = time.perf_counter()
        subprocess.run([*command, str(args.bits), str(args.group_size), kind], check=True, env=os.environ | threads)
        seconds = time.perf_counter() - start
        count = math.ceil(WINDOWS_TOKENS / 1024)
        written = min((scratch / "out").rglob("config.json"), default=scratch / "out" / "nothing").parent
        tokenizer, texts = load_tokenizer(locate(args.model)), {"dataset": args.test, "seqlen": 1024, "windows": count}
        found = evaluate(load(written, packed=False), tokenizer, **texts, reference=load(args.model), compared=8)
    finally:
        shutil.rmtree(scratch)
    return {"perplexity": found.perplexity, "kl": found.kl, "seconds": seconds, "threads": args.threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS)[:-1])
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "nearplane-peers")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers.jsonl"))
    args = parser.parse_args()
    settings = f"{Path(args.model).name}|{args.bits}|{args.group_size}|{args.nsamples}"
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    known = {json.loads(line)["cell"] for line in lines}
    for seed in args.seeds:
        for peer in args.peers:
            cell = f"{settings}|{peer}|{seed}"
            if cell in known:
                continue
            try:
                found = measure(peer, seed, args)
            except (subprocess.CalledProcessError, NearplaneError, OSError) as error:
                print(f"{cell}: left out, {error}", file=sys.stderr)
                continue
            with args.out.open("a") as file:
                file.write(json.dumps({"cell": cell, **found}) + "\n")
            print(cell, found, flush=True)


if __name__ == "__main__":
    main()
