"""Augmentation of a sample with other images: mosaic, mixup, copy-paste; and large-scale jitter.

The result has the size of the first image, so that batches of similar aspect ratios stay so. Boxes are clipped. An
object of which only a few pixels or a small part are left is dropped, with its rows of the target's other tensors.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms.v2 import functional as F

from dat.detection.config import TrainDataConfig
from dat.detection.data.records import Sample

# Grey where there is no image, as in YOLO: about the mean of ImageNet, which is also what padding of a batch is.
FILL = 114
# An object stays if both sides of its box have so many pixels and so much of its box is inside the image.
MIN_SIDE, MIN_INSIDE = 2, 0.2
# Without masks the visible part of an object is not known: it stays if so much of its box is not pasted over.
MIN_UNCOVERED = 0.5
# Sizes of the images of a mosaic and of a second image, relative to the largest that fits into the first.
SCALES = (0.5, 1.5)


class Mixing:
    """Draws and applies mosaic, mixup, copy_paste and scale_jitter of `data.train`; all randomness is torch's.

    Args:
        split: with these keys.
        epochs: of the training; the last `close_mosaic` of them are without mosaic and mixup.
    """

    def __init__(self, split: TrainDataConfig, epochs: int):
        self.split, self.mixed_epochs = split, epochs - split.close_mosaic

    def __call__(self, sample: Sample, epoch: int, draw: Callable[[], Sample]) -> Sample:
        """Augments an image uint8 [3, H, W] and its target; `draw` gives random other samples."""
        split, size, mixed = self.split, tuple(sample.image.shape[-2:]), epoch < self.mixed_epochs
        if mixed and _happens(split.mosaic):
            sample = mosaic([sample, draw(), draw(), draw()])
        elif split.scale_jitter:
            sample = place(sample, size, split.scale_jitter)
        if _happens(split.copy_paste):
            sample = copy_paste(sample, place(draw(), size, split.scale_jitter or SCALES))
        if mixed and _happens(split.mixup):
            sample = mixup(sample, place(draw(), size, SCALES))
        return sample


def place(sample: Sample, size: tuple[int, ...], scales: Sequence[float]) -> Sample:
    """An image at a random scale and position on grey, cut where it is larger (large-scale jitter, arXiv:2012.07177).

    Args:
        sample: image uint8 [3, h, w] and target.
        size: (height, width) of the result.
        scales: smallest and largest scale; 1 is the largest image that fits.
    """
    fitted = _fit(sample, size, _uniform(*scales))
    top, left = (round(_uniform(0, 1) * (side - own)) for side, own in zip(size, fitted, strict=True))
    canvas = torch.full((3, *size), FILL, dtype=torch.uint8)
    target = _draw(canvas, sample, fitted, (top, left), (0, 0, *size))
    return Sample(tv_tensors.Image(canvas), target)


def mosaic(samples: Sequence[Sample]) -> Sample:
    """Four images that meet in a random point, in the size of the first (YOLOv4, arXiv:2004.10934).

    As in YOLOX (arXiv:2107.08430) each image has a corner at the point, and all have one random scale.
    """
    height, width = size = tuple(samples[0].image.shape[-2:])
    y, x = (round(side * _uniform(0.25, 0.75)) for side in size)
    scale = _uniform(*SCALES)
    canvas = torch.full((3, *size), FILL, dtype=torch.uint8)
    targets = []
    for sample, (lower, right) in zip(samples, product((False, True), repeat=2), strict=True):
        rows, columns = fitted = _fit(sample, size, scale)
        corner = (y if lower else y - rows, x if right else x - columns)
        window = (y if lower else 0, x if right else 0, height if lower else y, width if right else x)
        targets.append(_draw(canvas, sample, fitted, corner, window))
    return Sample(tv_tensors.Image(canvas), _join(targets))


def mixup(sample: Sample, other: Sample) -> Sample:
    """The mean of two images of one size, with the objects of both (arXiv:1710.09412; for detection as in YOLOX)."""
    image = (sample.image.to(torch.int16) + other.image).div(2, rounding_mode="floor").to(torch.uint8)
    return Sample(tv_tensors.Image(image), _join([sample.target, other.target]))


def copy_paste(sample: Sample, other: Sample) -> Sample:
    """Pastes the boxes of random objects, each with probability 0.5, of another image of the same size.

    After arXiv:2012.07177, but without masks: an object brings the background in its box along. Objects that the pasted
    boxes mostly cover are dropped, and other objects of which these boxes show most are annotated too.
    """
    boxes = other.target["boxes"].as_subclass(Tensor)
    region = torch.zeros(sample.image.shape[-2:], dtype=torch.bool)
    for box in boxes[torch.rand(len(boxes)) < 0.5]:
        region[_pixels(box)] = True
    kept = _select(sample.target, 1 - _shares(region, sample.target["boxes"]) >= MIN_UNCOVERED)
    pasted = _select(other.target, _shares(region, boxes) >= MIN_UNCOVERED)
    return Sample(tv_tensors.Image(torch.where(region, other.image, sample.image)), _join([kept, pasted]))


def _fit(sample: Sample, size: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) of the image at a scale, where 1 is the largest that fits into `size`."""
    height, width = sample.image.shape[-2:]
    ratio = scale * min(size[0] / height, size[1] / width)
    # torch cannot resize uint8 images to a single pixel.
    return max(2, round(height * ratio)), max(2, round(width * ratio))


def _draw(
    canvas: Tensor, sample: Sample, size: tuple[int, int], corner: tuple[int, int], window: Sequence[int]
) -> dict[str, Any]:
    """Draws an image onto `canvas` in place; returns its target there.

    Args:
        canvas: uint8 [3, H, W].
        sample: image and target.
        size: (height, width) to which the image is resized.
        corner: (row, column) of the canvas at which the resized image begins; may be negative.
        window: (top, left, bottom, right) of the canvas to draw within.
    """
    ends = (corner[0] + size[0], corner[1] + size[1])
    top, left = (max(a, b) for a, b in zip(corner, window[:2], strict=True))
    bottom, right = (min(a, b) for a, b in zip(ends, window[2:], strict=True))
    cut = (top - corner[0], left - corner[1], bottom - top, right - left)
    canvas[:, top:bottom, left:right] = F.crop(F.resize(sample.image, list(size)), *cut)
    resized = _apply(sample.target, lambda x: F.resize(x, list(size)))
    margins = [left, top, canvas.shape[2] - right, canvas.shape[1] - bottom]
    target = _apply(resized, lambda x: F.pad(F.crop(x, *cut), margins))
    boxes, whole = (entries["boxes"].as_subclass(Tensor) for entries in (target, resized))
    large = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= MIN_SIDE
    return _select(target, large & (box_area(boxes) >= MIN_INSIDE * box_area(whole)))


def _apply(target: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """The target with boxes and masks transformed by a function of torchvision."""
    return {key: function(x) if isinstance(x, tv_tensors.TVTensor) else x for key, x in target.items()}


def _select(target: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """The rows `kept` of every tensor of a target."""
    return {
        key: tv_tensors.wrap(x[kept], like=x) if isinstance(x, tv_tensors.TVTensor)
        else x[kept] if isinstance(x, Tensor) else x
        for key, x in target.items()
    }  # fmt: skip


def _join(targets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of all targets; entries that are no tensors are those of the first."""
    joined = dict(targets[0])
    for key, first in targets[0].items():
        if isinstance(first, Tensor):
            rows = torch.cat([target[key].as_subclass(Tensor) for target in targets])
            joined[key] = tv_tensors.wrap(rows, like=first) if isinstance(first, tv_tensors.TVTensor) else rows
    return joined


def _shares(region: Tensor, boxes: Tensor) -> Tensor:
    """The share [n] of the pixels of each box that `region` [H, W] bool holds."""
    return torch.tensor([float(region[_pixels(box)].float().mean()) for box in boxes.as_subclass(Tensor)])


def _pixels(box: Tensor) -> tuple[slice, slice]:
    """The rows and columns that a box covers at least in part."""
    (left, top), (right, bottom) = box[:2].floor().int().tolist(), box[2:].ceil().int().tolist()
    return slice(top, bottom), slice(left, right)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _happens(probability: float) -> bool:
    """Whether an event of this probability happens; nothing is drawn for 0."""
    return probability > 0 and float(torch.rand(())) < probability
