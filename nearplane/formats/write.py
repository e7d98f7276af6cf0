"""Writing a transformers folder: shard by shard in bounded memory, and whole or not at all.

Decides the names of the shards and the order in which files appear. Every file is written under a temporary name,
forced to disk and renamed; the index comes last, so a folder without it was not finished.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.formats.store import INDEX, UNFINISHED

# Tensors wait in memory until so many bytes of them make a file.
SHARD_BYTES = 4 << 30


class Writer:
    """Writes into a new or empty folder, and leaves it as it was unless ``finish()`` is reached.

    Raises SettingError before anything is touched if ``out`` is a file or holds something; NearplaneError when the
    disk refuses.
    """

    def __init__(self, out: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.out = Path(out)
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shard_of: dict[str, int] = {}  # tensor name -> shard, counted from 0
        self._shards = 0
        self._total = 0
        self._written: set[Path] = set()
        self._created: list[Path] = []  # folders made here, innermost first
        self._finished = False
        self._refuse_occupied()

    def __enter__(self) -> "Writer":
        self._refuse_occupied()
        missing = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        try:
            for folder in reversed(missing):
                folder.mkdir()
                self._created.insert(0, folder)
            # A folder that cannot be written to must say so now, not after hours of solving.
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            self._remove()
            raise NearplaneError(f"folder {self.out} cannot be written to: {error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending.clear()
        if not self._finished:
            self._remove()

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add copies of tensors; they stay in memory until their shard is full. A name comes only once."""
        self._refuse_finished()
        for name, tensor in tensors.items():
            if name in self._shard_of:
                raise NearplaneError(f"tensor {name} is written twice into {self.out}.")
            if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
                self._flush()
            self._shard_of[name] = self._shards
            self._pending[name] = _own(tensor)
            self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self._flush()

    def text(self, name: str, content: str) -> None:
        """Write a text file of this name, all of it or nothing; a second one replaces the first."""
        target, data = self._target(name), content.encode("utf-8")
        with self._atomic(target, len(data)) as temporary:
            temporary.write_bytes(data)

    def json(self, name: str, obj: Any) -> None:
        """Write a JSON file of this name."""
        self.text(name, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def copy(self, path: Path) -> None:
        """Copy a file under its own name; what a link points to, not the link."""
        target = self._target(path.name)
        if not path.is_file():
            raise NearplaneError(f"{path} is not a file and cannot be copied to {self.out}.")
        with self._atomic(target, path.stat().st_size) as temporary:
            shutil.copyfile(path, temporary)

    def finish(self) -> None:
        """Give the shards their final names and write the index: from here on the folder is complete."""
        self._refuse_finished()
        if self._pending:
            self._flush()
        if not self._shards:
            raise NearplaneError(f"no tensor was written to {self.out}; there is no model to finish.")
        names = [f"model-{i + 1:05}-of-{self._shards:05}.safetensors" for i in range(self._shards)]
        self._written.update(self.out / name for name in names)  # before the renames: an interrupt may fall between
        try:
            for i, name in enumerate(names):
                self._part(i).rename(self.out / name)
            _sync(self.out)
        except OSError as error:
            raise NearplaneError(f"the shards in {self.out} cannot be renamed: {error}.") from error
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: names[shard] for name, shard in sorted(self._shard_of.items())},
        }
        data = json.dumps(index, indent=2).encode("utf-8")
        with self._atomic(self.out / INDEX, len(data)) as temporary:
            temporary.write_bytes(data)
        self._finished = True

    def _flush(self) -> None:
        """Write the pending tensors as the next shard, under a name that no reader takes for a weight."""
        target = self._part(self._shards)
        with self._atomic(target, self._pending_bytes) as temporary:
            save_file(self._pending, temporary, metadata={"format": "pt"})
        self._shards += 1
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    @contextlib.contextmanager
    def _atomic(self, target: Path, need: int) -> Iterator[Path]:
        """A temporary path to fill; afterwards it is on disk under the name ``target``."""
        temporary = target.with_name(f".{target.name}.tmp")
        self._written.update((temporary, target))
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(target)
            _sync(self.out)
        except (OSError, SafetensorError) as error:
            raise NearplaneError(
                f"{target} cannot be written ({error}): it needs {need / 1e9:.3g} GB and {_free(self.out)}."
            ) from error

    def _part(self, shard: int) -> Path:
        return self.out / f"part-{shard + 1:05}{UNFINISHED}"

    def _target(self, name: str) -> Path:
        self._refuse_finished()
        if not name or Path(name).name != name or name == INDEX:
            raise SettingError(f"{name!r} is not a file name that can be written into {self.out}.")
        return self.out / name

    def _refuse_finished(self) -> None:
        if self._finished:
            raise NearplaneError(f"{self.out} is finished; nothing can be added.")

    def _refuse_occupied(self) -> None:
        try:
            if self.out.is_symlink() and not self.out.exists():
                raise SettingError(f"{self.out} is a link that leads nowhere; choose another output folder.")
            if self.out.exists() and not self.out.is_dir():
                raise SettingError(f"{self.out} is a file; choose a new or empty output folder.")
            if self.out.exists() and any(self.out.iterdir()):
                raise SettingError(f"{self.out} is not empty; choose a new or empty output folder.")
        except OSError as error:
            raise NearplaneError(f"{self.out} cannot be read: {error}.") from error

    def _remove(self) -> None:
        """Take back every file and folder made here, and nothing else."""
        for path in self._written:
            with contextlib.suppress(OSError):  # the error that led here matters more; what stays has no index
                path.unlink(missing_ok=True)
        for folder in self._created:
            with contextlib.suppress(OSError):  # somebody else put a file there: it is theirs, and stays
                folder.rmdir()


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous and alone in its storage: safetensors refuses shared memory."""
    own = tensor.detach().to("cpu").contiguous()
    return own.clone() if own.data_ptr() == tensor.data_ptr() else own


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    """How much the disk has left, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB are free"
    except OSError:
        return "how much is free cannot be told"
