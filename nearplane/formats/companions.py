"""The files of a model's folder that go along into a checkpoint: all but weights, and what is of another tool or copy.

Decides by what a file is, not by a list of names to be kept: a name that nobody has thought of is copied. What is left
out has a reason, and is named to the user. Sub-folders are searched, links to folders are not followed. A file is read
once, when it is copied, and nothing is run.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from nearplane.core.errors import NearplaneError
from nearplane.formats.journal import STATE
from nearplane.formats.store import INDEX, PAGE, REPORT, SUMS, UNFINISHED, parse_json, weight_map

CONFIG, MODULES = "config.json", "modules.json"
# Of PyTorch, safetensors, llama.cpp, ONNX, TensorFlow, Keras, Flax, Rust, MLX, Core ML, OpenVINO, TensorRT, NeMo, Paddle.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data*",
    "*.onnx.data", "*.ort", "*.h5", "*.hdf5", "*.keras", "*.msgpack", "*.tflite", "*.pb", "*.data-[0-9]*-of-[0-9]*", "*.ot",
    "*.mlmodel", "*.mlpackage", "*.mlmodelc", "openvino_*.xml", "*.engine", "*.nemo", "*.pdparams", "*.pdiparams", "*.pdmodel",
    "*.distcp", "*.mar", "*.dduf", "*.llamafile", "weights*.npz", "model*.npz",
)  # fmt: skip
INDEXES = ("*.index.json", "variables.index", "model.ckpt*.index", "model.ckpt*.meta")
QUANTIZATIONS = (
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json", "recipe.yaml",
    "recipe.yml", "quant_log.csv", "quant_strategy.json", "smash_config.json", "*imatrix*.dat",
)  # fmt: skip
CARDS = ("readme*", "model_card*", "modelcard*")
# The model card that a checkpoint gets, and the line in it by which a card that nobody has edited is known again.
CARD = "README.md"
SEAL = re.compile(r"\n<!-- written by nearplane; ([0-9a-f]{16}): once edited, this card is yours, and is kept -->\n")
CACHES = (".*", "__pycache__", f"*{UNFINISHED}", "*.pyc", "*.tmp", "*.lock")
# Written anew, or of one run alone.
OWN = (CONFIG, REPORT, PAGE, SUMS, INDEX)
# Bytes of a companion: a tokenizer takes 33 MB, more is data or weights of some kind.
MOST_BYTES = 1 << 28
# Files of a sub-folder: voices of a speaker model are some hundreds, an environment or a data set has more.
MOST_FILES = 2000
# Names that a note lists of each reason.
NAMED = 20


class Companions(NamedTuple):
    """What is copied, and what is not."""

    copied: list[str]
    """Names of files, relative to the folder, sorted."""
    left: dict[str, list[str]]
    """Names that are left out, by reason; a sub-folder of which nothing is copied stands for its files."""

    def note(self) -> str | None:
        """Say what is left out, in one sentence without its full stop; None: nothing is."""
        parts = []
        for reason, names in sorted(self.left.items()):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            parts.append(f"{', '.join(names[:NAMED])}{more} ({reason})")
        return f"not copied: {'; '.join(parts)}" if parts else None


def companions(folder: Path) -> Companions:
    """Choose the files of a model's folder that belong into a checkpoint made of it; reads no content but JSON.

    The weights that are read as the model, and what every checkpoint gets anew, are in neither list.
    """
    copied, left = list[str](), dict[str, list[str]]()
    own = {*OWN, *_weights_read(folder), *([CARD] if is_ours(card_text(folder)) else [])}
    for name, reason in _search(folder, "", _modules(folder)):
        if reason is None:
            copied.append(name)
        elif name not in own:
            left.setdefault(reason, []).append(name)
    return Companions(sorted(set(copied) - own), {reason: sorted(names) for reason, names in left.items()})


def sealed(card: str) -> str:
    """Return a card with the line by which ``is_ours`` knows it; the line stands at its end."""
    return f"{card}\n<!-- written by nearplane; {_short(card)}: once edited, this card is yours, and is kept -->\n"


def is_ours(card: str | None) -> bool:
    """Tell whether a card was written by nearplane and not edited since."""
    found = SEAL.search(card or "")
    return found is not None and card is not None and _short(SEAL.sub("", card)) == found[1]


def card_text(folder: Path) -> str | None:
    """Read the card of a folder; None where there is none that can be read."""
    try:
        return (folder / CARD).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def kept_card(out: Path) -> bool:
    """Tell whether a folder has a card that must not be written over: any that is not as nearplane wrote it."""
    return (out / CARD).is_symlink() or ((out / CARD).exists() and not is_ours(card_text(out)))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _search(folder: Path, below: str, modules: set[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the name of every file below a folder, with the reason against it; one line for a sub-folder left whole."""
    try:
        entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
    except OSError:
        yield f"{below}/", "cannot be read"
        return
    for entry in entries:
        name = f"{below}/{entry.name}".lstrip("/")
        reason = _reason(entry, name, below in modules)
        if reason is not None or not entry.is_dir():
            if not (entry.name == STATE or (entry.is_dir() and (folder / name / STATE).exists())):
                yield _shown(name) + "/" * entry.is_dir(), reason
            continue
        inside = list(_search(folder, name, modules))
        reasons = {why for _, why in inside}
        if len(inside) > MOST_FILES:
            yield f"{name}/", f"more than {MOST_FILES} files"
        elif len(reasons) == 1 and None not in reasons:
            yield f"{name}/", reasons.pop()
        else:
            yield from inside


def _reason(entry: "os.DirEntry[str]", name: str, weights_too: bool) -> str | None:
    """Tell why a file or sub-folder is left out, by its name first; None if it is not.

    ``weights_too``: in the sub-folder of a layer behind the transformer.
    """
    kinds = [("caches and hidden files", CACHES), ("of another quantization", QUANTIZATIONS)]
    kinds += [] if weights_too else [("weights", WEIGHTS), ("an index of weights", INDEXES)]
    kinds += [("describes the original", CARDS)] if "/" not in name else []
    for reason, patterns in kinds:
        if any(fnmatch(entry.name.lower(), pattern) for pattern in patterns):
            return reason
    if _shown(entry.name) != entry.name:
        return "a name that sums cannot hold"
    return _unfit_folder(entry) if entry.is_dir() else _unfit_file(entry)


def _unfit_folder(entry: "os.DirEntry[str]") -> str | None:
    if entry.is_symlink():
        return "a link to a folder"
    if not os.access(entry.path, os.R_OK | os.X_OK):
        return "cannot be read"
    return "a model of its own" if _is_model(Path(entry.path)) else None


def _unfit_file(entry: "os.DirEntry[str]") -> str | None:
    if not entry.is_file():
        return "a link that leads nowhere" if entry.is_symlink() else "not a file"
    if not os.access(entry.path, os.R_OK):
        return "cannot be read"
    return f"over {MOST_BYTES >> 20} MB" if entry.stat().st_size > MOST_BYTES else None


def _shown(name: str) -> str:
    """Write a name so that a line of text holds it; as it is, if the line does."""
    plain = name.isprintable() and "\\" not in name
    return name if plain else ascii(name)[1:-1]


def _is_model(folder: Path) -> bool:
    """Tell whether a sub-folder holds another model, or is a checkpoint in the making."""
    if (folder / STATE).exists():
        return True
    raw = _json(folder / CONFIG)
    return isinstance(raw, dict) and bool(raw.keys() & {"model_type", "architectures"})


def _modules(folder: Path) -> set[str]:
    """Name the sub-folders with layers behind the transformer, as sentence-transformers lists them: with their weights."""
    raw = _json(folder / MODULES)
    entries = [entry for entry in raw if isinstance(entry, dict)] if isinstance(raw, list) else []
    return {path for path in (entry.get("path") for entry in entries) if isinstance(path, str) and path}


def _json(path: Path) -> object:
    """Parse a JSON file; None where there is none that parses."""
    try:
        return parse_json(path) if path.is_file() else None
    except NearplaneError:
        return None


def _weights_read(folder: Path) -> set[str]:
    """Name the files that hold the model; none where only its configuration is there."""
    try:
        return set(weight_map(folder).values())
    except NearplaneError:
        return set()
