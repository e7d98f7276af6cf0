"""transformers, with the package compressed-tensors, and nothing of nearplane. The contract is in contract.py.

    PYTHON runs/engines/transformers.py [--options '{"dequantize": true}'] FOLDER IDS OUT

Options: ``dequantize`` loads with ``CompressedTensorsConfig(dequantize=True)``; ``dtype`` ("float32").
"""

import sys
from pathlib import Path
from typing import Any

# This file has the name of the library that it imports.
HERE = str(Path(__file__).resolve().parent)
sys.path = [path for path in sys.path if path != HERE and Path(path or ".").resolve() != Path(HERE)]
import numpy as np
import torch
import transformers

sys.path.append(HERE)
import contract


def run(checkpoint: Path, ids: np.ndarray, greedy: int, options: dict[str, Any]) -> contract.Ran:
    """Load by the class that config.json names, and generate token by token without a cache."""
    more = {}
    if options.get("dequantize"):
        more["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    dtype = options.get("dtype", "float32")
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(checkpoint, dtype=getattr(torch, dtype), output_loading_info=True, **more)
    missing = [name for name in info["missing_keys"] if "rotary" not in name]
    if missing:
        raise RuntimeError(f"weights are filled at random, the first: {sorted(missing)[0]}")
    tokens, width = torch.tensor(ids), ids.shape[1]
    with torch.no_grad():
        logprobs = model.eval()(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
        for _ in range(greedy):
            last = model(input_ids=tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
    return contract.Ran(logprobs.numpy(), tokens[:, width:].numpy(), f"{dtype}, weights dense")


if __name__ == "__main__":
    contract.main(run, "transformers", ["transformers", "compressed-tensors", "torch"])
