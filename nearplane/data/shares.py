"""Read what a calibration mix is made of: sources with weights, and how many of the samples each gives.

In words a mix is ``a.txt:2,self:1,embedded``. A number behind the last colon is a weight; without one the weight is 1. What
names an existing file is that file, whatever commas and colons the name holds. Double quotes around a name settle the rest.
In Python a mix is a list of pairs, ``[("a.txt", 2), ("self", 1)]``, whose sources may also be rows in memory.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from math import floor, isfinite
from typing import Any, NamedTuple

from nearplane.core.errors import SettingError, plain

EMBEDDED, SELF = "embedded", "self"
# Sources that are no file and no dataset's name.
WORDS = (EMBEDDED, SELF)
# The longest name that is looked for on disk.
LONGEST = 4096


class Share(NamedTuple):
    """A source of a mix, and its weight."""

    dataset: Any
    """A file, a name, "embedded", "self", or rows in memory; None: the embedded text."""
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The source in words."""
        if self.dataset is None:
            return EMBEDDED
        return self.dataset if isinstance(self.dataset, str) else f"rows in memory ({type(self.dataset).__name__})"

    @property
    def own(self) -> bool:
        """Whether the model writes the samples itself."""
        return isinstance(self.dataset, str) and self.dataset == SELF


def shares_of(dataset: Any) -> tuple[Share, ...]:
    """Return the sources of a dataset as settings hold it: one, unless the dataset is a mix.

    Args:
        dataset: what ``rows.check`` has passed.

    Raises:
        SettingError: a mix in words that cannot be read, a weight that is none, or a source that is given twice.
    """
    if isinstance(dataset, str):
        found = _parsed(dataset)
    elif is_mix(dataset):
        found = tuple(_pair(entry) for entry in dataset)
    else:
        return (Share(dataset),)
    names = [share.name for share in found if share.dataset is None or isinstance(share.dataset, str)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(f"dataset gives {twice!r} twice; give it once, with the sum of the weights.")
    return found


def is_mix(dataset: Any) -> bool:
    """Whether a dataset in memory is a list with pairs of a source and a weight, not rows."""
    return isinstance(dataset, list | tuple) and any(_is_pair(entry) for entry in dataset)


def pairs_of(dataset: Any) -> Any:
    """Return a mapping of sources to weights as a list of pairs; anything else as it is. Columns of rows are no numbers."""
    if isinstance(dataset, dict) and dataset and all(_is_number(value) for value in dataset.values()):
        return list(dataset.items())
    return dataset


def as_word(path: str) -> str:
    """Return a path as a dataset in words: in quotes where the path could be read as a mix."""
    one = path not in WORDS and (_is_there(path) or not {",", ":", '"'} & set(path))
    return path if one or '"' in path else f'"{path}"'


def alone(source: Any) -> Any:
    """Return the only source of a mix as a dataset."""
    return as_word(source) if isinstance(source, str) and source not in WORDS else source


def refuse_names(dataset: Any) -> None:
    """Raise SettingError for a list of names where texts are meant: a model calibrated on names looks like any other."""
    if (
        isinstance(dataset, list | tuple)
        and dataset
        and all(isinstance(row, str) and (row in WORDS or (_is_there(row) and os.path.isfile(row))) for row in dataset)
    ):
        raise SettingError(
            f"dataset is a list that holds the name {dataset[0]!r}, and the words of a list are texts; give the name alone, "
            f"or for a mix pairs of a source and its weight, as [({dataset[0]!r}, 1), ...]."
        )


def counts(shares: Sequence[Share], total: int) -> list[int]:
    """Divide samples among sources in proportion to their weights, the largest remainders first.

    Args:
        shares: the sources.
        total: samples of all sources together.

    Returns:
        Samples of each source; their sum is ``total``.

    Raises:
        SettingError: a source would get no sample.
    """
    whole = sum(share.weight for share in shares)
    exact = [total * share.weight / whole for share in shares]
    found = [floor(part + 1e-9) for part in exact]  # a quotient that is whole may come out a little less
    order = sorted(range(len(shares)), key=lambda i: (found[i] - exact[i], i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    for share, count in zip(shares, found, strict=True):
        if not count:
            raise SettingError(
                f"dataset {share.name} has a weight of {share.weight:g} of {whole:g}, less than one of nsamples={total}; raise "
                "--nsamples or its weight, or leave it out."
            )
    return found


def seeds(shares: Sequence[Share], seed: int) -> list[int]:
    """Return a seed for each source: the first one's is the run's own, others are hashed from it and their place."""
    rest = [hashlib.sha256(f"{seed} {place}".encode()).digest()[:4] for place in range(1, len(shares))]
    return [seed, *(int.from_bytes(digest, "little") for digest in rest)]


def _parsed(words: str) -> tuple[Share, ...]:
    """Read a mix in words."""
    if words in WORDS or _is_there(words):
        return (Share(words),)
    pieces, found, at = _pieces(words), list[Share](), 0
    while at < len(pieces):
        ends = range(len(pieces), at + 1, -1)  # the longest run of pieces that names a file, or the first alone
        end = next((end for end in ends if _names_file(",".join(pieces[at:end]))), at + 1)
        found.append(_weighed(",".join(pieces[at:end]).strip(), words))
        at = end
    return tuple(found)


def _names_file(joined: str) -> bool:
    """Whether words, with a weight or without, name a file."""
    name, _, number = joined.strip().rpartition(":")
    return _is_there(joined.strip()) or (_value(number) is not None and _is_there(name))


def _pieces(words: str) -> list[str]:
    """Split a mix at the commas that no quotes enclose."""
    if words.count('"') % 2:
        raise SettingError(f"dataset {words!r} has a quote that is not closed.")
    pieces = re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', words)
    if not all(piece.strip() for piece in pieces):
        raise SettingError(
            f"dataset {words!r} has an empty place between its commas; a mix is written as a.txt:2,self:1."
            if len(pieces) > 1
            else "dataset is an empty word; leave it out for the embedded text."
        )
    return pieces


def _weighed(piece: str, words: str) -> Share:
    """Read one source with its weight."""
    quoted = re.fullmatch(r'"([^"]+)"(?::(.*))?', piece)
    if quoted:
        name, number = quoted.group(1), quoted.group(2)
        return Share(_literal(name), 1.0 if number is None else _number(number, piece))
    if '"' in piece:
        raise SettingError(f'dataset {words!r}: quotes enclose a whole name, as "a,b.txt":2; got {piece}.')
    name, colon, number = piece.rpartition(":")
    if not colon or not name:
        return Share(piece)
    if _is_there(piece):
        if _is_there(name) and _value(number) is not None:
            raise SettingError(
                f'dataset {piece}: there are files {name} and {piece}; write "{name}":{number} or "{piece}".'
            )
        return Share(piece)
    if _value(number) is None and not _is_source(name):
        return Share(piece)  # a drive, or a name that holds a colon
    return Share(name if _is_there(name) else name.strip(), _number(number, piece))


def _pair(entry: Any) -> Share:
    """Read one source of a list, a pair or a word."""
    source, weight = entry if _is_pair(entry) else (entry, 1)
    source = _literal(os.fspath(source)) if isinstance(source, os.PathLike) else source
    if not _is_pair(entry) and not isinstance(source, str):
        raise SettingError(
            f"dataset: a source of a mix is a pair (source, weight) or a name; got a {type(source).__name__}."
        )
    number = plain(weight)
    if isinstance(number, bool) or not isfinite(number) or number <= 0:
        raise SettingError(f"dataset {Share(source).name}: a weight must be a number above 0; got {number!r}.")
    return Share(source, float(number))


def _literal(path: str) -> str:
    """Return a path that is meant as one, also where it is called as one of the words for other sources."""
    return os.path.join(".", path) if path in WORDS else path


def _is_pair(entry: Any) -> bool:
    """Whether a list's entry is a source and a weight; two token ids are none."""
    return isinstance(entry, tuple) and len(entry) == 2 and _is_number(entry[1]) and not _is_number(entry[0])


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), int | float)


def _value(number: str) -> float | None:
    try:
        return float(number)
    except ValueError:
        return None


def _number(number: str, piece: str) -> float:
    """Read a weight."""
    value = _value(number)
    if value is None or not isfinite(value) or value <= 0:
        raise SettingError(f"dataset {piece}: a weight must be a number above 0; got {number!r}.")
    return value


def _is_there(name: str) -> bool:
    """Whether a name is that of a file or a folder."""
    return len(name) <= LONGEST and "\0" not in name and os.path.exists(os.path.expanduser(name))


def _is_source(name: str) -> bool:
    return name in WORDS or _is_there(name)
