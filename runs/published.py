"""The published methods, and ours, on SmolLM2-135M-Instruct: 3 bits, group 64, asymmetric, mean of three calibration draws.

    python runs/published.py --calibration wikitext2-valid.txt --test wikitext2-test.txt [--seeds 0 1 2] [--out runs/published]

Calibrates on 16 x 512 tokens; perplexity on the first 4 windows of 1,024 tokens of the test text. Every finished run is
kept in OUT.json, so that an interrupted study goes on where it was; the table goes to OUT.md.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from quality import commit

from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, Method, NearPlane, ResComp, evaluate, quantize

METHODS: dict[str, Method] = {
    "RTN": RTN(),
    "GPTQ": GPTQ(order="activation"),
    "GPTAQ": GPTAQ(order="activation"),
    "GPTAQ released": GPTAQ(order="activation", variant="released"),
    "ResComp": ResComp(order="activation"),
    "ResComp released": ResComp(order="activation", variant="released"),
    "ResComp on GPTQ": ResComp(order="activation", base="gptq"),
    "NearPlane": NearPlane(),
}


def measure(method: Method, fit: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Quantize with one draw of calibration windows and measure the checkpoint."""
    scratch = Path(tempfile.mkdtemp())
    try:
        grid = Grid(bits=3, group_size=64, sym=False, fit=fit)  # type: ignore[arg-type]
        draw = Calibration(dataset=args.calibration, nsamples=16, seqlen=512, seed=seed)
        report = quantize("demo", scratch / "model", method=method, grid=grid, calibration=draw, progress=False)
        result = evaluate(scratch / "model", dataset=args.test, seqlen=1024, windows=4)
    finally:
        shutil.rmtree(scratch)
    return {
        "perplexity": result.perplexity,
        "mean_error": report.totals["mean_error"],
        "seconds": report.totals["seconds"],
        "commit": commit(),
    }


def table(results: dict[str, dict[str, object]], original: float) -> str:
    """Markdown: mean and spread over seeds; hessian is the fit that NearPlane runs with by default."""
    lines = ["| method | grid fit | perplexity, mean of seeds | each seed |", "|---|---|---|---|"]
    lines.append(f"| original, 16 bits | | {original:.2f} | |")
    for fit in ("minmax", "mse", "hessian"):
        for name in METHODS:
            values = [float(str(r["perplexity"])) for key, r in results.items() if key.startswith(f"{name}/{fit}/")]
            if values:
                each = ", ".join(f"{v:.1f}" for v in values)
                lines.append(f"| {name} | {fit} | {statistics.mean(values):.2f} | {each} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fits", nargs="+", default=["minmax", "mse"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="runs/published")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = Path(args.out + ".json")
    kept = json.loads(path.read_text()) if path.exists() else {"results": {}}
    if "original" not in kept:
        kept["original"] = evaluate("demo", dataset=args.test, seqlen=1024, windows=4).as_dict()
    kept["machine"] = {"processor": platform.processor() or platform.machine(), "threads": args.threads}
    for seed in args.seeds:
        for fit in args.fits:
            for name in args.methods:
                key = f"{name}/{fit}/{seed}"
                if key in kept["results"] or (name == "RTN" and seed != args.seeds[0]):
                    continue
                kept["results"][key] = measure(METHODS[name], fit, seed, args)
                print(key, kept["results"][key], flush=True)
                path.write_text(json.dumps(kept, indent=1))
    Path(args.out + ".md").write_text(table(kept["results"], kept["original"]["perplexity"]))
    print(Path(args.out + ".md").read_text())


if __name__ == "__main__":
    main()
