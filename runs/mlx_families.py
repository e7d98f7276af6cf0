"""Which model types mlx-lm loads from ``--format mlx``: tiny models, dense and quantized, against nearplane.load.

    PYTHONPATH=tests python runs/mlx_families.py --engine MLX_PYTHON [TYPE ...] [--rows runs/mlx_families.jsonl]

A type that mlx-lm does not load, or not rightly, as a dense model is no fault of the format, and its row says so.
``LOADED`` and ``REFUSED`` of ``nearplane/formats/mlx.py`` are what these rows say.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers

import nearplane
from nearplane import RTN, Grid
from nearplane.checkpoint.config import written_config
from nearplane.core.errors import NearplaneError
from nearplane.formats import mlx
from nearplane.models.locate import BAD_CONFIG

ROOT = Path(__file__).resolve().parents[1]
DENSE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "olmo3", "granite",
    "stablelm", "gpt_neox", "gptj", "gpt_bigcode", "starcoder2", "cohere", "cohere2", "smollm3", "glm", "glm4", "exaone4",
    "helium", "nemotron", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "apertus", "bitnet", "mamba", "falcon_mamba", "lfm2",
    "ministral3", "nanochat", "minicpm3", "gemma3", "gpt2",
)  # fmt: skip
# What mlx-lm takes for granted about sizes.
SIZES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 6}, "gemma3": {}, "cohere2": {"num_hidden_layers": 4},
    "olmo3": {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "exaone4": {"num_hidden_layers": 4, "sliding_window_pattern": "LLLG"},
    "gpt_neox": {"intermediate_size": 256}, "gptj": {"n_inner": 256}, "starcoder2": {"hidden_act": "gelu_pytorch_tanh"},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
}  # fmt: skip
# Sizes of experts and of latent attention that a group of 32 divides.
WIDE = {"moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32}
# Types whose head mlx-lm takes for tied always.
TIED = ("gemma", "gemma2", "gemma3", "cohere", "cohere2")
IDS = [[5, 9, 33, 77, 2, 64, 100, 3, 17, 90, 41, 6]]
CLOSE = 1e-3


def measure(kind: str, place: Path, engine: Path) -> dict[str, Any]:
    """One row: how far mlx-lm is from us, dense and quantized, or what it said."""
    row: dict[str, Any] = {"type": kind}
    try:
        made = tiny.build_mixture if kind in tiny.MIXTURES else tiny.build
        default = transformers.AutoConfig.for_model(kind)
        settings = SIZES.get(kind, {}) | {
            k: v for k, v in WIDE.items() if kind in tiny.MIXTURES and hasattr(default, k)
        }
        untied = {"tie_word_embeddings": False} if hasattr(default, "tie_word_embeddings") and kind not in TIED else {}
        model = made(kind, **{**untied, **settings})
        tiny.save(model, place / "model")
    except (*BAD_CONFIG, RuntimeError, ImportError, OSError) as error:
        return row | {"skipped": f"no tiny model: {type(error).__name__}: {str(error)[:80]}"}
    path = place / "model" / "config.json"
    path.write_text(json.dumps(written_config(json.loads(path.read_text()), type(model.config), model)))
    mlx.REFUSED = {}  # the table is what is measured
    try:
        row["dense"] = compared(engine, place / "model")
        nearplane.quantize(
            place / "model", place / "out", method=RTN(), grid=Grid(4, 32), format="mlx", progress=False, force=True
        )
        row["quantized"] = compared(engine, place / "out")
    except NearplaneError as error:
        return row | {"skipped": str(error).replace(str(place), "")[:160]}
    return row


def compared(engine: Path, folder: Path) -> float | str:
    """The largest difference of a log-probability, or what the engine said."""
    ids, out = folder.parent / "ids.json", folder.parent / "out.npz"
    ids.write_text(json.dumps(IDS))
    out.unlink(missing_ok=True)
    command = [str(engine), str(ROOT / "runs" / "engines" / "mlx.py"), str(folder), str(ids), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if not out.exists():
        return f"ended: {done.stderr.strip()[-200:]}"
    found = np.load(out)
    if "logprobs" not in found:
        return str(json.loads(str(found["about"]))["refused"])[:200]
    with torch.no_grad():
        logits = nearplane.load(folder, packed=False, dtype="float32")(input_ids=torch.tensor(IDS)).logits
    return float(np.abs(torch.log_softmax(logits.float(), -1).numpy() - found["logprobs"]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "mlx_families.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kept = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    rows = {row["type"]: row for row in kept}
    for kind in args.types or (*DENSE, *tiny.MIXTURES):
        with tempfile.TemporaryDirectory() as place:
            rows[kind] = measure(kind, Path(place), args.engine)
        print(json.dumps(rows[kind]), flush=True)
    args.rows.write_text("".join(json.dumps(rows[kind]) + "\n" for kind in sorted(rows)))


if __name__ == "__main__":
    main()
