"""GGUF files of tiny random models, as llama.cpp's converter writes them: templates for runs/engines.py and the tests.

    python runs/gguf_templates.py FOLDER NEW.gguf

The file is in float32 and has no vocabulary. ``ARCHITECTURES`` says which kinds of models are known.
Before runs/engines.py quantizes a model, its template runs in llama.cpp, and must equal transformers.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from torch import Tensor

# A module's name in transformers behind "model.layers.N.", and a tensor's behind "blk.N.".
LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
BEFORE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
BEHIND = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
AROUND = {"input_layernorm": "attn_norm", **BEHIND, "pre_feedforward_layernorm": "ffn_norm"}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Keys = Callable[[gguf.GGUFWriter, Any], object]


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a type of model."""

    name: str
    norms: dict[str, str] = field(default_factory=lambda: BEFORE)
    """Names of the norms of a layer."""
    paired: bool = False
    """Whether rotary columns of queries and keys lie in pairs: rows are permuted, where transformers has halves."""
    shifted: bool = False
    """Whether norms are stored plus one."""
    keys: tuple[Keys, ...] = ()
    """What writes further metadata."""


def experts(writer: gguf.GGUFWriter, config: Any) -> None:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def window(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def caps(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def multipliers(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def parallel(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def logit_scale(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)


ARCHITECTURES = {
    "llama": Architecture("llama", paired=True),
    "mistral": Architecture("llama", paired=True),
    "mixtral": Architecture("llama", paired=True, keys=(experts,)),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", keys=(experts,)),
    "gemma2": Architecture("gemma2", AROUND, shifted=True, keys=(window, caps)),
    "gemma3_text": Architecture("gemma3", AROUND, shifted=True, keys=(window,)),
    "phi3": Architecture("phi3", keys=(phi3,)),
    "granite": Architecture("granite", paired=True, keys=(multipliers,)),
    "olmo2": Architecture("olmo2", BEHIND),
    "stablelm": Architecture("stablelm", keys=(parallel,)),
    "starcoder2": Architecture("starcoder2"),
    "cohere": Architecture("command-r", keys=(logit_scale,)),
}


def pairs(weight: Tensor, heads: int) -> Tensor:
    """Interleave the halves of each head's rows."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def tensors(model: Any) -> dict[str, Tensor]:
    """Give the tensors of a model by llama.cpp's names."""
    config, found = model.config, dict[str, Tensor]()
    known = ARCHITECTURES[config.model_type]
    names = {**LINEARS, **known.norms}
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        plain = value.float() + (1 if known.shifted and "norm" in module else 0)
        if module in ENDS:
            if module != "lm_head" or not config.tie_word_embeddings:
                found[f"{ENDS[module]}.{leaf}"] = plain
            continue
        _, _, index, inner = module.split(".", 3)
        block = f"blk.{index}"
        if leaf == "gate_up_proj":
            gate, up = plain.chunk(2, 1)
            found |= {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        elif leaf == "down_proj":
            found[f"{block}.ffn_down_exps.weight"] = plain
        else:
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(names[inner])
            found[f"{block}.{names[inner]}.{leaf}"] = pairs(plain, heads) if known.paired and heads else plain
    return found


def rotary(writer: gguf.GGUFWriter, config: Any, head: int) -> None:
    """Write the bases and the width of rotary embeddings."""
    given = config.rope_parameters
    plain = given.get("full_attention", given)
    writer.add_rope_freq_base(plain["rope_theta"])
    if "sliding_attention" in given:
        writer.add_rope_freq_base_swa(given["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(int(head * plain.get("partial_rotary_factor", 1)))


def write(config: Any, tensors: dict[str, Any], path: Path, type: str = "F32", tokens: Sequence[str] = ()) -> Path:
    """Write tensors and the metadata of a model.

    ``type``: of matrices, except routers, which are F32 as all else. ``tokens``: the vocabulary; none where empty.
    """
    known = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, known.name)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(0 if type == "F32" else 1)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", None) or config.norm_epsilon)
    rotary(writer, config, head)
    for keys in known.keys:
        keys(writer, config)
    writer.add_tokenizer_model("none")
    if tokens:
        writer.add_token_list(tokens)
    for name, value in tensors.items():
        data, kind = np.ascontiguousarray(value, dtype=np.float32), Type.F32
        if data.ndim > 1 and "gate_inp" not in name and type != "F32":
            kind = Type[type]
            data = data.astype(np.float16) if type == "F16" else gguf.quants.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_folder(folder: Path, path: Path) -> Path:
    """Write the file of the model in a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return write(model.config, tensors(model), path)


def widened(config: Any, file: Path, path: Path) -> Path:
    """Write a file again in float32, by the decoders of the package gguf."""
    found = gguf.GGUFReader(file).tensors
    made = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype("float32") for t in found}
    return write(config, made, path)


if __name__ == "__main__":
    of_folder(Path(sys.argv[1]), Path(sys.argv[2]))
