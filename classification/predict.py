"""Labels pictures: python -m classification.predict CHECKPOINT IMAGE_OR_FOLDER --out DIR [key.path=value ...]

Writes DIR/predictions.json and DIR/predictions.png, a sheet of the first pictures with their labels.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from classification.data import UNREADABLE, make_transform
from classification.model import Classifier, load_classifier
from dat.training.errors import DataError
from dat.training.loop import main_guard, setup_distributed


def find_pictures(place: Path) -> list[Path]:
    """The picture itself, or every picture below a folder, in natural order. Raises DataError when there is none."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise DataError(f"{place}: no such picture or folder")
    paths = [Path(path) for path, _ in find_images_and_targets(str(place))[0]]
    if not paths:
        raise DataError(f"{place}: holds no pictures")
    return paths


@torch.no_grad()
def predict(
    classifier: Classifier, paths: list[Path], device: torch.device, batch_size: int
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Labels pictures.

    Returns:
        one {"file", "label", "score", "top": [{"label", "score"}, up to 5]} per readable picture, scores 0 to 1, and
        the unreadable ones.
    """
    transform = make_transform(classifier.config.data, training=False)
    results: list[dict[str, Any]] = []
    unreadable: list[Path] = []
    for start in range(0, len(paths), batch_size):
        names, tensors = [], []
        for path in paths[start : start + batch_size]:
            try:
                with Image.open(path) as picture:
                    tensors.append(transform(picture.convert("RGB")))
                names.append(path)
            except UNREADABLE:
                unreadable.append(path)
        if not tensors:
            continue
        scores = classifier.model(torch.stack(tensors).to(device)).float().softmax(dim=1)
        values, indices = scores.topk(min(5, scores.shape[1]), dim=1)
        for name, row, classes in zip(names, values.tolist(), indices.tolist(), strict=True):
            labels = [classifier.class_names[k] for k in classes]
            top = [{"label": label, "score": round(v, 6)} for label, v in zip(labels, row, strict=True)]
            results.append({"file": str(name), **top[0], "top": top})
    return results, unreadable


def draw_sheet(results: list[dict[str, Any]], path: Path) -> None:
    """Draws pictures side by side, each under its label and score."""
    columns = min(8, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
    for position, result in enumerate(results, start=1):
        axes = figure.add_subplot(rows, columns, position)
        with Image.open(result["file"]) as picture:
            picture.thumbnail((256, 256))
            axes.imshow(picture.convert("RGB"))
        axes.set_title(f"{result['label'][:18]} {100 * result['score']:.0f}%", fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="classification.predict", description=__doc__)
    parser.add_argument("checkpoint", help="best.pth or last.pth of a run")
    parser.add_argument("pictures", type=Path, help="a picture, or a folder searched with its subfolders")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as data.img_size=224")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--sheet", type=int, default=48, help="pictures on the sheet (48)")
    arguments = parser.parse_intermixed_args()
    paths = find_pictures(arguments.pictures)
    device = setup_distributed("auto").device
    classifier = load_classifier(arguments.checkpoint, arguments.overrides, device)
    results, unreadable = predict(classifier, paths, device, min(64, classifier.config.train.batch_size))
    if not results:
        raise DataError(f"{arguments.pictures}: no picture can be read")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "predictions.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.sheet > 0:
        draw_sheet(results[: arguments.sheet], arguments.out / "predictions.png")
    if unreadable:
        print(f"warning: {len(unreadable)} unreadable pictures left out, such as {unreadable[0]}", file=sys.stderr)
    print(f"{len(results)} pictures labelled: {arguments.out}")


if __name__ == "__main__":
    main_guard(main)
