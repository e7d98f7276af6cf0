"""What makes a run resumable: beside each block's shard a record of the block, and a lock on the folder.

Decides what of an unfinished folder can be trusted. A record is written when its shard is safe on disk, carries the
shard's hash and its own, and is never changed afterwards; the first one that is missing or damaged ends the list.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nearplane.core.errors import NearplaneError

# Holds the records and the lock while a run is not finished.
STATE = ".nearplane"
LOCK = "lock"


class Journal:
    """The records in one folder. Raises NearplaneError where the folder cannot be locked or read."""

    def __init__(self, out: Path) -> None:
        self.out, self.state = out, out / STATE
        self._lock: int | None = None

    def lock(self) -> None:
        """Claim the folder until ``release`` or the end of this process, however it ends."""
        path = self.state / LOCK
        try:
            self.state.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise NearplaneError(f"folder {self.out} cannot be written to: {error}.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            os.write(handle, f"process {os.getpid()} on {platform.node()}, since {now}".encode())
        except BlockingIOError as error:
            os.close(handle)
            raise NearplaneError(
                f"{self.out} is being written by {holder(self.out)}; wait for it or stop it."
            ) from error
        except OSError as error:
            os.close(handle)
            raise NearplaneError(f"{path} cannot be locked: {error}.") from error
        self._lock = handle

    @property
    def held(self) -> bool:
        """Whether this process has claimed the folder."""
        return self._lock is not None

    @property
    def empty(self) -> bool:
        """Whether there is no record, good or not."""
        return not any(self.state.glob("block-*.json"))

    def release(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def records(self) -> tuple[list[dict[str, Any]], str | None]:
        """The records in order, up to the first that cannot be trusted, and why that one cannot."""
        found: list[dict[str, Any]] = []
        while (path := self._path(len(found))).exists():
            try:
                digest, _, content = path.read_bytes().partition(b"\n")
                if hashlib.sha256(content).hexdigest().encode() != digest:
                    return found, f"{path.name} is damaged"
                record = json.loads(content)
                for shard, wanted in record["shards"].items():
                    if not (self.out / shard).exists():
                        return found, f"{shard} is missing"
                    if file_hash(self.out / shard) != wanted:
                        return found, f"{shard} is damaged"
            except OSError as error:
                raise NearplaneError(f"{path} cannot be read: {error}.") from error
            found.append(record)
        return found, None

    def cut(self, count: int) -> None:
        """Forget the records from number ``count`` on, the last first."""
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self.state.glob("block-*"), reverse=True):
                if path.suffix == ".tmp" or path.name >= self._path(count).name:
                    path.unlink()

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Write a record, all of it or nothing. OSError where the disk refuses."""
        content = json.dumps(record).encode()
        path = self._path(number)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(self.state)

    def clear(self) -> None:
        """Remove records and lock."""
        for path in sorted(self.state.glob("*"), reverse=True):
            path.unlink(missing_ok=True)
        self.state.rmdir()
        self.release()

    def _path(self, number: int) -> Path:
        return self.state / f"block-{number:05}.json"


def holder(out: Path) -> str | None:
    """Who holds the lock of a folder; None if nobody does."""
    try:
        handle = os.open(out / STATE / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(handle, 200).decode(errors="replace") or "another process"
    finally:
        os.close(handle)
    return None


def unfinished(out: Path) -> str | None:
    """Of a folder that holds the state of a run, that it is not finished and how it will be; None of any other."""
    if not (out / STATE).is_dir():
        return None
    at_work = holder(out)
    if at_work is not None:
        return f"{out} is being written by {at_work}; wait until that has ended."
    done = len(list((out / STATE).glob("block-*.json")))
    if not done:
        return (
            f"{out} holds a write that was not finished, and no finished block: nearplane quantize --resume begins it again, "
            "and what nearplane convert left can be deleted."
        )
    blocks = "1 block is done" if done == 1 else f"{done} blocks are done"
    return f"{out} holds a run that was not finished, {blocks}; nearplane quantize with --resume goes on with it."


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
