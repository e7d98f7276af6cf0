"""The contract of an on-disk format, and the checks that every format makes before it packs.

A format decides the names, dtypes and shapes of the tensors of one weight and the ``quantization_config`` that says
so. It says *why* it cannot hold a weight (``supports``) and why engines will not load one that it can (``warn``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.core.grid import Grid, Quantized, ScaleDtype

# Group sizes worth suggesting: kernels read at least 8 columns at a time, and beyond 256 one scale per row is near.
SUGGESTED = range(8, 257, 8)
ONLY_HERE = "only nearplane loads such a weight"
ONLINE_ONLY_HERE = "only nearplane does; transformers, vLLM and SGLang do not know its format, and refuse it"


class Format(Protocol):
    """How one quantized weight and its description lie on disk."""

    @property
    def name(self) -> str:
        """What the user calls it, and the key in ``FORMATS``."""

    @property
    def holds_conv1d(self) -> bool:
        """Whether loaders look for this format in GPT-2's transposed Conv1D, too."""

    def supports(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why a weight of this (out, in) shape on this grid cannot be stored; None if it can."""

    def warn(self, grid: Grid, shape: tuple[int, int]) -> str | None:
        """Why engines will refuse a weight that can be stored; None if none is known to."""

    def scale_dtype(self, model_dtype: torch.dtype) -> ScaleDtype:
        """The dtype scales are stored in, which a grid needs to know before codes are chosen."""

    def tensors(self, name: str, quantized: Quantized, grid: Grid) -> dict[str, Tensor]:
        """The tensors of the module ``name``, on the CPU and contiguous. NearplaneError names the module."""

    def nbytes(self, shape: tuple[int, int], grid: Grid) -> int:
        """Bytes of the tensors of a weight of this (out, in) shape; ``grid.scale_dtype`` counts."""

    def config(
        self, grid: Grid, *, ignore: Sequence[str], settings: Mapping[str, Any], grids: Mapping[str, Grid] | None = None
    ) -> dict[str, Any]:
        """The ``quantization_config`` of config.json; ``ignore``: module names left as they were.

        ``grids``: the grid of each quantized module by name, where they are not all ``grid``.
        """

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files the format wants beside config.json, by name."""


def by_grid(grid: Grid, grids: Mapping[str, Grid] | None) -> dict[Grid, list[str]]:
    """Names of modules by what disk tells of their grids, the grid of most first; of one grid alone no names."""
    found: dict[Grid, list[str]] = {}
    for name, some in (grids or {}).items():
        found.setdefault(Grid(some.storage_bits, some.group_size, some.sym), []).append(name)
    if len(found) > 1:
        return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))
    return {next(iter(found), grid): []}


def tail_reason(grid: Grid, in_features: int) -> str | None:
    """A sentence about a smaller last group (or a group larger than the row); None if the groups divide the row."""
    if grid.group_size == -1 or in_features % grid.group_size == 0:
        return None
    fitting = [str(size) for size in SUGGESTED if in_features % size == 0]
    choice = f"{', '.join(fitting)}, or -1 (one scale per row)" if fitting else "-1 (one scale per row) only"
    return f"group_size {grid.group_size} does not divide the {in_features} input columns; what divides them: {choice}"


def conv1d_reason(format: Format) -> str | None:
    """Why a Conv1D cannot be stored; None if it can."""
    if format.holds_conv1d:
        return None
    return f"{format.name} knows nn.Linear only, loaders would fill this Conv1D with random weights; use gptq"


def check(name: str, quantized: Quantized, grid: Grid) -> Quantized:
    """The same weight on the CPU with scales in ``grid.scale_dtype``, once it is known that disk can hold it exactly.

    Raises NearplaneError for codes or zeros off the grid, shapes that do not fit together, and scales that are not
    finite or that storing would round: the codes were chosen for other values then.
    """
    codes, scale, zero = (tensor.detach().cpu() for tensor in quantized[:3])
    groups = (codes.shape[0], grid.group_count(codes.shape[1]))
    if codes.dtype != torch.uint8 or zero.dtype != torch.uint8:
        raise NearplaneError(f"{name}: codes and zeros must be uint8, and are {codes.dtype} and {zero.dtype}.")
    if scale.shape != groups or zero.shape != groups:
        raise NearplaneError(
            f"{name}: scales {tuple(scale.shape)} and zeros {tuple(zero.shape)} must both be {groups} (out, groups)."
        )
    least, greatest = grid.code_range
    if int(codes.min()) < least or int(codes.max()) > greatest:
        raise NearplaneError(f"{name}: codes leave the grid's range {least} to {greatest}.")
    half = 1 << (grid.storage_bits - 1)
    if grid.sym and bool((zero != half).any()):
        raise NearplaneError(f"{name}: every zero of a symmetric grid of {grid.storage_bits} bits must be {half}.")
    if int(zero.max()) > greatest:
        raise NearplaneError(f"{name}: a zero point leaves the grid's range 0 to {greatest}.")
    stored = scale.to(getattr(torch, grid.scale_dtype))
    if not bool(stored.isfinite().all()):
        raise NearplaneError(f"{name}: a scale is not finite in {grid.scale_dtype}.")
    if not torch.equal(stored.to(scale.dtype), scale):
        raise NearplaneError(
            f"{name}: storing the scales in {grid.scale_dtype} would round them after the codes were chosen; "
            "solve with this scale_dtype."
        )
    return Quantized(codes, stored.contiguous(), zero)
