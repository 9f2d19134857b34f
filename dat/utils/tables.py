"""Tables of results: CSV, and JSON with one row per line."""

import csv
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from dat.utils.files import atomic_write
from dat.utils.text import printable


class Tables:
    """Writes rows to `stem`.json, a list of objects, and to `stem`.csv as they come: hours of video need no memory.

    Both files replace earlier ones when the block ends; so they do when Ctrl-C interrupts it after a row, and hold the
    rows before that. Any other exception leaves earlier files as they were. For the cells see write_csv.
    """

    def __init__(self, stem: Path, columns: Sequence[str]) -> None:
        self.stem, self.columns = stem, columns
        self._files = ExitStack()
        self._count = -1

    def __enter__(self) -> "Tables":
        return self

    def add(self, row: dict[str, Any], **more: Any) -> None:
        """Adds a row; `more` are columns of the CSV alone. Raises OSError."""
        if self._count < 0:
            self._open()
        text, cells = json.dumps(row), _cells({**row, **more})
        self._json.write((",\n" if self._count else "") + text)
        self._csv.writerow(cells)
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, KeyboardInterrupt) and self._count > 0):
            if self._count < 0:
                self._open()
            self._json.write("\n]\n")
            self._files.close()
            if error is not None:
                raise KeyboardInterrupt(f"{self.stem}.json and .csv hold what came before") from error
        else:
            self._files.__exit__(kind, error, traceback)

    def _open(self) -> None:
        """Opens temporary files; not before the first row, so that a failure leaves no empty folder."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [self._files.enter_context(atomic_write(Path(f"{self.stem}{suffix}"))) for suffix in (".json", ".csv")]
        self._json, table = (self._files.enter_context(path.open("w", newline="", encoding="utf-8")) for path in paths)
        self._json.write("[\n")
        self._csv = csv.DictWriter(table, self.columns, extrasaction="ignore")
        self._csv.writeheader()
        # Last, as an interrupted opening has no files to end.
        self._count = 0


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Atomically replaces `path` by a table with a header row. Missing values are empty, further keys are ignored.

    Texts are written as `printable` shows them; an apostrophe leads those that spreadsheets would take for a formula.
    """
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(map(_cells, rows))


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _cell(value) for key, value in row.items()}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    # Tab and carriage return at the start are escaped by printable.
    text = printable(value)
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
