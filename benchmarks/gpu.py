"""What a GPU does: packed kernels, a whole decode step, and quantizing. One command does all of it within eight minutes.

    python benchmarks/gpu.py all --json gpu.json [--budget 460] [--parts kernel decode quantize equal] [--dry]
    python benchmarks/gpu.py kernel|decode|quantize|equal --json gpu.json [--budget SECONDS] [--bits 4 3 2]

``kernel``: products of Llama-3-8B's shapes at 1, 16, 64 and 256 rows, in CUDA graphs, weights in turn from more than a cache
holds, beside bfloat16 (cuBLAS) and the floor: the packed bytes at the rate of a device-to-device copy of the same run.
``decode``: a Llama of a billion random parameters, batch 1, with a static cache, a whole step in one CUDA graph: packed at 4
and 3 bits, and bfloat16. The tokens of the graph are those without one.
``quantize``: seconds per block of a model with the blocks of an 8B model, by GPTQ and NearPlane, and the solver's share.
``equal``: codes on the GPU against those on the CPU, in float64.

``all`` runs each part as a process with a budget of its own. A part writes FILE after every row, so a timeout loses one row.
Products of new sizes are tuned first, which takes a budget's first seconds and is kept in the user's cache.
``--dry``: tiny sizes on a CPU, kernels in Triton's interpreter. It shows that the script runs, and its names begin with
"dry" because its seconds mean nothing.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import torch
import transformers
from large import CONFIG, make
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import nearplane
import nearplane.api
from nearplane import GPTAQ, GPTQ, Calibration, Grid, NearPlane
from nearplane.run.estimate import CUDA_CONTEXT, estimate
from nearplane.run.plan import make_plan
from nearplane.runtime import triton, tuned
from nearplane.runtime.layout import Shape
from nearplane.runtime.linear import QuantizedLinear
from nearplane.runtime.words import Words

DEVICE = "cpu" if DRY else "cuda"
SHAPES = [(64, 128)] if DRY else [(4096, 4096), (14336, 4096), (4096, 14336)]  # (out, in): o_proj, gate_proj, down_proj
ROWS = (1, 16) if DRY else (1, 16, 64, 256)
CACHE = 0 if DRY else 200 << 20  # bytes of weights in turn: more than an L2 cache
GB = 1e9
# Seconds of each part: a part begins no row after them, and is ended 20 seconds later.
BUDGETS = {"kernel": 180.0, "decode": 90.0, "quantize": 150.0, "equal": 40.0}
METHODS = {"gptq": GPTQ(), "gptaq": GPTAQ(), "nearplane": NearPlane()}
Row = dict[str, Any]


def packed(out: int, columns: int, bits: int, group: int = 128) -> Words:
    """Random codes in groups of 128, made where they are needed."""
    groups, channels = columns // group, -(-out // 16) * 16
    shape = Shape(out, columns, bits, columns, group, groups, 0, torch.float16)
    codes = torch.randint(-(2**31), 2**31, (columns // 32, bits, channels), dtype=torch.int32, device=DEVICE)
    scales = (torch.rand(groups, channels, device=DEVICE) + 0.5) / (2**bits * columns**0.5)
    zeros = torch.full((groups, channels), 2 ** (bits - 1), dtype=torch.uint8, device=DEVICE)
    words = Words(
        shape, codes, scales.half().view(torch.int16), zeros, torch.empty(0, dtype=torch.int32, device=DEVICE)
    )
    words.check()
    return words


def microseconds(work: Callable[[Any], Any], copies: list[Any]) -> float:
    """One call within a CUDA graph of many, the copies in turn; the median."""
    turn = cycle(copies)
    if DRY:
        start = time.perf_counter()
        work(next(turn))
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench_cudagraph

    return 1000 * float(do_bench_cudagraph(lambda: work(next(turn)), rep=20, return_mode="median"))


def copy_rate() -> float:
    """GB/s, bytes read plus bytes written."""
    a = torch.empty(1 << (12 if DRY else 30), dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (microseconds(lambda _: b.copy_(a), [None]) * 1e-6) / GB


def kernel(args: argparse.Namespace) -> Iterator[Row]:
    """Products, the most asked for first."""
    rate = copy_rate()
    yield {"copies GB/s": rate}
    dtype = torch.bfloat16
    # Of a part's time most is compiling: 4 bits at every number of rows come before 3 and 2 bits at many.
    jobs = [(1, bits) for bits in args.bits] + [(n, bits) for bits in args.bits for n in ROWS[1:]]
    plain: dict[Any, float] = {}
    for n, bits in jobs:
        for out, columns in SHAPES:
            x = torch.randn(n, columns, device=DEVICE, dtype=dtype)
            if (n, out, columns) not in plain:
                dense = [torch.randn(out, columns, device=DEVICE, dtype=dtype)]
                dense += [dense[0].clone() for _ in range(CACHE // dense[0].nbytes)]
                plain[n, out, columns] = microseconds(lambda w, x=x: torch.nn.functional.linear(x, w), dense)
                del dense
            one = packed(out, columns, bits)
            weights = [one, *(packed(out, columns, bits) for _ in range(CACHE // one.nbytes))]
            start = time.perf_counter()
            triton.linear(x, one, None)  # tuned and compiled
            waited = time.perf_counter() - start
            row: Row = {"out": out, "in": columns, "bits": bits, "rows": n, "bytes": one.nbytes, "tuning s": waited}
            row |= {"floor us": one.nbytes / rate / GB * 1e6, "bf16 us": plain[n, out, columns]}
            row["packed us"] = microseconds(lambda w, x=x: triton.linear(x, w, None), weights)
            row["choice"] = dataclasses.asdict(
                tuned.choose(tuned.key(one.shape, n, dtype), x.device, n, lambda _: None)
            )
            row |= {"times bf16": row["bf16 us"] / row["packed us"], "times floor": row["packed us"] / row["floor us"]}
            yield row


def llama() -> LlamaForCausalLM:
    """A Llama with random weights in bfloat16, a billion unless dry."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    if DRY:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=128 if DRY else 32000, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def pack(model: LlamaForCausalLM, bits: int) -> None:
    """Put random packed weights in place of the blocks' linears; the head and the embedding stay."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            words = packed(module.out_features, module.in_features, bits, min(128, module.in_features))
            made = QuantizedLinear(words.tiles).to(DEVICE)
            made.like = made.like.bfloat16()
            model.model.layers.set_submodule(name, made)


class Decoder:
    """Greedy decoding with a static cache, step by step, or a step as one CUDA graph."""

    def __init__(self, model: LlamaForCausalLM, length: int) -> None:
        self.model, self.graph, self.length = model, None, length
        self.token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
        self.position = torch.zeros(1, dtype=torch.long, device=DEVICE)
        self.cache = StaticCache(config=model.config, max_cache_len=length)

    def step(self) -> None:
        """Compute the next token, in place: a graph reads and writes the same memory every time."""
        # A mask of its own: transformers' would ask for the length of the cache, which waits for the device.
        unseen = torch.arange(self.length, device=DEVICE) > self.position
        mask = (unseen.to(torch.bfloat16) * torch.finfo(torch.bfloat16).min)[None, None, None]
        found = self.model(
            self.token, attention_mask=mask, past_key_values=self.cache, position_ids=self.position[None],
            cache_position=self.position, use_cache=True,
        )  # fmt: skip
        self.token.copy_(found.logits[:, -1:].argmax(-1))
        self.position.add_(1)

    def restart(self) -> None:
        self.cache.reset()
        self.token.fill_(1), self.position.zero_()

    def record(self) -> None:
        """Record a step, after a few that compile, tune and allocate. Memory stays where it is."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.restart()
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def tokens(self, number: int) -> tuple[Tensor, float]:
        """Decode from the start: the tokens, and seconds per token."""
        self.restart()
        found = torch.zeros(number, dtype=torch.long, device=DEVICE)
        _wait()
        start = time.perf_counter()
        for i in range(number):
            self.step() if self.graph is None else self.graph.replay()
            found[i : i + 1].copy_(self.token[0])
        _wait()
        return found, (time.perf_counter() - start) / number


def _wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


@torch.inference_mode()
def decode(args: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds a token: dense, and packed."""
    number, dense = 4 if DRY else 128, 0.0
    for bits in (16, *(b for b in (3, 4, 2) if b in args.bits)):
        model = llama()
        if bits < 16:
            pack(model, bits)
        held = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
        decoder = Decoder(model, number + 8)
        decoder.tokens(2)
        plain, eager = decoder.tokens(number)
        if not DRY:
            decoder.record()
            decoder.tokens(2)
        recorded, graph = decoder.tokens(number)
        dense = graph if bits == 16 else dense
        row = {"bits": bits, "bytes": held, "ms a token": 1000 * graph, "ms a token without a graph": 1000 * eager}
        row |= {"times bf16": dense / graph, "same tokens": torch.equal(plain, recorded)}
        if DRY:
            start = torch.ones(1, 1, dtype=torch.long)
            found = model.generate(start, max_new_tokens=number, min_new_tokens=number, do_sample=False)
            row["as generate"] = torch.equal(found[0, 1:], plain)
        yield row
        del model, decoder


def blocks_of_8b(folder: Path, blocks: int) -> Path:
    """A checkpoint with the blocks of an 8B model (vocabulary 32000), made if it is not there."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": 128}
    if DRY:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"vocab_size": 128, "head_dim": 16}
    if not folder.exists():
        make(folder, CONFIG.__class__.from_dict({**CONFIG.to_dict(), **sizes, "num_hidden_layers": blocks}))
    return folder


def quantize(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds per block, after a run of one small window that loads libraries."""
    folder = blocks_of_8b(args.folder or Path(tempfile.mkdtemp()) / "model", args.blocks)
    grid = Grid(bits=4, group_size=32 if DRY else 128)
    windows = (2, 16) if DRY else (args.nsamples, args.seqlen)
    first = 0.0
    for name, (nsamples, seqlen) in [("warm", (2, 16)), *((name, windows) for name in args.methods)]:
        method, calibration = METHODS.get(name, GPTQ()), Calibration(nsamples=nsamples, seqlen=seqlen)
        settings: Row = {"method": method, "grid": grid, "calibration": calibration, "device": DEVICE}
        planned = estimate(make_plan(folder, **settings)).memory[-1].peak - CUDA_CONTEXT
        if not DRY:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            report = nearplane.quantize(folder, Path(scratch) / "out", progress=False, check=False, **settings)
            whole = time.perf_counter() - start
        if name == "warm":
            continue
        spent = report.seconds
        block = sum(spent.values()) / args.blocks
        first = first or block
        row = {
            "method": name,
            "blocks": args.blocks,
            "seconds": whole,
            "s a block": block,
            "times first": block / first,
        }
        row |= {"solver's share": (spent.get("prepare", 0.0) + spent.get("solve", 0.0)) / sum(spent.values())}
        row |= {"GB": 0.0 if DRY else torch.cuda.max_memory_allocated() / GB, "planned GB": planned / GB}
        yield row | {f"{k} s": v for k, v in spent.items()} | {"error": report.totals["mean_error"]}


def equal(args: argparse.Namespace) -> Iterator[Row]:
    """Codes on both devices in float64, which differ in the last digits only."""
    complete = nearplane.api.complete
    nearplane.api.complete = lambda *given: dataclasses.replace(complete(*given), compute=torch.float64)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128, "head_dim": 32}
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch) / "model", CONFIG.__class__.from_dict({**CONFIG.to_dict(), **sizes}))
        for name in args.methods:
            found = []
            for device in ("cpu", DEVICE):
                out = Path(scratch) / f"{name}-{len(found)}"
                settings = {"method": METHODS[name], "grid": Grid(bits=3, group_size=32), "format": "gptq_v2"}
                calibration = Calibration(nsamples=4, seqlen=32)
                nearplane.quantize(
                    Path(scratch) / "model", out, device=device, calibration=calibration, progress=False, check=False, **settings
                )  # fmt: skip
                found.append({k: v for path in sorted(out.glob("*.safetensors")) for k, v in load_file(path).items()})
            differing = [k for k, v in found[0].items() if not torch.equal(v, found[1][k])]
            yield {"method": name, "tensors": len(found[0]), "differing": differing}


PARTS = {"kernel": kernel, "decode": decode, "quantize": quantize, "equal": equal}


def stored(path: Path) -> Row:
    """What the file has, or its head."""
    if path.exists():
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if "parts" not in found:
            raise SystemExit(f"{path} is another benchmark's; choose a new file.")
        return found
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = "no GPU" if DRY else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"commit": commit.stdout.strip(), "machine": platform.platform(), "device": device, **versions, "parts": {}}


def write(path: Path, name: str, part: Row) -> None:
    """Store a part beside others."""
    whole = stored(path)
    whole["parts"][("dry " if DRY else "") + name] = part
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    temporary.replace(path)


def one(name: str, args: argparse.Namespace) -> None:
    """Run a part, row by row."""
    start, rows, end = time.perf_counter(), list[Row](), "done"
    work = PARTS[name](args)
    write(args.json, name, {"rows": rows, "seconds": 0.0, "end": "no row"})
    for row in work:
        rows.append(row)
        spent = time.perf_counter() - start
        shown = {k: v for k, v in row.items() if k != "choice"}
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True)
        if spent > args.budget:
            end = "out of time"
        write(args.json, name, {"rows": rows, "seconds": spent, "end": end if end != "done" else "cut off"})
        if end != "done":
            return
    write(args.json, name, {"rows": rows, "seconds": time.perf_counter() - start, "end": end})


def everything(args: argparse.Namespace, given: list[str]) -> int:
    """Run all parts, each a process, within the budget. A part that fails does not stop the others."""
    failed, ends = 0, time.perf_counter() + args.budget
    for name in args.parts:
        seconds = min(BUDGETS[name], ends - time.perf_counter() - 20)
        if seconds <= 0:
            print(f"{name}: no time left")
            continue
        print(f"{name}, {seconds:.0f} s", flush=True)
        command = [sys.executable, __file__, name, *given, "--budget", f"{seconds:.0f}"]
        try:
            failed += subprocess.run(command, check=False, timeout=seconds + 20).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{name}: ended; its rows so far are kept")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("all", *PARTS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=460.0, help="seconds")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--folder", type=Path, help="of the model to quantize, made if it is not there")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=["gptq", "nearplane"])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.what != "all":
        one(args.what, args)
        return 0
    given = ["--json", str(args.json), *(["--dry"] if args.dry else []), "--blocks", str(args.blocks)]
    given += ["--bits", *map(str, args.bits), "--methods", *args.methods, "--nsamples", str(args.nsamples)]
    given += ["--seqlen", str(args.seqlen), *(["--folder", str(args.folder)] if args.folder else [])]
    return everything(args, given)


if __name__ == "__main__":
    sys.exit(main())
