"""Errors that a user can fix: commands print them as one line; all others keep their traceback."""

import errno
import reprlib
from typing import Any

# Values of untrusted files may be nested without end, or numbers of thousands of digits.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


class UserError(Exception):
    """Base of errors whose message says what to change; no traceback is needed."""


class ConfigError(UserError, ValueError):
    """A configuration file, override or argument is wrong."""


class DataError(UserError, ValueError):
    """A data set is missing, unreadable or inconsistent."""


class ImageError(DataError):
    """An image or video that cannot be used; `reason` completes "2 images ..." in a count of them."""

    def __init__(self, message: str, reason: str = "that cannot be read") -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be read, written or used here."""


class NonFiniteError(UserError, RuntimeError):
    """A tensor holds NaN or infinity."""


class ExportError(UserError, RuntimeError):
    """A model cannot be exported, or the exported file gives other results than torch."""


class TooManyFilesError(UserError):
    """The process may not open another file. This is no fault of the file, and no reason to go on without it."""

    # A worker's error is made anew from its message.
    def __init__(
        self, message: str = "too many open files; raise their limit (ulimit -n) or lower train.workers or --workers"
    ) -> None:
        super().__init__(message)

    @staticmethod
    def check(error: BaseException) -> None:
        """Raises this error if that is what `error` means."""
        if too_many_files(error):
            raise TooManyFilesError from error


def too_many_files(error: BaseException) -> bool:
    """Whether the process, or the machine, may not open another file."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error message on one line, truncated to `limit` characters; the type's name if it is empty."""
    if isinstance(error, MemoryError):
        return "the memory does not suffice"
    return " ".join(str(error).split())[:limit] or type(error).__name__


def shown(value: Any) -> str:
    """A value for an error message: its repr, shortened to about 200 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
