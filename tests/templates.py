"""GGUF files of tiny models, written by the ``gguf`` package as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


def rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, the halves of each head interleaved, as llama.cpp's rotary embedding of llama takes them."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def llama_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a llama or a mixtral, by llama.cpp's names."""
    config, found = model.config, dict[str, Tensor]()
    state = {name: value.detach().float() for name, value in model.state_dict().items()}
    for name, value in state.items():
        parts = name.split(".")
        if name.startswith("model.layers.") and ".experts." not in name:
            leaf = ".".join(parts[3:-1])
            if leaf.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if leaf.endswith("q_proj") else config.num_key_value_heads
                found[f"blk.{parts[2]}.{NAMES[leaf]}.{parts[-1]}"] = rotary(value, heads)
                continue
            found[f"blk.{parts[2]}.{NAMES[leaf]}.{parts[-1]}"] = value
        elif name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, 1)
            found |= {f"blk.{parts[2]}.ffn_gate_exps.weight": gate, f"blk.{parts[2]}.ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj"):
            found[f"blk.{parts[2]}.ffn_down_exps.weight"] = value
    found["token_embd.weight"] = state["model.embed_tokens.weight"]
    found["output_norm.weight"] = state["model.norm.weight"]
    if not config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    return found


def write(path: Path, config: Any, tensors: dict[str, Tensor], type: str = "F16", arch: str = "llama") -> Path:
    """Write a file: matrices in ``type``, the rest in F32."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(1)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("none")
    writer.add_token_list([f"w{i}" for i in range(config.vocab_size)])
    for name, value in tensors.items():
        data, kind = value.numpy().astype(np.float32), Type.F32
        if value.dim() > 1 and "gate_inp" not in name and type != "F32":
            kind = Type[type]
            data = data.astype(np.float16) if type == "F16" else gguf.quants.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_folder(folder: Path, path: Path, type: str = "F16") -> Path:
    """Write the file of a llama or a mixtral in a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return write(path, model.config, llama_tensors(model), type)
