"""Augmentation of images and boxes with torchvision.transforms.v2, as DETR (arXiv:2005.12872) is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dat.detection.config import TrainDataConfig, ValDataConfig
from dat.detection.data.pipeline import UserTransform


@dataclass(frozen=True)
class Canvas:
    """The maximum size of a training image in pixels: as an entry of the target it limits the last resize."""

    height: int
    width: int


def resized_size(
    height: int, width: int, shortest: int, max_size: int, canvas: Canvas | None = None
) -> tuple[int, int]:
    """(height, width) at which the shortest edge is `shortest`, or the longest `max_size` where it would be longer.

    The result fits into the canvas.
    """
    scale = min(shortest / min(height, width), max_size / max(height, width))
    if canvas is not None:
        scale = min(scale, canvas.height / height, canvas.width / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


class ResizeShortestEdge(nn.Module):
    """Resizes to a shortest edge drawn from `sizes`, in pixels, the longest being at most `max_size`.

    torchvision's RandomShortestSize truncates: 799 for a shortest edge of 800 at some aspect ratios.
    `fit`: also to the target's "canvas", a Canvas, if there is one.
    """

    def __init__(self, sizes: Sequence[int], max_size: int, fit: bool = True):
        super().__init__()
        self.sizes, self.max_size, self.fit = list(sizes), max_size, fit

    def forward(self, image: Any, target: dict[str, Any]) -> Any:
        height, width = v2.query_size([image])
        shortest = self.sizes[int(torch.randint(len(self.sizes), ()))]
        canvas = target.get("canvas") if self.fit else None
        return v2.Resize(list(resized_size(height, width, shortest, self.max_size, canvas)))(image, target)


class RandomSizeCrop(v2.Transform):
    """Crops a random window; each side is drawn from `min_size` to `max_size` pixels, or is the image's if smaller."""

    def __init__(self, min_size: int, max_size: int):
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        canvas = v2.query_size(flat_inputs)
        height, width = (
            int(torch.randint(min(self.min_size, side), min(self.max_size, side) + 1, ())) for side in canvas
        )
        top = int(torch.randint(canvas[0] - height + 1, ()))
        left = int(torch.randint(canvas[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


def _normalize(mean: Sequence[float], std: Sequence[float]) -> list[nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def _per_object(inputs: tuple[Any, dict[str, Any]]) -> tuple[Tensor, ...]:
    """Plain tensors of a target: they have a row for each box, which is dropped with it. Masks follow by themselves."""
    values = inputs[1].values()
    return tuple(x for x in values if isinstance(x, Tensor) and not isinstance(x, tv_tensors.TVTensor))


def train_transform(
    split: TrainDataConfig,
    mean: Sequence[float],
    std: Sequence[float],
    first: Callable[..., Any] | None = None,
) -> v2.Compose:
    """Flips, colour distortion, and a resize or (probability `crop`) resize, crop, resize; then normalises.

    Maps (image uint8, {"boxes", "labels", ...}) to float32; all randomness is torch's. Boxes smaller than a pixel are
    dropped in the end, with their rows of the target's other tensors. `first`: of the user, see UserTransform.
    """
    steps: list[nn.Module] = [] if first is None else [UserTransform(first)]
    if split.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(split.horizontal_flip))
    if split.vertical_flip:
        steps.append(v2.RandomVerticalFlip(split.vertical_flip))
    resize = ResizeShortestEdge(split.sizes, split.max_size)
    if split.crop:
        first = ResizeShortestEdge(split.crop_resize, split.max_size, fit=False)
        cropped = v2.Compose([first, RandomSizeCrop(split.crop_min, split.crop_max), resize])
        steps.append(v2.RandomChoice([resize, cropped], p=[1 - split.crop, split.crop]))
    else:
        steps.append(resize)
    # After the resize, because it mostly makes the image smaller.
    if split.photometric:
        steps.append(v2.RandomApply([v2.RandomPhotometricDistort()], p=split.photometric))
    return v2.Compose(
        [*steps, *_normalize(mean, std), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_per_object)]
    )


def val_transform(split: ValDataConfig, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Resizes the shortest edge to `size` and normalises; keeps every box."""
    return v2.Compose([ResizeShortestEdge([split.size], split.max_size), *_normalize(mean, std)])
