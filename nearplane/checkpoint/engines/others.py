"""What llama.cpp, mlx-lm and ONNX Runtime GenAI load: met in runs of these versions, rows of docs/engines.md."""

from nearplane.checkpoint.engines.describe import Described, Model
from nearplane.checkpoint.engines.findings import AWQ, COMPRESSED, Findings, grids_of, online, tail
from nearplane.core.grid import Grid
from nearplane.formats.mlx import GROUPS, LOADED, REFUSED, WIDTHS

LLAMA, MLX, ONNX = "llama.cpp b11549", "mlx-lm 0.32", "ONNX Runtime GenAI 0.18"
OPENVINO = "OpenVINO 2026.4"
ONNX_BITS = (2, 4, 8)
# Types of models of whose sliding window an engine knows nothing. The dense model is computed like that, too.
LLAMA_WINDOWLESS = ("mistral", "mixtral", "phi3", "starcoder2")
MLX_WINDOWLESS = ("gemma2", "mistral", "mixtral", "phi3", "starcoder2")

# Classes of text models in its model builder, read there. Of the rest, twelve were run, and refused.
ONNX_CLASSES = (
    "ChatGLMForConditionalGeneration", "ChatGLMModel", "Ernie4_5ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration", "GptOssForCausalLM",
    "Gemma4UnifiedForConditionalGeneration", "GraniteForCausalLM", "GraniteMoeHybridForCausalLM", "HunYuanDenseV1ForCausalLM",
    "InternLM2ForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Lfm2VlForConditionalGeneration",
    "Lfm2AudioForConditionalGeneration", "LlamaForCausalLM", "MistralForCausalLM", "Mistral3ForConditionalGeneration",
    "NemotronForCausalLM", "OlmoForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM", "Phi3SmallForCausalLM",
    "Phi3VForCausalLM", "Phi4MMForCausalLM", "Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration", "Qwen3ForCausalLM",
    "Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
    "SmolLM3ForCausalLM", "VideoChatFlashQwenForCausalLM", "WhisperForConditionalGeneration",
)  # fmt: skip
# What the builder has and did not convert.
ONNX_FAILED = {
    "Gemma3ForCausalLM": "it looks for one rotary base where the model has two",
    "OlmoForCausalLM": "the dense model, too, comes out otherwise than in transformers",
    "PhiForCausalLM": "it refuses the quantized model",
    "GptOssForCausalLM": "it wants the package optimum to read quantized weights of it",
}

# Types that optimum-intel 2.2, which exports for OpenVINO, refuses beside the transformers 5.5 that it needs; those that ran.
OPENVINO_REFUSED = ("gemma2", "gemma3_text")
OPENVINO_LOADED = (
    "cohere", "gpt_neox", "gptj", "granite", "llama", "mistral", "olmo2", "opt", "phi3", "qwen2", "qwen3", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip


def llama(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of llama.cpp, which Ollama and LM Studio run, too: it reads GGUF only."""
    found.refuse(online(checkpoint))
    found.note(f"{LLAMA} rounds the inputs of quantized matrices to 8 bits")
    _windows(LLAMA, LLAMA_WINDOWLESS, checkpoint.model, found)
    if checkpoint.model is not None and not checkpoint.model.causal:
        found.note(f"whether {LLAMA} has {checkpoint.model.name} was not looked up")


def mlx(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of mlx-lm."""
    found.refuse(online(checkpoint))
    if checkpoint.format == "gptq":
        found.refuse(
            f"{MLX} takes no GPTQ with g_idx, which the layout of nearplane and gptqmodel has; write mlx or awq"
        )
        return
    for grid, shapes in grids_of(checkpoint):
        bits, size = grid.storage_bits, grid.group_size
        reason = tail(grid, shapes)
        if reason is None and bits not in WIDTHS:
            reason = f"{MLX} has {', '.join(map(str, WIDTHS))} bits, not {bits}"
        if reason is None and size not in GROUPS:
            reason = f"{MLX} has groups of {', '.join(map(str, GROUPS))}, not {size}"
        found.refuse(reason)
    if checkpoint.format == AWQ:
        found.note(
            f"{MLX} rounds each offset, scale times zero, to the dtype of the scales; {MLX}'s own format keeps it"
        )
    if checkpoint.model is not None:
        _mlx_model(checkpoint.format, checkpoint.model, found)


def _mlx_model(format: str, model: Model, found: Findings) -> None:
    """Add what is known of a model in mlx-lm."""
    if model.type in REFUSED:
        found.refuse(f"{MLX} does not load a quantized {model.type}: {REFUSED[model.type]}")
    elif format == AWQ and model.experts:
        found.refuse(f"{MLX} loads no experts in the layout awq; write it as mlx")
    elif not model.causal:
        found.note(f"whether {MLX} has {model.name} was not looked up")
    elif model.type and model.type not in LOADED:
        found.note(f"{model.type} was not run in {MLX}")
    _windows(MLX, MLX_WINDOWLESS, model, found)


def onnx(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of ONNX Runtime GenAI, whose model builder makes an ONNX model of a folder."""
    found.refuse(online(checkpoint))
    for grid, shapes in grids_of(checkpoint):
        found.refuse(tail(grid, shapes) or _onnx_grid(checkpoint.format, grid, shapes))
    found.note(
        f"the model builder of {ONNX} makes an ONNX model of it first (python -m onnxruntime_genai.models.builder)"
    )
    if checkpoint.model is not None:
        _onnx_model(checkpoint.model, found)


def _onnx_model(model: Model, found: Findings) -> None:
    """Add what is known of a model in the builder."""
    if model.name not in ONNX_CLASSES:
        found.refuse(f"the model builder of {ONNX} has no {model.name}")
    elif model.name in ONNX_FAILED:
        found.refuse(f"the model builder of {ONNX} does not convert {model.name}: {ONNX_FAILED[model.name]}")
    elif model.experts or not model.causal:
        found.note(f"whether {ONNX} converts {model.name} with these weights was not run")
    elif model.dense:
        found.refuse(
            f"the model builder of {ONNX} ends with an error where some linears of the layers stay dense: quantize all of "
            "them (without --ignore)"
        )
    if model.type in ("mistral", "smollm3"):
        found.note(f"where config.json has a sliding_window, {ONNX} did not run {model.name}")
    if model.type == "phi3":
        found.note(
            f"{ONNX} did not convert Phi-3 with another max_position_embeddings than original_max_position_embeddings"
        )


def _onnx_grid(format: str, grid: Grid, shapes: list[tuple[int, int]]) -> str | None:
    """Tell why the model builder, or a kernel, does not take a grid."""
    bits = grid.storage_bits
    if format == "gptq_v2":
        return f"{ONNX} reads gptq_v2 as version 1, each zero off by one; write it as gptq"
    if bits not in ONNX_BITS:
        return f"the model builder of {ONNX} reads {format} of 2, 4 and 8 bits, not {bits}"
    widths = {grid.group_width(columns) for _, columns in shapes}
    wrong = sorted(width for width in widths if width < 16 or width & (width - 1))
    if not wrong:
        return None
    row = " (one scale per row)" if grid.group_size == -1 else ""
    return f"{ONNX} takes groups of a power of two, 16 at least, not {wrong[0]}{row}"


def openvino(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of OpenVINO, for which optimum-intel exports a folder."""
    found.refuse(online(checkpoint))
    if checkpoint.format != COMPRESSED:
        found.refuse(
            f"{OPENVINO} reads {checkpoint.format} by the package gptqmodel, without which it was refused; with it nothing "
            "was run here, but compressed-tensors of 4 bits in groups was"
        )
        return
    for grid, shapes in grids_of(checkpoint):
        reason = tail(grid, shapes)
        if reason is None and (grid.storage_bits != 4 or grid.group_size == -1):
            size = "of one scale per row" if grid.group_size == -1 else "in groups"
            reason = (
                f"{OPENVINO} takes compressed-tensors of 4 bits in groups only, not {grid.storage_bits} bits {size}"
            )
        found.refuse(reason)
    if any(weight.activations is not None for weight in checkpoint.weights):
        found.refuse(f"{OPENVINO} takes no compressed-tensors whose activations are rounded")
    model = checkpoint.model
    if model is not None and model.experts:
        found.refuse(
            f"{OPENVINO}, by optimum-intel 2.2, computes something else where experts are quantized, without a word, or "
            "refuses the model"
        )
    elif model is not None and model.type in OPENVINO_REFUSED:
        found.refuse(
            f"optimum-intel 2.2, which exports for {OPENVINO}, takes {model.type} with transformers up to 5.0 only"
        )
    elif model is not None and model.type and model.type not in OPENVINO_LOADED:
        found.note(f"{model.type} was not run in {OPENVINO}")
    found.note("a script exports it first, without the hook that makes the weights dense (runs/engines/openvino.py)")


def _windows(engine: str, windowless: tuple[str, ...], model: Model | None, found: Findings) -> None:
    """Tell of a sliding window that an engine does not have."""
    if model is not None and model.type in windowless:
        found.note(
            f"where config.json has a sliding_window, {engine} ignores it: texts longer than it come out otherwise"
        )
