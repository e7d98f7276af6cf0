"""Turn text into token windows, seeded and hashed.

The text is tokenized once, as a whole, without padding. Calibration takes ``nsamples`` windows of ``seqlen`` tokens at seeded
random places (as GPTQ does, arXiv 2210.17323); evaluation takes consecutive windows. Without a dataset the text is the embedded
one, two files that ship with the package (``data/embedded``): one for calibration, one held out.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError

# Names of datasets in other toolkits -> hub id, configuration, text column.
NAMED = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence"),
}
Part = Literal["calibration", "evaluation"]
# The files of the embedded text, and what an origin calls them. A changed file takes the next version: figures name it.
EMBEDDED_VERSION = 1
EMBEDDED = {"calibration": ("calibration.txt", "calibration"), "evaluation": ("held_out.txt", "held out")}


class Text(NamedTuple):
    """A text and its origin."""

    content: str
    origin: str


class Tokens(NamedTuple):
    """Windows of token ids, and the record that identifies them."""

    ids: Tensor  # (windows, seqlen), int64
    origin: str
    text_tokens: int  # tokens in the whole text
    sha256: str  # of the windows


@dataclass(frozen=True)
class Calibration:
    """Calibration data: dataset, number and length of samples, seed."""

    dataset: str | None = None
    """Text file (.txt, or .jsonl with a "text" field) or dataset name (wikitext2, c4, ptb, or a hub id); none: embedded text.
    For a model of images or audio: a folder of files."""
    nsamples: int = 128
    """Number of samples: windows of text, images or recordings."""
    seqlen: int = 512
    """Tokens per window; GPU users often take 2048."""
    seed: int = 0
    """Seed of the drawn samples."""
    sentences: bool = False
    """Take padded paragraphs as samples (lines, if no line is empty), not windows of the whole text."""
    all_experts: bool = False
    """Mixtures of experts: calibrate every expert on every token; the router's choice still makes the output."""

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen", "seed"):
            if type(getattr(self, name)) is not int:
                raise SettingError(f"{name} must be a whole number; got {getattr(self, name)!r}.")
        if self.nsamples < 1 or self.seqlen < 2:
            raise SettingError(
                f"nsamples must be at least 1 and seqlen at least 2; got {self.nsamples} and {self.seqlen}."
            )
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed must be 0 to 2**63 - 1; got {self.seed}.")

    def load(self, tokenizer: Any, longest: int | None = None) -> Tokens:
        """Tokenize the dataset and draw ``nsamples`` seeded windows.

        Args:
            tokenizer: the model's tokenizer.
            longest: the model's number of positions, the most tokens of a window.

        Raises:
            NearplaneError: the dataset cannot be read, or is shorter than one window.
        """
        text = read_text(self.dataset, "calibration")
        ids = tokenize(tokenizer, text)
        seqlen = min(self.seqlen, longest or self.seqlen)
        if len(ids) < seqlen:
            raise NearplaneError(
                f"calibration text {text.origin} has {len(ids)} tokens, fewer than one window of seqlen={seqlen}; "
                "give a longer text or a smaller --seqlen."
            )
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randint(0, len(ids) - seqlen + 1, (self.nsamples,), generator=generator)
        windows = ids[start[:, None] + torch.arange(seqlen)]
        return Tokens(windows, text.origin, len(ids), digest(windows))


def sentences(calibration: Calibration, tokenizer: Any, longest: int | None) -> tuple[Tensor, Tensor, str]:
    """Draw ``nsamples`` seeded paragraphs of a text and pad them to one length.

    Args:
        calibration: dataset, number, seed, and the most tokens of a paragraph.
        tokenizer: the model's tokenizer.
        longest: the model's number of positions, the most tokens as well.

    Returns:
        Token ids (paragraphs, length), a mask of that shape that is 1 for real tokens, and the text's origin.

    Raises:
        NearplaneError: the dataset cannot be read, or has no token.
    """
    text = read_text(calibration.dataset, "calibration")
    parts = [part for part in text.content.split("\n\n" if "\n\n" in text.content else "\n") if part.strip()]
    if not parts:
        raise NearplaneError(f"text {text.origin} is empty.")
    generator = torch.Generator().manual_seed(calibration.seed)
    chosen = torch.randperm(len(parts), generator=generator)[: calibration.nsamples].tolist()
    seqlen = min(calibration.seqlen, longest or calibration.seqlen)
    rows = [tokenizer(parts[i], truncation=True, max_length=seqlen, verbose=False)["input_ids"] for i in chosen]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, : len(values)], mask[row, : len(values)] = torch.tensor(values, dtype=torch.long), 1
    if not bool(mask.any()):
        raise NearplaneError(f"the tokenizer makes no token of {text.origin}.")
    return ids, mask, text.origin


def read_text(dataset: str | None, part: Part) -> Text:
    """Read a text.

    Args:
        dataset: a file, a named dataset or hub id; None or "embedded" for the embedded text.
        part: "calibration" or "evaluation", where a dataset has both. A file has one part.

    Raises:
        NearplaneError: the text cannot be read.
    """
    if dataset is None or dataset == "embedded":
        return _embedded(part)
    path = Path(dataset).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        raise NearplaneError(f"dataset {dataset} is a folder; give one .txt or .jsonl file, or a dataset name.")
    if path.suffix in (".txt", ".jsonl", ".json", ".raw", ".tokens") or path.is_absolute():
        raise NearplaneError(f"dataset file {dataset} does not exist.")
    return _from_hub(dataset, part)


def tokenize(tokenizer: Any, text: Text) -> Tensor:
    """Return the token ids (tokens,), int64, of a whole text, with the tokenizer's own special tokens at the ends."""
    if not text.content.strip():
        raise NearplaneError(f"text {text.origin} is empty.")
    ids: list[int] = tokenizer(text.content, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def digest(ids: Tensor) -> str:
    """Return SHA-256 of token windows, equal for equal runs."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _embedded(part: Part) -> Text:
    """Read a part of the text that ships with the package, equal on every machine."""
    file, name = EMBEDDED[part]
    try:
        content = resources.files("nearplane.data").joinpath("embedded", file).read_bytes()
    except OSError as error:
        raise NearplaneError(
            f"the embedded text nearplane/data/embedded/{file} cannot be read ({error.strerror}); "
            "install nearplane again, or name a text with --dataset."
        ) from error
    short = hashlib.sha256(content).hexdigest()[:8]
    return Text(content.decode("utf-8"), f"embedded text v{EMBEDDED_VERSION} ({name}, sha256 {short})")


def _from_file(path: Path) -> Text:
    """Read a text file, or the text fields of a .jsonl file."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NearplaneError(f"dataset file {path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise NearplaneError(f"dataset file {path} cannot be read ({error.strerror}).") from error
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise NearplaneError(f'{path}, line {number}: not a JSON object with a "text" field.') from error
        content = "\n\n".join(rows)
    return Text(content, str(path))


def _from_hub(name: str, part: Part) -> Text:
    """Read up to 20000 rows of a dataset on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise NearplaneError(
            f"dataset {name}: no such file, and reading datasets by name needs: pip install 'nearplane[datasets]'."
        ) from error
    hub, config, column = NAMED.get(name, (name, None, "text"))
    split = "train" if part == "calibration" else ("validation" if name == "c4" else "test")
    try:
        rows = datasets.load_dataset(hub, config, split=split, streaming=True)
        content = "\n\n".join(row[column] for row in rows.take(20_000))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NearplaneError(
            f"dataset {name}: no such file, and the hub gave nothing ({type(error).__name__}: {str(error)[:120]})."
        ) from error
    return Text(content, f"{name} ({split})")
