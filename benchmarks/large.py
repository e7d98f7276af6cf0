"""A model larger than what a run may hold: peak and growth of resident memory, block by block.

    python benchmarks/large.py FOLDER [--blocks 4] [--nsamples 16] [--seqlen 256] [--method gptq] [--threads 2]
        [--json benchmarks/results/large.json]

Makes FOLDER first, if it is not there: a Llama of 3.4B parameters in bfloat16 (hidden 3200, 26 blocks, vocabulary 32000; 6.9 GB,
one shard a block) with random, structured weights: rows and columns of unequal size, a low-rank part, some outliers. Then
quantizes it at 4 bits in a process of its own, which is asked to stop once the given number of blocks is done, and reads that
process's peak of resident memory block by block. Any other folder of a Llama will do, and so will ``demo``; with
``--blocks 0`` the whole model is quantized and written. Beside each figure stands what ``plan`` said, and what it may be:
1.5 GB, one block in float32 twice, the hidden states, and the moments of the widest input. FILE keeps the rows of other runs.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sweep import record
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast

from nearplane.models.locate import locate

CONFIG = LlamaConfig(
    hidden_size=3200, intermediate_size=8640, num_hidden_layers=26, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
GB = 1e9


def weight(out: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """(out, width), with the structure that makes a weight unlike noise."""
    w = torch.randn(out, width, generator=generator)
    w += torch.randn(out, 8, generator=generator) @ torch.randn(8, width, generator=generator) / 3
    w *= torch.exp(0.3 * torch.randn(out, 1, generator=generator)) * torch.exp(
        0.3 * torch.randn(width, generator=generator)
    )
    w[:, torch.randint(0, width, (4,), generator=generator)] *= 8
    return (w / w.norm() * out**0.5 * 0.7).bfloat16()


def make(folder: Path, c: LlamaConfig = CONFIG) -> None:
    """The checkpoint, shard by shard."""
    temporary = folder.with_name(folder.name + ".making")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    generator, h, m = torch.Generator().manual_seed(0), c.hidden_size, c.intermediate_size
    kv = h // c.num_attention_heads * c.num_key_value_heads
    shapes = {f"self_attn.{name}_proj": (kv if name in "kv" else h, h) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m)}
    index: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05}-of-{c.num_hidden_layers + 1:05}.safetensors"
        save_file(tensors, temporary / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for k in range(c.num_hidden_layers):
        block = {f"{name}.weight": weight(*shape, generator) for name, shape in shapes.items()}
        block |= {
            f"{name}.weight": torch.ones(h).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")
        }
        shard(k + 1, {f"model.layers.{k}.{name}": value for name, value in block.items()})
    rest = {
        f"{n}.weight": torch.randn(c.vocab_size, h, generator=generator).bfloat16()
        for n in ("model.embed_tokens", "lm_head")
    }
    shard(c.num_hidden_layers + 1, rest | {"model.norm.weight": torch.ones(h).bfloat16()})
    (temporary / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    c.save_pretrained(temporary)
    words = {word: i for i, word in enumerate(["<unk>", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(temporary)
    temporary.rename(folder)


def status(pid: int, field: str) -> float:
    """A figure of /proc/PID/status, in GB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) * 1024 / GB if found else 0.0


def words(args: argparse.Namespace) -> list[str]:
    """The flags of ``plan`` and ``quantize``."""
    found = ["--bits", "4", "--group-size", "64", "--method", args.method]
    return [*found, "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen), *args.more]


def watch(out: Path, args: argparse.Namespace, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Quantize; peak memory, which is counted anew from block to block, and time whenever a block is done."""
    command = [sys.executable, "-m", "nearplane", "quantize", args.folder, str(out), *words(args)]
    start, rows, peak = time.perf_counter(), list[dict[str, Any]](), 0.0
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not args.blocks or len(rows) < args.blocks):
            time.sleep(0.02)
            try:
                peak = status(process.pid, "VmHWM") or peak
                if not (out / ".nearplane" / f"block-{len(rows):05}.json").exists():
                    continue
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
            except OSError:
                break
            rows.append({"block": len(rows), "peak GB": peak, "seconds": time.perf_counter() - start})
            print(f"block {len(rows) - 1}: peak {peak:.3f} GB, {rows[-1]['seconds']:.0f} s", flush=True)
        if args.blocks:
            process.send_signal(signal.SIGINT)
    if not args.blocks and process.returncode == 0:
        rows.append({"block": "the end", "peak GB": peak, "seconds": time.perf_counter() - start})
    return rows


def planned(args: argparse.Namespace, environment: dict[str, str]) -> float:
    """GB that ``plan`` says."""
    command = [sys.executable, "-m", "nearplane", "plan", args.folder, *words(args), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return float(json.loads(done.stdout)["memory"][0]["peak"]) / GB


def allowed(args: argparse.Namespace) -> float:
    """GB: see above."""
    c = AutoConfig.from_pretrained(locate(args.folder))
    h, m, streams = c.hidden_size, c.intermediate_size, 1 if args.method == "gptq" else 2
    block = 4 * (2 * h * h * (1 + c.num_key_value_heads / c.num_attention_heads) + 3 * h * m)
    hidden, moments = 4 * args.nsamples * args.seqlen * h * streams, 4 * m * m * (1 if args.method == "gptq" else 2)
    return 1.5 + (2 * block + hidden + moments) / GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--blocks", type=int, default=4, help="0: all, to the end")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    args, args.more = parser.parse_known_args()
    if args.folder != "demo" and not Path(args.folder).exists():
        make(Path(args.folder))
    environment, near = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}, locate(args.folder).parent
    said = planned(args, environment)
    with tempfile.TemporaryDirectory(dir=None if args.folder == "demo" else near) as scratch:
        rows = watch(Path(scratch) / "out", args, environment)
    if len(rows) < max(args.blocks, 2):
        raise SystemExit("the run ended before its blocks were done; run its command by hand to see why.")
    peak, may, blocks = max(r["peak GB"] for r in rows), allowed(args), [r for r in rows if r["block"] != "the end"]
    growth = blocks[-1]["peak GB"] / blocks[1]["peak GB"] - 1
    print(f"{args.method}: peak {peak:.2f} GB; plan said {said:.2f}; may be {may:.2f}")
    print(f"growth of a block's peak from the second block to the last: {100 * growth:.1f}%")
    if args.json:
        found = {"model": Path(args.folder).name, "method": args.method, "windows": [args.nsamples, args.seqlen]}
        row = {**found, "peak GB": peak, "planned GB": said, "allowed GB": may, "growth": growth, "blocks": rows}
        kept = json.loads(Path(args.json).read_text())["rows"] if Path(args.json).exists() else []
        record(
            args.json, [r for r in kept if any(r[key] != value for key, value in found.items())] + [row], args.threads
        )


if __name__ == "__main__":
    main()
