"""The container: the header of a GGUF file, its tensors on demand, and a file written like another one.

Metadata is kept as the bytes that the file holds, so that what is not understood is copied unchanged. Every size is compared
with the file's length before anything is read. The layout is that of versions 2 and 3, little-endian.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.formats.gguf.blocks import BLOCKS

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
# Formats of struct by the number of a metadata type; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, UINT32 = 8, 9, 4
# No file has more; beyond that a header is damaged.
MOST_TENSORS, MOST_KEYS, MOST_DIMENSIONS, DEEPEST = 1 << 20, 1 << 16, 4, 4
# Number, columns of a block and its bytes, of every type by name.
TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "F64": (28, 1, 8),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "Q8_1": (9, 32, 36), "Q8_K": (15, 256, 292), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136), "IQ3_S": (21, 256, 110),
    "IQ3_XXS": (18, 256, 98), "IQ2_S": (22, 256, 82), "IQ2_XS": (17, 256, 74), "IQ2_XXS": (16, 256, 66),
    "IQ1_S": (19, 256, 50), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
} | {name: (block.number, block.size, block.nbytes) for name, block in BLOCKS.items()}  # fmt: skip
NUMBERS = {number: name for name, (number, _, _) in TYPES.items()}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What ``general.file_type`` says where most of a file is of a type.
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32} | {name: block.ftype for name, block in BLOCKS.items()}


class Key(NamedTuple):
    """One entry of the metadata."""

    kind: int
    item: int
    """Type of an array's items; else ``kind``."""
    length: int
    """Of an array; else 1."""
    raw: bytes
    """All of the entry: name, type and value."""
    value: Any
    """Of a scalar or a string; None for an array."""


@dataclass(frozen=True)
class Info:
    """One tensor of a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    """Rows first, as in torch; a file lists sizes the other way round."""
    start: int
    """Of its bytes in the file."""

    @property
    def matrices(self) -> int:
        """Matrices that are stacked: 1 for a plain one; 0 for what is no matrix."""
        return {2: 1, 3: self.shape[0]}.get(len(self.shape), 0)

    @property
    def rows(self) -> int:
        """Rows of one matrix."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Inputs of a matrix."""
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        _, size, nbytes = TYPES[self.type]
        return self.columns // size * nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """An open GGUF file: ``keys`` and ``tensors`` by name, in the file's order. Raises NearplaneError for what is none."""

    def __init__(self, path: str | Path) -> None:
        """Read and check the header; reads no tensor."""
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb")
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise NearplaneError(f"GGUF file {self.path} {reason}.") from error
        try:
            self._header()
        except (struct.error, EOFError) as error:
            raise NearplaneError(f"{self.path} is truncated: its header goes beyond its end; get it again.") from error
        except OSError as error:
            raise NearplaneError(f"GGUF file {self.path} cannot be read: {error}.") from error

    def value(self, key: str, default: Any = None) -> Any:
        """Look up a scalar or a string of the metadata."""
        return self.keys[key].value if key in self.keys else default

    def length(self, key: str) -> int | None:
        """Count the items of an array of the metadata; None where there is none."""
        return self.keys[key].length if key in self.keys and self.keys[key].kind == ARRAY else None

    @property
    def digest(self) -> str:
        """A hash of the header: metadata, names, types, shapes and places."""
        sums = hashlib.sha256(repr(list(self.tensors.values())).encode())
        for key in self.keys.values():
            sums.update(key.raw)
        return sums.hexdigest()

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read bytes of rows, counted through all matrices of a tensor, as uint8 (count, row_bytes)."""
        info = self.tensors[name]
        data = bytearray(count * info.row_bytes)
        view, done, start = memoryview(data), 0, info.start + first * info.row_bytes
        try:
            while done < len(data):
                read = os.preadv(self._file.fileno(), [view[done:]], start + done)
                if read == 0:
                    raise NearplaneError(f"{self.path} ends inside tensor {name}; it was changed since it was opened.")
                done += read
        except OSError as error:
            raise NearplaneError(f"tensor {name} cannot be read from {self.path}: {error}.") from error
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(count, info.row_bytes)

    def values(self, name: str, first: int, count: int) -> Tensor:
        """Read rows as float32 (count, columns).

        Raises:
            NearplaneError: a type that is not decoded here, where the package gguf is not installed.
        """
        return decode(self.rows(name, first, count), self.tensors[name].type, f"tensor {name} of {self.path}")

    def pieces(self, name: str, most: int = 1 << 24) -> Iterator[bytes]:
        """Read the bytes of a tensor, some at a time."""
        info = self.tensors[name]
        rows, step = prod(info.shape[:-1]), max(1, most // max(1, info.row_bytes))
        for first in range(0, rows, step):
            yield self.rows(name, first, min(step, rows - first)).numpy().tobytes()

    def _header(self) -> None:
        head = self._file.read(8)
        if head[:4] != MAGIC:
            raise NearplaneError(f"{self.path} is not a GGUF file: it does not begin with GGUF.")
        (version,) = struct.unpack("<I", head[4:])
        if version not in VERSIONS:
            told = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
            raise NearplaneError(f"{self.path} {told}; nearplane reads GGUF versions 2 and 3, little-endian.")
        tensors, keys = self._read("QQ")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise self._damaged(f"its header promises {tensors} tensors and {keys} keys")
        self.keys: dict[str, Key] = {}
        for _ in range(keys):
            name, key = self._key()
            self.keys[name] = key
        alignment = self.value("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}")
        self.alignment = alignment
        found = [self._info() for _ in range(tensors)]
        data = -(-self._file.tell() // alignment) * alignment
        self.tensors: dict[str, Info] = {}
        for info in found:
            placed = Info(info.name, info.type, info.shape, data + info.start)
            if info.name in self.tensors:
                raise self._damaged(f"tensor {info.name} is listed twice")
            if placed.start + placed.nbytes > self._size:
                raise NearplaneError(
                    f"{self.path} is truncated: tensor {info.name} ends at byte {placed.start + placed.nbytes}, the file has "
                    f"{self._size}; get it again."
                )
            self.tensors[info.name] = placed

    def _key(self) -> tuple[str, Key]:
        """Read one entry of the metadata."""
        start = self._file.tell()
        name = self._string()
        (kind,) = self._read("I")
        item, length, value = kind, 1, None
        if kind == ARRAY:
            item, length = self._array(DEEPEST)
        elif kind == STRING:
            value = self._string()
        else:
            (value,) = self._read(self._scalar(kind))
        end = self._file.tell()
        self._file.seek(start)
        return name, Key(kind, item, length, self._file.read(end - start), value)

    def _array(self, depth: int) -> tuple[int, int]:
        """Pass over an array; returns the type of its items and their number."""
        item, length = self._read("IQ")
        least = 8 if item == STRING else 12 if item == ARRAY else struct.calcsize(self._scalar(item))
        if length * least > self._size - self._file.tell():
            raise EOFError
        if item in SCALARS:
            self._file.seek(length * least, os.SEEK_CUR)
        for _ in range(length if item not in SCALARS else 0):
            if item == STRING:
                self._skip(*self._read("Q"))
            elif depth:
                self._array(depth - 1)
            else:
                raise self._damaged("an array holds arrays of arrays")
        return item, length

    def _info(self) -> Info:
        """Read one entry of the list of tensors; ``start`` counts from the first one's."""
        name = self._string()
        (dimensions,) = self._read("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name[:80]!r} has {dimensions} dimensions")
        sizes = self._read(f"{dimensions}Q")
        number, offset = self._read("IQ")
        if number not in NUMBERS:
            raise NearplaneError(
                f"tensor {name} of {self.path} has type {number}, which is none of those that nearplane knows; take a template "
                "in F16 or Q8_0."
            )
        info = Info(name, NUMBERS[number], tuple(reversed(sizes)), offset)
        block = TYPES[info.type][1]
        if min(sizes) < 1 or prod(sizes) > 8 * self._size * block or sizes[0] % block:
            raise self._damaged(f"tensor {name[:80]!r} has shape {list(info.shape)} of {info.type}")
        if offset % self.alignment:
            raise self._damaged(f"tensor {name[:80]!r} begins at {offset}")
        return info

    def _read(self, format: str) -> tuple[Any, ...]:
        """Read numbers. struct.error where the file ends before."""
        format = f"<{format}"
        return struct.unpack(format, self._file.read(struct.calcsize(format)))

    def _string(self) -> str:
        (length,) = self._read("Q")
        if length > self._size - self._file.tell():
            raise EOFError
        try:
            return self._file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a name or text of its header is not UTF-8") from error

    def _skip(self, length: int) -> None:
        if length > self._size - self._file.tell():
            raise EOFError
        self._file.seek(length, os.SEEK_CUR)

    def _scalar(self, kind: int) -> str:
        """Give struct's format; strings and arrays, which have none, are read elsewhere."""
        if kind not in SCALARS:
            raise self._damaged(f"its header names a type {kind} of metadata")
        return SCALARS[kind]

    def _damaged(self, what: str) -> NearplaneError:
        return NearplaneError(f"GGUF file {self.path} is damaged: {what}; get it again.")


def decode(data: Tensor, type: str, what: str) -> Tensor:
    """Decode rows of bytes to float32; ``what`` they are, for errors. Types not written here need the package gguf."""
    if type in BLOCKS:
        return BLOCKS[type].values(data)
    if type in FLOATS:
        return data.contiguous().view(FLOATS[type]).float()
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise NearplaneError(f"{what} is {type}, which needs gguf: pip install 'nearplane[gguf]'.") from error
    number = TYPES[type][0]
    try:
        found = dequantize(data.numpy(), GGMLQuantizationType(number))
    except (ValueError, NotImplementedError) as error:  # an older package, or a type that holds no weights
        raise NearplaneError(f"{what} is {type}, which cannot be decoded here; take one in F16 or Q8_0.") from error
    return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


def scalar(name: str, kind: int, value: Any) -> bytes:
    """Encode an entry of the metadata: a string, or a number of one of ``SCALARS``."""
    head = _text(name) + struct.pack("<I", kind)
    return head + (_text(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value))


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def write(
    path: Path,
    like: GGUFFile,
    types: Mapping[str, str],
    changed: Mapping[str, bytes],
    data: Callable[[str], Iterator[bytes]],
) -> None:
    """Write a file with another one's names, shapes and metadata.

    Args:
        path: the new file.
        like: gives everything that is not changed.
        types: of the tensors that get another type.
        changed: entries of the metadata by name, encoded by ``scalar``; new ones come last.
        data: gives the bytes of a tensor, some at a time.
    """
    raw = [changed.get(name, key.raw) for name, key in like.keys.items()]
    raw += [entry for name, entry in changed.items() if name not in like.keys]
    infos = [Info(i.name, types.get(i.name, i.type), i.shape, 0) for i in like.tensors.values()]
    head, offset = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(infos), len(raw)), *raw], 0
    for info in infos:
        sizes = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        head.append(_text(info.name) + sizes + struct.pack("<IQ", TYPES[info.type][0], offset))
        offset += -(-info.nbytes // like.alignment) * like.alignment
    with path.open("wb") as file:
        written = sum(map(file.write, head))
        for info in infos:
            file.write(bytes(-written % like.alignment))
            written = 0
            for piece in data(info.name):
                written += file.write(piece)
            if written != info.nbytes:
                raise NearplaneError(f"tensor {info.name} got {written} bytes of {info.nbytes}.")
        file.write(bytes(-written % like.alignment))
