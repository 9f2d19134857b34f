"""Draws what a detector finds in images and videos.

    python -m detection.predict MODEL SOURCE [SOURCE ...] --out DIR [--threshold 0.3]

MODEL is a checkpoint, or an .onnx or .pt2 that detection.export wrote. A SOURCE is an image, a video, a folder or a
pattern such as "day*/*.jpg". Writes into DIR an annotated picture per image or video frame, and every detection, of any
score, with the category ids of the training data: detections.json in COCO's result format and detections.csv. Images
are numbered from 1 in the order of their names; "file_name", relative to the folder of them all, tells which is which,
and "frame" is of a video. --crops also cuts out what is drawn, --show-points draws where each of the drawn detections
looked.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dat.detection.data import Category
from dat.detection.draw import draw_boxes
from dat.detection.evaluation import to_results
from dat.detection.points import Points, check_points, detect_with_points, draw_points
from dat.detection.predictor import Predictor, load_predictor
from dat.engine.distributed import setup_distributed
from dat.utils.errors import ConfigError
from dat.utils.files import file_name, write_csv, write_json
from dat.utils.media import Frame, Frames, Media, find_media

logger = logging.getLogger(__name__)

COLUMNS = ("image_id", "file_name", "frame", "category_id", "category", "score", "x", "y", "width", "height")


@dataclass(frozen=True)
class Output:
    """What is written of a run, beside the files of all detections.

    Attributes:
        folder: of all files.
        targets: where the picture of an image goes, and in which folder those of a video's frames.
        threshold: least score of what is drawn and cut out.
        crops, points: whether detections are cut out; whether their sampling points are drawn.
    """

    folder: Path
    targets: dict[Media, Path]
    threshold: float
    crops: bool
    points: bool

    def write(
        self, frame: Frame, results: dict[int, dict[str, Any]], points: Points | None, predictor: Predictor
    ) -> int:
        """Writes the pictures of a frame; returns how many detections are drawn.

        `results`: by their places among all detections of the frame, which `points` are of.
        """
        chosen = [i for i, result in results.items() if result["score"] >= self.threshold]
        drawn = [results[i] for i in chosen]
        target = self.targets[frame.media]
        if frame.number is not None:
            target = target / f"{frame.number:06d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_boxes(frame.picture, drawn, predictor.categories).save(target)
        if self.crops:
            self._cut(frame.picture, drawn, predictor.categories, target)
        if points is not None and drawn:
            sheet = target.with_name(f"{target.stem}_points.png")
            draw_points(frame.picture, drawn, points.select(chosen), predictor.categories, sheet)
        return len(drawn)

    def _cut(
        self, picture: Image.Image, drawn: Sequence[dict[str, Any]], categories: Sequence[Category], target: Path
    ) -> None:
        names = {category.id: category.name for category in categories}
        relative = target.relative_to(self.folder).with_suffix("")
        for i, result in enumerate(drawn, 1):
            x, y, w, h = result["bbox"]
            # at least the pixel that it is in
            left, top = min(int(x), picture.width - 1), min(int(y), picture.height - 1)
            right, bottom = max(round(x + w), left + 1), max(round(y + h), top + 1)
            folder = self.folder / "crops" / file_name(names[result["category_id"]])
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{'_'.join(relative.parts)}_{i}.png"
            picture.crop((left, top, min(right, picture.width), min(bottom, picture.height))).save(folder / name)


def picture_paths(media: Sequence[Media], out: Path) -> dict[Media, Path]:
    """Where pictures go, and in which folders those of videos. Raises ConfigError if that would replace an image."""
    targets = [out / (one.name if one.is_video else Path(one.name).with_suffix(".png")) for one in media]
    if len(set(targets)) < len(targets):
        # photo.jpg beside photo.png
        targets = [out / (one.name if one.is_video else f"{one.name}.png") for one in media]
    sources = {one.path.resolve() for one in media}
    for target in targets:
        if target.resolve() in sources:
            raise ConfigError(f"--out: {target} is an image to search, the folder should be another one")
    return dict(zip(media, targets, strict=True))


def choose_classes(names: Sequence[str] | None, categories: Sequence[Category]) -> frozenset[int]:
    """The category ids of the classes of these names, or of all. Raises ConfigError for one that there is not."""
    ids = {category.name: category.id for category in categories}
    for name in names or ():
        if name not in ids:
            raise ConfigError(f"--classes: no class {name!r}, there are {', '.join(ids)}")
    return frozenset(ids[name] for name in names or ids)


def predict(
    predictor: Predictor, frames: Frames, batch_size: int, classes: frozenset[int], output: Output
) -> tuple[list[dict[str, Any]], int, int]:
    """Searches all frames and writes their pictures.

    Returns:
        The detections in COCO's format, numbers of images and of drawn detections.
    """
    found: list[dict[str, Any]] = []
    images = drawn = 0
    with tqdm(unit=" images", disable=not sys.stderr.isatty()) as bar:
        for batch in frames.batches(batch_size):
            for frame, (detections, points) in zip(batch, _detect(predictor, batch, output.points), strict=True):
                images += 1
                size = (frame.picture.height, frame.picture.width)
                origin = {"file_name": frame.media.name} | ({} if frame.number is None else {"frame": frame.number})
                results = {
                    i: {**result, **origin}
                    for i, result in enumerate(to_results(images, size, detections, predictor.categories))
                    if result["category_id"] in classes
                }
                drawn += output.write(frame, results, points, predictor)
                found += results.values()
            bar.update(len(batch))
    return found, images, drawn


def _detect(
    predictor: Predictor, batch: Sequence[Frame], points: bool
) -> list[tuple[dict[str, Tensor], Points | None]]:
    pictures = [frame.picture for frame in batch]
    if points:
        return [detect_with_points(predictor, picture) for picture in pictures]
    return [(detections, None) for detections in predictor(pictures)]


def table_rows(results: Sequence[dict[str, Any]], categories: Sequence[Category]) -> list[dict[str, Any]]:
    """COCO results as rows of COLUMNS."""
    names = {category.id: category.name for category in categories}
    sides = ("x", "y", "width", "height")
    return [
        {**result, "category": names[result["category_id"]], **dict(zip(sides, result["bbox"], strict=True))}
        for result in results
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m detection.predict", description="Draws detections.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="best.pth of a run, or an exported .onnx or .pt2")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="image, video, folder or pattern")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, detections.json and .csv")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score, 0 to 1, of what is drawn (0.3)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these (all)")
    parser.add_argument("--crops", action="store_true", help="also cut out what is drawn, a folder for each class")
    parser.add_argument("--show-points", action="store_true", help="also draw where each detection looked")
    parser.add_argument("--top-k", type=int, default=100, help="most detections per image (100)")
    parser.add_argument("--batch-size", type=int, default=8, help="images in memory; equal sizes run together (8)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th frame of videos (1)")
    parser.add_argument("--trust", action="store_true", help="load a .pt2, which can run any code")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold is {options.threshold}, should be 0 to 1")
    for name in ("top_k", "batch_size", "every"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}, should be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out: {options.out} is a file, should be a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = setup_distributed(options.device).device
    # not the pictures of an earlier call
    media = find_media(options.sources, exclude=options.out)
    targets = picture_paths(media, options.out)
    predictor = load_predictor(options.model, device, options.top_k, options.trust)
    classes = choose_classes(options.classes, predictor.categories)
    if options.show_points:
        check_points(predictor)
    frames = Frames(media, options.every)
    output = Output(options.out, targets, options.threshold, options.crops, options.show_points)
    results, images, drawn = predict(predictor, frames, options.batch_size, classes, output)
    if not frames.count:
        raise frames.errors[0]
    if frames.errors:
        logger.warning(f"warning: left out {len(frames.errors)} of {len(media)} files, such as {frames.errors[0]}")
    write_json(options.out / "detections.json", results)
    write_csv(options.out / "detections.csv", table_rows(results, predictor.categories), COLUMNS)
    print(f"{drawn} detections of at least {options.threshold} in {images} images: {options.out}")
