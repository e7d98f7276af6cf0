"""Originals in FP8, MXFP4 and NVFP4, made of tiny models by code that is not nearplane's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip
Coder = Callable[[str, Tensor], dict[str, Tensor]]


def in_blocks(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 codes, a scale for each block, and the dense weight, block by block in a plain loop."""
    *first, height, width = weight.shape
    grid = (*first, -(-height // rows), -(-width // columns))
    codes, scale, dense = torch.empty(weight.shape, dtype=FP8), torch.empty(grid), torch.empty(weight.shape)
    for i in range(grid[-2]):
        for j in range(grid[-1]):
            place = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            part = weight[place].float()
            scale[..., i, j] = part.abs().amax((-1, -2)) / 448 + 1e-12
            each = scale[..., i, j, None, None]
            codes[place] = (part / each).to(FP8)
            dense[place] = codes[place].float() * each
    return codes, scale, dense


def by_blocks(rows: int = 128, columns: int = 128, suffix: str = "_scale_inv") -> Coder:
    """As DeepSeek and Qwen publish FP8."""

    def code(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scale, dense = in_blocks(weight, rows, columns)
        return {name: codes, f"{name}{suffix}": scale, "dense": dense}

    return code


def by_rows(name: str, weight: Tensor) -> dict[str, Tensor]:
    """One scale per output, as compressed-tensors and fbgemm store it, in bfloat16."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight.float() / scale.float()).to(FP8)
    return {name: codes, f"{name}_scale": scale, "dense": codes.float() * scale.float()}


def by_tensor(name: str, weight: Tensor) -> dict[str, Tensor]:
    """One scale, no dimension, and one of the inputs."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(FP8)
    inputs = name.replace("weight", "input_scale")
    return {name: codes, f"{name}_scale": scale, inputs: torch.tensor(0.01), "dense": codes.float() * scale}


def four_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest FP4 numbers, and two of their codes a byte, the first in the low half."""
    codes = (values[..., None] - LEVELS).abs().argmin(-1)
    return LEVELS[codes], (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def nvfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As compressed-tensors stores it: FP8 scales for 16 inputs, multiplied by a scale of the tensor."""
    groups = weight.float().unflatten(1, (-1, 16))
    whole = 448 * 6 / groups.abs().max()
    scale = (groups.abs().amax(-1) / 6 * whole).to(FP8)
    values, packed = four_bits((groups / (scale.float() / whole)[..., None]).clamp(-6, 6))
    dense = (values * (scale.float() / whole)[..., None]).flatten(1)
    stem = name.removesuffix("weight")
    return {
        f"{stem}weight_packed": packed.flatten(1), f"{stem}weight_scale": scale, f"{stem}weight_global_scale": whole[None],
        "dense": dense,
    }  # fmt: skip


def mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """As gpt-oss stores experts (experts, in, out): blocks of 32 inputs, an exponent for each."""
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
    power = torch.floor(torch.log2(groups.abs().amax(-1) + 1e-30)) - 2
    values, packed = four_bits(groups / 2.0 ** power[..., None])
    dense = (values * 2.0 ** power[..., None]).flatten(2).transpose(1, 2).contiguous()
    return {f"{name}_blocks": packed, f"{name}_scales": (power + 127).to(torch.uint8), "dense": dense}


def rewrite(
    folder: Path, quantization: dict[str, Any] | None, code: Coder, which: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Store the weights ``which`` picks coded, and return all tensors as they are meant."""
    file = folder / "model.safetensors"
    state, meant = safetensors.torch.load_file(file), dict[str, Tensor]()
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = code(name, value) if which(name) else {name: value, "dense": value}
        meant[name] = parts.pop("dense")
        stored |= {key: part.contiguous() for key, part in parts.items()}
    safetensors.torch.save_file(stored, file, metadata={"format": "pt"})
    configure(folder, quantization_config=quantization)
    return meant


def configure(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None takes a field away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    gone = {key for key, value in fields.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in gone}))


def linears(name: str) -> bool:
    """Pick the weights of linears in layers, not the routers'."""
    return (".layers." in name and name.endswith("_proj.weight")) or name.endswith(
        ("q_a_proj.weight", "kv_b_proj.weight")
    )
