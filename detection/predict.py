"""Draws what a checkpoint detects in images.

    python -m detection.predict CHECKPOINT IMAGE_OR_FOLDER --out DIR [--threshold 0.3]

Writes into DIR one annotated picture per image, and detections.json: every detection, of any score, in COCO's result
format with the category ids of the training data. Images are numbered from 1 in the order of their names; "file_name"
tells which is which.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dat.training.errors import ConfigError, DataError
from dat.training.loop import amp_context, main_guard, setup_distributed

from .build import Detector, load_detector
from .data import read_image, val_transform
from .draw import draw_boxes
from .evaluator import to_results
from .post_process import post_process
from .report import to_pil, write_json


def find_images(source: Path) -> list[Path]:
    """The image itself, or those of a folder and of the folders in it, by name. Raises DataError if there are none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such image or folder")
    extensions = Image.registered_extensions()
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in extensions and path.is_file())
    if not images:
        raise DataError(f"{source}: holds no images")
    return images


def picture_paths(paths: Sequence[Path], source: Path, out: Path) -> list[Path]:
    """Where the annotated pictures go. Raises ConfigError when that would replace an image."""
    folder = source if source.is_dir() else source.parent
    targets = [(out / path.relative_to(folder)).with_suffix(".png") for path in paths]
    if len(set(targets)) < len(targets):
        # photo.jpg beside photo.png
        targets = [out / f"{path.relative_to(folder)}.png" for path in paths]
    sources = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in sources:
            raise ConfigError(f"--out: {target} is an image to search, the folder should be another one")
    return targets


@torch.inference_mode()
def predict(detector: Detector, paths: Sequence[Path], device: torch.device, top_k: int) -> list[dict[str, Any]]:
    """COCO results of the images, numbered from 1, with their files' names; boxes are in the upright image's pixels."""
    data = detector.config.data
    transform = val_transform(size=data.val.size, max_size=data.val.max_size, mean=data.mean, std=data.std)
    results = []
    for number, path in enumerate(paths, start=1):
        image = read_image(path)
        size = (image.shape[-2], image.shape[-1])
        with amp_context(device, detector.config.train.amp):
            outputs = detector.model(transform(image)[None].to(device))
        (found,) = post_process(outputs, torch.tensor([size]), top_k=top_k)
        of_image = to_results(number, size, found, detector.categories)
        results += [{**result, "file_name": path.name} for result in of_image]
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
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out: {options.out} is a file, should be a folder")
    device = setup_distributed(options.device).device
    paths = find_images(options.source)
    targets = picture_paths(paths, options.source, options.out)
    detector = load_detector(options.checkpoint, device)
    # all images are read and searched before the first file is written
    results = predict(detector, paths, device, options.top_k)
    drawn = defaultdict(list)
    for result in results:
        if result["score"] >= options.threshold:
            drawn[result["image_id"]].append(result)
    for number, (path, target) in enumerate(zip(paths, targets, strict=True), start=1):
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_boxes(to_pil(read_image(path)), drawn[number], detector.categories).save(target)
    write_json(options.out / "detections.json", results)
    print(
        f"{sum(map(len, drawn.values()))} detections of at least {options.threshold} "
        f"in {len(paths)} images: {options.out}"
    )


if __name__ == "__main__":
    main_guard(main)
