"""Tables of predictions."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dat.utils.files import atomic_write


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Replaces `path` by a table with a header; what rows hold beside the columns is left out, what they lack empty."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def file_name(text: str) -> str:
    """A text as the name of a file or folder, on any system."""
    return "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in text).strip() or "_"
