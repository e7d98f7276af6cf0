"""Writing a transformers folder: a run's parts, then the shards of the checkpoint, whole or resumable.

Decides the names of the files and the order in which they appear. Solved weights lie in *parts*, in one neutral layout
whatever the format (``compressed.NEUTRAL``); ``checkpoint/export.py`` makes shards of them. Every file is written under
a temporary name, forced to disk and renamed. The index comes last, so a folder without it was not finished. A sealed
part survives whatever ends the process, and a writer that resumes the folder goes on after it; without a seal nothing
stays. A finished folder has the sums of its files beside them.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.core.grid import Grid, Quantized
from nearplane.formats.companions import CARD, companions
from nearplane.formats.compressed import NEUTRAL
from nearplane.formats.journal import LAYOUT, STATE, Journal, file_hash, holder, sync
from nearplane.formats.read import Checkpoint, read_tensors
from nearplane.formats.store import INDEX, PAGE, REPORT, SUMS, UNFINISHED, Shard, Store, read_index

FINAL = "model-{:05}-of-{:05}.safetensors"
# Two hold times, so that each run has other bytes, and a card is edited: two runs that did the same have the same sums.
UNSUMMED = (REPORT, PAGE, CARD)

# Tensors wait in memory until so many bytes of them make a file: 5 GB, as other tools have it.
SHARD_BYTES = 5_000_000_000
# Of unfinished files: parts, and the shards that are made of them; without parts, what is put becomes shards by name.
STEMS = ("part", "shard")


class Part(NamedTuple):
    """The solved weights of one block."""

    files: list[Path]
    quantization: dict[str, Any] | None
    """Their description in the neutral layout; None: the block has no linear."""

    def open(self) -> Checkpoint | None:
        """Open the weights, to be read by name on disk; None where there is none."""
        if self.quantization is None or not self.files:
            return None
        return read_tensors(Store.of(self.files), {}, self.quantization, NEUTRAL)


class Writer:
    """Writes into a new or empty folder, which stays as it was unless a part was sealed or ``finish()`` reached.

    Attributes:
        records: what an earlier writer sealed, in order, as far as it can be trusted, with ``resume``.
        lost: why there are no more records, if one or its part is damaged.
        complete: whether an earlier writer finished all but the tidying up: nothing is written then.
    """

    def __init__(self, out: Path, *, shard_bytes: int = SHARD_BYTES, resume: bool = False) -> None:
        """Check the folder; ``__enter__`` claims it.

        Args:
            out: a folder that does not exist or is empty.
            shard_bytes: tensors wait in memory until so many bytes make a file.
            resume: whether ``out`` may hold what an earlier writer left.

        Raises:
            SettingError: before anything is touched, if ``out`` is a file or holds something else.
            NearplaneError: when the disk refuses, or another process writes there; so does every method.
        """
        self.out = Path(out)
        self.shard_bytes, self.resume = shard_bytes, resume
        self.records: list[dict[str, Any]] = []
        self.lost: str | None = None
        self.complete = False
        self._journal = Journal(self.out)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._grids: dict[str, Grid] = {}  # of the weights since the last seal
        self._copying = False  # shards are written beside the parts
        self._shard_of: dict[str, int] = {}  # tensor name -> shard, counted from 0
        self._elsewhere: dict[str, str] = {}  # tensor name -> file that is no shard
        self._hashes: list[str] = []  # of each shard
        self._sums: dict[str, str] = {}  # of each other file, by name
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
            self._journal.lock()
            self._take_over()
        except OSError as error:
            self._give_up()
            raise NearplaneError(f"folder {self.out} cannot be written to: {error}.") from error
        except NearplaneError:
            self._give_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending.clear()
        if not self._finished:
            self._give_up()

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add copies of tensors; they stay in memory until their shard is full. A name comes only once."""
        self._refuse_finished()
        if self.complete:
            return
        for name, tensor in tensors.items():
            if name in self._shard_of:
                raise NearplaneError(f"tensor {name} is written twice into {self.out}.")
            if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
                self.flush()
            self._shard_of[name] = len(self._hashes)
            self._pending[name] = _own(tensor)
            self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def put_quantized(self, name: str, quantized: Quantized, grid: Grid) -> None:
        """Add a solved weight to the current part.

        Args:
            name: of the module on disk.
            quantized: codes (out, in), scales and zeros (out, groups).
            grid: with ``scale_dtype`` of the format that will be exported.
        """
        self._grids[name] = grid
        self.put(NEUTRAL.pack(name, quantized, grid))

    def seal(self, record: dict[str, Any]) -> None:
        """Make the current part durable, with a record (for JSON) that ``records`` will give back."""
        self._refuse_finished()
        if self.complete:
            return
        first = sum(len(earlier["shards"]) for earlier in self.records)
        self.flush()
        grids = self._grids
        described = NEUTRAL.config(next(iter(grids.values())), ignore=[], settings={}, grids=grids) if grids else None
        parts = {self._part(i).name: self._hashes[i] for i in range(first, len(self._hashes))}
        record = {**record, "layout": LAYOUT, "quantization": described, "shards": parts}
        try:
            self._journal.add(len(self.records), record)
        except OSError as error:
            raise NearplaneError(f"the state of {self.out} cannot be written: {error}.") from error
        self.records.append(record)
        self._grids = {}

    def part(self, record: dict[str, Any]) -> Part:
        """Locate the part of a sealed record, also where it has become a shard of the finished checkpoint."""
        files = []
        for name in record["shards"]:
            shards = sorted(self.out.glob(f"model-{name.split('-')[1].split('.')[0]}-of-*.safetensors"))
            files.append(self.out / name if (self.out / name).exists() or not shards else shards[0])
        return Part(files, record["quantization"])

    def repack(self) -> None:
        """Begin the checkpoint's shards anew beside the parts, which stay until all of the shards are safe."""
        self._copying = True
        self._shard_of, self._hashes, self._total = {}, [], 0

    def flush(self) -> None:
        """End the current shard: write the pending tensors, under a name that no reader takes for a weight."""
        if not self._pending:
            return
        target = self._part(len(self._hashes))
        with self._atomic(target, self._pending_bytes) as temporary:
            save_file(self._pending, temporary, metadata={"format": "pt"})
            digest = file_hash(temporary)
        self._hashes.append(digest)
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def text(self, name: str, content: str) -> None:
        """Write a text file of this name, all of it or nothing; a second one replaces the first."""
        target, data = self._target(name), content.encode("utf-8")
        if self.complete:
            return
        with self._atomic(target, len(data)) as temporary:
            temporary.write_bytes(data)
        self._sums[name] = hashlib.sha256(data).hexdigest()

    def json(self, name: str, obj: Any) -> None:
        """Write a JSON file of this name."""
        self.text(name, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def copy(self, path: Path, name: str | None = None) -> None:
        """Copy a file; what a link points to, not the link. ``name``: below the folder, its sub-folders included."""
        name = name or path.name
        target = self._target(name, deep=True)
        if not path.is_file():
            raise NearplaneError(f"{path} is not a file and cannot be copied to {self.out}.")
        if self.complete:
            return
        self._make_folder(target.parent)
        with self._atomic(target, path.stat().st_size) as temporary:
            shutil.copyfile(path, temporary)
            self._sums[name] = file_hash(temporary)

    def produce(self, name: str, need: int, fill: Callable[[Path], None], holds: Iterable[str] = ()) -> None:
        """Write a file of this name, all of it or nothing; ``fill`` writes some ``need`` bytes under the path it is given.

        ``holds``: tensors that the index places in the file, so that no loader takes the folder for whole without it.
        """
        target = self._target(name)
        self._elsewhere |= dict.fromkeys(holds, name)
        if self.complete:
            return
        with self._atomic(target, need) as temporary:
            fill(temporary)
            self._sums[name] = file_hash(temporary)

    def companions(self, folder: Path) -> None:
        """Copy what makes a folder a usable model besides weights and configuration (``formats/companions.py``).

        A file of a name that was written here stays as it was written.
        """
        for name in companions(folder).copied:
            if name not in self._sums:
                self.copy(folder / name, name)

    def finish(self) -> None:
        """Give the shards their final names and write the index: from here on the folder is complete. Then tidy up."""
        self._refuse_finished()
        if not self.complete:
            self._name_shards()
        self._finished = True
        try:
            self._journal.cut(0)  # before the parts that the records describe
            for path in self._leftovers():
                path.unlink(missing_ok=True)
            self._journal.clear()
        except OSError as error:
            self._journal.release()
            raise NearplaneError(f"{self.out} is complete, but {STATE} in it cannot be removed: {error}.") from error

    def _name_shards(self) -> None:
        """Rename the shards, and write sums and index."""
        self.flush()
        if not self._hashes:
            raise NearplaneError(f"no tensor was written to {self.out}; there is no model to finish.")
        names = [FINAL.format(i + 1, len(self._hashes)) for i in range(len(self._hashes))]
        self._written.update(self.out / name for name in names)  # before the renames: an interrupt may fall between
        try:
            for i, name in enumerate(names):
                self._part(i).rename(self.out / name)
            sync(self.out)
        except OSError as error:
            raise NearplaneError(f"the shards in {self.out} cannot be renamed: {error}.") from error
        index = {
            "metadata": {"total_size": self._total},
            "weight_map": {name: names[shard] for name, shard in sorted(self._shard_of.items())} | self._elsewhere,
        }
        data = json.dumps(index, indent=2).encode("utf-8")
        sums = {**self._sums, **dict(zip(names, self._hashes, strict=True)), INDEX: hashlib.sha256(data).hexdigest()}
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items()) if name not in UNSUMMED]
        for name, content in ((SUMS, "".join(lines).encode("utf-8")), (INDEX, data)):
            with self._atomic(self.out / name, len(content)) as temporary:
                temporary.write_bytes(content)

    @contextlib.contextmanager
    def _atomic(self, target: Path, need: int) -> Iterator[Path]:
        """Give a temporary path to fill, and put the file on disk under the name ``target`` afterwards."""
        temporary = target.with_name(f".{target.name}.tmp")
        self._written.update((temporary, target))
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask has it; safetensors gives the file to its owner alone
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
        except (OSError, SafetensorError) as error:
            raise NearplaneError(
                f"{target} cannot be written ({error}): it needs {need / 1e9:.3g} GB and {_free(self.out)}."
            ) from error

    def _make_folder(self, folder: Path) -> None:
        """Make a sub-folder of the output, which goes again where the run gives up."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            for path in reversed(missing):
                path.mkdir()
                self._created.insert(0, path)
        except OSError as error:
            raise NearplaneError(f"folder {folder} cannot be made: {error}.") from error

    def _part(self, shard: int, *, copied: bool | None = None) -> Path:
        """Name a part, or a shard that is made of parts (``copied``)."""
        stem = "shard" if (self._copying if copied is None else copied) else "part"
        return self.out / f"{stem}-{shard + 1:05}{UNFINISHED}"

    def _leftovers(self) -> list[Path]:
        """List files of the folder that are not done."""
        parts = [path for stem in STEMS for path in self.out.glob(f"{stem}-*{UNFINISHED}")]
        return parts + [path for path in self.out.rglob(".*.tmp") if STATE not in path.parts]

    def _target(self, name: str, *, deep: bool = False) -> Path:
        """Give the path of a file to be written. Raises SettingError for a name that is none, or one of the writer's own.

        ``deep``: whether the file may lie in a sub-folder.
        """
        self._refuse_finished()
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts if deep else path.name == name
        if not name or not inside or str(path) != name or name in (INDEX, SUMS):
            raise SettingError(f"{name!r} is not a file name that can be written into {self.out}.")
        return self.out / name

    def _refuse_finished(self) -> None:
        """Raise NearplaneError where the folder is finished."""
        if self._finished:
            raise NearplaneError(f"{self.out} is finished; nothing can be added.")

    def _refuse_occupied(self) -> None:
        """Raise SettingError where the folder holds something else, NearplaneError where another process writes there."""
        try:
            if self.out.is_symlink() and not self.out.exists():
                raise SettingError(f"{self.out} is a link that leads nowhere; choose another output folder.")
            if self.out.exists() and not self.out.is_dir():
                raise SettingError(f"{self.out} is a file; choose a new or empty output folder.")
            if (self.out / STATE).is_dir():
                other = holder(self.out)
                if other is not None:
                    raise NearplaneError(f"{self.out} is being written by {other}; wait for it or stop it.")
                if not self.resume:
                    raise SettingError(
                        f"{self.out} holds a run that was not finished; resume it (--resume), or choose another folder."
                    )
            elif self.resume and (self.out / INDEX).exists():
                raise SettingError(f"{self.out} is finished; there is nothing to resume.")
            elif self.out.exists() and any(self.out.iterdir()):
                raise SettingError(f"{self.out} is not empty; choose a new or empty output folder.")
        except OSError as error:
            raise NearplaneError(f"{self.out} cannot be read: {error}.") from error

    def _take_over(self) -> None:
        """Bring a resumed folder into the state after its last good seal, and count that as written here."""
        if not self.resume:
            return
        if self._journal.earlier:
            raise SettingError(
                f"{self.out} holds a run that an earlier version of nearplane began, and its finished blocks lie in another "
                "layout; finish it with that version, or begin in another folder."
            )
        self.complete = self._is_complete()
        if self.complete:
            self.records, self.lost = self._journal.records(check=False)
            return
        self._unfinish()
        self.records, self.lost = self._journal.records()
        self._journal.cut(len(self.records))
        sealed = {name: digest for record in self.records for name, digest in record["shards"].items()}
        for path in self._leftovers():
            if path.name not in sealed:
                path.unlink()
        for name, digest in sealed.items():
            tensors = Shard(self.out / name).tensors
            self._shard_of |= dict.fromkeys(tensors, len(self._hashes))
            self._total += sum(tensor.end - tensor.start for tensor in tensors.values())
            self._hashes.append(digest)

    def _is_complete(self) -> bool:
        """Tell whether the index, which is written last, is there with every shard that it names."""
        if not (self.out / INDEX).exists():
            return False
        return all((self.out / name).exists() for name in set(read_index(self.out / INDEX).values()))

    def _unfinish(self) -> None:
        """Undo what was done of ``finish``: shards become parts again, or go where their parts are still there."""
        (self.out / INDEX).unlink(missing_ok=True)
        for path in self.out.glob("model-*-of-*.safetensors"):
            part = self._part(int(path.name.split("-")[1]) - 1, copied=False)
            if self._copying or part.exists():
                path.unlink()
            else:
                path.rename(part)

    def _give_up(self) -> None:
        """Take back every file and folder made here and not sealed, and nothing else."""
        if self.complete:
            self._journal.release()
            return
        with contextlib.suppress(OSError):  # the error that led here matters more; what stays has no index
            if self.records:
                self._unfinish()
        sealed = {self.out / name for record in self.records for name in record["shards"]}
        for path in self._written - sealed:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if self.records:
            self._journal.release()
            return
        if self._journal.held and not self._journal.empty:  # of an earlier run, and not read: not ours to remove
            self._journal.release()
            return
        with contextlib.suppress(OSError):
            if self._journal.held:
                self._journal.clear()
        for folder in self._created:
            with contextlib.suppress(OSError):  # somebody else put a file there: it is theirs, and stays
                folder.rmdir()


def _own(tensor: Tensor) -> Tensor:
    """Copy to the CPU, contiguous and alone in its storage: safetensors refuses shared memory."""
    own = tensor.detach().to("cpu").contiguous()
    return own.clone() if own.data_ptr() == tensor.data_ptr() else own


def _free(folder: Path) -> str:
    """Tell how much the disk has left, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB are free"
    except OSError:
        return "how much is free cannot be told"
