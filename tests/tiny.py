"""Tiny random models of many architectures, saved as ordinary transformers folders with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers

VOCABULARY = 128
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 64, "rotary_dim": 8,
    "ffn_dim": 96, "word_embed_proj_dim": 64, "d_model": 64, "num_layers": 2, "attention_heads": 4, "n_layers": 2, "n_heads": 4,
    "max_seq_len": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "dim": 64, "hidden_dim": 96, "embedding_size": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_ff": 96, "d_kv": 16, "num_heads": 4,
    "num_decoder_layers": 2, "decoder_start_token_id": 1, "image_size": 32, "patch_size": 8, "num_mel_bins": 16,
    "max_source_positions": 24, "max_target_positions": 32, "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
# Linears per stage of the first block, known from each architecture's definition.
STAGES = {
    "llama": [3, 1, 2, 1],
    "qwen2": [3, 1, 2, 1],
    "qwen3": [3, 1, 2, 1],
    "mistral": [3, 1, 2, 1],
    "gemma2": [3, 1, 2, 1],
    "gemma3_text": [3, 1, 2, 1],
    "olmo2": [3, 1, 2, 1],
    "granite": [3, 1, 2, 1],
    "starcoder2": [3, 1, 1, 1],
    "opt": [3, 1, 1, 1],
    "gpt_neo": [3, 1, 1, 1],
    "phi3": [1, 1, 1, 1],  # fused qkv and gate_up
    "gpt2": [1, 1, 1, 1],  # Conv1D
    "bloom": [1, 1, 1, 1],
    "gpt_neox": [1, 1, 1, 1],
    "mpt": [1, 1, 1, 1],
    "phi": [4, 1, 1],  # parallel block: q, k, v and fc1 read one norm
    "cohere": [5, 1, 1],  # parallel block: q, k, v, gate, up
    "gptj": [4, 1, 1],
    "falcon": [2, 1, 1],  # parallel block, its own Linear class
}
# Of models that are no decoders, the class that a checkpoint names.
CLASSES = {
    "bert": "BertForMaskedLM", "roberta": "RobertaModel", "distilbert": "DistilBertForMaskedLM", "electra": "ElectraModel",
    "mpnet": "MPNetForMaskedLM", "modernbert": "ModernBertForMaskedLM", "deberta-v2": "DebertaV2Model",
    "t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
    "vit": "ViTForImageClassification", "deit": "DeiTModel", "dinov2": "Dinov2Model", "swin": "SwinModel",
    "swinv2": "Swinv2Model", "clip": "CLIPModel", "siglip": "SiglipModel", "albert": "AlbertModel", "wav2vec2": "Wav2Vec2ForCTC",
    "audio-spectrogram-transformer": "ASTModel", "moonshine": "MoonshineForConditionalGeneration",
    "speech_to_text": "Speech2TextForConditionalGeneration", "wav2vec2-bert": "Wav2Vec2BertForCTC",
}  # fmt: skip
# Configurations of towers inside one, sized like the others.
PARTS = {"text_config", "vision_config"}
# Where a configuration class computes a field from others and refuses it.
REFUSED = {
    "falcon": ("head_dim", "num_kv_heads"),
    "swin": ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_layers"),
    "swinv2": ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_layers"),
}
EXTRA: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 96},
    "swin": {"depths": [2, 2], "embed_dim": 32, "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "swinv2": {"depths": [2, 2], "embed_dim": 32, "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "clip": {"projection_dim": 32},
    # Of sound, sizes that the folder's feature extractor must know.
    "audio-spectrogram-transformer": {"max_length": 64, "time_stride": 8, "frequency_stride": 8},
    "speech_to_text": {"input_feat_per_channel": 16, "max_source_positions": 600, "conv_channels": 32},
    "wav2vec2-bert": {"feature_projection_input_dim": 32},
    "wav2vec2": {
        "conv_dim": [16] * 5,
        "conv_stride": [5, 4, 4, 4, 4],
        "conv_kernel": [10, 4, 4, 4, 4],
        "num_feat_extract_layers": 5,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
    },
}
# Of mixtures of experts, whatever a configuration calls them: 4 experts, 2 for each token.
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_top_k": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 48, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "intermediate_size_mlp": 96, "first_k_dense_replace": 1, "moe_layer_start_index": 0, "moe_layer_interval": 1,
    "interleave_moe_layer_step": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "mamba_d_state": 4,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # multi-head latent attention
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {}, "deepseek_v2": LATENT, "deepseek_v3": LATENT, "gpt_oss": {}, "olmoe": {},
    "phimoe": {}, "granitemoe": {}, "jamba": {}, "glm4_moe": {}, "ernie4_5_moe": {}, "minimax_m2": {}, "dots1": {},
    "llama4_text": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
}  # fmt: skip


def build(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A random model of one model_type, weights large enough that its layers do something."""
    default = transformers.AutoConfig.for_model(kind)
    sizes = {k: v for k, v in SIZES.items() if hasattr(default, k) and k not in REFUSED.get(kind, ())}
    for part in PARTS & vars(default).keys():
        sizes[part] = {k: v for k, v in SIZES.items() if hasattr(getattr(default, part), k)}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **EXTRA.get(kind, {}), **settings})
    torch.manual_seed(seed)
    make = (
        getattr(transformers, CLASSES[kind])._from_config
        if kind in CLASSES
        else transformers.AutoModelForCausalLM.from_config
    )
    model = make(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def build_mixture(kind: str, **settings: Any) -> Any:
    """A random mixture of experts, whose experts differ and whose router is not undecided."""
    default = transformers.AutoConfig.for_model(kind)
    sizes = {k: v for k, v in EXPERTS.items() if hasattr(default, k) and kind != "dbrx"}
    return with_experts(build(kind, **{**sizes, **MIXTURES[kind], **settings}))


def with_experts(model: Any) -> Any:
    """The model, its experts drawn at random: as they are made, some are not."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and "shared" not in name:  # some are left as they were allocated, some are zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def save(model: Any, folder: Path) -> Path:
    """Write the model and a word-level tokenizer of its vocabulary."""
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def marking(folder: Path, first: str = "<s>", last: str = "</s>", template: str | None = None) -> Path:
    """Let the tokenizer in a folder put BOS, token 1, before each text and EOS, token 2, behind it; an empty word: none."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    marks = [(word, number) for word, number in ((first, 1), (last, 2)) if word]
    words = {word: i for word, i in words.items() if i not in dict(marks).values()} | dict(marks)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shape = f"{first} $A {last}".strip()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=shape, special_tokens=marks)
    names = {key: word for key, word in (("bos_token", first), ("eos_token", last)) if word}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def with_text(folder: Path, words: int = 2000, **settings: Any) -> Path:
    """A Llama in ``folder/model``, and beside it ``text.txt`` to calibrate on."""
    (folder / "text.txt").write_text(text(words))
    return save(build("llama", **settings), folder / "model")


def one_shard(folder: Path) -> Path:
    """Put a checkpoint's tensors, which come in a shard for each block, into one file, which is easier to damage.

    The sums of what was written go: they are another folder's.
    """
    (folder / "SHA256SUMS").unlink()
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= safetensors.torch.load_file(path)
        path.unlink()
    shard, index = "model-00001-of-00001.safetensors", folder / "model.safetensors.index.json"
    safetensors.torch.save_file(state, folder / shard, metadata={"format": "pt"})
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": dict.fromkeys(sorted(state), shard)}, indent=2))
    return folder


def text(words: int, seed: int = 0) -> str:
    """A text of that many tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (words,), generator=generator)
    return " ".join(f"w{i}" for i in ids.tolist())


def tokens(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token windows."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def batch(kind: str, samples: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the forward of one of ``CLASSES`` reads."""
    generator = torch.Generator().manual_seed(seed)
    images, mels = (
        torch.randn(samples, 3, 32, 32, generator=generator),
        torch.randn(samples, 16, 48, generator=generator),
    )
    ids, decoded = tokens(samples, length, seed), tokens(samples, 6, seed + 1)
    if kind in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": images}
    if kind == "whisper":
        return {"input_features": mels, "decoder_input_ids": decoded}
    if kind == "wav2vec2":
        return {"input_values": torch.randn(samples, 8000, generator=generator)}  # 6 frames
    if kind in ("vit", "deit", "dinov2", "swin", "swinv2"):
        return {"pixel_values": images}
    return {"input_ids": ids} | ({"decoder_input_ids": decoded} if kind in ("t5", "bart") else {})
