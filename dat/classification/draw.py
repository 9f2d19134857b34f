"""Sheets of images under their predicted labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dat.classification.readers import Split
from dat.classification.results import Results
from dat.utils.plots import draw_grid, thumbnail


def sheet_title(label: str, score: float, truth: str | None = None) -> str:
    """Label and score of a prediction and, below them, the true label if it differs."""
    title = f"{label[:18]} {100 * score:.0f}%"
    return title if truth in (None, label) else f"{title}\n(is {truth[:16]})"


def draw_predictions(results: Results, split: Split, class_names: Sequence[str], path: Path, count: int) -> None:
    """Draws `count` evenly chosen images of the results under predicted and, where it differs, true label."""
    chosen = np.linspace(0, len(results.index) - 1, min(count, len(results.index))).astype(int)
    _draw(results, chosen, split, class_names, path)


def draw_mistakes(results: Results, split: Split, class_names: Sequence[str], path: Path, count: int) -> None:
    """Draws the `count` mistakes of highest score under predicted and true label."""
    _draw(results, results.mistakes()[:count], split, class_names, path)


def _draw(results: Results, positions: np.ndarray, split: Split, class_names: Sequence[str], path: Path) -> None:
    """Draws images of the results; without any, `path` is removed."""
    path.unlink(missing_ok=True)
    images = []
    for position in positions:
        image, _ = split.read(int(results.index[position]))
        label, truth = class_names[results.top[position, 0]], class_names[results.labels[position]]
        images.append((thumbnail(image), sheet_title(label, float(results.scores[position, 0]), truth)))
    if images:
        draw_grid(images, path)
