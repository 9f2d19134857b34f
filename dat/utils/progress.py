"""Progress bars in terminals and notebooks."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*arguments: Any, hidden: bool = False, **options: Any) -> Any:
    """A tqdm bar with tqdm's arguments; it is `hidden` too where neither a terminal nor a notebook shows it."""
    # A notebook's stderr is no terminal.
    shown = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(*arguments, disable=hidden or not shown, **options)
