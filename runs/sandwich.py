"""What the target behind a norm is worth on a model whose norms follow the sublayers, trained here for want of a real one.

    python runs/sandwich.py [--kind gemma3_text] [--steps 700] [--bits 3 2] [--out runs/sandwich.jsonl]

No pretrained model with sandwich norms can be had offline. So a small one of transformers' own class (6 blocks, width 128,
1.3M weights) is trained for some minutes on Python's documentation and standard library, with a BPE of 1024 tokens of its own.
The last fifth of the documentation is held out. Calibration: 32 windows of 256 tokens of the first part, three draws.

Figures, on the held-out text: KL per token to the original, perplexity, and the relative error of the residual stream behind
each block. A cell is a line; a second call measures nothing again.
"""

import argparse
import math
import pydoc_data.topics
import sysconfig
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import tokenizers
import torch
import transformers
from cells import Kept
from quality import commit

import nearplane
from nearplane import GPTAQ, GPTQ, RTN, Calibration, Grid, Method, NearPlane, ResComp

ROWS: dict[str, Method] = {
    "RTN": RTN(),
    "GPTQ": GPTQ(),
    "GPTAQ": GPTAQ(),
    "ResComp": ResComp(),
    "NearPlane, --no-sandwich": NearPlane(sandwich=False),
    "NearPlane, --no-residual: weights alone": NearPlane(residual=False),
    "NearPlane": NearPlane(),
}
VOCABULARY, LENGTH, BATCH, RATE, WARM = 1024, 128, 16, 3e-3, 50
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 384, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 128, "query_pre_attn_scalar": 32,
}  # fmt: skip
DRAWS, SAMPLES, WINDOW, TEST_WINDOWS = 3, 32, 256, 64


def texts() -> tuple[str, str, str]:
    """Documentation to train and calibrate on, documentation held out, and source code to train on."""
    pages = "\n\n".join(pydoc_data.topics.topics.values())
    cut = int(0.8 * len(pages))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    return pages[:cut], pages[cut:], "\n".join(file.read_text(errors="ignore") for file in files)


def train(kind: str, folder: Path, steps: int) -> None:
    """Train a small model of a model type and save it with its tokenizer."""
    first, _, code = texts()
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = split, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=split.alphabet()
    )
    backend.train_from_iterator([first, code[:1_000_000]], trainer)
    ids = torch.tensor(backend.encode(code).ids + 3 * backend.encode(first).ids)
    known = transformers.AutoConfig.for_model(kind)
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in SIZES.items() if hasattr(known, k)})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARM) * (0.03 + 0.97 * cosine)
        batch = torch.stack([ids[a : a + LENGTH] for a in torch.randint(0, len(ids) - LENGTH, (BATCH,)).tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"{kind}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)
    marks = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logarithms of probabilities, and the stream behind each block."""
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return out.logits.float().log_softmax(-1), list(out.hidden_states[1:])


def loss(logs: torch.Tensor, ids: torch.Tensor) -> float:
    return float(-logs[:, :-1].gather(2, ids[:, 1:, None]).mean())


def cell(folder: Path, method: Method, bits: int, group: int, seed: int, ids: torch.Tensor) -> dict[str, Any]:
    """One checkpoint against its original."""
    reference, streams = run(nearplane.load(folder), ids)
    draw = Calibration(dataset=str(folder / "calibration.txt"), nsamples=SAMPLES, seqlen=WINDOW, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        grid = Grid(bits=bits, group_size=group, sym=False)
        report = nearplane.quantize(
            folder, Path(scratch) / "out", method=method, grid=grid, calibration=draw, progress=False
        )
        logs, found = run(nearplane.load(Path(scratch) / "out"), ids)
    stream = [
        float((a - b).square().sum() / a.square().sum()) for a, b in zip(streams[:-1], found[:-1], strict=True)
    ]  # the last one has passed the final norm
    return {
        "kl": float((reference.exp() * (reference - logs)).sum(-1).mean()),
        "perplexity": math.exp(loss(logs, ids)),
        "original": math.exp(loss(reference, ids)),
        "stream": [round(error, 5) for error in stream],
        "seconds": round(sum(report.seconds.values()), 1),
        "commit": commit(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=["gemma3_text"])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "nearplane-sandwich")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.disable_progress_bar()
    kept = Kept(args.out)
    first, test, _ = texts()
    for kind in args.kind:
        folder = args.models / f"{kind}-{args.steps}"
        if not (folder / "config.json").exists():
            train(kind, folder, args.steps)
        (folder / "calibration.txt").write_text(first)
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(test).input_ids
        ids = torch.tensor(tokens[: WINDOW * min(TEST_WINDOWS, len(tokens) // WINDOW)]).view(-1, WINDOW)
        for bits in args.bits:
            for row, method in ROWS.items():
                for seed in range(DRAWS if method.needs else 1):
                    key = f"{kind}|{bits}|{args.group_size}|{row}|{seed}"
                    if key not in kept.cells:
                        kept.keep(key, cell(folder, method, bits, args.group_size, seed, ids))
    print(table(kept, args.kind, args.bits, args.group_size))


def table(kept: Kept, kinds: list[str], bits: list[int], group: int) -> str:
    """Markdown: means over the draws; the stream behind the last block but one."""
    lines = [
        "| model | bits | method | KL | perplexity (original) | stream | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        for width in bits:
            for row in ROWS:
                draws = kept.draws(kind, str(width), str(group), row)
                kl, ppl, original, seconds = (
                    mean(draw[name] for draw in draws) for name in ("kl", "perplexity", "original", "seconds")
                )
                stream = mean(draw["stream"][-1] for draw in draws)
                figures = f"{kl:.4f} | {ppl:.2f} ({original:.2f}) | {stream:.4f} | {seconds:.1f}"
                lines.append(f"| {kind} | {width} | {row} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
