"""Names and texts of unknown origin, as people see them."""

import re
import sys

# Control characters, line separators, marks that change the direction of text, and what no encoding holds: surrogates,
# as which Python reads bytes of file names that are no UTF-8.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that a terminal obeys, or no file holds, as \x1b or \u202e; `keep`: not these."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def echo(text: str, error: bool = False) -> None:
    """Prints lines to the standard output, or as an `error` to the standard error, see `printable`."""
    print(printable(text, keep="\n\t"), file=sys.stderr if error else sys.stdout, flush=error)
