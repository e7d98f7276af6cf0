"""OpenVINO on a CPU, through optimum-intel. The contract is in contract.py.

    PYTHON runs/engines/openvino.py FOLDER IDS OUT

OpenVINO's frontend takes 4-bit pack-quantized linears as they are. optimum-intel's own export runs the model first, by
which compressed-tensors makes the weights dense. So the model is loaded here, that hook is removed, and then it is exported.
Inference and the cache are float32, and no activations are rounded. docs/serve.md says which versions were run.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

# This file has the name of the library that it imports.
HERE = str(Path(__file__).resolve().parent)
sys.path = [path for path in sys.path if path != HERE and Path(path or ".").resolve() != Path(HERE)]
import numpy as np
import torch
from optimum.exporters.openvino import export_from_model
from optimum.intel import OVModelForCausalLM
from transformers import AutoModelForCausalLM

sys.path.append(HERE)
import contract

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def run(checkpoint: Path, ids: np.ndarray, greedy: int, options: dict[str, Any]) -> contract.Ran:
    """Export without the hook, then run every sequence."""
    with tempfile.TemporaryDirectory() as scratch:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        hook = getattr(loaded, "ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
        export_from_model(loaded, scratch, task="text-generation-with-past", stateful=True)
        kept = sum(path.stat().st_size for path in Path(scratch).glob("*.bin"))
        model = OVModelForCausalLM.from_pretrained(scratch, ov_config=SETTINGS)

        def logits(row: list[int]) -> torch.Tensor:
            tokens = torch.tensor([row])
            return torch.as_tensor(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]).float()

        rows, tokens = [], []
        for sequence in ids.tolist():
            rows.append(logits(sequence).log_softmax(-1).numpy())
            row = list(sequence)
            for _ in range(greedy):
                row.append(int(logits(row)[-1].argmax()))
            tokens.append(row[len(sequence) :])
    return contract.Ran(np.stack(rows), np.array(tokens), "float32", [f"OpenVINO's weights take {kept} bytes"])


if __name__ == "__main__":
    contract.main(run, "openvino", ["openvino", "optimum-intel", "nncf", "transformers", "compressed-tensors"])
