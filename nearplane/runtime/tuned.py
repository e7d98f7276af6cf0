"""Choose a Triton kernel and its sizes for a product: measured once a device, and kept in a file of the user's cache.

The first product of new sizes is timed with a few choices, outside of CUDA graphs. A choice fixes the order of all sums, so
products have the same bits in every run as long as the file stays. Delete the file to measure anew.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch

from nearplane.core.errors import NearplaneError
from nearplane.machine.progress import say
from nearplane.runtime.layout import Shape

VERSION = 1  # of the kernels: another number makes old choices void
LARGEST = 512  # rows; for more the weight is always unpacked
PROCESSORS = 132  # where no device says its own


@dataclass(frozen=True)
class Choice:
    """A kernel and its sizes."""

    kernel: Literal["few", "many", "dense"]
    rows: int = 1
    """Rows of a program."""
    channels: int = 128
    """Output channels of a program."""
    blocks: int = 4
    """Blocks of 32 inputs of a step."""
    warps: int = 4
    stages: int = 1
    """Steps that are loaded ahead, and one."""
    programs: int = 4
    """Programs per multiprocessor, which the inputs are split for."""


DENSE = Choice("dense")


def candidates(rows: int) -> list[Choice]:
    """Return the choices for a number of rows, the one to take unmeasured first."""
    if rows < 16:
        each = min(8, 1 << (rows - 1).bit_length())
        sizes = [(128, 4, 4, 1, 8), (128, 4, 4, 3, 4), (32, 64, 16, 1, 1), (64, 16, 8, 1, 4), (128, 8, 8, 1, 2)]
        found = [Choice("few", each, *size) for size in sizes]
        return found + [Choice("many", 16, 64, 4, 4, 3, 2), Choice("many", 16, 32, 4, 4, 4, 4)] * (rows > 4)
    each = min(128, 1 << (rows - 1).bit_length())
    sizes = [(64, 2, 4, 3, 2), (128, 2, 4, 3, 2), (64, 4, 4, 3, 2), (32, 4, 4, 4, 4)]
    if each > 32:
        sizes = [(64, 2, 4, 3, 1), (128, 2, 8, 3, 1), (64, 2, 8, 4, 2), (128, 1, 8, 4, 1)]
    found = [Choice("many", min(each, 64), *size) for size in sizes]
    if each > 64:
        found += [Choice("many", 128, *size) for size in sizes[1:]]
    if rows > LARGEST:
        return [DENSE]
    return [DENSE, *found] if rows >= 256 else [*found, DENSE] if rows > 32 else found


def split(choice: Choice, blocks: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Return the blocks of a share, and the number of shares, for a number of tiles of the output."""
    steps = -(-blocks // choice.blocks)
    wanted = max(1, min(steps, choice.programs * _processors(device) // tiles))
    share = choice.blocks * -(-steps // wanted)
    return share, -(-blocks // share)


def key(shape: Shape, rows: int, dtype: torch.dtype) -> str:
    """Name products that have a choice in common: rows up to the same power of two, or to 15."""
    rows = 15 if 8 < rows < 16 else min(2 * LARGEST, 1 << (rows - 1).bit_length())
    zeros = "real" if shape.free else "whole"
    return f"{shape.bits} bits, {shape.out} x {shape.columns}, {zeros} zeros, {rows} rows, {str(dtype)[6:]}"


_tables: dict[str, dict[str, Choice]] = {}
_ran: set[tuple[str, str]] = set()
_lock = Lock()


def known(name: str, device: torch.device) -> bool:
    """Return whether a product of this name has run in this process."""
    return (name, str(device)) in _ran


def choose(name: str, device: torch.device, rows: int, run: Callable[[Choice], Any]) -> Choice:
    """Return the choice for products of this name, which is measured if there is none.

    Args:
        name: ``key`` of the product.
        device: where it runs; anything but CUDA is not measured.
        rows: rows of the input.
        run: runs the product with a choice.

    Raises:
        NearplaneError: none of the choices runs on the device.
    """
    found = candidates(rows)
    if device.type != "cuda":
        return found[0]
    with _lock:
        table = _tables.get(str(device))
        if table is None:
            table = _tables[str(device)] = read(_file(device))
        if name not in table:
            say(f"note: choosing a GPU kernel for {name}, once for this device")
            table[name] = found[0] if len(found) == 1 else _fastest(found, run)
            write(_file(device), table)
        _ran.add((name, str(device)))
    return table[name]


def _fastest(found: list[Choice], run: Callable[[Choice], Any]) -> Choice:
    """Return the choice of the least time, weights not in a cache."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Choice, float] = {}
    reason = ""
    for choice in found:
        try:
            times[choice] = float(do_bench(lambda choice=choice: run(choice), warmup=5, rep=20, return_mode="median"))
        except (OutOfResources, CompilationError) as error:  # a device with less shared memory
            reason = f"{choice}: {error}"
    if not times:
        raise NearplaneError(f"no Triton kernel of this product runs on {torch.cuda.get_device_name()}; {reason}")
    return min(times, key=lambda choice: times[choice])


def read(path: Path) -> dict[str, Choice]:
    """Read choices. Of a file that is no such file, or an older kernel's, none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {k: Choice(**v) for k, v in stored["choices"].items()} if stored["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(path: Path, table: dict[str, Choice]) -> None:
    """Keep choices, and those that other processes have kept. Where the folder cannot be written, they are this process's."""
    stored = {"version": VERSION, "choices": {k: asdict(v) for k, v in sorted({**read(path), **table}.items())}}
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _file(device: torch.device) -> Path:
    """The file of a kind of device."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearplane"
    return cache / "kernels" / (re.sub(r"\W+", "-", torch.cuda.get_device_name(device)) + ".json")
