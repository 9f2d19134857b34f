"""Sheets of images under their predicted labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dat.classification.classifier import Classifier
from dat.classification.readers import Split
from dat.classification.results import Results
from dat.utils.images import UNREADABLE
from dat.utils.plots import draw_grid, thumbnail


def sheet_title(label: str, score: float, truth: str | None = None) -> str:
    """Label and score of a prediction and, below them, the true label if it differs."""
    title = f"{label[:18]} {100 * score:.0f}%"
    return title if truth in (None, label) else f"{title}\n(is {truth[:16]})"


def draw_predictions(classifier: Classifier, split: Split, count: int, path: Path) -> None:
    """Draws `count` evenly chosen images of a split under their predicted labels, if any can be read."""
    samples = []
    for index in np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist():
        try:
            samples.append(split.read(index))
        except UNREADABLE:
            continue
    found = classifier.predict([image for image, _ in samples])
    titles = [
        sheet_title(one.label, one.score, classifier.class_names[label])
        for one, (_, label) in zip(found, samples, strict=True)
    ]
    if samples:
        draw_grid([(thumbnail(image), title) for (image, _), title in zip(samples, titles, strict=True)], path)


def draw_mistakes(results: Results, split: Split, class_names: Sequence[str], path: Path, count: int) -> None:
    """Draws the `count` mistakes of highest score under predicted and true label; without any, `path` is removed."""
    path.unlink(missing_ok=True)
    images = []
    for position in results.mistakes()[:count]:
        image, _ = split.read(int(results.index[position]))
        label, truth = class_names[results.top[position, 0]], class_names[results.labels[position]]
        images.append((thumbnail(image), sheet_title(label, float(results.scores[position, 0]), truth)))
    if images:
        draw_grid(images, path)
