"""Labels pictures: python -m classification.predict CHECKPOINT IMAGE_OR_FOLDER --out DIR [key.path=value ...]

Writes DIR/predictions.json and DIR/predictions.png, a sheet of the first pictures with their labels.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from classification.model import Classifier, load_classifier
from classification.sheet import label_pictures, sheet_title
from dat.training.distributed import setup_distributed
from dat.training.errors import DataError
from dat.training.files import UNREADABLE, find_images, to_rgb, write_json
from dat.training.loop import main_guard
from dat.training.sheet import draw_sheet


def predict(
    classifier: Classifier, paths: list[Path], device: torch.device, batch_size: int
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Labels picture files.

    Returns:
        one {"file", "label", "score", "top"} per readable picture, see label_pictures, and the unreadable ones.
    """
    results: list[dict[str, Any]] = []
    unreadable: list[Path] = []
    for start in range(0, len(paths), batch_size):
        names, pictures = [], []
        for path in paths[start : start + batch_size]:
            try:
                with Image.open(path) as picture:
                    pictures.append(to_rgb(picture))
                names.append(path)
            except UNREADABLE:
                unreadable.append(path)
        if pictures:
            found = label_pictures(classifier, pictures, device)
            results += [{"file": str(name), **result} for name, result in zip(names, found, strict=True)]
    return results, unreadable


def draw_results(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the sheet of what predict found."""
    pictures = []
    for result in results:
        with Image.open(result["file"]) as picture:
            pictures.append((ImageOps.contain(to_rgb(picture), (256, 256)), sheet_title(result)))
    draw_sheet(pictures, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="classification.predict", description=__doc__)
    parser.add_argument("checkpoint", help="best.pth or last.pth of a run")
    parser.add_argument("pictures", type=Path, help="a picture, or a folder searched with its subfolders")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as data.img_size=224")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--sheet", type=int, default=48, help="pictures on the sheet (48)")
    arguments = parser.parse_intermixed_args()
    paths = find_images(arguments.pictures, exclude=arguments.out)
    device = setup_distributed("auto").device
    classifier = load_classifier(arguments.checkpoint, arguments.overrides, device)
    results, unreadable = predict(classifier, paths, device, min(64, classifier.config.train.batch_size))
    if not results:
        raise DataError(f"{arguments.pictures}: no picture can be read")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "predictions.json", results)
    if arguments.sheet > 0:
        draw_results(results[: arguments.sheet], arguments.out / "predictions.png")
    if unreadable:
        print(f"warning: {len(unreadable)} unreadable pictures left out, such as {unreadable[0]}", file=sys.stderr)
    print(f"{len(results)} pictures labelled: {arguments.out}")


if __name__ == "__main__":
    main_guard(main)
