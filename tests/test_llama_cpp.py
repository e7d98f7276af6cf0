"""llama.cpp for real, in the environment that ``make test`` makes (.engines/llama): the cheapest engine of runs/engines/."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import templates
import tiny
import torch

import nearplane

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("NEARPLANE_ENGINES", ROOT / ".engines")) / "llama" / "bin" / "python"
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": False}

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="there is no .engines/llama (make engines)")


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection, halves side by side, as llama.cpp's llama has them: in pairs."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def written(model: Any, path: Path) -> Path:
    """A Llama as a GGUF in float32, without a vocabulary."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight" for ours, theirs in NAMES.items()}
    for name, value in model.state_dict().items():
        weight = value.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        writer.add_tensor(names[name], turned(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    answer = ran(written(model, tmp_path / "m.gguf"), tmp_path, ids.tolist())
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
