"""How long GPTQ of a whole model takes: nearplane against GPTQModel and llm-compressor, same tokens, same threads.

    python benchmarks/peers/timing.py [--peers nearplane llmcompressor gptqmodel] [--model demo] [--bits 4] [--group-size 64]
        [--nsamples 32] [--seqlen 512] [--threads 1] [--limit 2400] [--envs ~/.cache/nearplane-peers] [--out FILE.json]

Each runs in a process of its own, in float32, with asymmetric groups, activation order and its default search for scales. Of a
peer the whole process and its quantize() or oneshot() are stated, of nearplane the whole process, from the start of the
interpreter to the finished checkpoint, without the check on fresh windows, which no peer has. Other jobs beside lengthen CPU
seconds, too: compare what had the same beside it. Before a peer is timed it must do a model of two small blocks, which also
builds what it compiles on first use. One that is not through after --limit seconds is ended, and reported with what it had done.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import HERE, environment

from nearplane import Calibration
from nearplane.models.locate import locate
from nearplane.models.source import open_source

# What a peer's log says of a linear that it has solved, or is about to.
TAKEN = re.compile(r"(?:gptq: |Quantizing \d+ module\(s\): \[')([\w.]+_proj)")


def run(command: list[str], threads: int, limit: float, log: Path) -> dict[str, Any]:
    """Run to the end or the limit: seconds, CPU seconds of the whole process, whether it was ended, its exit status."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "COLUMNS": "160"}
    start = time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    pid, ended = 0, False
    while not pid:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not pid:
            if time.perf_counter() - start > limit and not ended:
                ended = True
                os.killpg(child.pid, signal.SIGKILL)
            time.sleep(0.2)
    child.returncode = os.waitstatus_to_exitcode(status)
    found = {"wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime}
    return {**found, "ended": ended, "status": child.returncode}


def peer(name: str, model: str, windows: Path, scratch: Path, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """A peer on a model: ``run``'s figures, the parts its script timed, and how many linears it had taken up."""
    script, out, log = str(HERE / f"{name}_run.py"), scratch / f"{name}-out", scratch / f"{name}.log"
    command = [str(environment(name, args.envs)), script, model, str(windows), str(out)]
    found = run([*command, str(args.bits), str(args.group_size), "plain"], args.threads, limit, log)
    text = log.read_text(errors="replace")
    laps = re.findall(r"^laps (.*)$", text, re.MULTILINE)
    found["parts"] = json.loads(laps[-1]) if laps else {}
    found["linears"] = len(set(TAKEN.findall(text)))
    if not laps and not found["ended"]:
        raise subprocess.CalledProcessError(found["status"], command, text[-2000:])
    return found


def small_model(model: str, folder: Path) -> str:
    """Two small blocks of random weights with the model's tokenizer."""
    import transformers

    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate(model))
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **size, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ours(draw: Calibration, sha256: str, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The command line of nearplane, on windows with that hash."""
    command = [sys.executable, "-m", "nearplane", "quantize", args.model, str(scratch / "out"), "--method", "gptq"]
    command += ["--bits", str(args.bits), "--group-size", str(args.group_size), "--no-sym"]
    command += ["--nsamples", str(draw.nsamples), "--seqlen", str(draw.seqlen), "--no-check"]
    log = scratch / "nearplane.log"
    found = run(command, args.threads, args.limit, log)
    if found["status"]:
        raise subprocess.CalledProcessError(found["status"], command, log.read_text(errors="replace")[-2000:])
    report = json.loads((scratch / "out" / "report.json").read_text())
    if report["data"]["sha256"] != sha256:
        raise ValueError("nearplane took other tokens than the peers were given.")
    return found | {"linears": len(report["linears"]), "phases": report["seconds"]}


def line(name: str, found: dict[str, Any], base: dict[str, Any] | None) -> str:
    """A row of the table."""
    wall, cpu = found.get("parts", {}).get("quantize", (found["wall"], found["cpu"]))
    more = "> " if found["ended"] else ""
    cells = [f"{found['wall']:.0f}", f"{found['cpu']:.0f}", f"{wall:.0f}", f"{cpu:.0f}"]
    cells += [f"{cpu / base['cpu']:.2f}", f"{found['cpu'] / base['cpu']:.2f}"] if base else ["", ""]
    return f"| {name} | {' | '.join(more + cell for cell in cells)} | {found['linears']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["nearplane", "llmcompressor", "gptqmodel"]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=2400)
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "nearplane-peers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw = Calibration(nsamples=args.nsamples, seqlen=args.seqlen)
    tokens = draw.load(open_source(args.model).tokenizer)
    print(
        "| | wall s | CPU s | quantize: wall s | CPU s | quantize / nearplane, CPU | whole / nearplane, CPU | linears |"
    )
    print("|---" * 8 + "|", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    results: dict[str, Any] = {"threads": args.threads, "limit": args.limit, "commit": commit.stdout.strip()}
    results |= {"machine": platform.platform(), "load": os.getloadavg()[0]}
    for name in args.peers:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            windows, few = scratch / "windows.json", scratch / "few.json"
            windows.write_text(json.dumps(tokens.ids.tolist()))
            few.write_text(json.dumps(tokens.ids[:8, :64].tolist()))
            try:
                if name == "nearplane":
                    results[name] = ours(draw, tokens.sha256, scratch, args)
                else:
                    (scratch / "small").mkdir()
                    peer(name, small_model(args.model, scratch / "small"), few, scratch / "small", 900, args)
                    results[name] = peer(name, str(locate(args.model)), windows, scratch, args.limit, args)
            except subprocess.CalledProcessError as error:
                print(f"{name}: left out, {error}\n{error.output or ''}", file=sys.stderr)
                continue
        print(line(name, results[name], results.get("nearplane")), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
