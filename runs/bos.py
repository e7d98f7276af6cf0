"""What BOS in each calibration window does to a quantized model: the same windows with and without it, both ways measured.

    python runs/bos.py --calibration VALID.txt --test TEST.txt        (3 bits, group 64, asymmetric; 32 x 512 tokens)

The model is a stand-in: the tokenizer of SmolLM2-135M-Instruct puts no BOS before a text. Here its post-processor is set to
put its ``bos_token`` there. That model was not trained on windows that begin so.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from nearplane import Evaluation, evaluate, quantize
from nearplane.data.text import opening_of, read_text, tokenize
from nearplane.models.locate import locate
from nearplane.models.source import load_tokenizer


def stand_in(model: str, folder: Path) -> Path:
    """Copy a model, its tokenizer changed to put BOS before a text."""
    shutil.copytree(locate(model), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.save_pretrained(folder)
    return folder


def windows(folder: Path, dataset: str, count: int, seqlen: int, seed: int) -> dict[str, torch.Tensor]:
    """Draw windows that begin at the same places, (count, seqlen), with BOS and without."""
    tokenizer, text = load_tokenizer(folder), read_text(dataset, "calibration")
    opening = opening_of(tokenizer, text)
    assert len(opening) == 1, opening
    ids = tokenize(tokenizer, text, opening, marked=False)
    start = torch.randint(0, len(ids) - seqlen, (count,), generator=torch.Generator().manual_seed(seed))
    found = ids[start[:, None] + torch.arange(seqlen)]
    return {"with": torch.cat([torch.full((count, 1), opening[0]), found[:, :-1]], 1), "without": found}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="text to measure on")
    parser.add_argument("--methods", nargs="+", default=["gptq", "nearplane"])
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="windows of seqlen tokens that are measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        folder = stand_in(args.model, Path(scratch) / "model")

        def measured(model: Path, bos: bool, reference: Path | None = None) -> Evaluation:
            return evaluate(
                model, dataset=args.test, seqlen=args.seqlen, windows=args.windows, bos=bos, reference=reference
            )

        original = [measured(folder, bos).perplexity for bos in (True, False)]
        print(f"original: perplexity with BOS {original[0]:.3f}, without {original[1]:.3f}", flush=True)
        print(
            "| method | seed | calibrated | perplexity, BOS | KL, BOS | perplexity, none |\n|---|---|---|---|---|---|"
        )
        for seed in args.seeds:
            drawn = windows(folder, args.calibration, args.nsamples, args.seqlen, seed)
            for method in args.methods:
                for form, ids in drawn.items():
                    out = Path(scratch) / f"{method}-{form}-{seed}"
                    settings = {"method": method, "bits": 3, "group_size": 64, "sym": False, "progress": False}
                    quantize(folder, out, dataset=ids, nsamples=args.nsamples, seqlen=args.seqlen, **settings)
                    found, other = measured(out, True, folder), measured(out, False)
                    cells = f"{found.perplexity:.3f} | {found.kl:.4f} | {other.perplexity:.3f}"
                    print(f"| {method} | {seed} | {form} BOS | {cells} |", flush=True)
                    shutil.rmtree(out)


if __name__ == "__main__":
    main()
