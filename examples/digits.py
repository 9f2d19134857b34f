"""Scenes and crops of real handwritten digits: a detection and a classification data set that need no download.

The digits are scikit-learn's (UCI's optical recognition of handwritten digits, 8 x 8 pixels, 1,797 samples). Held-out
scenes are drawn with digits that no training image shows.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits
from torchvision.ops import box_iou
from tqdm import tqdm

Digit = tuple[NDArray[np.float32], int]
TRAIN_DIGITS = 1400


def load() -> tuple[list[Digit], list[Digit]]:
    """Training and held-out digits as (ink [8, 8] in 0..1, class)."""
    data = load_digits()
    digits = [
        (image.astype(np.float32) / 16, int(label)) for image, label in zip(data.images, data.target, strict=True)
    ]
    return digits[:TRAIN_DIGITS], digits[TRAIN_DIGITS:]


def texture(size: int, rng: np.random.Generator) -> Image.Image:
    """A canvas: two colours mixed by smooth noise of several scales, under stripes."""
    noise = np.zeros((size, size), np.float32)
    for cells in (3, 7, 19, 45):
        grid = Image.fromarray(rng.random((cells, cells), np.float32))
        noise += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / cells**0.4
    y, x = np.mgrid[:size, :size] / size
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(4, 30)
    noise += rng.uniform(0, 0.3) * np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    mix = (noise - noise.min()) / np.ptp(noise)
    low, high = rng.uniform(30, 225, (2, 3))
    return Image.fromarray((low + mix[..., None] * (high - low)).clip(0, 255).astype(np.uint8))


def clutter(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Lines, rings and blots in random colours: shapes with edges that are not digits."""
    draw = ImageDraw.Draw(canvas)
    size = canvas.width
    for _ in range(rng.integers(3, 9)):
        x, y = rng.uniform(0, size, 2)
        w, h = rng.uniform(size / 30, size / 4, 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        kind = rng.integers(3)
        if kind == 0:
            draw.line((x, y, x + w - h, y + h), colour, int(rng.integers(1, 5)))
        elif kind == 1:
            draw.arc((x, y, x + w, y + h), *sorted(rng.uniform(0, 360, 2)), colour, int(rng.integers(1, 5)))
        else:
            draw.polygon([(x + w * u, y + h * v) for u, v in rng.random((5, 2))], colour)


def sized(ink: NDArray[np.float32], height: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], int, int]:
    """The inked columns of a digit, and its width and height in pixels."""
    columns = np.flatnonzero(ink.max(0) > 0.2)
    ink = ink[:, columns[0] : columns[-1] + 1]
    return ink, max(2, round(height * ink.shape[1] / 8 * rng.uniform(0.8, 1.2))), height


def paste(
    canvas: Image.Image, digit: tuple[NDArray[np.float32], int, int], corner: Sequence[int], rng: np.random.Generator
) -> list[float]:
    """Draws a sized digit in a contrasting colour; returns the box (x, y, w, h) of its ink."""
    ink, width, height = digit
    mask = Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)
    alpha = ((np.asarray(mask) - 0.35) * 3).clip(0, 1)
    x, y = corner
    region = np.asarray(canvas.crop((x, y, x + width, y + height)), np.float32)
    # Dark ink on a light ground and light ink on a dark one.
    colour = rng.uniform(0, 70, 3) if region.mean() > 127 else rng.uniform(185, 255, 3)
    mixed = region + alpha[..., None] * (colour - region)
    canvas.paste(Image.fromarray(mixed.astype(np.uint8)), (x, y))
    rows, columns = np.flatnonzero(alpha.max(1) > 0.3), np.flatnonzero(alpha.max(0) > 0.3)
    return [
        float(x + columns[0]),
        float(y + rows[0]),
        float(columns[-1] - columns[0] + 1),
        float(rows[-1] - rows[0] + 1),
    ]


def scene(
    digits: list[Digit], size: int, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[list[float], int]]]:
    """One canvas with two to eight digits between a seventh and half of its side, and their (box, class)."""
    canvas = texture(size, rng)
    clutter(canvas, rng)
    objects: list[tuple[list[float], int]] = []
    taken = torch.zeros(0, 4)
    wanted = rng.integers(2, 9)
    for _ in range(40):
        if len(objects) == wanted:
            break
        height = int(np.exp(rng.uniform(np.log(size / 7), np.log(size / 2))))
        ink, label = digits[rng.integers(len(digits))]
        digit = sized(ink, height, rng)
        x, y = int(rng.integers(0, size - digit[1])), int(rng.integers(0, size - height))
        place = torch.tensor([[x, y, x + digit[1], y + height]], dtype=torch.float32)
        if len(taken) and box_iou(place, taken).max() > 0.02:
            continue
        objects.append((paste(canvas, digit, (x, y), rng), label))
        taken = torch.cat((taken, place))
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    return canvas, objects


def make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Makes a folder of data, unless it exists; an interruption leaves no half of it."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        make(temporary)
        temporary.rename(folder)


def make_scenes(root: Path, train: int, val: int, size: int) -> None:
    """Writes root/images and root/{train,val}.json, COCO JSON whose category ids are the digits plus one."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for split, digits, count, seed in zip(("train", "val"), load(), (train, val), (1, 2), strict=True):
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for index in tqdm(range(count), f"{split} scenes", mininterval=1):
            canvas, objects = scene(digits, size, rng)
            name = f"{split}_{index:05d}.jpg"
            canvas.save(root / "images" / name, quality=92)
            images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
            for box, label in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))


def make_crops(root: Path, train: int, val: int, size: int) -> None:
    """Writes root/{train,val}/{0..9}/*.png: a digit that fills most of its canvas, half of them with clutter."""
    for split, digits, count, seed in zip(("train", "val"), load(), (train, val), (3, 4), strict=True):
        rng = np.random.default_rng(seed)
        for index in tqdm(range(count), f"{split} crops", mininterval=1):
            canvas = texture(size, rng)
            if rng.random() < 0.5:
                clutter(canvas, rng)
            ink, label = digits[index % len(digits)]
            digit = sized(ink, int(rng.uniform(0.7, 1.0) * size), rng)
            x, y = (int(rng.integers(0, max(1, size - length + 1))) for length in digit[1:])
            paste(canvas, digit, (x, y), rng)
            folder = root / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            canvas.save(folder / f"{index:05d}.png")
