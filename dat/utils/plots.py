"""Plots of runs and evaluations: training curves, confusion matrices and grids of images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from dat.utils.files import atomic_write, read_jsonl
from dat.utils.fonts import figure_fonts
from dat.utils.text import printable

# Confusion matrices of more classes are drawn without class names, or without counts.
NAMED, NUMBERED = 100, 20


def save_plot(figure: Figure, path: Path) -> None:
    """Atomically replaces `path` by a figure, at 120 pixels per inch."""
    with atomic_write(path) as temporary, figure_fonts(figure):
        figure.savefig(temporary, dpi=120)


def draw_curves(log: Path, path: Path, panels: Mapping[str, Sequence[tuple[str, str]]]) -> bool:
    """Draws the values of a log.jsonl against epochs. Without any of them it removes `path` and returns False.

    Args:
        log: log.jsonl of a complete or interrupted run.
        path: image file to write.
        panels: title of each panel -> the (kind, name) of the values it shows; those of kind "val" get markers.
    """
    entries = read_jsonl(log)
    epoch = _steps_per_epoch(entries)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 4.2 * columns, 2.7 * rows
    figure = Figure(figsize=(width, height))
    # Margins in inches: a layout engine would take as long as the drawing.
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
            points = [entry for entry in entries if entry["kind"] == kind and entry.get(name) is not None]
            if points:
                x, y = [entry["step"] / (epoch or 1) for entry in points], [entry[name] for entry in points]
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
    """Draws a confusion matrix, coloured by the fraction of each row.

    Args:
        counts: [R, C], true classes by predicted classes.
        rows, columns: names of the R true and C predicted classes.
        path: image file to write.
    """
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = max(len(rows), len(columns))
    inches = min(13, 3 + 0.35 * many) if many <= NAMED else 9
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    axes = figure.subplots()
    matrix = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(matrix, ax=axes, label="fraction of the row", fraction=0.04, pad=0.02)
    axes.set(xlabel="predicted", ylabel="true")
    if many <= NAMED:
        size = 8 if many <= 30 else 5
        style: dict[str, Any] = {"fontsize": size, "parse_math": False}
        axes.set_xticks(range(len(columns)), [printable(name)[:18] for name in columns], rotation=90, **style)
        axes.set_yticks(range(len(rows)), [printable(name)[:18] for name in rows], **style)
    if many <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if fractions[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    save_plot(figure, path)


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy of at most 256 pixels a side, as large as draw_grid shows it."""
    return ImageOps.contain(image, (256, 256))


def draw_grid(
    images: Sequence[tuple[Image.Image, str]], path: Path, columns: int = 8, inches: float = 1.6, heading: str = ""
) -> None:
    """Draws one or more images side by side, each below its title.

    Args:
        images: images and their titles.
        path: image file to write.
        columns: maximum number of images in a row.
        inches: width of each image; an inch has 120 pixels.
        heading: title of the whole figure.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    # Room for the tallest image, limited to a square, and its title.
    height = inches * min(1.0, max(image.height / image.width for image, _ in images)) + 0.3
    figure = Figure(figsize=(inches * columns, height * rows + 0.4 * bool(heading)), layout="constrained")
    if heading:
        figure.suptitle(printable(heading, keep="\n"), parse_math=False)
    for position, (image, title) in enumerate(images, start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(image)
        axes.set_title(printable(title, keep="\n"), fontsize=8, parse_math=False)
        axes.axis("off")
    save_plot(figure, path)


def _steps_per_epoch(entries: Sequence[dict[str, Any]]) -> float:
    """Steps per epoch of a log, 0 if unknown."""
    # The maximum: older logs of classifiers count an epoch as soon as it begins.
    counted = [entry["step"] / entry["epoch"] for entry in entries if entry["kind"] == "train" and entry.get("epoch")]
    return max(counted, default=0.0)
