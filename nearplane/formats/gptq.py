"""GPTQ, versions 1 and 2: the layout of AutoGPTQ and GPTQModel.

Codes are packed along the input columns and stored transposed; zeros are packed along the output rows. Version 1
stores ``zero - 1`` and readers disagree on what a zero of 0 becomes, so it is written for symmetric grids only.
Groups are contiguous: ``g_idx`` is trivial, ``desc_act`` false.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nearplane.core.grid import Grid, Quantized, ScaleDtype
from nearplane.formats.base import by_grid, check, tail_reason
from nearplane.formats.bits import pack, words_of
from nearplane.formats.engines import fused_names

WIDTHS = (2, 3, 4, 8)
# Kernels read words of 32 codes across both axes, and a 3-bit word only ends where 32 codes do.
MULTIPLE = 32


@dataclass(frozen=True)
class GPTQ:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""

    name: Literal["gptq", "gptq_v2"] = "gptq"

    @property
    def holds_conv1d(self) -> bool:
        """Its readers convert Conv1D and nn.Linear alike."""
        return True

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Widths 2, 3, 4 and 8, sides that are multiples of 32, no tail group; version 1 symmetric only."""
        if grid.storage_bits not in WIDTHS:
            return f"{self.name} stores 2, 3, 4 or 8 bits, not {grid.storage_bits}; compressed-tensors stores 2 to 8"
        if not grid.sym and self.name == "gptq":
            return "gptq (version 1) cannot hold every asymmetric zero point; use gptq_v2 or compressed-tensors"
        if shape[0] % MULTIPLE or shape[1] % MULTIPLE:
            return f"{self.name} needs both sides to be multiples of 32, and this weight is {shape[0]} x {shape[1]}"
        return tail_reason(grid, shape[1])

    def warn(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Nothing: what engines refuse by shape is refused above."""
        return None

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """Always float16."""
        return "float16"

    def tensors(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """int32 (in words, out), int32 (groups, out words), float16 (groups, out), int32 (in,)."""
        codes, scale, zero = check(name, quantized, grid)[:3]
        stored = zero.T if self.name == "gptq_v2" else zero.T - 1  # symmetric: at least 2 - 1, never below 0
        columns = torch.arange(codes.shape[1], dtype=torch.int32)
        return {
            f"{name}.qweight": pack(codes, grid.storage_bits).T.contiguous(),
            f"{name}.qzeros": pack(stored, grid.storage_bits),
            f"{name}.scales": scale.T.contiguous(),
            f"{name}.g_idx": columns // grid.group_width(codes.shape[1]),
        }

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Of ``tensors``, exactly."""
        (out, columns), groups = shape, grid.group_count(shape[1])
        words = out * words_of(columns, grid.storage_bits) + groups * words_of(out, grid.storage_bits) + columns
        return 4 * words + 2 * out * groups

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """Loaders' own fields first; whatever else ``settings`` holds is kept under ``meta``.

        The format knows no list of modules left out, but engines skip those that a ``dynamic`` rule starting with
        "-:" matches; a rule starting with "+:" says in what a module differs from the rest. Engines that fuse modules
        look for the fused one's name, so that it has a rule, too. ``lm_head`` is left out unless the field of that name
        says otherwise.
        """
        (grid, _), *others = by_grid(grid, grids).items()
        rest = dict(settings)
        config: dict[str, Any] = {
            "bits": grid.storage_bits,
            "group_size": grid.group_size,
            "desc_act": False,
            "sym": grid.sym,
            "lm_head": bool(rest.pop("lm_head", False)),
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        }
        if 0 < rest.get("damp_percent", 0) < 1:  # transformers refuses to load any other value
            config["damp_percent"] = rest.pop("damp_percent")
        for field in ("true_sequential", "static_groups"):
            if field in rest:
                config[field] = rest.pop(field)
        skipped = [module for module in ignore if module != "lm_head"]
        rules: dict[str, dict[str, Any]] = {f"-:{_pattern(module)}": {} for module in [*skipped, *fused_names(skipped)]}
        for some, names in others:
            rule = {"bits": some.storage_bits, "group_size": some.group_size, "sym": some.sym}
            rules |= {f"+:{_pattern(module)}": dict(rule) for module in [*names, *fused_names(names)]}
        if rules:
            config["dynamic"] = rules
        config["meta"] = {"quantizer": [f"nearplane:{rest.pop('version', 'unknown')}"], **rest}
        return config

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The same again as quantize_config.json, where older loaders look."""
        return {"quantize_config.json": dict(config)}


def _pattern(module: str) -> str:
    """A regular expression for one entry of ``ignore``: a name, or a pattern marked "re:"."""
    return module.removeprefix("re:") if module.startswith("re:") else f"^{re.escape(module)}$"
