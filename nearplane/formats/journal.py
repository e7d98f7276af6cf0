"""Records that make a run resumable, one beside each block's part, and a lock on the folder.

Decides what of an unfinished folder can be trusted. A record is written when its part is safe on disk, carries the
part's hash and its own, and is never changed afterwards; the first one that is missing or damaged ends the list.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nearplane.core.errors import NearplaneError

WINDOWS = sys.platform == "win32"
# Holds the records and the lock while a run is not finished.
STATE = ".nearplane"
LOCK, HOLDER = "lock", "holder"
# Name of the layout of parts, in every record; records of earlier versions have none.
LAYOUT = "neutral-1"


class Journal:
    """The records in one folder. Raises NearplaneError where the folder cannot be locked or read."""

    def __init__(self, out: Path) -> None:
        self.out, self.state = out, out / STATE
        self._lock = _lock(out)

    def lock(self) -> None:
        """Claim the folder until ``release`` or the end of this process, however it ends."""
        try:
            self.state.mkdir(exist_ok=True)
            self._lock.acquire()
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            (self.state / HOLDER).write_text(f"process {os.getpid()} on {platform.node()}, since {now}", "utf-8")
        except Timeout as error:
            raise NearplaneError(
                f"{self.out} is being written by {holder(self.out)}; wait for it or stop it."
            ) from error
        except (OSError, NotImplementedError) as error:
            self.release()
            raise NearplaneError(f"folder {self.out} cannot be written to: {error}.") from error

    @property
    def held(self) -> bool:
        """Whether this process has claimed the folder."""
        return self._lock.is_locked

    @property
    def empty(self) -> bool:
        """Whether there is no record, good or not."""
        return not any(self.state.glob("block-*.json"))

    def release(self) -> None:
        """Give the folder free."""
        if self.held:
            with contextlib.suppress(OSError):  # who held it is no matter any more
                (self.state / HOLDER).unlink(missing_ok=True)
        self._lock.release()

    def records(self, *, check: bool = True) -> tuple[list[dict[str, Any]], str | None]:
        """Read the records in order, up to the first that cannot be trusted, and tell why that one cannot.

        ``check``: also that parts are what the records say.
        """
        found: list[dict[str, Any]] = []
        while (path := self._path(len(found))).exists():
            try:
                record = _record(path)
                if record is None:
                    return found, f"{path.name} is damaged"
                for part, wanted in record["shards"].items() if check else ():
                    if not (self.out / part).exists():
                        return found, f"{part} is missing"
                    if file_hash(self.out / part) != wanted:
                        return found, f"{part} is damaged"
            except OSError as error:
                raise NearplaneError(f"{path} cannot be read: {error}.") from error
            found.append(record)
        return found, None

    @property
    def earlier(self) -> bool:
        """Whether an earlier version wrote a record: its parts have no layout that is known here."""
        records = self.records(check=False)[0]
        return any(record.get("layout") != LAYOUT for record in records)

    def cut(self, count: int) -> None:
        """Forget the records from number ``count`` on, the last first."""
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(self.state.glob("block-*"), reverse=True):
                if path.suffix == ".tmp" or path.name >= self._path(count).name:
                    path.unlink()

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Write a record, all of it or nothing. Raises OSError where the disk refuses."""
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
        self.cut(0)
        for path in sorted(self.state.glob("*")):
            path.unlink(missing_ok=True)
        self.state.rmdir()
        self.release()

    def _path(self, number: int) -> Path:
        """Name the file of a record."""
        return self.state / f"block-{number:05}.json"


def _lock(out: Path) -> FileLock:
    """Make the lock of a folder: no waiting, and the lock of a process rather than of a thread."""
    return FileLock(out / STATE / LOCK, timeout=0, thread_local=False)


def _record(path: Path) -> dict[str, Any] | None:
    """Read a record; None if it is damaged."""
    digest, _, content = path.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    record: dict[str, Any] = json.loads(content)
    return record


def holder(out: Path) -> str | None:
    """Name the process that holds the lock of a folder; None if none does."""
    if not (out / STATE / LOCK).exists():
        return None
    try:
        with _lock(out):
            return None
    except Timeout:
        with contextlib.suppress(OSError):
            return (out / STATE / HOLDER).read_text("utf-8", errors="replace") or "another process"
        return "another process"
    except (OSError, NotImplementedError):
        return None


def unfinished(out: Path) -> str | None:
    """Tell of a folder with the state of a run that it is not finished, and how to go on; None of any other."""
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
    """Hash a file with SHA-256, in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    if WINDOWS and path.is_dir():  # cannot be opened there; its entries are in the file system's own journal
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
