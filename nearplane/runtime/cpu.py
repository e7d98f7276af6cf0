"""Call the C++ kernel (kernel.cpp) on packed weights.

Arithmetic "auto" means 16-bit activations where there are vector instructions for them, else float32.
"""

import ctypes
import time
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nearplane.core import compiled
from nearplane.core.compiled import HOW, Isa
from nearplane.core.errors import SettingError
from nearplane.runtime.layout import Shape, Tiles

Arithmetic = Literal["auto", "exact", "a16", "a8"]

PATHS: dict[str, int] = {"exact": 0, "a16": 1, "a8": 2}
best, library = compiled.best, compiled.library
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Weight(ctypes.Structure):
    """The struct NearplaneWeight of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "order")),
        *((name, ctypes.c_int64) for name in ("out", "columns", "positions", "groups", "span")),
        *((name, ctypes.c_int32) for name in ("bits", "zero", "scale_dtype", "free")),
    )


class Handle(NamedTuple):
    """A weight as the kernel takes it, with the tensors whose memory the handle points to."""

    weight: ctypes._Pointer  # type: ignore[type-arg]
    shape: Shape
    addresses: tuple[int, ...]
    owners: tuple[object, ...]


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernel cannot take an input of this device and dtype; None if it can."""
    if device.type != "cpu":
        return f"the C++ kernel runs on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"the C++ kernel takes float32, float16 and bfloat16, not {dtype}"
    if best() is None:
        return f"the C++ kernel is not there; {HOW}"
    return None


def linear(
    x: Tensor,
    handle: Handle,
    bias: Tensor | None = None,
    arithmetic: Arithmetic = "auto",
    isa: Isa | None = None,
    threads: int | None = None,
) -> Tensor:
    """Compute ``x @ W.T + bias`` with the C++ kernel.

    "exact" multiplies in float32. "a16" rounds each run of 128 inputs, or of a smaller group, to 16-bit integers: an error of
    at most max|x| / 65024 per input of the run. "a8" rounds each run of 32 inputs to 8 bits: an error of at most
    max|x| / 254. With both, a NaN or Inf makes its whole row NaN.

    Args:
        x: (..., in) float32, float16 or bfloat16, for which ``supports`` returns None.
        handle: the weight (out, in), of ``prepare``.
        bias: (out,).
        arithmetic: "exact", "a16", "a8", or "auto" (``resolve``).
        isa: instruction set; None: the fastest.
        threads: number of threads; None: torch's.

    Returns:
        (..., out), of the dtype of ``x``.

    Raises:
        SettingError: the kernel for ``isa`` cannot run here, or ``arithmetic`` is unknown.
        ValueError: ``x`` has another width than the weight.
        MemoryError: the activations take too much memory.
    """
    isa = isa or best()
    kernel = None if isa is None else library(isa)
    if kernel is None or isa is None:
        raise SettingError(f"no C++ kernel for {isa or 'any instruction set'} can run here; {HOW}.")
    shape = handle.shape
    if x.shape[-1:] != (shape.columns,):
        raise ValueError(f"expected (..., {shape.columns}), got {list(x.shape)}")
    x = x.resolve_neg().contiguous()
    y = x.new_empty((*x.shape[:-1], shape.out))
    rows = x.numel() // shape.columns
    if rows:
        if bias is not None:
            bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
        adds = (None, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
        sizes = rows, shape.columns, DTYPES[x.dtype]
        how = PATHS[resolve(arithmetic, isa)], threads or torch.get_num_threads()
        if kernel.nearplane_linear(handle.weight, x.data_ptr(), *sizes, *adds, y.data_ptr(), *how):
            raise MemoryError(f"no memory for the activations of {rows} rows")
    return y


def prepare(tiles: Tiles) -> Handle:
    """Make the handle of a weight, valid while ``addresses`` of its tensors do not change.

    Raises:
        ValueError: the tensors do not match the weight's shape.
    """
    tiles.check()
    shape, where = tiles.shape, addresses(tiles.codes, tiles.scales, tiles.zeros, tiles.order)
    sizes = (shape.out, shape.columns, shape.positions, shape.groups, shape.span)
    weight = _Weight(
        *(at or None for at in where), *sizes, shape.bits, shape.zero, DTYPES[shape.scale_dtype], shape.free
    )
    return Handle(ctypes.pointer(weight), shape, where, (weight, tiles))


def addresses(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> tuple[int, ...]:
    """Return the addresses of the four tensors of a weight; 0 for an empty one."""
    return codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), order.data_ptr()


def check(arithmetic: str) -> None:
    """Raise SettingError for an unknown arithmetic."""
    if arithmetic not in ("auto", *PATHS):
        raise SettingError(f"arithmetic must be auto, {', '.join(PATHS)}; got {arithmetic!r}.")


def resolve(arithmetic: Arithmetic, isa: Isa) -> Literal["exact", "a16", "a8"]:
    """Return the meaning of an arithmetic. "auto" is "a16" with vector instructions: faster, and more exact than bfloat16."""
    if arithmetic == "auto":
        return "exact" if isa == "portable" else "a16"
    check(arithmetic)
    return arithmetic


def read_rate(megabytes: int = 400) -> float:
    """Measure GB/s of processor time at which one thread reads memory: the floor that benchmarks divide by."""
    isa = best()
    kernel = None if isa is None else library(isa)
    if kernel is None:
        raise SettingError(f"there is no C++ kernel to measure with; {HOW}.")
    memory = torch.ones(megabytes << 20, dtype=torch.uint8)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        kernel.nearplane_read(memory.data_ptr(), memory.nbytes)
        seconds.append(time.process_time() - start)
    return memory.nbytes / min(seconds) / 1e9
