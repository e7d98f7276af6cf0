"""Turn the rows of a dataset into texts or token ids, and refuse by name and row what is neither.

A row is a text, a conversation or token ids, or a mapping that has one of these in a column. Rows come from files
(``data/files.py``), from the hub, or are held in memory by a user. A conversation goes through the tokenizer's chat template.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nearplane.core.errors import NearplaneError, SettingError, some_of
from nearplane.data.shares import Share, alone, as_word, is_mix, pairs_of, refuse_names, shares_of

# Columns that are looked for where a user names none, in this order.
COLUMNS = ("input_ids", "text", "messages", "conversations")
# Roles of chat templates by the names that ShareGPT's form has for them.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
# Rows that are read of a dataset on the hub, or of a ``datasets.Dataset``.
MOST_ROWS = 20_000


class Rows(Protocol):
    """Rows in memory: a list of texts, of dicts or of token ids, a tensor of token ids, or a ``datasets.Dataset``."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return a row, or a column."""


class Row(NamedTuple):
    """A row, and the words that find it again."""

    where: str
    value: Any


class Documents(NamedTuple):
    """What rows hold: texts or token ids, one for each row."""

    column: str
    texts: tuple[str, ...] = ()
    ids: tuple[Tensor, ...] = ()


def check(dataset: Any) -> Any:
    """Return a dataset as settings hold it; a path becomes a string. SettingError for anything that cannot be read twice."""
    if isinstance(dataset, PathLike):
        return as_word(str(dataset))
    if dataset is None or isinstance(dataset, str):
        shares_of(dataset)
        return dataset
    dataset = pairs_of(dataset)
    if is_mix(dataset):
        pairs = [_checked(share) for share in shares_of(dataset)]
        return pairs if len(pairs) > 1 else alone(pairs[0][0])
    refuse_names(dataset)
    kind = type(dataset).__name__
    if hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__"):
        raise SettingError(f"dataset is a {kind}, which can be read only once; give a list, as list(...) makes it.")
    if isinstance(dataset, bytes | bytearray) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise SettingError(
            f"dataset is a {kind}; give a file, a name, a list of texts or dicts, a datasets.Dataset, or a tensor of token ids."
        )
    if getattr(dataset, "ndim", 1) == 0 or len(dataset) == 0:
        raise SettingError(f"dataset is a {kind} without rows.")
    return dataset


def _checked(share: Share) -> tuple[Any, float]:
    """Return a source of a mix in memory as a pair. SettingError for one that cannot be read twice, or is a mix itself."""
    named = share.dataset is None or isinstance(share.dataset, str)
    dataset = share.dataset if named else check(share.dataset)
    if is_mix(dataset):
        raise SettingError("dataset: a source of a mix is a mix itself; give all sources in one list.")
    return dataset, share.weight


def documents(rows: Iterable[Row], name: str, column: str | None, tokenizer: Any) -> Documents:
    """Take the text or the token ids out of each row.

    Args:
        rows: at least one.
        name: the dataset's name, for errors.
        column: the column to take; none: the first of ``COLUMNS`` that the first row has.
        tokenizer: has the chat template that conversations go through.

    Raises:
        NearplaneError: no row, a row without the column, or a value that is neither text, conversation nor token ids.
    """
    texts: list[str] = []
    ids: list[Tensor] = []
    chosen = column
    for where, row in rows:
        place = f"{name}, {where}"
        if not isinstance(row, Mapping) and column is not None:
            raise SettingError(f"{place}: it is {_shown(row)} without columns, so there is no column {column!r}.")
        value, mask = row, None
        if isinstance(row, Mapping):
            chosen = pick(list(row), chosen, place)
            value, mask = row[chosen], row.get("attention_mask")
        place = f"{place}: {chosen}" if isinstance(row, Mapping) else place
        spoken, numbers = chosen in COLUMNS[2:], chosen == COLUMNS[0]
        if isinstance(value, str) and not (spoken or numbers):
            texts.append(_encodable(value, place))
        elif _is_list(value) and len(value) > 0 and isinstance(value[0], Mapping):
            texts.append(_encodable(_conversation(value, tokenizer, place, name), place))
        elif _is_list(value) and chosen != COLUMNS[1] and not spoken:
            ids.append(_token_ids(value, mask, place))
        else:
            wanted = "conversation" if spoken else "list of token ids" if numbers else "text"
            raise NearplaneError(
                f"{place} is {_shown(value)}, not a {wanted}; mend that row, or choose another column."
            )
    if texts and ids:
        raise NearplaneError(f"{name}: some rows are texts, others are token ids; give rows of one kind.")
    if not texts and not ids:
        raise NearplaneError(f"{name} holds no rows.")
    return Documents(chosen or ("text" if texts else "input_ids"), tuple(texts), tuple(ids))


def pick(columns: Sequence[Any], column: str | None, where: str) -> str:
    """Choose a column. SettingError, naming the columns that there are, where the wanted one is not among them.

    Args:
        columns: those that there are.
        column: the wanted one; none: the first of ``COLUMNS``.
        where: the dataset and its row, for the error.
    """
    there = some_of([str(name) for name in columns]) or "none"
    if column is not None and column not in columns:
        raise SettingError(f"{where}: there is no column {column!r}; the columns are {there}.")
    found = column or next((name for name in COLUMNS if name in columns), None)
    if found is None:
        raise SettingError(
            f"{where}: there is no column text, messages or input_ids; the columns are {there}; choose one with --dataset-column."
        )
    return found


def of_object(value: Any, name: str, column: str | None, split: str | None) -> Iterator[Row]:
    """Find the rows in a parsed JSON document, or in an object of the same form in memory.

    Args:
        value: a list of rows, a mapping of columns, a single row, or a mapping of which one value is a list of rows.
        name: the dataset's name, for errors.
        column: the column that the user wants.
        split: key of the list of rows, where a mapping has several.

    Raises:
        SettingError: no such split, or none is named and there are several.
        NearplaneError: an object whose rows cannot be told apart from other things.
    """
    splits = [key for key, part in value.items() if _holds_rows(part)] if isinstance(value, Mapping) else []
    if split is not None:
        if split not in splits:
            there = f"the splits are {some_of([str(key) for key in splits])}" if splits else "it has no splits"
            raise SettingError(f"{name}: there is no split {split!r}; {there}.")
        return of_object(value[split], name, column, None)
    if not isinstance(value, Mapping):
        if _is_list(value) or hasattr(value, "column_names"):
            return _numbered(value)
        raise NearplaneError(f"{name} holds {_shown(value)}; a list of rows is needed, or an object of columns.")
    if _is_row(value, column):
        return iter([Row("row 1", value)])
    if len(splits) > 1:
        listed = some_of([str(key) for key in splits])
        raise SettingError(f"{name} holds several lists of rows, {listed}; choose one with --dataset-split.")
    if splits:
        return of_object(value[splits[0]], name, column, None)
    columns = {key: list(part.values()) if isinstance(part, Mapping) else part for key, part in value.items()}
    if not columns or not all(_is_list(part) for part in columns.values()):
        raise NearplaneError(
            f"{name} is an object with the keys {some_of([str(key) for key in value]) or 'none'}; a list of rows is needed, an "
            "object of columns, or an object with one list of rows."
        )
    lengths = {key: len(part) for key, part in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = some_of([f"{key} has {length}" for key, length in lengths.items()])
        raise NearplaneError(f"{name} is an object of columns of different lengths: {listed}.")
    return _numbered([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def in_memory(dataset: Rows, column: str | None, split: str | None) -> tuple[str, Iterator[Row]]:
    """Return the name and the rows of a dataset that a user holds in memory.

    Args:
        dataset: what ``check`` has passed.
        column: the column that the user wants.
        split: of a mapping of datasets, such as a ``datasets.DatasetDict``, which one.
    """
    name = f"dataset ({type(dataset).__name__})"
    given: Any = dataset
    if hasattr(given, "to_pylist"):  # a table of Arrow
        given = given.to_pylist()
    elif hasattr(given, "to_dicts"):  # a data frame of Polars
        given = given.to_dicts()
    elif hasattr(given, "to_dict") and hasattr(given, "columns"):  # a data frame of pandas
        given = given.to_dict("records")
    elif hasattr(given, "tolist") and _rank(given) == 1 and not _whole(given):  # a column of texts
        given = given.tolist()
    if is_stream(given):  # one stream of token ids
        given = [given]
    if isinstance(given, Mapping) or _is_list(given):
        return name, of_object(given, name, column, split)
    if split is not None:
        raise SettingError(f"{name}: there is no split {split!r}; it has no splits.")
    return name, _numbered(given)


def is_stream(dataset: Any) -> bool:
    """Whether a dataset in memory is one flat list of token ids."""
    return _is_list(dataset) and _whole_numbers(dataset)


def refuse_short(dataset: Any, ids: Sequence[Tensor], seqlen: int) -> None:
    """Refuse a flat list of token ids that is shorter than a window: one example was meant, and such a list is one stream."""
    if is_stream(dataset) and len(ids[0]) < seqlen:
        raise SettingError(
            f"dataset is one list of {len(ids[0])} token ids, fewer than one window of seqlen={seqlen}; put each example into a "
            "list of its own, as [[1, 2, 3]], or give a smaller seqlen."
        )


def _numbered(rows: Any) -> Iterator[Row]:
    """Number rows from 1; at most ``MOST_ROWS`` of a dataset whose rows are read from elsewhere."""
    count = len(rows) if _is_list(rows) else min(len(rows), MOST_ROWS)
    return (Row(f"row {number + 1}", rows[number]) for number in range(count))


def _conversation(messages: Sequence[Any], tokenizer: Any, place: str, name: str) -> str:
    """Render a conversation by the tokenizer's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise NearplaneError(
            f"{name} holds conversations, and the model's tokenizer has no chat template to write them with; give a column of "
            "texts (--dataset-column), or a model folder with a chat template."
        )
    from jinja2 import TemplateError

    turns = [_message(message, f"{place}, message {number}") for number, message in enumerate(messages, 1)]
    try:
        found = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, ImportError) as error:
        raise NearplaneError(f"{place}: the chat template refuses that conversation ({str(error)[:120]}).") from error
    return str(found)


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return a message with ``role`` and ``content``, whichever of the two usual forms it has."""
    if not isinstance(message, Mapping):
        raise NearplaneError(f"{place} is {_shown(message)}, not an object with role and content.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if "role" not in message and isinstance(role, str):
        role = ROLES.get(role)
    if not isinstance(role, str):
        raise NearplaneError(f"{place} has no role that is known; it has {some_of([str(key) for key in message])}.")
    if _is_list(content) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise NearplaneError(f"{place}: content is {_shown(content)}, not a text.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {**rest, "role": role, "content": content}


def _token_ids(value: Any, mask: Any, place: str) -> Tensor:
    """Return the token ids of a row (tokens,), those under a mask of 0 left out."""
    ids, kept = _vector(value, place), None if mask is None else _mask(mask, f"{place}, attention_mask")
    if kept is not None and len(kept) != len(ids):
        raise NearplaneError(f"{place} has {len(ids)} token ids, its attention_mask {len(kept)} numbers.")
    ids = ids if kept is None else ids[kept != 0]
    if len(ids) == 0:
        raise NearplaneError(f"{place} holds no token ids{'' if kept is None else ' that its attention_mask keeps'}.")
    return torch.from_numpy(ids)


def _array(value: Any, place: str) -> "np.ndarray[Any, Any]":
    """Return numbers as an array. NearplaneError for lists of different lengths."""
    try:
        return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except (ValueError, TypeError) as error:
        raise NearplaneError(f"{place} is no vector of whole numbers.") from error


def _mask(value: Any, place: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return a mask as whole numbers; 0 and 1 may be written as floats or bools, as ``np.ones`` makes them."""
    found = _array(value, place)
    if found.dtype.kind not in "iufb" or not np.isin(found, (0, 1)).all():
        raise NearplaneError(f"{place} holds other values than 0 and 1.")
    return _vector(found.astype(np.int64), place)


def _vector(value: Any, place: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return whole numbers of at least 0 as a vector of its own; a first dimension of 1 is dropped."""
    found = _array(value, place)
    found = found[0] if found.ndim == 2 and len(found) == 1 else found
    if found.size == 0:
        return np.zeros(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0:
        why = f"{found.ndim} dimensions" if found.ndim != 1 else str(found.dtype)
        why = "negative numbers" if found.ndim == 1 and found.dtype.kind == "i" else why
        raise NearplaneError(f"{place} is {_shown(value)}, not a text and not a vector of token ids ({why}).")
    return found.astype(np.int64)


def _encodable(text: str, place: str) -> str:
    """Return a text. NearplaneError for half a pair of surrogates, which JSON can write and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NearplaneError(f"{place} holds {text[error.start]!r}, half a character, at {error.start}.") from error
    return text


def _is_row(value: Mapping[Any, Any], column: str | None) -> bool:
    """Whether a mapping is a single row: its text is a string, its conversation a list of messages, its ids numbers."""
    for name in COLUMNS if column is None else (column,):
        part: Any = value.get(name)
        spoken = _holds_rows(part) and _is_list(part) and bool({"role", "from"} & set(part[0]))
        if isinstance(part, str) or spoken or (name == COLUMNS[0] and _is_list(part) and _whole_numbers(part)):
            return True
    return False


def _holds_rows(value: Any) -> bool:
    """Whether a value is a list of mappings, or a dataset with columns."""
    return hasattr(value, "column_names") or (_is_list(value) and len(value) > 0 and isinstance(value[0], Mapping))


def _is_list(value: Any) -> bool:
    """Whether a value is a list, or an array or a tensor with a first dimension."""
    return isinstance(value, list | tuple) or _rank(value) > 0


def _rank(value: Any) -> int:
    return int(value.ndim) if isinstance(value, Tensor | np.ndarray) or hasattr(value, "tolist") else 0


def _whole(value: Any) -> bool:
    """Whether an array or a tensor holds whole numbers."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value).dtype.kind in "iu"


def _whole_numbers(value: Any) -> bool:
    """Whether a list or a vector holds whole numbers and nothing else."""
    if isinstance(value, list | tuple):
        return all(type(number) is int or isinstance(number, np.integer) for number in value)
    return _rank(value) == 1 and _whole(value)


def _shown(value: Any) -> str:
    """Name a value in an error."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"the number {value}" if not isinstance(value, bool) else str(value).lower()
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    if isinstance(value, Mapping):
        return "an object"
    return "a text" if isinstance(value, str) else f"a {type(value).__name__}"
