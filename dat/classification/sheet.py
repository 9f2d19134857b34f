"""Sheets of pictures under their labels."""

from pathlib import Path
from typing import Any

import torch

from dat.classification.labeller import labeller_of
from dat.classification.model import Classifier
from dat.classification.readers import Split
from dat.utils.images import UNREADABLE
from dat.utils.plots import draw_grid, thumbnail


def sheet_title(result: dict[str, Any], truth: str | None = None) -> str:
    """Label and score of one of a Labeller's results, and below them the true label if it is another."""
    title = f"{result['label'][:18]} {100 * result['score']:.0f}%"
    return title if truth in (None, result["label"]) else f"{title}\n(is {truth[:16]})"


def draw_validation_sheet(classifier: Classifier, split: Split, device: torch.device, count: int, path: Path) -> bool:
    """Draws `count` pictures of a split, evenly chosen, under their predicted labels; False if none can be read."""
    pictures, truths = [], []
    for index in torch.linspace(0, len(split) - 1, min(count, len(split))).long().tolist():
        try:
            picture, label = split.read(index)
        except UNREADABLE:
            continue
        pictures.append(picture)
        truths.append(classifier.class_names[label])
    if not pictures:
        return False
    results = labeller_of(classifier, device)(pictures)
    titles = [sheet_title(result, truth) for result, truth in zip(results, truths, strict=True)]
    small = [thumbnail(picture) for picture in pictures]
    draw_grid(list(zip(small, titles, strict=True)), path)
    return True
