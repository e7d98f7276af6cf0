"""Checks that files and layers of a checkpoint are whole: the index against its shards, leftovers, JSON that parses.

Decides what of a folder is a problem (a reader would fail, or read something else than was written) and what only a note.
Everything is listed; nothing here stops at the first thing that is wrong.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from nearplane.core.errors import NearplaneError
from nearplane.formats.base import StoredLayer
from nearplane.formats.read import Checkpoint
from nearplane.formats.store import (
    INDEX,
    REPORT,
    SINGLE,
    SUMS,
    UNFINISHED,
    Shard,
    lacking,
    parse_json,
    read_index,
    read_json,
    stays_inside,
)

LEFTOVERS = (f"*{UNFINISHED}", ".*.tmp")  # what ``formats/parts.py`` calls a file that is not done


@dataclass
class Findings:
    """Sentences about a checkpoint: problems, and notes that a person may want to read. Each only once."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Add a sentence about something wrong."""
        if text not in self.problems:
            self.problems.append(text)

    def note(self, text: str) -> None:
        """Add a sentence about something unusual, or not looked at."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def listing(self) -> Iterator[None]:
        """Make a problem of a NearplaneError inside."""
        try:
            yield
        except NearplaneError as error:
            self.problem(str(error))


@dataclass(frozen=True)
class FileSum:
    """One file of the folder, with what identifies its content."""

    name: str
    bytes: int
    sha256: str


def holds_weights(folder: Path) -> bool:
    """Tell whether anything in the folder says that it is, or was to be, a checkpoint in safetensors."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", INDEX, f"*{UNFINISHED}"))


def sums(folder: Path, found: Findings) -> Iterator[FileSum]:
    """Hash the files of the folder one after the other; one that cannot be read is a problem."""
    for path in files(folder):
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                yield FileSum(path.relative_to(folder).as_posix(), stream.tell(), digest)
        except OSError as error:
            found.problem(f"{path} cannot be read: {error}.")


def check_sums(folder: Path, hashed: list[FileSum], found: Findings) -> None:
    """Compare the hashes with the sums that lie beside the files, where there are any."""
    path = folder / SUMS
    if not path.is_file():
        return
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found.problem(f"{path} cannot be read: {error}.")
        return
    present = {file.name: file.sha256 for file in hashed}
    for number, line in enumerate(lines, 1):
        digest, name = line[:64], line[66:]
        if line[64:66] not in ("  ", " *") or not name:
            found.problem(f"{path}: line {number} is not a sum and a name; it is damaged.")
        elif any(problem.startswith(f"{folder / name} ") for problem in found.problems):
            continue  # that it is missing, cut or cannot be read is said already
        elif name not in present:
            found.problem(f"{folder / name} is named in {SUMS}, and is missing.")
        elif present[name] != digest:
            found.problem(
                f"{folder / name} is not what was written, its sha256 is another than in {SUMS}; restore it, or, if the "
                "change was meant, delete its line there."
            )


def files(folder: Path) -> list[Path]:
    """List the files of the folder itself, links that lead nowhere among them, and those of sub-folders that have sums."""
    found = {path for path in folder.iterdir() if path.is_file() or not path.exists()}
    try:
        lines = (folder / SUMS).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # said where the sums are compared
        lines = []
    named = {folder / line[66:] for line in lines if "/" in line[66:] and stays_inside(line[66:])}
    return sorted(found | {path for path in named if path.is_file()})


def check_files(folder: Path, found: Findings) -> None:
    """Check names, headers and JSON; reads no tensor."""
    for pattern in LEFTOVERS:
        for path in sorted(folder.glob(pattern)):
            found.problem(
                f"{path} is left over from a write that did not finish; delete it, and write again what it was."
            )
    for path in sorted(folder.glob("*.json")):
        with found.listing():
            _check_code(folder, path, parse_json(path), found)
    with found.listing():
        if not (folder / "config.json").exists():
            read_json(folder / "config.json")  # raises the sentence that every reader would
    indexed: set[str] = set()
    if (folder / INDEX).exists():
        with found.listing():
            indexed = _check_index(folder, found)
    shards = [path for path in sorted(folder.glob("*.safetensors")) if path.name not in indexed]
    for path in shards:
        with found.listing():
            Shard(path)
        if path.name == SINGLE and indexed:
            found.note(f"{path} is what readers take; {INDEX} does not name it, and they ignore what it names.")
        elif indexed:
            found.note(f"{path} is not named in {INDEX}; no reader takes it for weights.")


def _check_code(folder: Path, path: Path, content: object, found: Findings) -> None:
    """Look for the Python files that a configuration names in ``auto_map``; readers that trust its code want them."""
    named = content.get("auto_map") if isinstance(content, dict) else None
    for value in named.values() if isinstance(named, dict) else ():
        for entry in value if isinstance(value, list) else [value]:
            module = entry.rpartition(".")[0] if isinstance(entry, str) and "--" not in entry else ""
            if module and not (folder / f"{module}.py").is_file():
                told = f"{path} names code in {module}.py (auto_map), which is missing"
                kind = content.get("model_type") if isinstance(content, dict) else None
                own = path.name == "config.json" and kind not in CONFIG_MAPPING_NAMES
                if own:
                    found.problem(f"{told}; no reader knows the model without the code.")
                else:
                    found.note(f"{told}.")


def _check_index(folder: Path, found: Findings) -> set[str]:
    """Compare the index with its shards, both ways; returns the shards' names."""
    index = folder / INDEX
    promised = read_index(index)
    shards = list(dict.fromkeys(promised.values()))
    total: int | None = 0
    for file in shards:
        held: dict[str, int] | None = None
        with found.listing():
            held = {name: at.end - at.start for name, at in Shard(folder / file).tensors.items()}
        if held is None:
            total = None
            continue
        wanted = {name for name, place in promised.items() if place == file}
        for name in sorted(wanted - held.keys()):
            found.problem(lacking(folder, name, file))
            total = None
        for name in sorted(held.keys() - wanted):
            where = f"places it in {promised[name]}" if name in promised else "does not name it"
            found.problem(f"{folder / file} holds tensor {name}, and {INDEX} {where}: no reader finds it there.")
        for name in sorted(wanted & held.keys()):
            total = None if total is None else total + held[name]
    if total is not None:
        _check_total(index, total, found)
    return set(shards)


def _check_total(index: Path, total: int, found: Findings) -> None:
    """Compare the index's ``total_size`` with the bytes of its tensors."""
    metadata = read_json(index).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is None:
        found.note(f"{index} states no total_size.")
    elif stated != total:
        found.problem(f"{index} states a total_size of {stated} bytes, and its tensors take {total}.")


def signs(folder: Path) -> bool | None:
    """Tell whether the run that wrote a folder allowed negative scales; None where nearplane did not write it.

    Runs of versions without that setting had none. A converted checkpoint keeps the report of its run.
    """
    if not (folder / REPORT).exists():
        return None
    try:
        settings = read_json(folder / REPORT).get("settings")
    except NearplaneError:
        return False
    held = settings if isinstance(settings, dict) else {}
    grid, overrides = held.get("grid"), held.get("override")
    if not isinstance(grid, dict) or not grid.get("negative_scales"):
        return False
    return bool(grid.get("sym")) or any(
        isinstance(some, dict) and some.get("sym") for some in (overrides if isinstance(overrides, list) else [])
    )


def examine(checkpoint: Checkpoint, name: str, found: Findings, negative: bool | None = None) -> None:
    """Read a layer and list what is wrong with it, a tensor that cannot be read, a code off the grid, a NaN included.

    ``negative`` is the answer of ``signs``.
    """
    reader = checkpoint.reader
    if reader is None:
        return
    try:
        layer, decoded = checkpoint.decode(name)
        flaws = list(reader.flaws(checkpoint.store, layer, decoded))
    except NearplaneError as error:
        found.problem(str(error))
        return
    if f"{name}.weight" in checkpoint.dense:
        found.problem(f"{name} is stored twice, quantized and as {name}.weight.")
    for flaw in flaws:
        found.problem(flaw)
    half = 1 << (layer.grid.storage_bits - 1)
    wrong = int((decoded.zero != half).sum()) if layer.grid.sym else 0
    if wrong:
        found.problem(f"{layer.name} is symmetric, and {wrong} of its zero points are not {half}.")
    _scales(layer, decoded.scale, negative, found)
    for remark in reader.remarks(layer):
        found.note(remark)
    _order(checkpoint, layer, decoded.group, reader.order_key, found)


def _scales(layer: StoredLayer, scale: Tensor, negative: bool | None, found: Findings) -> None:
    """Look for scales that are 0, subnormal, or negative where ``signs`` does not allow that; all are finite."""
    least = torch.finfo(scale.dtype).smallest_normal
    kinds = {"0": scale == 0, "negative": scale < 0, "subnormal": (scale != 0) & (scale.abs() < least)}
    if negative or (layer.grid.scales.held_in is not None and layer.grid.scales.either_sign):
        del kinds["negative"]
    # AutoRound's symmetric scales have the sign of the group's largest weight.
    wrong = {"0": bool((scale == 0).all()), "negative": negative is not None or not layer.grid.sym}
    for kind, where in kinds.items():
        if bool(where.any()):
            row, group = (int(i) for i in where.nonzero()[0])
            count = int(where.sum())
            say = found.problem if wrong.get(kind) else found.note
            say(
                f"{layer.name}: {count} of {scale.numel()} scales {'are' if count > 1 else 'is'} {kind}, the first in "
                f"row {row}, group {group}."
            )


def _order(checkpoint: Checkpoint, layer: StoredLayer, group: Tensor, key: str, found: Findings) -> None:
    """Compare the groups of a layer's columns with what the configuration says under ``key``."""
    if layer.order is None:
        return
    dtype = checkpoint.store.dtype(layer.order)
    if dtype.is_floating_point:
        found.problem(f"{layer.order} is {dtype}; groups are counted in integers.")
    trivial = torch.arange(layer.shape[1]) // layer.grid.group_width(layer.shape[1])
    if not checkpoint.ordered and not torch.equal(group, trivial):
        suffix = layer.order.removeprefix(f"{layer.name}.")
        found.problem(
            f"{layer.name} has groups in an order of its own ({suffix}), and the configuration does not say so ({key}); "
            "engines would read other weights."
        )
