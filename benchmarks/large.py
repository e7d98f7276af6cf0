"""A model larger than what a run may hold: peak and growth of resident memory, block by block.

    python benchmarks/large.py FOLDER [--blocks 4] [--nsamples 16] [--seqlen 256] [--method gptq] [--threads 2]
        [--json benchmarks/results/large.json]

Makes FOLDER first, if it is not there: a Llama of 3.4B parameters in bfloat16 (hidden 3200, 26 blocks, vocabulary 32000; 6.9 GB,
one shard a block) with random, structured weights: rows and columns of unequal size, a low-rank part, some outliers. Then
quantizes it at 4 bits in a process of its own, which is asked to stop once the given number of blocks is done, and reads that
process's resident memory whenever a block is. Beside each figure stands what it may be: 1.5 GB, one block in float32
twice, the hidden states, and the moments of the widest input.
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
from transformers import LlamaConfig, PreTrainedTokenizerFast

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


def watch(folder: Path, out: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantize; resident memory and time whenever a block is done."""
    words = [sys.executable, "-m", "nearplane", "quantize", str(folder), str(out), "--bits", "4", "--group-size", "64"]
    words += ["--method", args.method, "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen), *args.more]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as process:
        highest = 0.0
        while process.poll() is None and len(rows) < args.blocks:
            time.sleep(0.05)
            try:
                resident = status(process.pid, "VmRSS")
                peak = status(process.pid, "VmHWM")
            except OSError:
                break
            highest = max(highest, resident)
            if (out / ".nearplane" / f"block-{len(rows):05}.json").exists():
                row = {"block": len(rows), "peak GB": peak, "highest in block GB": highest}
                rows.append(row | {"seconds": time.perf_counter() - start})
                print(
                    " ".join(
                        f"{key} {value:.3f}" if value != row["block"] else f"{key} {value}"
                        for key, value in rows[-1].items()
                    ),
                    flush=True,
                )
                highest = 0.0
        process.send_signal(signal.SIGINT)
    return rows


def allowed(args: argparse.Namespace) -> float:
    """GB: see above."""
    h, m, streams = CONFIG.hidden_size, CONFIG.intermediate_size, 1 if args.method == "gptq" else 2
    block, hidden = 4 * (4 * h * h + 3 * h * m), 4 * args.nsamples * args.seqlen * h * streams
    moments = 4 * m * m * (1 if args.method == "gptq" else 2)
    return 1.5 + (2 * block + hidden + moments) / GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    args, args.more = parser.parse_known_args()
    if not args.folder.exists():
        make(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as scratch:
        rows = watch(args.folder, Path(scratch) / "out", args)
    if len(rows) < args.blocks:
        raise SystemExit("the run ended before its blocks were done; run its command by hand to see why.")
    print(f"{args.method}: peak {rows[-1]['peak GB']:.2f} GB; may be {allowed(args):.2f} GB")
    growth = rows[-1]["highest in block GB"] / rows[1]["highest in block GB"] - 1
    print(f"growth of a block's highest from the second block to the last: {100 * growth:.1f}%")
    if args.json:
        record(args.json, [{"method": args.method, "allowed GB": allowed(args), **row} for row in rows], args.threads)


if __name__ == "__main__":
    main()
