"""Checkpoints as other tools write them, shared by the tests of the readers."""

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from nearplane.formats.read import Checkpoint, open_checkpoint

OUT, IN = 32, 64
Tensors = dict[str, torch.Tensor]


def save(folder: Path, tensors: Tensors, quantization: Any, beside: Any = None) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "x"} if quantization is None else {"model_type": "x", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "quantize_config.json").write_text(json.dumps(beside))
    return open_checkpoint(folder)


def by_package(scheme: dict[str, Any], layout: str, seed: int = 0) -> tuple[Tensors, torch.Tensor]:
    """A weight compressed by the compressed-tensors package, and what the package reads back."""
    torch.manual_seed(seed)
    parsed = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": scheme})
    strategy = parsed.weights.strategy
    shape = {"tensor": (1,), "channel": (OUT, 1)}.get(strategy, (OUT, IN // (scheme.get("group_size") or 1)))
    half = 1 << (scheme["num_bits"] - 1)
    state = {"weight": torch.randn(OUT, IN), "weight_scale": torch.rand(shape) + 0.5}
    state["weight_zero_point"] = torch.zeros(shape, dtype=torch.int8)
    if not scheme.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    state["weight"] *= half
    compressor = BaseCompressor.get_value_from_registry(layout)
    compressed = compressor.compress(state, parsed)
    return compressed, compressor.decompress(compressed, parsed)["weight"]


def ct_config(layout: str, *groups: tuple[list[str], dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A configuration of several groups (targets, weights)."""
    named = {f"group_{i}": {"targets": targets, "weights": weights} for i, (targets, weights) in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": named, **more}


def named(name: str, tensors: Tensors) -> Tensors:
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
