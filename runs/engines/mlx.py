"""mlx-lm on a CPU runs a folder. The contract is in contract.py.

    MLX_PYTHON runs/engines/mlx.py [--options '{"dtype": "float32"}'] CHECKPOINT IDS OUT

The folder is loaded as ``mlx_lm.load`` does, its tokenizer aside. Options: ``dtype``, "float32" (the default) to widen every
float after loading, scales and biases too, so that only names, codes and arithmetic are compared; "stored" to leave them.
"""

import sys
from pathlib import Path
from typing import Any

# This file has the name of the package.
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
import contract


def wide(model: Any) -> None:
    """Widen every float of a model to float32: what was stored keeps its value."""
    small = (mx.float16, mx.bfloat16)
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in small else x, model.parameters()))


def run(checkpoint: Path, ids: np.ndarray, greedy: int, options: dict[str, Any]) -> contract.Ran:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(checkpoint)
    dtype = options.get("dtype", "float32")
    if dtype == "float32":
        wide(model)
    logits, tokens = [], []
    for row in ids.tolist():
        logits.append(np.array(model(mx.array([row])).astype(mx.float32))[0])
        cache, step, found = make_prompt_cache(model), mx.array([row]), []
        for _ in range(greedy):
            found.append(int(mx.argmax(model(step, cache=cache)[0, -1])))
            step = mx.array([found[-1:]])
        tokens.append(found)
    told = np.array(tokens, dtype=np.int64).reshape(len(ids), greedy)
    return contract.Ran(contract.log_softmax(np.stack(logits)), told, f"{dtype}, MLX's CPU kernels")


contract.main(run, "mlx", ["mlx-lm", "mlx"])
