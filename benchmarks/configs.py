"""Configurations of Llama 3 8B and 70B and of a model like its 405B, without weights: what docs/large_models.md is made of.

    python benchmarks/configs.py FOLDER          FOLDER/8b/config.json, FOLDER/70b/config.json, FOLDER/405b/config.json

The sizes are the published ones; everything else is transformers' default.
"""

import argparse
import json
from pathlib import Path

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
SHARED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_theta": 500000.0, "dtype": "bfloat16",
}  # fmt: skip


def write(folder: Path) -> list[Path]:
    """One folder a model, each with its config.json."""
    folders = []
    for name, shape in SHAPES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(SHARED | shape, indent=1))
        folders.append(folder / name)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for folder in write(parser.parse_args().folder):
        print(folder)


if __name__ == "__main__":
    main()
