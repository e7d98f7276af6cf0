"""What is on disk: the tensors of a transformers folder, each read when asked for and not before.

Decides which files of a folder are its weights (``model.safetensors``, else the index, else the only safetensors
file), and refuses at open what would otherwise fail hours later: a missing, truncated or misnamed shard.
"""

import json
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nearplane.core.errors import NearplaneError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A shard that a writer has not finished (``write.py``) carries this ending, so that no reader takes it for a weight.
UNFINISHED = ".unfinished"
PICKLES = ("*.bin", "*.pt", "*.pth")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Store:
    """Lazy, memory-mapped access to the tensors of one folder.

    Opening reads and checks every shard's header and no tensor. Raises NearplaneError, naming the file, for whatever
    makes the folder unreadable.
    """

    folder: Path
    names: frozenset[str]

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            problem = "is not a folder" if self.folder.exists() else "does not exist"
            raise NearplaneError(f"{self.folder} {problem}; give the folder that holds model.safetensors.")
        promised = _weight_map(self.folder)
        # Insertion order of the shards is that of the index, so that the first problem reported is the first shard's.
        self._shards: dict[str, Any] = {
            file: open_shard(self.folder / file) for file in dict.fromkeys(promised.values())
        }
        held = {file: set(shard.keys()) for file, shard in self._shards.items()}
        if not (self.folder / SINGLE).exists() and (self.folder / INDEX).exists():
            for name, file in promised.items():
                if name not in held[file]:
                    raise NearplaneError(lacking(self.folder, name, file))
            self._file = promised
        else:
            self._file = {name: file for file, names in held.items() for name in names}
        self.names = frozenset(self._file)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU. It may view the mapped file: clone it before writing to it."""
        file = self._where(name)
        try:
            tensor: Tensor = self._shards[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise NearplaneError(f"tensor {name} cannot be read from {self.folder / file}: {error}.") from error
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads no data."""
        return tuple(self._shards[self._where(name)].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; reads no data."""
        file = self._where(name)
        stored = self._shards[file].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise NearplaneError(f"tensor {name} in {self.folder / file} has dtype {stored}, which is not supported.")
        return DTYPES[stored]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor; reads no data."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def _where(self, name: str) -> str:
        if name not in self._file:
            raise NearplaneError(f"{self.folder} holds no tensor named {name}.")
        return self._file[name]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object; NearplaneError names the file when it is missing, unreadable or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NearplaneError(f"{path} does not exist; a transformers folder needs it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise NearplaneError(f"{path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise NearplaneError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise NearplaneError(f"{path} must hold a JSON object, and holds a {type(content).__name__}.")
    return content


def lacking(folder: Path, name: str, file: str) -> str:
    """The sentence about a tensor that the index names and its shard does not hold."""
    return f"{folder / INDEX} promises tensor {name} in {file}, which lacks it; download both again."


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor, as promised by the index; of a single file, one entry under the file's own name.

    A lone ``model.safetensors`` is preferred to an index, as transformers does.
    """
    if (folder / SINGLE).exists():
        return {SINGLE: SINGLE}
    if (folder / INDEX).exists():
        return read_index(folder / INDEX)
    unfinished = sorted(folder.glob(f"*{UNFINISHED}"))
    if unfinished:
        raise NearplaneError(
            f"{folder} was not written to its end ({unfinished[0].name} is left over); delete it and quantize again."
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
    raise NearplaneError(f"{folder} holds no safetensors file; give the folder that holds model.safetensors.")


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index, with every file name checked to stay inside the folder."""
    promised = read_json(path).get("weight_map")
    if not isinstance(promised, dict) or not promised:
        raise NearplaneError(f"{path} has no weight_map; download it again.")
    for name, file in promised.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise NearplaneError(f"{path} places tensor {name} in {file!r}, outside of the folder; refused.")
    return promised


def _stays_inside(file: str) -> bool:
    """Whether a relative path has no way up. Symbolic links may leave: the Hugging Face cache is made of them."""
    return bool(file) and all(
        not path.anchor and ".." not in path.parts for path in (PurePosixPath(file), PureWindowsPath(file))
    )


def open_shard(path: Path) -> safe_open:
    """A shard with a checked header: safetensors compares it with the file's length."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise NearplaneError(f"{path} is missing; download the folder again.") from error
    except SafetensorError as error:
        raise NearplaneError(f"{path} is truncated or corrupt ({error}); download it again.") from error
    except OSError as error:
        raise NearplaneError(f"{path} cannot be read: {error}.") from error
