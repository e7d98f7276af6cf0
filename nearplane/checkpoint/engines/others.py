"""What llama.cpp, mlx-lm and ONNX Runtime GenAI load."""

from nearplane.checkpoint.engines.describe import Described
from nearplane.checkpoint.engines.findings import Findings, grids_of, online, tail

LLAMA, MLX, ONNX = "llama.cpp b11549", "mlx-lm 0.32", "ONNX Runtime GenAI 0.18"
MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
ONNX_BITS = (2, 4, 8)


def llama(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of llama.cpp, which Ollama and LM Studio run, too: it reads GGUF only."""
    found.refuse(online(checkpoint))
    found.note(f"{LLAMA} rounds the inputs of quantized matrices to 8 bits")
    if checkpoint.model is not None and not checkpoint.model.causal:
        found.note(f"whether {LLAMA} has {checkpoint.model.name} was not looked up")


def mlx(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of mlx-lm."""
    found.refuse(online(checkpoint))
    for grid, shapes in grids_of(checkpoint):
        bits, size = grid.storage_bits, grid.group_size
        reason = tail(grid, shapes)
        if reason is None and bits not in MLX_BITS:
            reason = f"{MLX} has {', '.join(map(str, MLX_BITS))} bits, not {bits}"
        if reason is None and size not in MLX_GROUPS:
            reason = f"{MLX} has groups of {', '.join(map(str, MLX_GROUPS))}, not {size}"
        found.refuse(reason)
    if checkpoint.model is not None and not checkpoint.model.causal:
        found.note(f"whether {MLX} has {checkpoint.model.name} was not looked up")


def onnx(_: str, checkpoint: Described, found: Findings) -> None:
    """Add what is known of ONNX Runtime GenAI, whose model builder makes an ONNX model of a folder."""
    found.refuse(online(checkpoint))
    for grid, shapes in grids_of(checkpoint):
        bits = grid.storage_bits
        reason = tail(grid, shapes)
        if reason is None and checkpoint.format == "gptq_v2":
            reason = f"{ONNX} reads gptq_v2 as version 1, each zero off by one; write it as gptq"
        if reason is None and bits not in ONNX_BITS:
            reason = f"the model builder of {ONNX} reads {checkpoint.format} of 2, 4 and 8 bits, not {bits}"
        found.refuse(reason)
    found.note(
        f"the model builder of {ONNX} makes an ONNX model of it first (python -m onnxruntime_genai.models.builder)"
    )
    model = checkpoint.model
    if model is not None and (model.experts or not model.causal):
        found.note(f"whether {ONNX} has {model.name} with these weights was not looked up")
