"""The rows of `benchmarks.ops` as text."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A heading and a line for each row; "ours" is the speed-up of this package's op of the same dtype."""
    lines = []
    for (section, title), group in groupby(rows, lambda row: (row["section"], _title(row))):
        members = list(group)
        lines += ["", f"{section}: {title}"]
        make = {"growth": _growth, "threads": _threads}.get(section, _measured)
        lines += _align(make(members))
    return "\n".join(lines)


def _title(row: Row) -> str:
    if row["section"] in ("growth", "threads"):
        return row["op"]
    return f"{row['op']}, {row['work']}, batch {row['batch']}"


def _measured(rows: Sequence[Row]) -> list[list[str]]:
    columns = ("forward ms", "ours", "MB", "forward+backward ms", "ours", "MB", "error", "gradient error")
    cells = [["implementation", "dtype", *columns]]
    for row in rows:
        line = [row["implementation"], row["dtype"]]
        for name in ("forward", "forward_backward"):
            line += [f"{row[f'{name}_ms']:.2f}", f"{row[f'{name}_ours']:.2f}x", _megabytes(row[f"{name}_peak_bytes"])]
        cells.append([*line, f"{row['error']:.1e}", f"{row['gradient_error']:.1e}"])
    return cells


def _growth(rows: Sequence[Row]) -> list[list[str]]:
    cells = [["", "pass", "sizes", "ms", "exponent", "MB", "exponent"]]
    for row in rows:
        memory = "-" if row["memory_exponent"] is None else f"{row['memory_exponent']:.3f}"
        times, peaks = (" ".join(f"{t:.1f}" for t in row["ms"]), " ".join(map(_megabytes, row["peak_bytes"])))
        sizes = " ".join(map(str, row["sizes"]))
        cells.append([row["variable"], row["pass"], sizes, times, f"{row['time_exponent']:.3f}", peaks, memory])
    return cells


def _threads(rows: Sequence[Row]) -> list[list[str]]:
    cells = [["work", "pass", *(f"{n} threads" for n in rows[0]["threads"])]]
    for row in rows:
        times = [f"{ms:.2f} ms {s:.2f}x" for ms, s in zip(row["ms"], row["speedups"], strict=True)]
        cells.append([row["work"], row["pass"], *times])
    return cells


def _megabytes(amount: int | None) -> str:
    return "-" if amount is None else f"{amount / 2**20:.1f}"


def _align(cells: list[list[str]]) -> list[str]:
    """Lines of aligned columns: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
