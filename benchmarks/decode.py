"""Tokens per second of a whole model that decodes one sequence: plain, fused, torch's bfloat16, llama.cpp, and an empty model.

    python benchmarks/decode.py [--threads 1] [--rounds 5] [--prompt 128] [--new 64] [--model CHECKPOINT] [--gguf FILE]
        [--llama PYTHON] [--json benchmarks/results/decode.json]
    python benchmarks/decode.py --scaling [--rounds 10] [--prompt 128] [--new 16] [--model CHECKPOINT] [--json FILE]

Without --model the demo model is rounded to nearest at 4 bits, symmetric, in groups of 32: codes that Q4_0 holds as they are.
--gguf is the same checkpoint by ``nearplane convert``, and is made where it is not given. llama.cpp runs in an environment with
xllamacpp: --llama, or $NEARPLANE_ENGINES/llama/bin/python; it is left out without one. Rounds of all contenders are interleaved,
on the same prompt, and every one decodes greedily. Their medians count: CPU time with one thread, wall time with more.
Bytes: of the weights that one token reads.

By default the model's forward is called token by token; "generate" is transformers' ``generate``. Two empty models tell what
Python costs alone: a forward that gives the same logits at once, and one that calls as many modules as the model has, which do
nothing.

--scaling measures two threads against one instead, of fused decoding: wall time of single tokens, sampling included, in short
rounds of --new tokens that alternate in one process. Medians of all tokens count. "others": cores that other processes used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep import record
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import nearplane
from nearplane.evaluation.speed import token_bytes
from nearplane.runtime import cpu, fused
from nearplane.runtime.linear import set_arithmetic

Round = Callable[[Tensor, int], tuple[float, list[int]]]  # of a prompt and a number of tokens: seconds a token, tokens


def clock(threads: int) -> Callable[[], float]:
    """CPU time of the process where one thread works, else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


def stepped(model: Any, threads: int) -> Round:
    """Decode by the model's forward."""

    def once(prompt: Tensor, new: int) -> tuple[float, list[int]]:
        now, tokens = clock(threads), list[int]()
        with torch.inference_mode():
            out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            start = now()
            for _ in range(new):
                token = out.logits[0, -1].argmax()
                tokens.append(int(token))
                out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        return (now() - start) / new, tokens

    return once


class Arrivals:
    """A streamer that notes when tokens come."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.times = now, list[float]()

    def put(self, _: Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        """Do nothing."""


def generated(model: Any, threads: int) -> Round:
    """Decode by transformers' ``generate``."""

    def once(prompt: Tensor, new: int) -> tuple[float, list[int]]:
        arrivals = Arrivals(clock(threads))
        with torch.inference_mode():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new + 1, do_sample=False, eos_token_id=None,
                streamer=arrivals,
            )  # fmt: skip
        return (arrivals.times[-1] - arrivals.times[1]) / new, out[0, prompt.shape[1] : -1].tolist()

    return once


def empty(model: Any, modules: int) -> Any:
    """A model of the same class whose forward calls so many modules that do nothing."""
    config = transformers.LlamaConfig(
        hidden_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=2,
        vocab_size=model.config.vocab_size,
    )
    made: Any = transformers.LlamaForCausalLM(config).eval()
    logits, key = torch.zeros(1, 1, model.config.vocab_size), torch.zeros(1, 1, 1, 2)
    parts = nn.ModuleList(nn.Identity() for _ in range(modules))
    if modules:
        made.add_module("parts", parts)

    def forward(input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        past_key_values.update(key.expand(1, 1, input_ids.shape[1], 2), key.expand(1, 1, input_ids.shape[1], 2), 0)
        x = logits
        for part in parts:
            x = part(x)
        return CausalLMOutputWithPast(logits=x, past_key_values=past_key_values)

    made.forward = forward
    return made


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, gguf: str, threads: int) -> None:
        script = Path(__file__).parent / "peers" / "llama_decode.py"
        self.threads = threads
        self.process = subprocess.Popen(
            [python, str(script), gguf, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()

    def read(self) -> str:
        """Give the next line that is an answer."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith(("ready", "{")):
            if not line:
                sys.exit("llama.cpp ended early; see what it wrote above.")
        return line

    def __call__(self, prompt: Tensor, new: int) -> tuple[float, list[int]]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt[0].tolist(), "new": new}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.read())
        return answer["cpu" if self.threads == 1 else "clock"] / new, answer["tokens"]


WAYS: dict[str, Any] = {"": {}, ", head 8 bits": {"head_bits": 8}, ", bfloat16": {"dtype": "bfloat16"}}


def quantized(args: argparse.Namespace, folder: Path) -> str:
    """Give the checkpoint, which is made where none is given."""
    if args.model is not None:
        return str(args.model)
    grid, checkpoint = nearplane.Grid(bits=4, group_size=32), str(folder / "out")
    nearplane.quantize("demo", checkpoint, method=nearplane.RTN(), grid=grid, progress=False)
    return checkpoint


def set_up(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Round], dict[str, int]]:
    """Load every contender; give them, and the bytes that a token of each reads."""
    checkpoint = quantized(args, folder)
    rounds: dict[str, Round] = {}
    size: dict[str, int] = {}
    for name, settings in WAYS.items():
        model = nearplane.load(checkpoint, device="cpu", **settings)
        for arithmetic in ("a16", "a8"):
            for decode in ("plain", "auto"):
                key = f"{'fused' if decode == 'auto' else 'plain'} {arithmetic}{name}"
                size[key] = size[f"{key}, generate"] = token_bytes(model)
                rounds[key] = chosen(model, arithmetic, decode, stepped(model, args.threads))
                if arithmetic == "a16":
                    rounds[f"{key}, generate"] = chosen(model, arithmetic, decode, generated(model, args.threads))
    modules = sum(1 for _ in model.modules())
    dense = nearplane.load(checkpoint, device="cpu", packed=False, dtype="bfloat16")
    rounds["torch bfloat16"], size["torch bfloat16"] = stepped(dense, args.threads), token_bytes(dense)
    for name, count in (("empty, generate", 0), (f"{modules} empty modules, generate", modules)):
        rounds[name] = generated(empty(model, count), args.threads)
    if args.llama:
        gguf = args.gguf or str(folder / "model.gguf")
        if args.gguf is None:
            nearplane.convert(checkpoint, gguf, progress=False)
        rounds["llama.cpp"], size["llama.cpp"] = LlamaCpp(args.llama, gguf, args.threads), tensor_bytes(gguf)
    return rounds, size


def used() -> float:
    """Seconds of all processors that were not idle so far, as Linux counts them."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def scaling(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Two threads against one, of each way to load the model."""
    checkpoint, found = quantized(args, folder), []
    print(
        "| | ms a token, 1 thread | 2 threads | ratio | of the fastest twentieth | others |\n|---|---|---|---|---|---|"
    )
    for name, settings in WAYS.items():
        model: Any = nearplane.load(checkpoint, device="cpu", **settings)
        if (said := fused.why(model)) != "fused decode":
            raise SystemExit(said)
        times: dict[int, list[float]] = {1: [], 2: []}
        spent, start, own = used(), time.perf_counter(), time.process_time()
        with torch.inference_mode():
            out = model(input_ids=words(checkpoint, args.prompt), use_cache=True, logits_to_keep=1)
            for number in range(args.rounds + 1):  # the first warms up
                for threads, each in times.items():
                    torch.set_num_threads(threads)
                    for _ in range(args.new):
                        begin = time.perf_counter()
                        token = out.logits[0, -1].argmax()
                        out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
                        if number:
                            each.append(time.perf_counter() - begin)
        torch.set_num_threads(args.threads)
        others = (used() - spent - (time.process_time() - own)) / (time.perf_counter() - start)
        row: dict[str, Any] = {"name": name[2:] or "as loaded", "others": others}
        for part, kind in ((0.5, "median"), (0.05, "fastest")):
            one, two = (sorted(tokens)[int(part * len(tokens))] for tokens in times.values())
            row |= {f"{kind} ms, 1": 1e3 * one, f"{kind} ms, 2": 1e3 * two, f"{kind} ratio": one / two}
        found.append(row)
        cells = f"{row['median ms, 1']:.2f} | {row['median ms, 2']:.2f} | {row['median ratio']:.2f}"
        print(f"| {row['name']} | {cells} | {row['fastest ratio']:.2f} | {others:.2f} |", flush=True)
    return found


class LeftOutError(Exception):
    """A contender cannot run as it was asked to."""


def chosen(model: Any, arithmetic: Any, decode: Any, once: Round) -> Round:
    """The same, with an arithmetic and a way to decode that are set, and checked, before the clock starts."""

    def set_first(prompt: Tensor, new: int) -> tuple[float, list[int]]:
        set_arithmetic(model, arithmetic)
        fused.set_decode(model, decode)
        said = fused.why(model)
        if said.startswith("fused") != (decode == "auto"):
            raise LeftOutError(said)
        return once(prompt, new)

    return set_first


def words(checkpoint: str, count: int) -> Tensor:
    """Tokens of the text that nearplane brings along, (1, count)."""
    text = resources.files("nearplane.data").joinpath("embedded/calibration.txt").read_text(encoding="utf-8")
    ids: Tensor = transformers.AutoTokenizer.from_pretrained(checkpoint)(text[: 20 * count], return_tensors="pt")[
        "input_ids"
    ]
    return ids[:, :count]


def tensor_bytes(gguf: str) -> int:
    """Bytes of all weights of a file, whose embedding is the head, too."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(gguf).tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="5; 10 with --scaling")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, help="tokens of a round: 64; 16 with --scaling")
    parser.add_argument("--model")
    parser.add_argument("--gguf")
    engines = os.environ.get("NEARPLANE_ENGINES")
    parser.add_argument("--llama", metavar="PYTHON", default=engines and f"{engines}/llama/bin/python")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.rounds, args.new = args.rounds or (10 if args.scaling else 5), args.new or (16 if args.scaling else 64)
    if args.scaling:
        with tempfile.TemporaryDirectory() as made:
            alternated = scaling(args, Path(made))
        print(f"\n{cpu.best()}, load {os.getloadavg()[0]:.1f}")
        if args.json:
            record(args.json, alternated, 2, isa=cpu.best(), load=os.getloadavg())
        return
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """All contenders beside each other."""
    with tempfile.TemporaryDirectory() as folder:
        rounds, size = set_up(args, Path(folder))
        prompt = words(args.model or f"{folder}/out", args.prompt)
        times: dict[str, list[float]] = {name: [] for name in rounds}
        tokens: dict[str, list[int]] = {}
        for number in range(args.rounds + 1):  # the first warms up
            for name, once in list(rounds.items()):
                try:
                    seconds, tokens[name] = once(prompt, args.new)
                except LeftOutError as reason:
                    print(f"{name}: left out, {reason}", file=sys.stderr)
                    del rounds[name], times[name]
                    continue
                if number:
                    times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    base, load, rate = median.get("llama.cpp"), os.getloadavg(), cpu.read_rate()
    what = "CPU time" if args.threads == 1 else "wall time"
    print(f"{cpu.best()}, {args.threads} thread(s), {what}, reading {rate:.1f} GB/s, load {load[0]:.1f}\n")
    print(
        "| | ms a token | tokens/s | x llama.cpp's time | MB a token | tokens as plain a16 |\n|---|---|---|---|---|---|"
    )
    rows = []
    for name, seconds in median.items():
        row: dict[str, Any] = {"name": name, "ms": 1e3 * seconds, "tokens/s": 1 / seconds, "bytes": size.get(name)}
        row["x llama.cpp"] = None if base is None else seconds / base
        same = [a == b for a, b in zip(tokens[name], tokens["plain a16"], strict=True)]
        row["equal tokens"] = (
            None if "empty" in name else next((i for i, equal in enumerate(same) if not equal), args.new)
        )
        rows.append(row)
        ratio = "" if base is None else f"{seconds / base:.2f}"
        megabytes = "" if name not in size else f"{size[name] / 1e6:.0f}"
        print(f"| {name} | {1e3 * seconds:.2f} | {1 / seconds:.0f} | {ratio} | {megabytes} | {row['equal tokens']} |")
    if args.json:
        record(args.json, rows, args.threads)
        found = json.loads(Path(args.json).read_text())
        found |= {
            "load": load,
            "time": what,
            "read GB/s": rate,
            "isa": cpu.best(),
            "prompt": args.prompt,
            "new": args.new,
        }
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
