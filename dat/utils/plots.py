"""Plots that runs and evaluations of every kind leave: training curves and confusion matrices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dat.utils.files import atomic_write, read_log

# classes up to which a matrix has their names, or the numbers in its cells
NAMED, NUMBERED = 100, 20


def save_plot(figure: Figure, path: Path) -> None:
    """Replaces `path` by a figure, 120 pixels an inch; a crash leaves the old file or the new one."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_curves(log: Path, path: Path, panels: Mapping[str, Sequence[tuple[str, str]]]) -> bool:
    """Draws what a run's log.jsonl tells against its epochs; False, and no picture, where it tells nothing of that.

    Args:
        log: of a run, whole or interrupted.
        path: of the picture.
        panels: the (kind, name) of the numbers that each panel shows, by its title; those of kind "val" are marked.
    """
    entries = read_log(log)
    epoch = _steps_per_epoch(entries)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 4.2 * columns, 2.7 * rows
    figure = Figure(figsize=(width, height))
    # margins in inches; a layout engine would take as long as all the drawing
    figure.subplots_adjust(0.65 / width, 0.45 / height, 1 - 0.1 / width, 1 - 0.25 / height, wspace=0.22, hspace=0.36)
    for position, (title, series) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.set_xlabel("epoch" if epoch else "step", fontsize=8)
        axes.set_ylabel(title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        axes.yaxis.get_offset_text().set_fontsize(7)
        axes.grid(alpha=0.3)
        kinds = {kind for kind, _ in series}
        for kind, name in series:
            told = [entry for entry in entries if entry["kind"] == kind and entry.get(name) is not None]
            if told:
                x, y = [entry["step"] / (epoch or 1) for entry in told], [entry[name] for entry in told]
                label = name if len(kinds) == 1 else f"{name}, {kind}"
                axes.plot(x, y, label=label, marker="." if kind == "val" else None, linewidth=1.2)
        if len(axes.lines) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), fontsize=7, frameon=False,
                        columnspacing=1, handlelength=1, borderaxespad=0)  # fmt: skip
    drawn = any(axes.lines for axes in figure.axes)
    if drawn:
        save_plot(figure, path)
    else:
        path.unlink(missing_ok=True)
    return drawn


def draw_confusion(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str], path: Path) -> None:
    """Draws a matrix of counts, what there is by what it was taken for, as shares of each row.

    Args:
        counts: [R, C].
        rows, columns: their names, R and C.
        path: of the picture.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = max(len(rows), len(columns))
    inches = min(13, 3 + 0.35 * many) if many <= NAMED else 9
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the row", fraction=0.04, pad=0.02)
    axes.set(xlabel="predicted", ylabel="is")
    if many <= NAMED:
        size = 8 if many <= 30 else 5
        style: dict[str, Any] = {"fontsize": size, "parse_math": False}
        axes.set_xticks(range(len(columns)), [name[:18] for name in columns], rotation=90, **style)
        axes.set_yticks(range(len(rows)), [name[:18] for name in rows], **style)
    if many <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    save_plot(figure, path)


def _steps_per_epoch(entries: Sequence[dict[str, Any]]) -> float:
    """Of a log; 0 where it does not tell. Older logs of classifiers count epochs that have begun."""
    counted = [entry["step"] / entry["epoch"] for entry in entries if entry["kind"] == "train" and entry.get("epoch")]
    return max(counted, default=0.0)
