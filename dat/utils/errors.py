"""Errors that a person can act on: commands print them as one line, everything else keeps its traceback."""


class UserError(Exception):
    """Parent of every error whose message alone tells the user what to change."""


class ConfigError(UserError, ValueError):
    """A configuration file, override or argument is wrong."""


class DataError(UserError, ValueError):
    """A data set is missing, unreadable or inconsistent."""


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be read, written or used here."""


class NonFiniteError(UserError, RuntimeError):
    """A tensor holds NaN or infinity."""


class ExportError(UserError, RuntimeError):
    """A model cannot be exported, or the exported file gives other results than torch."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What the error of a library says, on a line of at most so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
