"""The errors a user can meet. The command line prints their text as one sentence and exits with status 2."""

from collections.abc import Sequence

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
