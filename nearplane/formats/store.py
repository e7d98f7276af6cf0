"""The tensors of a transformers folder on disk, each read when asked for and not before.

Decides which files of a folder are its weights (``model.safetensors``, else the index, else the only safetensors
file), and refuses at open what would otherwise fail hours later: a missing, truncated or misnamed shard. Tensors are read,
not memory-mapped: mapped pages count as resident as long as the file is open, and a file that is cut short meanwhile
kills a process that has mapped it, where a short read is an error with a name.
"""

import json
import os
from collections.abc import Iterable
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nearplane.core.errors import NearplaneError
from nearplane.formats.journal import unfinished

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a writer leaves beside the files: the sha256 of each, for ``sha256sum -c`` and for verify.
SUMS = "SHA256SUMS"
# What a run leaves beside its checkpoint, and no download of another tool's has.
REPORT = "report.json"
PAGE = "report.html"
# A shard that a writer has not finished (``parts.py``) carries this ending, so that no reader takes it for a weight.
UNFINISHED = ".unfinished"
# Files of a folder that hold weights and are no safetensors: formats/gguf reads them.
GGUF = ".gguf"
PICKLES = ("*.bin", "*.pt", "*.pth")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
# Floats that are no numbers of a weight until they are multiplied by a scale.
SMALL_FLOATS = {DTYPES[name] for name in DTYPES if name.startswith("F8")}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu  # of scales: an exponent


class Stored(NamedTuple):
    """The place of a tensor in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Shard:
    """One open safetensors file."""

    def __init__(self, path: Path) -> None:
        """Check the header (safetensors does, against the file's length) and read it. Raises NearplaneError."""
        self.path = path
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass
            self._file = path.open("rb", buffering=0)
            length = int.from_bytes(self._read(0, 8), "little")
            header = json.loads(self._read(8, length))
        except FileNotFoundError as error:
            raise NearplaneError(f"{path} is missing; {again(path.parent)}.") from error
        except SafetensorError as error:
            told = " ".join(str(error).split())  # a header's own words may have line breaks
            raise NearplaneError(f"{path} is truncated or corrupt ({told}); {again(path.parent)}.") from error
        except (OSError, ValueError) as error:
            raise NearplaneError(f"{path} cannot be read: {error}.") from error
        header.pop("__metadata__", None)
        self.tensors = {
            name: Stored(entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        }

    def get(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        return self._get(name, self.tensors[name])

    def _get(self, name: str, part: Stored) -> Tensor:
        """Read a place in the file as a tensor; ``name`` is for errors."""
        _, shape, start, end = part
        dtype = self.dtype(name)
        try:
            raw = self._read(start, end - start)
        except OSError as error:
            raise NearplaneError(f"tensor {name} cannot be read from {self.path}: {error}.") from error
        if not raw:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows of a tensor's first dimension into memory of their own."""
        dtype, shape, start, end = self.tensors[name]
        size = (end - start) // shape[0]
        part = Stored(dtype, (count, *shape[1:]), start + first * size, start + (first + count) * size)
        return self._get(name, part)

    def dtype(self, name: str) -> torch.dtype:
        """Look up the dtype of a tensor."""
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise NearplaneError(f"tensor {name} in {self.path} has dtype {stored}, which is not supported.")
        return DTYPES[stored]

    def _read(self, start: int, size: int) -> bytearray:
        """Read bytes from a place in the file. Raises OSError where the file ends before."""
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            read = os.preadv(self._file.fileno(), [view[done:]], start + done)
            if read == 0:
                raise OSError(f"the file ends {size - done} bytes too early, it has been changed since it was opened")
            done += read
        return data


class Store:
    """Lazy access to the tensors of one folder.

    Opening reads and checks every shard's header and no tensor. Raises NearplaneError, naming the file, for whatever
    makes the folder unreadable; with ``partial`` only where nothing can be read at all.
    """

    folder: Path
    names: frozenset[str]
    lost: frozenset[str] = frozenset()
    """With ``partial``, tensors that the index promises and no shard gives."""

    def __init__(self, folder: Path, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise NearplaneError(f"{self.folder} {problem}; give the folder that holds model.safetensors.")
        promised = weight_map(self.folder)
        # Insertion order of the shards is that of the index, so that the first problem reported is the first shard's.
        self._shards = dict[str, Shard]()
        files = dict.fromkeys(promised.values())
        for number, file in enumerate(files, 1):
            try:
                self._shards[file] = Shard(self.folder / file)
            except NearplaneError:
                if not partial or (number == len(files) and not self._shards):
                    raise
        held = {file: set(shard.tensors) for file, shard in self._shards.items()}
        if not (self.folder / SINGLE).exists() and (self.folder / INDEX).exists():
            self.lost = frozenset(name for name, file in promised.items() if name not in held.get(file, ()))
            for name in promised:
                if name in self.lost and not partial:
                    raise NearplaneError(lacking(self.folder, name, promised[name]))
            self._file = {name: file for name, file in promised.items() if name not in self.lost}
        else:
            self._file = {name: file for file, names in held.items() for name in names}
        self.names = frozenset(self._file)

    @classmethod
    def of(cls, files: list[Path]) -> "Store":
        """Open certain files of one folder, whatever they are called."""
        store = cls.__new__(cls)
        store.folder = files[0].parent
        store._shards = {file.name: Shard(file) for file in files}
        store._file = {name: file for file, shard in store._shards.items() for name in shard.tensors}
        store.names = frozenset(store._file)
        return store

    def get(self, name: str) -> Tensor:
        """Read a tensor to the CPU, into memory of its own."""
        return self._where(name).get(name)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read ``count`` rows of a tensor's first dimension, and no others."""
        return self._where(name).rows(name, first, count)

    def shape(self, name: str) -> tuple[int, ...]:
        """Look up the shape of a tensor; reads no data."""
        return self._where(name).tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Look up the dtype of a tensor; reads no data."""
        return self._where(name).dtype(name)

    def nbytes(self, name: str) -> int:
        """Count the bytes of a tensor; reads no data."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def rejoined(self, quantized: set[str]) -> frozenset[str]:
        """Return the names to copy beside the ``quantized`` ones."""
        return self.stored(self.names - quantized)

    def stored(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names under which the tensors ``names`` are stored."""
        return frozenset(names)

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes; reads no data."""
        return self.nbytes(name)

    @property
    def total(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(self.nbytes(name) for name in self.names)

    def _where(self, name: str) -> Shard:
        """Find the shard of a tensor. Raises NearplaneError where there is none."""
        if name not in self._file:
            raise NearplaneError(f"{self.folder} holds no tensor named {name}.")
        return self._shards[self._file[name]]


class Twice(Store):
    """A store that shows one tensor under a second name."""

    def __init__(self, store: Store, name: str, like: str) -> None:
        """Wrap ``store``; ``name``: the second name of the tensor ``like``."""
        self.store, self.name, self.like = store, name, like
        self.folder, self.names = store.folder, store.names | {name}

    def get(self, name: str) -> Tensor:
        """Read a tensor."""
        return self.store.get(self._known(name))

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read ``count`` rows of a tensor's first dimension."""
        return self.store.rows(self._known(name), first, count)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; reads no data."""
        return self.store.shape(self._known(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; reads no data."""
        return self.store.dtype(self._known(name))

    def nbytes(self, name: str) -> int:
        """Return a tensor's size in bytes; reads no data."""
        return self.store.nbytes(self._known(name))

    def reading(self, name: str) -> int:
        """Count the bytes of memory that reading a tensor takes; reads no data."""
        return self.store.reading(self._known(name))

    def rejoined(self, quantized: set[str]) -> frozenset[str]:
        """Return the names to copy beside the ``quantized`` ones."""
        return self.store.rejoined(quantized) | ({self.name} - quantized)

    def _known(self, name: str) -> str:
        return self.like if name == self.name else name


def parse_json(path: Path) -> Any:
    """Parse a JSON file. Raises NearplaneError, naming the file, when it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NearplaneError(f"{path} does not exist; a transformers folder needs it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise NearplaneError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:  # beside what is no JSON: numbers of thousands of digits, nesting
        raise NearplaneError(f"{path} is not valid JSON ({error}); {again(path.parent)}.") from error


def again(folder: Path) -> str:
    """Advise what to do about a damaged file; a report beside it tells that it was written here."""
    return "write it again or restore it from a copy" if (folder / REPORT).exists() else "download it again"


def read_json(path: Path) -> dict[str, object]:
    """Parse a JSON object. Raises NearplaneError, naming the file, when it is missing, unreadable or something else."""
    content = parse_json(path)
    if not isinstance(content, dict):
        raise NearplaneError(f"{path} must hold a JSON object, and holds a {type(content).__name__}.")
    return content


def lacking(folder: Path, name: str, file: str) -> str:
    """Write the sentence about a tensor that the index names and its shard does not hold."""
    return f"{folder / INDEX} promises tensor {name} in {file}, which lacks it; {again(folder)}."


def weight_map(folder: Path) -> dict[str, str]:
    """Map each tensor to its file, as the index promises; a single file has one entry under its own name.

    A lone ``model.safetensors`` is preferred to an index, as transformers does.
    """
    if (folder / SINGLE).exists():
        return {SINGLE: SINGLE}
    if (folder / INDEX).exists():
        return read_index(folder / INDEX)
    reason, left = unfinished(folder), sorted(folder.glob(f"*{UNFINISHED}"))
    if reason is not None:
        raise NearplaneError(reason)
    if left:
        raise NearplaneError(
            f"{folder} was not written to its end ({left[0].name} is left over), and the records to resume it are gone; write "
            "it again."
        )
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: files[0]}
    if files:
        raise NearplaneError(
            f"{folder} holds {len(files)} safetensors files and no {INDEX}; the download or the write was not finished."
        )
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise NearplaneError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run any code when loaded and is refused; "
            "load the model once with transformers where you trust it and save_pretrained() it as safetensors."
        )
    raise NearplaneError(f"{folder} holds no weights (*.safetensors); give a folder that does.")


def read_index(path: Path) -> dict[str, str]:
    """Read the ``weight_map`` of an index, and check that every file name stays inside the folder."""
    promised = read_json(path).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise NearplaneError(f"{path} has no weight_map; {again(path.parent)}.")
    for name, file in promised.items():
        if not isinstance(file, str) or not stays_inside(file):
            raise NearplaneError(f"{path} places tensor {name} in {file!r}, outside of the folder; refused.")
    return {name: file for name, file in promised.items() if not file.endswith(GGUF)} or promised


def stays_inside(file: str) -> bool:
    """Tell whether a relative path has no way up. Symbolic links may leave: the Hugging Face cache is made of them."""
    return bool(file) and all(
        not path.anchor and ".." not in path.parts for path in (PurePosixPath(file), PureWindowsPath(file))
    )
