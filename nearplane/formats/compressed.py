"""compressed-tensors, the default output: what vLLM, SGLang and transformers load.

With activations rounded too it is ``int-quantized``: an int8 for every code, whatever its bits. Else ``pack-quantized``:
codes are packed along the input columns of each row, zeros (asymmetric only) along the output rows. The library
shifts codes and zeros to signed before it subtracts them, so unsigned ones are stored as they are.
Ternary weights are 2-bit symmetric ones that never use code 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.core.tokens import TokenGrid
from nearplane.formats.base import ONLY_HERE, by_grid, check, tail_reason
from nearplane.formats.bits import pack, words_of

# The release of the library whose reading of these tensors is the one described here.
LAYOUT_VERSION = "0.17.0"
CLIP = "nearplane_clip"
# Before the names of formats where inputs are rotated while the model runs: no other reader is to take such weights.
ONLINE = "nearplane-online-"
SCALE_DTYPES: dict[torch.dtype, ScaleDtype] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class CompressedTensors:
    """``weight_packed``, ``weight_scale``, ``weight_shape`` and, asymmetric, ``weight_zero_point``."""

    name: str = "compressed-tensors"
    activations: TokenGrid | None = None
    """How engines round what goes into a linear."""
    online: bool = False
    """Whether some linears are given rotated inputs while the model runs: only nearplane does that."""

    @property
    def holds_conv1d(self) -> bool:
        """Its targets are nn.Linear: transformers leaves a Conv1D without weights, and does not say so."""
        return False

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Holds every grid."""
        return None

    def warn(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """A tail group has its own scale on disk, but the library refuses to multiply it out; nor does it know of a clip."""
        if self.activations is not None and self.activations.clip < 1:
            return (
                f"engines round activations without the clip of {self.activations.clip:g}; only nearplane applies it."
            )
        reason = tail_reason(grid, shape[1])
        return reason and f"{reason}; {ONLY_HERE}, vLLM, SGLang and transformers refuse it."

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """The model's own: loaders cast scales to it."""
        return SCALE_DTYPES.get(model_dtype, "float32")

    def tensors(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """int32 (out, words), scale (out, groups), int64 (2,), and int32 (words, groups) of zeros if asymmetric."""
        codes, scale, zero = check(name, quantized, grid)[:3]
        if self.activations is not None:
            half = 1 << (grid.storage_bits - 1)
            plain = {f"{name}.weight": (codes.to(torch.int16) - half).to(torch.int8), f"{name}.weight_scale": scale}
            zeros = {} if grid.sym else {f"{name}.weight_zero_point": (zero.to(torch.int16) - half).to(torch.int8)}
            return plain | zeros
        tensors = {
            f"{name}.weight_packed": pack(codes, grid.storage_bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if not grid.sym:  # a zero point beside a symmetric weight makes vLLM refuse the checkpoint
            tensors[f"{name}.weight_zero_point"] = pack(zero.T, grid.storage_bits).T.contiguous()
        return tensors

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Of ``tensors``, exactly."""
        (out, columns), groups = shape, grid.group_count(shape[1])
        scale: torch.dtype = getattr(torch, grid.scale_dtype)
        if self.activations is not None:
            return out * columns + out * groups * (scale.itemsize + (not grid.sym))
        zeros = 0 if grid.sym else 4 * groups * words_of(out, grid.storage_bits)
        return 4 * out * words_of(columns, grid.storage_bits) + scale.itemsize * out * groups + zeros + 16

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """One group for all linear layers, or of several grids one group each, which names its modules.

        None of several may target the class: vLLM asks for a fused module's class before it asks for the names of its
        parts. The library refuses keys it does not know, so ``settings`` stay out.
        """
        groups = by_grid(grid, grids)
        described = [_group(some, names or ["Linear"], self.activations, self.online) for some, names in groups.items()]
        return {
            "quant_method": "compressed-tensors",
            "version": LAYOUT_VERSION,
            "format": described[0]["format"],
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(described)},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
        }

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """None."""
        return {}


def _group(grid: Grid, targets: list[str], activations: TokenGrid | None, online: bool) -> dict[str, Any]:
    """One config group."""
    channel = grid.group_size == -1
    weights = {
        "num_bits": grid.storage_bits,
        "type": "int",
        "symmetric": grid.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": targets,
        "format": (ONLINE if online else "") + ("pack-quantized" if activations is None else "int-quantized"),
        "weights": weights,
        "input_activations": None if activations is None else _tokens(activations),
        "output_activations": None,
    }


def _tokens(grid: TokenGrid) -> dict[str, Any]:
    """The library knows no clip; it keeps what is meant for an observer, and a dynamic scale has none."""
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.sym,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {} if grid.clip == 1 else {CLIP: grid.clip},
    }
