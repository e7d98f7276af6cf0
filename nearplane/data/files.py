"""Read the files that datasets come in: raw text, JSON, JSON lines, CSV and Parquet, some of them compressed.

The ending decides, in any case. A file with another ending is raw text, unless its content is binary or looks like JSON:
such a file is refused by name, because a model calibrated on brackets and keys looks like any other.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nearplane.core.errors import NearplaneError, SettingError
from nearplane.data.rows import Row, of_object, pick
from nearplane.data.shares import WORDS

JSON, LINES, PARQUET = (".json",), (".jsonl", ".ndjson", ".jsonlines"), (".parquet", ".pq")
TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress,
}  # fmt: skip
# Taken as they are, whatever they look like.
RAW = (".txt", ".text", ".md", ".rst", ".raw", ".tokens", ".py", ".tex", ".html", ".xml", ".log")
# First bytes of files that are no text, and what to do with such a file.
MAGIC = {
    b"PK\x03\x04": "a zip archive; unpack it and give one file of it",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"\x1f\x8b": "compressed by gzip; give it the ending .gz behind its own",
    b"BZh": "compressed by bzip2; give it the ending .bz2 behind its own",
    b"\xfd7zXZ": "compressed by xz; give it the ending .xz behind its own",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give one file of it",
    b"ARROW1": "an Arrow file; load it with the datasets library, and give the dataset in Python",
    b"\x93NUMPY": "an array of NumPy; load it, and give the array in Python",
    b"\x89HDF": "an HDF5 file; save its texts as .jsonl or .parquet",
    b"SQLite format": "an SQLite database; save its texts as .jsonl or .parquet",
    b"%PDF": "a PDF; save its text as .txt",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}


def is_file_name(name: str) -> bool:
    """Whether a name means a file, to judge by its form, although no such file exists."""
    path = Path(name)
    known = (*JSON, *LINES, *PARQUET, *TABLES, *PACKED, *RAW, ".arrow", ".zip", ".zst", ".yaml", ".yml")
    return path.suffix.lower() in known or path.is_absolute() or name.startswith(("~", ".")) or len(path.parts) > 2


def refuse_words(name: str) -> None:
    """Refuse a text where a name is meant: no file, and nothing that a dataset on the hub may be called."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SettingError(
            f"dataset {name[:60]!r} is no file, and no name of a dataset on the hub; give texts as a list of them, or in a file."
        )


def has_columns(dataset: Any) -> bool:
    """Whether a source may have columns: rows in memory, a name on the hub, or a file whose ending is not that of a raw text."""
    return not isinstance(dataset, str) or (dataset not in WORDS and _ending(dataset) not in RAW)


def has_splits(dataset: Any) -> bool:
    """Whether a source may have splits: rows in memory, a name on the hub, or a JSON file."""
    named = isinstance(dataset, str) and dataset not in WORDS and not Path(dataset).expanduser().exists()
    return not isinstance(dataset, str) or (named and not is_file_name(dataset)) or _ending(dataset) in JSON


def _ending(name: str) -> str:
    """Return the ending of a file's content, in small letters."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in PACKED else name).suffix.lower()


def read_file(path: Path, column: str | None = None, split: str | None = None) -> str | Iterator[Row]:
    """Read a dataset file.

    Args:
        path: the file.
        column: the column that the user wants.
        split: of a JSON object with several lists of rows, which one.

    Returns:
        A raw text, or rows.

    Raises:
        NearplaneError: a file that cannot be read, with its line where there is one.
        SettingError: a column or a split that the file does not have.
    """
    name, ending = f"dataset file {path}", path.suffix.lower()
    data = _bytes(path)
    if ending in PACKED:
        ending = Path(path.stem).suffix.lower()
        data = _unpacked(data, PACKED[path.suffix.lower()], name)
    if split is not None and ending not in JSON:
        raise SettingError(f"{name} has no splits, so there is no split {split!r}.")
    if ending in PARQUET:
        return _parquet(data, name, column)
    content = _decoded(data, name)
    if ending in TABLES:
        return iter(_table(content, name, TABLES[ending]))
    if ending in LINES or (ending in JSON and _is_lines(content)):
        if split is not None:
            raise SettingError(f"{name} has no splits, so there is no split {split!r}.")
        return _lines(content, name)
    if ending in JSON:
        return of_object(_json(content, name), name, column, split)
    if ending not in RAW and _looks_like_json(content):
        raise NearplaneError(
            f"{name} looks like JSON; give it the ending .json or .jsonl, or .txt if it is plain text."
        )
    if column is not None:
        raise SettingError(f"{name} is plain text, so there is no column {column!r}.")
    return content


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read()
    except OSError as error:
        raise NearplaneError(f"dataset file {path} cannot be read ({error.strerror}).") from error


def _unpacked(data: bytes, unpack: Callable[[bytes], bytes], name: str) -> bytes:
    try:
        return unpack(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise NearplaneError(f"{name} cannot be unpacked ({error}).") from error


def _decoded(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    for magic, what in MAGIC.items():
        if data.startswith(magic):
            raise NearplaneError(f"{name} is {what}.")
    if b"\0" in data:
        raise NearplaneError(f"{name} holds zero bytes: it is binary or UTF-16; save it as UTF-8 text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NearplaneError(f"{name} is not UTF-8 text (byte {error.start}).") from error


def _json(content: str, name: str) -> Any:
    if not content.strip():
        raise NearplaneError(f"{name} is empty.")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise NearplaneError(f"{name} is not valid JSON (line {error.lineno}: {error.msg}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets
        raise NearplaneError(f"{name} is not usable JSON ({error}).") from error


def _lines(content: str, name: str) -> Iterator[Row]:
    """Parse JSON lines. Only a newline ends a line: U+2028 and its like may stand in a string."""
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield Row(f"line {number}", json.loads(line))
            except (ValueError, RecursionError) as error:
                raise NearplaneError(f"{name}, line {number}: not valid JSON ({error}).") from error


def _is_lines(content: str) -> bool:
    """Whether a file named .json holds JSON lines: more than one line, and the first is an object by itself."""
    first, _, rest = content.strip().partition("\n")
    return bool(rest.strip()) and isinstance(_parsed(first), dict)


def _looks_like_json(content: str) -> bool:
    """Whether a text is a JSON document, or its first line is an object or a list."""
    start = content.lstrip()
    first = start.partition("\n")[0]
    return start[:1] in ("{", "[") and (isinstance(_parsed(first), dict) or isinstance(_parsed(start), dict | list))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _table(content: str, name: str, delimiter: str) -> list[Row]:
    """Parse a table with a header. Each row must have as many fields as the header."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(len(content) + 1)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise NearplaneError(f"{name} names a column twice in its header: {', '.join(header)}.")
        rows = []
        for row in reader:
            if row and len(row) != len(header):
                counts = f"{len(row)} fields, the header {len(header)}"
                raise NearplaneError(f"{name}, line {reader.line_num}: the row has {counts}.")
            if row:
                rows.append(Row(f"line {reader.line_num}", dict(zip(header, row, strict=True))))
        return rows
    except csv.Error as error:
        raise NearplaneError(f"{name}, line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(data: bytes, name: str, column: str | None) -> Iterator[Row]:
    """Read the wanted column of a Parquet file."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise NearplaneError(
            f"{name}: reading Parquet needs pyarrow, which comes with: pip install 'nearplane[datasets]'."
        ) from error
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        wanted = pick(names, column, name)
        rows = file.read([wanted, *({"attention_mask"} & {*names} - {wanted})]).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise NearplaneError(f"{name} is not a readable Parquet file ({str(error)[:120]}).") from error
    return (Row(f"row {number}", row) for number, row in enumerate(rows, 1))
