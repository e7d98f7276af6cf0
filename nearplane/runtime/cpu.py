"""The C++ kernel (kernel.cpp): found among the package's files, checked, and called.

Decides which of its libraries this machine runs (one per instruction set, built by the package's build where a compiler
was there), and which arithmetic is meant where none was asked for.
"""

import ctypes
import time
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.runtime.layout import Shape, Tiles

Arithmetic = Literal["auto", "exact", "a16", "a8"]
Isa = Literal["avx512", "avx2", "portable"]

ISAS: dict[Isa, int] = {"avx512": 2, "avx2": 1, "portable": 0}  # the best first
PATHS: dict[str, int] = {"exact": 0, "a16": 1, "a8": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ABI = 2  # nearplane_abi() of the kernel.cpp that belongs to this file
HOW = (
    "it is built while nearplane is installed, where there is a C++ compiler (g++ or clang++): with one, in a clone, "
    "pip install --force-reinstall --no-deps ."
)


class _Weight(ctypes.Structure):
    """NearplaneWeight of kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "order")),
        *((name, ctypes.c_int64) for name in ("out", "columns", "positions", "groups", "span")),
        *((name, ctypes.c_int32) for name in ("bits", "zero", "scale_dtype")),
    )


class Handle(NamedTuple):
    """A weight as the kernel takes it. Holds the tensors whose memory it points to."""

    weight: ctypes._Pointer  # type: ignore[type-arg]
    shape: Shape
    addresses: tuple[int, ...]
    owners: tuple[object, ...]


def library_path(isa: Isa) -> Path | None:
    """Where the package's build put a library, if it did."""
    found = (Path(__file__).parent / f"_kernel_{isa}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)


def open_library(path: Path) -> ctypes.CDLL:
    """A built kernel. NearplaneError for one that belongs to another version of this package."""
    library = ctypes.CDLL(str(path))
    if library.nearplane_abi() != ABI:
        raise NearplaneError(f"{path} was built for another version of nearplane; {HOW}.")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.nearplane_linear.argtypes = [
        ctypes.POINTER(_Weight), pointer, number, number, ctypes.c_int, pointer, ctypes.c_int, pointer, ctypes.c_int,
        ctypes.c_int,
    ]  # fmt: skip
    library.nearplane_read.argtypes = [pointer, number]
    library.nearplane_read.restype = ctypes.c_uint64
    return library


@cache
def library(isa: Isa) -> ctypes.CDLL | None:
    """The kernel for an instruction set; None where it was not built or this machine does not have those instructions."""
    portable, path = library_path("portable"), library_path(isa)
    if portable is None or path is None or not open_library(portable).nearplane_runs(ISAS[isa]):
        return None
    return open_library(path)


@cache
def best() -> Isa | None:
    """The fastest instruction set that can be used here."""
    return next((isa for isa in ISAS if library(isa) is not None), None)


def check(arithmetic: str) -> None:
    """SettingError for a name that is none."""
    if arithmetic not in ("auto", *PATHS):
        raise SettingError(f"arithmetic must be auto, {', '.join(PATHS)}; got {arithmetic!r}.")


def resolve(arithmetic: Arithmetic, isa: Isa) -> Literal["exact", "a16", "a8"]:
    """What "auto" means: a16 where there are vectors for it, which are faster so and more exact than bfloat16."""
    if arithmetic == "auto":
        return "exact" if isa == "portable" else "a16"
    check(arithmetic)
    return arithmetic


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the kernel cannot take such an input; None where it can."""
    if device.type != "cpu":
        return f"the C++ kernel runs on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"the C++ kernel takes float32, float16 and bfloat16, not {dtype}"
    if best() is None:
        return f"the C++ kernel is not there; {HOW}"
    return None


def prepare(tiles: Tiles) -> Handle:
    """Point at a weight: good while its tensors' ``addresses`` are the handle's. ValueError for one that is malformed."""
    tiles.check()
    shape, where = tiles.shape, addresses(tiles.codes, tiles.scales, tiles.zeros, tiles.order)
    sizes = (shape.out, shape.columns, shape.positions, shape.groups, shape.span)
    weight = _Weight(*(at or None for at in where), *sizes, shape.bits, shape.zero, DTYPES[shape.scale_dtype])
    return Handle(ctypes.pointer(weight), shape, where, (weight, tiles))


def addresses(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> tuple[int, ...]:
    """Where the four tensors of a weight lie; 0 for an empty one."""
    return codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), order.data_ptr()


def linear(
    x: Tensor,
    handle: Handle,
    bias: Tensor | None = None,
    arithmetic: Arithmetic = "auto",
    isa: Isa | None = None,
    threads: int | None = None,
) -> Tensor:
    """``x @ W.T + bias``, (..., in) to (..., out) of the same dtype; ``supports`` must have said None.

    Arithmetic, with the error of one output for a row ``w`` of the weight: "exact" multiplies in float32; "a16" rounds
    each run of 128 inputs (less where groups are smaller) to 16-bit integers, an error of at most max|x| / 65024 per
    input of the run; "a8" each run of 32 inputs to 8 bits, max|x| / 254. A NaN or Inf makes its whole row NaN in the
    last two. ``isa`` forces an instruction set, ``threads`` a number (torch's otherwise).
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


def read_rate(megabytes: int = 400) -> float:
    """GB/s of processor time at which one thread reads memory here: the floor that benchmarks divide by."""
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
