"""The compiled part of this package: a library for each instruction set, of which the fastest that this machine runs is taken.

The package's build makes them where there is a C++ compiler. What they hold is in ``runtime/kernel.cpp``,
``runtime/decode.cpp`` and ``core/columns.cpp``; ``runtime/threads.cpp`` shares out the work of all.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

from nearplane.core.errors import NearplaneError

Isa = Literal["avx512", "avx2", "portable"]

ISAS: dict[Isa, int] = {"avx512": 2, "avx2": 1, "portable": 0}  # the best first
ABI = 6  # nearplane_abi() of the kernel.cpp that belongs to this version
FOLDER = Path(__file__).parents[1] / "runtime"
HOW = (
    "it is built while nearplane is installed, where there is a C++ compiler (g++ or clang++): with one, in a clone, "
    "pip install --force-reinstall --no-deps ."
)


@cache
def best() -> Isa | None:
    """Return the fastest instruction set that can be used here; None if there is no kernel."""
    return next((isa for isa in ISAS if library(isa) is not None), None)


@cache
def library(isa: Isa) -> ctypes.CDLL | None:
    """Return the kernel for an instruction set; None if it was not built, or this machine cannot run it."""
    portable, path = library_path("portable"), library_path(isa)
    if portable is None or path is None or not open_library(portable).nearplane_runs(ISAS[isa]):
        return None
    return open_library(path)


def library_path(isa: Isa) -> Path | None:
    """Return the path of a library that the package's build made; None if it made none."""
    paths = (FOLDER / f"_kernel_{isa}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def open_library(path: Path) -> ctypes.CDLL:
    """Open a built kernel. NearplaneError for one that belongs to another version of this package."""
    library = ctypes.CDLL(str(path))
    if library.nearplane_abi() != ABI:
        raise NearplaneError(f"{path} was built for another version of nearplane; {HOW}.")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.nearplane_linear.argtypes = [
        pointer, pointer, number, number, ctypes.c_int, pointer, ctypes.c_int, pointer, ctypes.c_int,
        ctypes.c_int,
    ]  # fmt: skip
    library.nearplane_decode.argtypes = [pointer, pointer, number, number, *[pointer] * 4, ctypes.c_int]
    library.nearplane_head.argtypes = [pointer, pointer, pointer, ctypes.c_int]
    library.nearplane_columns.argtypes = [pointer, ctypes.c_int]
    real, switch = ctypes.c_double, ctypes.c_int
    library.nearplane_errors.argtypes = [*[pointer] * 5, number, number, real, real, *[switch] * 3]
    library.nearplane_read.argtypes = [pointer, number]
    library.nearplane_read.restype = ctypes.c_uint64
    return library
