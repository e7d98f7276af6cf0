"""What mlx-lm makes of a folder: log-probabilities of given token ids, and the tokens that it generates greedily.

    /path/to/mlx/bin/python runs/engines/mlx.py FOLDER IDS.json OUT.npz [--new 8] [--float32]

Stands alone: run it by a Python that has ``mlx[cpu]`` and ``mlx-lm``, without nearplane. IDS holds a list of token ids, or
a list of such lists of one length. OUT gets ``logprobs`` (sequences, positions, vocabulary) float32, and ``greedy``
(sequences, new). A folder that mlx-lm refuses ends with one JSON line on standard output, and status 3.
"""

import sys

sys.path.pop(0)  # this file's own name is that of the package

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def wide(model):
    """Cast every floating parameter to float32, scales and biases included: only the arithmetic changes."""
    floats = (mx.float16, mx.bfloat16)
    model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in floats else x, model.parameters()))
    return model


def answer(folder: Path, ids: list[list[int]], new: int, float32: bool) -> dict[str, np.ndarray]:
    """Load the folder as ``mlx_lm.load`` does, its tokenizer aside, and run the model."""
    model, _ = load_model(folder)
    model = wide(model) if float32 else model
    logits, greedy = [], []
    for row in ids:
        out = model(mx.array([row])).astype(mx.float32)
        logits.append(np.array(out - mx.logsumexp(out, axis=-1, keepdims=True))[0])
        cache, step, tokens = make_prompt_cache(model), mx.array([row]), []
        for _ in range(new):
            token = int(mx.argmax(model(step, cache=cache)[0, -1]))
            tokens.append(token)
            step = mx.array([[token]])
        greedy.append(tokens)
    return {"logprobs": np.stack(logits), "greedy": np.array(greedy, dtype=np.int64).reshape(len(ids), new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--float32", action="store_true", help="compute in float32, whatever is stored")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    ids = json.loads(args.ids.read_text())
    ids = ids if isinstance(ids[0], list) else [ids]
    told = {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")}
    try:
        found = answer(args.folder, ids, args.new, args.float32)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is the finding
        print(json.dumps({**told, "error": f"{type(error).__name__}: {str(error)[:500]}"}))
        sys.exit(3)
    np.savez(args.out, **found)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
