"""Progress bars in terminals and notebooks."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A tqdm bar with tqdm's arguments; it is hidden where neither a terminal nor a notebook shows it."""
    in_notebook = "ipykernel" in sys.modules
    return tqdm(*arguments, disable=not (in_notebook or sys.stderr.isatty()), **options)
