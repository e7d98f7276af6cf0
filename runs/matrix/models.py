"""The models of the engines' matrix: tiny random ones of many kinds, and the demo model, which is real."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from nearplane.models.locate import locate

SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 192, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 192, "n_positions": 64, "rotary_dim": 32,
    "ffn_dim": 192, "word_embed_proj_dim": 128, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
    "tie_word_embeddings": False, "moe_intermediate_size": 64, "shared_intermediate_size": 64, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 64, "first_k_dense_replace": 1, "mamba_d_state": 16, "sliding_window": 8,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": 32,
    "kv_lora_rank": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
HYBRID = {"layer_types": ["attention", "mamba"], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1}
# Kinds of models: a type, what differs from SIZES, and what the kind stands for.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "gate and up, fewer key heads"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, "a tied head"),
    "llama, 192 wide": (
        "llama", {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 288}, "sizes 256 does not divide",
    ),
    "qwen2": ("qwen2", {}, "biases"),
    "qwen3": ("qwen3", {}, "norms of queries and keys"),
    "mistral": ("mistral", {}, "a sliding window"),
    "gemma2": ("gemma2", {"tie_word_embeddings": True}, "soft caps, windows in every other layer"),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, "windows, two rotary bases"),
    "phi3": ("phi3", {}, "stored fused: qkv, gate and up"),
    "gpt_neox": ("gpt_neox", {}, "stored fused: qkv by heads; biases"),
    "opt": ("opt", {}, "learned positions, biases"),
    "starcoder2": ("starcoder2", {}, "no gate, biases"),
    "stablelm": ("stablelm", {}, "partial rotary"),
    "olmo2": ("olmo2", {}, "norms behind"),
    "cohere": ("cohere", {"tie_word_embeddings": True}, "attention beside the MLP"),
    "granite": ("granite", {}, "multipliers"),
    "smollm3": ("smollm3", {}, "layers without rotary"),
    "gptj": ("gptj", {}, "attention beside the MLP"),
    "bloom": ("bloom", {"tie_word_embeddings": True}, "stored fused: qkv by heads; ALiBi"),
    "mpt": ("mpt", {}, "ALiBi"),
    "mixtral": ("mixtral", {"intermediate_size": 64}, "experts w1, w3, w2"),
    "qwen3_moe": ("qwen3_moe", {}, "experts"),
    "qwen2_moe": ("qwen2_moe", {}, "experts, a shared one"),
    "olmoe": ("olmoe", {"intermediate_size": 64}, "experts"),
    "deepseek_v2": ("deepseek_v2", LATENT, "experts, latent attention"),
    "glm4_moe": ("glm4_moe", {"head_dim": 32}, "experts, shared ones"),
    "granitemoe": ("granitemoe", {"intermediate_size": 64}, "experts stored fused"),
    "granitemoeshared": ("granitemoeshared", {"intermediate_size": 64}, "experts stored fused, a shared one"),
    "granitemoehybrid": ("granitemoehybrid", {"intermediate_size": 64, **HYBRID}, "experts stored fused, Mamba 2"),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 64}, "experts stored fused, biases"),
    "jamba": ("jamba", {"intermediate_size": 64}, "experts, Mamba"),
}  # fmt: skip
TEXTS = (
    "The capital of France is Paris, and the river that flows through the city from the east to the west is called the Seine.",
    "A nearest plane is found column by column: each weight is rounded, and what the rounding cost is pushed into the others.",
)
FAMILIES = tuple(MODELS)[1:]
EXPERTS = r"experts\."
# The same kinds where llama.cpp computes what the real models of that kind say, and not what transformers' defaults say.
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}
WINDOWS = ["sliding_attention"] * 5 + ["full_attention"]
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.5,
}
MODELS |= {
    "llama, 256 wide": (
        "llama", {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 256}, "sizes 256 divides",
    ),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}, "biases, rotary ones too"),
    "qwen3_moe, summing to 1": ("qwen3_moe", {"norm_topk_prob": True}, "experts"),
    "gemma2, heads of 32": ("gemma2", GEMMA, "soft caps, windows in every other layer, a tied head"),
    "gemma3, 6 layers": (
        "gemma3_text", {**GEMMA, "layer_types": WINDOWS, "num_hidden_layers": 6}, "windows, two rotary bases, a tied head",
    ),
    "mixtral, no window": ("mixtral", {"intermediate_size": 64, "sliding_window": None}, "experts w1, w3, w2"),
    "starcoder2, no window": ("starcoder2", {"sliding_window": None, "tie_word_embeddings": True}, "no gate, biases, tied head"),
    "cohere, scale 1": ("cohere", {"tie_word_embeddings": True, "logit_scale": 1.0}, "attention beside the MLP, a tied head"),
    "phi3, no window": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 64}, "fused: qkv, gate and up"),
    "mistral, no window": ("mistral", {"sliding_window": None}, "fewer key heads"),
    "smollm3, no window": ("smollm3", {"sliding_window": None}, "layers without rotary"),
    "gemma2, no window": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 64}, "soft caps, a tied head"),
    "gpt_neox, 4 times wider between": ("gpt_neox", {"intermediate_size": 512}, "stored fused: qkv by heads; biases"),
    "gptj, 4 times wider between": ("gptj", {"n_inner": 512}, "attention beside the MLP"),
    "granite, multiplied": ("granite", MULTIPLIERS, "multipliers"),
}  # fmt: skip
DEMO = "SmolLM2-135M-Instruct"
MODELS[DEMO] = ("llama", {}, "a real model; a tied head")
GGUF_FAMILIES = (
    "llama", "llama, tied", "llama, 192 wide", "llama, biased", "qwen2", "qwen3", "qwen3_moe, summing to 1", "mixtral, no window",
    "gemma2, heads of 32", "gemma3, 6 layers", "phi3, no window", "granite, multiplied", "olmo2", "stablelm",
    "starcoder2, no window", "cohere, scale 1",
)  # fmt: skip
# Without those in which mlx-lm takes a tiny model's configuration for another one: page.md says which.
MLX_FAMILIES = (
    "llama, tied",
    "llama, 192 wide",
    "llama, biased",
    "qwen2",
    "qwen3",
    "mistral, no window",
    "gemma2, no window",
    "gemma3",
    "phi3, no window",
    "gpt_neox, 4 times wider between",
    "opt",
    "starcoder2, no window",
    "stablelm",
    "olmo2",
    "cohere",
    "granite, multiplied",
    "smollm3",
    "gptj, 4 times wider between",
    "bloom",
    "mpt",
    "mixtral, no window",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "gpt_oss",
)
OPENVINO_FAMILIES = (
    *(model for model in MLX_FAMILIES if model not in ("mpt", "bloom", "gpt_neox, 4 times wider between")), "gpt_neox",
)  # fmt: skip
ONNX_FAMILIES = (
    *(model for model in MLX_FAMILIES if model not in ("gemma2, no window", "smollm3")), "gemma2", "smollm3, no window",
)  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Save a random model of a kind, whose weights are large enough that its layers do something; give its folder.

    The demo model is not made: its own folder is given.
    """
    if name == DEMO:
        return locate("demo")
    if folder.exists():
        return folder
    kind, changes, _ = MODELS[name]
    default = transformers.AutoConfig.for_model(kind)
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)} | changes
    config = transformers.AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name and "shared" not in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            elif parameter.dim() == 2:
                parameter.mul_(3)
    model.save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(sizes["vocab_size"])}, unk_token="w0")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return folder


def tokens(model: str, folder: Path) -> list[list[int]]:
    """Two sequences of 24 tokens: random ones of a tiny model, those of two sentences of the demo model."""
    if model == DEMO:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return [tokenizer(text)["input_ids"][:24] for text in TEXTS]
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
