"""ONNX Runtime GenAI on a CPU, of a checkpoint that its own model builder converts first. The contract is in contract.py.

    PYTHON runs/engines/onnxruntime.py [--options '{"accuracy": 4, "dense_head": false}'] FOLDER IDS OUT

Options: ``accuracy`` is the builder's ``accuracy_level``: 1, float32 activations, or 4, of 8 bits, its own choice;
``dense_head`` keeps a dense head, and a tied embedding, as they are, where the builder would round them to 4 bits. With
the defaults, 1 and true, what is left of a difference is arithmetic.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# This file has the name of a library that the engine imports.
HERE = str(Path(__file__).resolve().parent)
sys.path = [path for path in sys.path if path != HERE and Path(path or ".").resolve() != Path(HERE)]
import numpy as np
import onnxruntime_genai as og

sys.path.append(HERE)
import contract


def build(folder: Path, out: Path, options: list[str]) -> None:
    """Convert a checkpoint. What the builder prints goes to standard error."""
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
    words += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache"), "--extra_options", *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"the model builder ended with {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")


def run(checkpoint: Path, ids: np.ndarray, greedy: int, options: dict[str, Any]) -> contract.Ran:
    """Convert, then feed token by token: some builds give the logits of the last position only."""
    accuracy = options.get("accuracy", 1)
    kept = ["nodes_to_exclude=/lm_head/MatMul", "shared_embeddings=false"] if options.get("dense_head", True) else []
    rows, tokens = [], []
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "onnx"
        build(checkpoint, built, [f"accuracy_level={accuracy}", *kept])
        model = og.Model(str(built))
        for sequence in ids:
            settings = og.GeneratorParams(model)
            settings.set_search_options(max_length=len(sequence) + greedy + 1, do_sample=False)
            generator, found, chosen = og.Generator(model, settings), [], []
            for token in sequence:
                generator.append_tokens(np.array([token], dtype=np.int32))
                found.append(np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1))
            last = found[-1]
            for _ in range(greedy):
                chosen.append(int(last.argmax()))
                generator.append_tokens(np.array(chosen[-1:], dtype=np.int32))
                last = np.array(generator.get_output("logits"), dtype=np.float32).reshape(-1)
            rows.append(np.stack(found))
            tokens.append(chosen)
    arithmetic = {1: "float32", 4: "activations of 8 bits"}.get(accuracy, f"accuracy level {accuracy}")
    return contract.Ran(contract.log_softmax(np.stack(rows)), np.array(tokens), arithmetic)


if __name__ == "__main__":
    contract.main(run, "onnxruntime-genai", ["onnxruntime-genai", "onnxruntime", "transformers", "torch"])
