"""The errors a user can meet, and the numbers that all settings take.

The command line prints the text of an error as one sentence and exits with status 2.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

# How many names a message lists.
LISTED = 5


def some_of(names: Sequence[str]) -> str:
    """Join the first few names, and say how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


class NearplaneError(Exception):
    """An error that the user can mend: its text says what happened, where, and what to do."""

    told = False  # whether another process of the same run has told the user


class SettingError(NearplaneError):
    """A setting that has no meaning, or two settings that exclude each other."""


class NumericalError(NearplaneError):
    """The numbers of one layer cannot be solved; the text names likely causes and remedies."""


def plain(value: Any) -> Any:
    """Return a number or word of NumPy or torch as Python's own, also inside a tuple; anything else as it is."""
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(plain(part) for part in value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def plain_numbers(settings: Any) -> None:
    """Replace the numbers of NumPy and torch among the fields of a frozen dataclass by Python's own."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        number = plain(value)
        if number is not value:
            object.__setattr__(settings, field.name, number)
