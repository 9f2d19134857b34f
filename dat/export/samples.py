"""Pictures that an exported model is checked on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dat.utils.errors import ConfigError, DataError
from dat.utils.files import find_images
from dat.utils.images import read_image

# Of a batch to trace with: maps of stride 32 have more than two windows along each side, and no side is divisible.
EXAMPLE = (2, 3, 545, 673)
# as many pictures as a batch of the check holds
COUNT = 2


@dataclass(frozen=True)
class Pictures:
    """Two pictures, in RGB, and where they are from."""

    pictures: tuple[Image.Image, ...]
    origin: str


def sample_pictures(source: Path | None, validation: Path) -> Pictures:
    """The first readable pictures of `source`, else of the folder of validation data, else generated ones.

    Raises DataError where `source` is given and has none.
    """
    if source is not None:
        paths = find_images(source)
        return Pictures(_first(paths), str(source))
    try:
        return Pictures(_first(find_images(validation)), str(validation))
    except DataError:
        return Pictures(tuple(_generate(seed) for seed in range(COUNT)), "generated pictures")


def sample_batches(pictures: Pictures, sizes: Sequence[int]) -> list[Tensor]:
    """Batches uint8 [B, 3, H, W] of 2 and of 1 for each size: the first square but for a quarter, the other upright."""
    batches = []
    for count in (2, 1):
        for i, size in enumerate(sizes):
            width, height = (size * 5 // 4, size) if i == 0 else (size, size * 3 // 2)
            images = [np.asarray(picture.resize((width, height))) for picture in pictures.pictures[:count]]
            batches.append(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())
    return batches


def check_sizes(sizes: Sequence[int] | None, usual: int) -> tuple[int, int]:
    """The two sides to check at; by default the usual one and a smaller one. Raises ConfigError."""
    if sizes is None:
        return usual, max(usual * 3 // 4, 1)
    if min(sizes) < 1 or len(set(sizes)) < 2:
        raise ConfigError(f"--sizes are {sizes[0]} and {sizes[1]}, should be two sizes of at least 1")
    return sizes[0], sizes[1]


def _first(paths: Sequence[Path]) -> tuple[Image.Image, ...]:
    pictures: list[Image.Image] = []
    error: DataError | None = None
    for path in paths:
        try:
            pictures.append(read_image(path))
        except DataError as failed:
            error = error or failed
        if len(pictures) == COUNT:
            break
    if not pictures:
        raise error or DataError("no pictures")
    # one picture and its mirror image
    return (pictures * 2)[0], (pictures * 2)[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _generate(seed: int) -> Image.Image:
    """Coloured blots of all sizes."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((640, 480))
    fine = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((640, 480))
    return Image.blend(picture, fine, 0.4)
