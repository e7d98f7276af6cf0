"""Run a checkpoint in ONNX Runtime GenAI, in an environment that has it and not nearplane.

    python runs/engine_onnxruntime.py FOLDER IDS.json OUT.npz

IDS.json is a list of lists of token ids. FOLDER is converted by GenAI's own model builder for a CPU. Activations are float32
(``accuracy_level=1``), and a dense head stays dense (``nodes_to_exclude``, and ``shared_embeddings=false`` where the
head is tied), so that what is left of a difference is arithmetic. By default the builder rounds activations to 8 bits, and
a dense head to 4. OUT.npz has for the list i: ``logprobs_i``, float32 (tokens, vocabulary), of each position, and
``greedy_i``, the token ids that follow. Needs onnxruntime-genai (0.18 was run), onnxruntime, onnx-ir, torch, transformers.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy


def build(folder: Path, out: Path, options: list[str]) -> None:
    """Convert a checkpoint. What the builder prints goes to standard error."""
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
    words += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache"), "--extra_options", *options]
    done = subprocess.run(words, stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"the model builder refuses {folder}: status {done.returncode}, its reason is above")


def run(model: object, ids: list[int], new: int) -> tuple[numpy.ndarray, list[int]]:
    """Give log-probabilities of every position, and the greedy tokens that follow."""
    import onnxruntime_genai as og

    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + new, do_sample=False, repetition_penalty=1.0)
    rows, tokens = [], []
    generator = og.Generator(model, settings)
    for position in range(len(ids)):  # one by one: some builds give the logits of the last position only
        generator.append_tokens(numpy.array([ids[position]], dtype=numpy.int32))
        rows.append(numpy.array(generator.get_output("logits"), dtype=numpy.float32).reshape(-1))
    while len(tokens) < new and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    logits = numpy.stack(rows)
    high = logits.max(1, keepdims=True)
    return logits - high - numpy.log(numpy.exp(logits - high).sum(1, keepdims=True)), tokens


def main() -> None:
    """Convert, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--new", type=int, default=16, help="greedy tokens behind each list")
    parser.add_argument("--accuracy", default="1", help="accuracy_level: 1 float32 activations, 4 of 8 bits")
    given = parser.parse_args()
    import onnxruntime_genai as og

    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "onnx"
        dense = ["nodes_to_exclude=/lm_head/MatMul", "shared_embeddings=false"]
        build(given.folder, built, [f"accuracy_level={given.accuracy}", *dense])
        model, found = og.Model(str(built)), {}
        for number, ids in enumerate(json.loads(given.ids.read_text())):
            logprobs, tokens = run(model, ids, given.new)
            found |= {f"logprobs_{number}": logprobs, f"greedy_{number}": numpy.array(tokens)}
    numpy.savez(given.out, **found)
    version = importlib.metadata.version("onnxruntime-genai")
    print(json.dumps({"engine": "onnxruntime-genai", "version": version, "lists": len(found) // 2}))


if __name__ == "__main__":
    main()
