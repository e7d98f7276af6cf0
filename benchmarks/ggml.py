"""ggml's mul_mat as a contender of packed.py: what llama.cpp multiplies with, compiled here against an installed ggml.

The folder is what ``cmake --install`` of ggml or llama.cpp writes: include/ggml.h and lib/libggml*.so. It is given by
--ggml or GGML_PREFIX; without one, nothing of ggml runs.
"""

import ctypes
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# ggml's types by bits. "repacked": the order of codes that llama.cpp gives a weight when it loads one.
TYPES = {2: ("q2_K",), 3: ("q3_K",), 4: ("q4_0", "q4_K"), 8: ("q8_0",)}
# What quantizing a normal weight to these bits costs an output, and more: a product of something else is off by 1 and more.
ERRORS = {2: 0.5, 3: 0.3, 4: 0.15, 8: 0.02}


class Ggml:
    """A compiled ggml_matmul.cpp."""

    def __init__(self, prefix: Path, folder: Path) -> None:
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise SystemExit("--ggml needs a C++ compiler (g++ or clang++).")
        if not (prefix / "include" / "ggml.h").exists():
            raise SystemExit(f"{prefix} has no include/ggml.h: --ggml is the prefix that ggml was installed to.")
        source, target, libraries = Path(__file__).with_name("ggml_matmul.cpp"), folder / "ggml.so", prefix / "lib"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", f"-I{prefix / 'include'}", str(source), "-o", str(target),
                   f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lggml", "-lggml-cpu", "-lggml-base"]  # fmt: skip
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(target))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.library.bench_version.restype = ctypes.c_char_p
        self.library.bench_new.restype = pointer
        self.library.bench_new.argtypes = [
            ctypes.c_char_p, pointer, pointer, number, number, number, ctypes.c_int, ctypes.c_int, ctypes.c_int
        ]  # fmt: skip
        self.library.bench_run.argtypes = self.library.bench_free.argtypes = [pointer]
        self.library.bench_output.argtypes = [pointer, pointer]
        self.library.bench_bytes.restype = number
        self.library.bench_bytes.argtypes = [ctypes.c_char_p, number, number]
        self.version = self.library.bench_version().decode()

    def contenders(
        self, x: Tensor, out: int, bits: int, rotate: int, threads: int
    ) -> dict[str, tuple["Product", int, int]]:
        """Products of ``x`` with weights of this width by name: (product of all copies, number of copies, bytes of one)."""
        found = {}
        for name in TYPES.get(bits, ()):
            size = self.library.bench_bytes(name.encode(), out, x.shape[1])
            number = max(1, -(-rotate // size))
            for repack in (False, True):
                product = Product(self.library, name, x, out, (number, threads, repack))
                if product.handle is not None:
                    product.check(ERRORS[bits])
                    found[f"{bits} bits ggml {name}{' repacked' * repack}"] = product, number, size
        return found


class Product:
    """One graph of ggml: x by every copy of a weight."""

    def __init__(self, library: ctypes.CDLL, name: str, x: Tensor, out: int, how: tuple[int, int, bool]) -> None:
        self.x, self.w = x, torch.randn(out, x.shape[1], generator=torch.Generator().manual_seed(0))
        self.library = library
        sizes = (out, x.shape[1], x.shape[0])
        self.handle = library.bench_new(name.encode(), self.w.data_ptr(), x.data_ptr(), *sizes, *how)
        self.run = partial(library.bench_run, self.handle)

    def __call__(self) -> None:
        if self.run():
            raise RuntimeError("ggml could not compute its graph")

    def check(self, allowed: float) -> None:
        """Refuse a product of something else."""
        self()
        y, exact = torch.empty(self.x.shape[0], self.w.shape[0]), self.x @ self.w.T
        self.library.bench_output(self.handle, y.data_ptr())
        error = float((y - exact).norm() / exact.norm())
        if not error < allowed:
            raise RuntimeError(f"ggml's product is off by {error:.3f}")
        del self.w

    def __del__(self) -> None:
        if self.handle is not None:
            self.library.bench_free(self.handle)


def installed(given: str | None) -> Path | None:
    """The folder of --ggml, or of GGML_PREFIX; None: not run."""
    path = given or os.environ.get("GGML_PREFIX")
    return Path(path) if path else None
