"""Packed weights for the tests of the runtime, with the matrix they stand for in float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nearplane.core import compiled
from nearplane.runtime.layout import Tiles, tile

SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Problem(NamedTuple):
    tiles: Tiles
    dense: Tensor  # float64
    checkpoint_bytes: int  # codes, scales and zeros as a checkpoint packs them


def problem(
    out: int = 48, columns: int = 256, bits: int = 4, group: int = 64, sym: bool = False,
    scale_dtype: torch.dtype = torch.float16, shuffled: bool = False, seed: int = 0, free: bool = False,
) -> Problem:  # fmt: skip
    """Normal weights rounded to nearest; of symmetric ones about half of the scales are negative.

    ``shuffled``: groups of columns that are not neighbours, as desc_act leaves them. ``free``: zeros are real numbers, below
    0 and above the codes, too, as in MLX and GGUF. They are multiples of 1/256, so that code - zero is exact in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    width = columns if group == -1 else min(group, columns)
    groups = -(-columns // width)
    of = torch.arange(columns) // width
    if shuffled:
        of = of[torch.randperm(columns, generator=generator)]
    weight = torch.randn(out, columns, generator=generator)
    if free:
        weight += 3 * (torch.arange(out) % 3 - 1)[:, None]
    levels = 2**bits - 1
    scale, zero = torch.empty(out, groups), torch.empty(out, groups)
    for g in range(groups):
        part = weight[:, of == g]
        low, high = (part.amin(1), part.amax(1)) if free else (part.amin(1).clamp(max=0), part.amax(1).clamp(min=1e-3))
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scale[:, g] = (high - low) / levels
        exact = -low / scale[:, g]
        zero[:, g] = (exact * 256).round() / 256 if free else float(2 ** (bits - 1)) if sym else exact.round()
    if sym:
        scale *= torch.where(torch.rand(out, groups, generator=generator) < 0.5, -1.0, 1.0)
    scale = scale.to(scale_dtype)
    codes = (weight / scale.float()[:, of] + zero[:, of]).round().clamp(0, levels)
    dense = (codes - zero[:, of]).double() * scale.double()[:, of]
    kept = zero if free else zero.to(torch.uint8)
    tiles = tile(codes.to(torch.uint8), scale, kept, bits, width, of if shuffled else None)
    packed = out * -(-columns * bits // 32) * 4 + scale.nbytes + (0 if sym else -(-out * bits // 32) * 4 * groups)
    return Problem(tiles, dense, packed)


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


def emulated(folder: Path) -> ctypes.CDLL:
    """The AVX-512 kernel, compiled over plain arrays (avx512.h)."""
    here, target = Path(__file__).parent, folder / "emulated.so"
    names = ("runtime/kernel.cpp", "runtime/decode.cpp", "runtime/threads.cpp", "core/columns.cpp")
    sources = [str(compiled.FOLDER.parent / name) for name in names]
    flags = [
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
        "-DNEARPLANE_ISA=2",
        "-DNEARPLANE_EMULATED",
        "-ffp-contract=off",
    ]
    command = [compiler() or "", *flags, "-include", str(here / "avx512.h"), *sources, "-o", str(target)]
    subprocess.run(command, check=True)
    return compiled.open_library(target)
