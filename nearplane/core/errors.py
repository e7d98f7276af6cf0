"""The errors a user can meet. The command line prints their text as one sentence and exits with status 2."""


class NearplaneError(Exception):
    """Something the user can mend: its text says what happened, where, and what to do."""

    told = False  # to the user, by another process of the same run


class SettingError(NearplaneError):
    """A setting that has no meaning, or two settings that exclude each other."""


class NumericalError(NearplaneError):
    """The numbers of one layer cannot be solved; the text names likely causes and remedies."""
