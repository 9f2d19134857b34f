"""What an evaluation or a run leaves to look at: tables, the confusion matrix, the worst mistakes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from classification.readers import Split
from classification.results import Results, class_table
from classification.sheet import sheet_title
from dat.training.files import write_json
from dat.training.sheet import draw_sheet, thumbnail

# classes up to which a matrix has their names, or the numbers in its cells
NAMED, NUMBERED = 60, 20


def write_report(
    results: Results, split: Split, class_names: Sequence[str], folder: Path, worst: int, more: dict[str, Any]
) -> list[dict[str, Any]]:
    """Writes metrics.json, confusion.png and, where `worst` pictures are wanted and there are mistakes, worst.png.

    Args:
        results: of the pictures of `split`.
        class_names: of the model.
        folder: that the files go to.
        worst: most pictures on the sheet of the worst mistakes.
        more: further entries of metrics.json.
    Returns:
        the rows of class_table.
    """
    confusion = results.confusion(len(class_names))
    rows = class_table(confusion, class_names)
    write_json(folder / "metrics.json", {**results.metrics(), **more, "per_class": rows})
    draw_confusion(confusion, class_names, folder / "confusion.png")
    draw_mistakes(results, split, class_names, folder / "worst.png", worst)
    return rows


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draws a matrix of counts, label by predicted class, as shares of each label's pictures."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    inches = min(14, 3 + 0.35 * len(class_names)) if len(class_names) <= NAMED else 10
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the pictures of a class")
    axes.set(xlabel="predicted", ylabel="is")
    if len(class_names) <= NAMED:
        axes.set_xticks(range(len(class_names)), [name[:18] for name in class_names], rotation=90, parse_math=False)
        axes.set_yticks(range(len(class_names)), [name[:18] for name in class_names], parse_math=False)
    if len(class_names) <= NUMBERED:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    figure.savefig(path, dpi=120)


def draw_mistakes(results: Results, split: Split, class_names: Sequence[str], path: Path, count: int) -> bool:
    """Draws the `count` surest mistakes under what they were taken for and what they are; False if there are none."""
    path.unlink(missing_ok=True)
    pictures = []
    for position in results.mistakes()[:count]:
        picture, _ = split.read(int(results.index[position]))
        found = {"label": class_names[results.top[position, 0]], "score": float(results.scores[position, 0])}
        title = sheet_title(found, class_names[results.labels[position]])
        pictures.append((thumbnail(picture), title))
    if pictures:
        draw_sheet(pictures, path)
    return bool(pictures)
