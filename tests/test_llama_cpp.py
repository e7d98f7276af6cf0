"""llama.cpp for real, in the environment that ``make test`` makes (.engines/llama): the cheapest engine of runs/engines/."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
import tiny
import torch

import nearplane

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("NEARPLANE_ENGINES", ROOT / ".engines")) / "llama" / "bin" / "python"
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": False}

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="there is no .engines/llama (make engines)")


def ran(path: Path, folder: Path, ids: list[list[int]]) -> Any:
    (folder / "ids.json").write_text(json.dumps(ids))
    runner = ROOT / "runs" / "engines" / "llama.py"
    words = [str(PYTHON), str(runner), str(path), str(folder / "ids.json"), str(folder / "out.npz")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "out.npz")


def test_llama_cpp_computes_what_transformers_does(tmp_path: Path) -> None:
    """A dense model, so that the runner, its contract and the engine itself are known to be right."""
    model = tiny.build("llama", tie_word_embeddings=False)
    ids = tiny.tokens(2, 12)
    file = templates.write(tmp_path / "m.gguf", model.config, templates.tensors(model), "F32")
    answer = ran(file, tmp_path, ids.tolist())
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1).numpy()
        greedy = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)[:, 12:]
    assert json.loads(str(answer["about"]))["versions"].keys() == {"xllamacpp", "gguf"}
    assert answer["logprobs"].shape == (2, 12, 128) and np.abs(answer["logprobs"] - expected).max() < 1e-4
    assert answer["greedy"].tolist() == greedy.tolist()


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K"])
def test_llama_cpp_computes_what_nearplane_wrote(type: str, tmp_path: Path) -> None:
    """A K type whose blocks divide the inputs, and a plain one; runs/engines.py tries all types and more kinds of models.

    What is left is llama.cpp's rounding of inputs to 8 bits, a mean of 0.01 there. Each of the eight greedy tokens is the most
    likely one, or behind it by no more than that rounding explains.
    """
    folder = tiny.save(tiny.build("llama", **WIDE), tmp_path / "model")
    template = templates.of_folder(folder, tmp_path / "template.gguf", "F32")
    out, ids = tmp_path / "out", tiny.tokens(2, 12)
    settings: dict[str, Any] = {"format": "gguf", "gguf_type": type, "template": template}
    nearplane.quantize(folder, out, method=nearplane.RTN(), progress=False, **settings)
    answer = ran(out / f"model-{type}.gguf", tmp_path, ids.tolist())
    model, made = nearplane.load(out, arithmetic="exact"), torch.tensor(answer["greedy"])
    with torch.no_grad():
        ours = model(input_ids=ids).logits.log_softmax(-1).numpy()
        after = model(input_ids=torch.cat([ids, made[:, :-1]], 1)).logits.log_softmax(-1)[:, 11:]
        dense = tiny.build("llama", **WIDE)(input_ids=ids).logits.log_softmax(-1).numpy()
    off = np.abs(answer["logprobs"] - ours).mean()
    behind = after.amax(-1) - after.gather(-1, made[..., None])[..., 0]
    assert behind.shape == (2, 8) and behind.max() <= 0.05
    assert off < 0.03 and off < 0.2 * np.abs(dense - ours).mean()


def test_what_llama_cpp_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGML" * 16)
    answer = ran(tmp_path / "bad.gguf", tmp_path, [[3, 4]])
    assert answer.files == ["about"] and "magic" in json.loads(str(answer["about"]))["refused"]
