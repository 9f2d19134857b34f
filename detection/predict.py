"""Draws what a checkpoint detects in images.

    python -m detection.predict CHECKPOINT IMAGE_OR_FOLDER --out DIR [--threshold 0.3]

Writes into DIR one annotated picture per image, and detections.json: every detection, of any score, in COCO's result
format with the category ids of the training data. Images are numbered from 1 in the order of their names; "file_name",
relative to the folder, tells which is which.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dat.training.distributed import setup_distributed
from dat.training.errors import ConfigError, DataError
from dat.training.files import find_images, write_json
from dat.training.loop import amp_context, main_guard

from .build import Detector, load_detector
from .data import read_image, val_transform
from .data.loader import Collate
from .draw import draw_boxes
from .evaluator import to_results
from .post_process import post_process
from .report import to_pil

logger = logging.getLogger(__name__)


def picture_paths(paths: Sequence[Path], folder: Path, out: Path) -> dict[Path, Path]:
    """Where the annotated pictures of images in `folder` go. Raises ConfigError when that would replace an image."""
    targets = [(out / path.relative_to(folder)).with_suffix(".png") for path in paths]
    if len(set(targets)) < len(targets):
        # photo.jpg beside photo.png
        targets = [out / f"{path.relative_to(folder)}.png" for path in paths]
    sources = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in sources:
            raise ConfigError(f"--out: {target} is an image to search, the folder should be another one")
    return dict(zip(paths, targets, strict=True))


@torch.inference_mode()
def predict(
    detector: Detector, paths: Sequence[Path], folder: Path, device: torch.device, top_k: int
) -> dict[Path, list[dict[str, Any]]]:
    """COCO results by image, numbered from 1, "file_name" relative to `folder`; boxes in the upright image's pixels.

    Images that cannot be read are left out, with one warning that counts them. Raises DataError if none can be read.
    """
    data = detector.config.data
    transform = val_transform(size=data.val.size, max_size=data.val.max_size, mean=data.mean, std=data.std)
    collate = Collate(data.pad_multiple)
    results: dict[Path, list[dict[str, Any]]] = {}
    unreadable = []
    for path in paths:
        try:
            image = read_image(path)
        except DataError as error:
            unreadable.append(error)
            continue
        size = (image.shape[-2], image.shape[-1])
        batch, mask, _ = collate([(transform(image), {})])
        with amp_context(device, detector.config.train.amp):
            outputs = detector.model(batch.to(device), None if mask is None else mask.to(device))
        (found,) = post_process(outputs, torch.tensor([size]), detector.model.scores, top_k)
        name = path.relative_to(folder).as_posix()
        of_image = to_results(len(results) + 1, size, found, detector.categories)
        results[path] = [{**result, "file_name": name} for result in of_image]
    if not results:
        raise unreadable[0]
    if unreadable:
        logger.warning(f"warning: left out {len(unreadable)} of {len(paths)} files, such as {unreadable[0]}")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detection.predict", description="Draws detections.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pth or last.pth of a run")
    parser.add_argument("source", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and detections.json")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score, 0 to 1, of what is drawn (0.3)")
    parser.add_argument("--top-k", type=int, default=100, help="most detections per image (100)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold is {options.threshold}, should be 0 to 1")
    if options.top_k < 1:
        raise ConfigError(f"--top-k is {options.top_k}, should be at least 1")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out: {options.out} is a file, should be a folder")
    device = setup_distributed(options.device).device
    # not the pictures of an earlier call
    paths = find_images(options.source, exclude=options.out)
    folder = options.source if options.source.is_dir() else options.source.parent
    targets = picture_paths(paths, folder, options.out)
    detector = load_detector(options.checkpoint, device)
    # all images are read and searched before the first file is written
    results = predict(detector, paths, folder, device, options.top_k)
    count = 0
    for path, of_image in results.items():
        drawn = [result for result in of_image if result["score"] >= options.threshold]
        count += len(drawn)
        targets[path].parent.mkdir(parents=True, exist_ok=True)
        draw_boxes(to_pil(read_image(path)), drawn, detector.categories).save(targets[path])
    write_json(options.out / "detections.json", [result for of_image in results.values() for result in of_image])
    print(f"{count} detections of at least {options.threshold} in {len(results)} images: {options.out}")


if __name__ == "__main__":
    main_guard(main)
