"""Sheets of pictures under their labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from classification.data import make_transform
from classification.model import Classifier
from classification.readers import Split
from dat.training.files import UNREADABLE
from dat.training.sheet import draw_sheet


@torch.no_grad()
def label_pictures(
    classifier: Classifier, pictures: Sequence[Image.Image], device: torch.device
) -> list[dict[str, Any]]:
    """One {"label", "score", "top": [{"label", "score"}, up to 5]} per picture (RGB, any size); scores are 0 to 1."""
    transform = make_transform(classifier.config.data, training=False)
    images = torch.stack([transform(picture) for picture in pictures])
    scores = classifier.model(images.to(device)).float().softmax(dim=1)
    results = []
    for row, classes in zip(*(found.tolist() for found in scores.topk(min(5, scores.shape[1]), dim=1)), strict=True):
        labels = [classifier.class_names[k] for k in classes]
        top = [{"label": label, "score": round(score, 6)} for label, score in zip(labels, row, strict=True)]
        results.append({**top[0], "top": top})
    return results


def sheet_title(result: dict[str, Any], truth: str | None = None) -> str:
    """Label and score of one of label_pictures' results, and below them the true label if it is another."""
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
    results = label_pictures(classifier, pictures, device)
    titles = [sheet_title(result, truth) for result, truth in zip(results, truths, strict=True)]
    small = [ImageOps.contain(picture, (256, 256)) for picture in pictures]
    draw_sheet(list(zip(small, titles, strict=True)), path)
    return True
