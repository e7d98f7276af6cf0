"""Turn a dataset into token windows, seeded and hashed.

A text is tokenized once, as a whole, without padding. Calibration takes ``nsamples`` windows of ``seqlen`` tokens at seeded
random places (as GPTQ does, arXiv 2210.17323); evaluation takes consecutive windows. Where the tokenizer opens a text with
tokens of its own, such as BOS, each window begins with these. Without a dataset the text is the embedded one, two files that
ship with the package (``data/embedded``): one for calibration, one held out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError, plain, plain_numbers
from nearplane.data.files import has_columns, has_splits, is_file_name, read_file, refuse_words
from nearplane.data.rows import MOST_ROWS, Documents, Row, Rows, check, documents, in_memory, refuse_short
from nearplane.data.shares import EMBEDDED as EMBEDDED_WORD
from nearplane.data.shares import Share, alone, counts, seeds, shares_of
from nearplane.data.windows import Text, Tokens, digest, few, joined, overlapping, padded

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
# Words of a text that are tokenized to see how the tokenizer opens it, and the most characters that they may have.
PROBED, MOST_PROBED = 8, 2000


@dataclass(frozen=True)
class Calibration:
    """Calibration data: dataset, number and length of samples, seed.

    In Python ``dataset`` may also be held in memory: a list of texts, of dicts with a column as files have it, or of token
    ids; a ``datasets.Dataset``; a tensor of token ids; or a mix, a list of pairs of a source and its weight (docs/data.md).
    """

    dataset: str | Path | Rows | None = None
    """File (plain text; .jsonl, .json, .csv, .tsv or .parquet with a column of texts, conversations or token ids) or dataset
    name (wikitext2, c4, ptb, or a hub id); embedded: the embedded text, as without a dataset; self: samples that the model
    writes. A mix with weights, such as a.txt:2,self:1. For a model of images or audio: a folder of files."""
    nsamples: int = 128
    """Number of samples: windows of text, images or recordings."""
    seqlen: int = 512
    """Tokens per window; GPU users often take 2048."""
    seed: int = 0
    """Seed of the drawn samples."""
    sentences: bool = False
    """Take padded paragraphs as samples (lines, if no line is empty), or rows of a dataset, not windows of the whole text."""
    all_experts: bool = False
    """Mixtures of experts: calibrate every expert on every token; the router's choice still makes the output."""
    dataset_split: str | None = None
    """Split of the dataset; none: train to calibrate on, test or validation to evaluate on, where a dataset has splits."""
    dataset_column: str | None = None
    """Column of the dataset's rows; none: input_ids, text, messages or conversations, the first that there is."""
    bos: bool = True
    """Begin each window with the tokens that the tokenizer puts before a text, such as BOS, where it does so; --no-bos cuts
    windows from the whole text as the tokenizer gives it."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        object.__setattr__(self, "dataset", check(self.dataset))
        for name in ("nsamples", "seqlen", "seed"):
            if type(getattr(self, name)) is not int:
                raise SettingError(f"{name} must be a whole number; got {getattr(self, name)!r}.")
        for name in ("sentences", "all_experts", "bos"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name} must be True or False; got {getattr(self, name)!r}.")
        for name in ("dataset_split", "dataset_column"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise SettingError(f"{name} must be a name; got {value!r}.")
        if self.nsamples < 1 or self.seqlen < 2:
            raise SettingError(
                f"nsamples must be at least 1 and seqlen at least 2; got {self.nsamples} and {self.seqlen}."
            )
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed must be 0 to 2**63 - 1; got {self.seed}.")
        shares_of(self.dataset)

    @property
    def shares(self) -> tuple[tuple[Share, int, int], ...]:
        """The sources of the dataset, each with its number of samples and its seed; one, unless the dataset is a mix.

        Raises:
            SettingError: a source would get no sample.
        """
        found = shares_of(self.dataset)
        return tuple(zip(found, counts(found, self.nsamples), seeds(found, self.seed), strict=True))

    def load(self, tokenizer: Any, longest: int | None = None, own: Tokens | None = None) -> Tokens:
        """Tokenize the dataset and draw ``nsamples`` seeded windows, or with ``sentences`` paragraphs.

        Several rows of token ids are the samples themselves: nothing is put before them, and they are padded where their
        lengths differ. One row of token ids that is longer than ``seqlen`` is a text. Each source of a mix gives its share
        of the windows, drawn with a seed of its own.

        Args:
            tokenizer: the model's tokenizer.
            longest: the model's number of positions, the most tokens of a window.
            own: what the model has written, where the dataset asks for that.

        Raises:
            NearplaneError: the dataset cannot be read, or is shorter than one window; of a mix, a source has fewer samples than
                its share.
        """
        shares, made = self.shares, []
        for share, count, seed in shares:
            if share.own and own is None:
                raise SettingError(
                    "dataset self is written by the model, which is not at hand here; quantize writes it."
                )
            part = own
            if not share.own:
                one = replace(self, dataset=None, nsamples=count, seed=seed)
                text = self._text(share, tokenizer)
                refuse_short(share.dataset, text.ids, min(self.seqlen, longest or self.seqlen))
                part = one._drawn(text, tokenizer, longest)._replace(tokenized=bool(text.ids))
            assert part is not None
            if len(shares) > 1 and len(part.ids) != count:
                raise SettingError(
                    f"dataset {share.name} has {len(part.ids)} samples, fewer than its share of {count} of "
                    f"nsamples={self.nsamples}; lower its weight or --nsamples, or give more of it."
                )
            made.append(part if len(shares) == 1 else part._replace(notes=(*part.notes, *overlapping(part))))
        if len(made) == 1:
            return made[0]
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        return joined([share for share, _, _ in shares], [seed for _, _, seed in shares], made, pad)

    def texts(self, tokenizer: Any) -> list[Text]:
        """Read the calibration part of each source that is not the model's own, as ``read_text`` does."""
        return [self._text(share, tokenizer) for share, _, _ in self.shares if not share.own]

    def of_source(self, number: int) -> "Calibration":
        """Return the settings that draw the samples of one source, by its place, as the whole dataset's do."""
        share, count, seed = self.shares[number]
        column, split = self._asked(share)
        given = {"dataset": alone(share.dataset), "nsamples": count, "seed": seed}
        return replace(self, dataset_column=column, dataset_split=split, **given)

    def _text(self, share: Share, tokenizer: Any) -> Text:
        """Read a source."""
        column, split = self._asked(share)
        return _read(share.dataset, "calibration", tokenizer, split=split, column=column)

    def _asked(self, share: Share) -> tuple[str | None, str | None]:
        """Return column and split for a source; of a mix, these are for the sources that have such."""
        given = [other.dataset for other in shares_of(self.dataset)]
        column, split = (
            value if fits(share.dataset) or not any(map(fits, given)) else None
            for value, fits in ((self.dataset_column, has_columns), (self.dataset_split, has_splits))
        )
        return column, split

    def _drawn(self, text: Text, tokenizer: Any, longest: int | None) -> Tokens:
        """Draw samples of one text."""
        seqlen = min(self.seqlen, longest or self.seqlen)
        if len(text.ids) > 1 or (text.ids and len(text.ids[0]) <= seqlen):
            return self._rows(text, list(text.ids), seqlen, tokenizer)
        if self.sentences:
            return sentences(self, text, tokenizer, seqlen)
        opening = opening_of(tokenizer, text) if self.bos else ()
        ids, width = tokenize(tokenizer, text, opening, marked=not self.bos), _width(seqlen, opening)
        if len(ids) < width:
            raise NearplaneError(
                f"calibration text {text.origin} has {len(ids)} tokens, fewer than one window of seqlen={seqlen}; "
                "give a longer text or a smaller --seqlen."
            )
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randint(0, len(ids) - width + 1, (self.nsamples,), generator=generator)
        windows = _opened(ids[start[:, None] + torch.arange(width)], opening)
        return Tokens(windows, text.origin, len(ids), digest(windows), spelled(tokenizer, opening), held=text.held)

    def _rows(self, text: Text, rows: list[Tensor], seqlen: int, tokenizer: Any) -> Tokens:
        """Take ``nsamples`` seeded rows of token ids as samples; all, in their order, if there are not more."""
        total, notes = sum(map(len, rows)), few(len(rows), self.nsamples)
        if len(rows) > self.nsamples:
            generator = torch.Generator().manual_seed(self.seed)
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)[: self.nsamples].tolist()]
        cut = sum(len(row) > seqlen for row in rows)
        if cut:
            notes.append(f"{cut} of {len(rows)} rows of token ids are cut to {seqlen} tokens; --seqlen is the limit")
        return padded(text, [row[:seqlen] for row in rows], tokenizer)._replace(text_tokens=total, notes=tuple(notes))


def sentences(calibration: Calibration, text: Text, tokenizer: Any, seqlen: int) -> Tokens:
    """Draw ``nsamples`` seeded paragraphs, or rows, of a text and pad them to one length.

    Args:
        calibration: number and seed.
        text: a text, not token ids.
        tokenizer: the model's tokenizer, which marks each paragraph by itself.
        seqlen: the most tokens of a paragraph.

    Raises:
        NearplaneError: the text has no token.
    """
    parts = text.rows or text.content.split("\n\n" if "\n\n" in text.content else "\n")
    parts = [part for part in parts if part.strip()]
    if not parts:
        raise NearplaneError(f"text {text.origin} is empty.")
    generator = torch.Generator().manual_seed(calibration.seed)
    chosen = torch.randperm(len(parts), generator=generator)[: calibration.nsamples].tolist()
    opening = opening_of(tokenizer, text)
    spelling = _spellings(tokenizer, opening)
    rows = []
    for i in chosen:
        ids = tokenizer(_bare(parts[i], spelling), truncation=True, max_length=seqlen, verbose=False)["input_ids"]
        rows.append(torch.tensor(ids if calibration.bos else _without(ids, opening), dtype=torch.long))
    if not any(map(len, rows)):
        raise NearplaneError(f"the tokenizer makes no token of {text.origin}.")
    made = padded(text, rows, tokenizer, spelled(tokenizer, opening) if calibration.bos else "")
    return made._replace(notes=tuple(few(len(parts), calibration.nsamples)))


def consecutive(
    tokenizer: Any, text: Text, seqlen: int, windows: int | None, *, bos: bool
) -> tuple[Tensor, tuple[int, ...]]:
    """Cut a text into consecutive windows.

    Args:
        tokenizer: the model's tokenizer.
        text: the text, or rows of token ids that follow each other.
        seqlen: tokens per window, those that it begins with counted.
        windows: the most windows; None: all.
        bos: begin each window with the tokens that the tokenizer puts before a text.

    Returns:
        Token ids (windows, seqlen), and the tokens that the tokenizer puts before a text, whether windows begin with them or not.

    Raises:
        SettingError: ``bos`` is neither true nor false.
        NearplaneError: the text is shorter than one window.
    """
    if not isinstance(plain(bos), bool):
        raise SettingError(f"bos must be True or False; got {bos!r}.")
    found = opening_of(tokenizer, text)
    opening = found if bos else ()
    ids, width = tokenize(tokenizer, text, opening, marked=not bos), _width(seqlen, opening)
    count = min(len(ids) // width, windows or len(ids))
    if count == 0:
        raise NearplaneError(f"text {text.origin} has {len(ids)} tokens, fewer than one window of seqlen={seqlen}.")
    return _opened(ids[: count * width].view(count, width), opening), found


def read_text(
    dataset: Any, part: Part, tokenizer: Any = None, *, split: str | None = None, column: str | None = None
) -> Text:
    """Read a text.

    Args:
        dataset: a file, a named dataset or hub id, or rows in memory; None or "embedded" for the embedded text.
        part: "calibration" or "evaluation", where a dataset has both. A file has one part.
        tokenizer: the model's tokenizer, whose chat template writes conversations.
        split: the split of a dataset that has some; None: by ``part``.
        column: the column of a dataset that has some; None: the first known one.

    Raises:
        NearplaneError: the text cannot be read.
    """
    shares = shares_of(check(dataset))
    if len(shares) > 1 or shares[0].own:
        what = "a mix" if len(shares) > 1 else "self, the model's own samples,"
        raise SettingError(f"{what} is to calibrate on, and dataset is {dataset!r}; give one text.")
    return _read(shares[0].dataset, part, tokenizer, split=split, column=column)


def _read(dataset: Any, part: Part, tokenizer: Any, *, split: str | None, column: str | None) -> Text:
    """Read one source, as ``read_text`` says."""
    if dataset is None or (isinstance(dataset, str) and dataset == EMBEDDED_WORD):
        for what, name in (("split", split), ("column", column)):
            if name is not None:
                raise SettingError(f"the embedded text has no {what}s, so there is no {what} {name!r}; give --dataset.")
        return _embedded(part)
    if not isinstance(dataset, str):
        name, rows = in_memory(dataset, column, split)
        return _held(dataset, documents(rows, name, column, tokenizer), split)
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise NearplaneError(f"dataset {dataset} is a folder; give one file of texts in it, or a dataset name.")
    if path.exists() and not path.is_file():
        raise NearplaneError(f"dataset {dataset} is no regular file; give a file of texts, or a dataset name.")
    if path.is_file():
        found = read_file(path, column, split)
        if isinstance(found, str):
            return Text(found, str(path))
        chosen = f" ({split})" if split else ""
        return _joined(documents(found, f"dataset file {path}", column, tokenizer), f"{path}{chosen}")
    if is_file_name(dataset):
        raise NearplaneError(f"dataset file {dataset} does not exist.")
    return _from_hub(dataset, part, tokenizer, split, column)


def opening_of(tokenizer: Any, text: Text) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts before a text: BOS, CLS, or several. Found by tokenizing a few words twice."""
    sample = _sample(text)
    marked, bare = _ids(tokenizer, sample), _ids(tokenizer, sample, add_special_tokens=False)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bare and bare[0] == bos:  # a tokenizer that marks a text whether asked to or not
        return (bare[0],)
    for first in range(len(marked) - len(bare) + 1 if bare else 0):
        if marked[first : first + len(bare)] == bare:
            return tuple(marked[:first])
    return (marked[0],) if marked and marked[0] == bos else ()


def spelled(tokenizer: Any, opening: Sequence[int]) -> str:
    """Write the tokens that windows begin with."""
    return " ".join(_spellings(tokenizer, opening))


def tokenize(tokenizer: Any, text: Text, opening: Sequence[int] = (), *, marked: bool = True) -> Tensor:
    """Tokenize a whole text.

    Args:
        tokenizer: the model's tokenizer.
        text: the text; of rows that are token ids, these are joined.
        opening: what windows will begin with. The text's own rows then begin without it.
        marked: keep the tokenizer's special tokens at both ends.

    Returns:
        Token ids (tokens,), int64.

    Raises:
        NearplaneError: the text is empty.
    """
    if text.ids:
        return torch.cat([torch.tensor(_without(row.tolist(), opening), dtype=torch.long) for row in text.ids])
    if not text.content.strip():
        raise NearplaneError(f"text {text.origin} is empty.")
    if marked:
        return torch.tensor(_ids(tokenizer, text.content), dtype=torch.long)
    spelling = _spellings(tokenizer, opening)
    content = JOINT.join(_bare(row, spelling) for row in text.rows) if text.rows else _bare(text.content, spelling)
    ids = _without(_ids(tokenizer, content, add_special_tokens=False), opening)
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and ids[-1:] == [end] == _ids(tokenizer, _sample(text), add_special_tokens=False)[-1:]:
        ids = ids[:-1]  # of a tokenizer that marks a text whether asked to or not
    return torch.tensor(ids, dtype=torch.long)


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


# What stands between the rows of a dataset.
JOINT = "\n\n"


def _joined(found: Documents, origin: str) -> Text:
    """Join rows to one text."""
    rows = len(found.texts) or len(found.ids)
    counted = f"{rows} row{'s' * (rows != 1)} of {found.column}"
    return Text(JOINT.join(found.texts), f"{origin}, {counted}", found.texts, found.ids)


def _held(dataset: Any, found: Documents, split: str | None) -> Text:
    """Join rows in memory, and describe them by their kind, number and hash."""
    kind, hashed = type(dataset).__name__, hashlib.sha256()
    for row in (*(text.encode("utf-8") for text in found.texts), *(ids.numpy().tobytes() for ids in found.ids)):
        hashed.update(len(row).to_bytes(8, "little") + row)
    chosen = f" ({split})" if split else ""
    text = _joined(found, f"dataset in memory ({kind}{chosen})")
    rows, total = len(found.texts) or len(found.ids), len(dataset)
    if rows == MOST_ROWS < total and hasattr(dataset, "column_names"):
        text = text._replace(origin=f"{text.origin}, the first of {total}")
    return text._replace(held={"kind": kind, "rows": rows, "sha256": hashed.hexdigest()})


def _from_hub(name: str, part: Part, tokenizer: Any, split: str | None, column: str | None) -> Text:
    """Read up to ``MOST_ROWS`` rows of a dataset on the hub."""
    refuse_words(name)
    try:
        import datasets
    except ImportError as error:
        raise NearplaneError(
            f"dataset {name}: no such file, and reading datasets by name needs: pip install 'nearplane[datasets]'."
        ) from error
    hub, config, known = NAMED.get(name, (name, None, None))
    split = split or ("train" if part == "calibration" else ("validation" if name == "c4" else "test"))
    try:
        rows = datasets.load_dataset(hub, config, split=split, streaming=True).take(MOST_ROWS)
        numbered = (Row(f"row {number}", row) for number, row in enumerate(rows, 1))
        found = documents(numbered, f"dataset {name} ({split})", column or known, tokenizer)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NearplaneError(
            f"dataset {name}: no such file, and the hub gave nothing ({type(error).__name__}: {str(error)[:120]})."
        ) from error
    return _joined(found, f"{name} ({split})")


def _sample(text: Text) -> str:
    """Return a few words of a text."""
    return " ".join(text.content.split(maxsplit=PROBED)[:PROBED])[:MOST_PROBED] or "a text"


def _ids(tokenizer: Any, content: str, **how: Any) -> list[int]:
    return list(tokenizer(content, verbose=False, **how)["input_ids"])


def _spellings(tokenizer: Any, opening: Sequence[int]) -> list[str]:
    """Write each token of an opening."""
    write = getattr(tokenizer, "convert_ids_to_tokens", None)
    return [str(token) for token in (write(list(opening)) if write and opening else opening)]


def _bare(text: str, spelling: Sequence[str]) -> str:
    """Cut an opening that a text brings itself, as chat templates write it."""
    for token in spelling:
        text = text.removeprefix(token)
    return text


def _without(ids: list[int], opening: Sequence[int]) -> list[int]:
    """Cut an opening that token ids bring themselves."""
    return ids[len(opening) :] if opening and ids[: len(opening)] == list(opening) else ids


def _width(seqlen: int, opening: Sequence[int]) -> int:
    """Return the tokens of a window that are text."""
    if seqlen <= len(opening):
        raise SettingError(f"seqlen={seqlen} leaves no token behind the {len(opening)} that each window begins with.")
    return seqlen - len(opening)


def _opened(windows: Tensor, opening: Sequence[int]) -> Tensor:
    """Put an opening before each window."""
    first = torch.tensor(list(opening), dtype=torch.long).expand(len(windows), -1)
    return torch.cat([first, windows], 1)
