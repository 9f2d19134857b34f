"""A user's augmentation as the first step of training's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from dat.engine.pipelines import is_albumentations, run_albumentations
from dat.utils.errors import ConfigError


class UserTransform(nn.Module):
    """Calls a user's transform on an image and its target, and checks the result.

    Args:
        transform: maps (image tv_tensors.Image uint8 [3, H, W], target) to the same, as those of
            torchvision.transforms.v2 do; the target has "boxes" tv_tensors.BoundingBoxes XYXY [n, 4] and "labels" [n].
            Or an albumentations.Compose with bbox_params of format pascal_voc and any label_fields.

    Raises:
        ConfigError: boxes would not follow the pipeline; when called: the result is of another kind.
    """

    def __init__(self, transform: Callable[..., Any]):
        super().__init__()
        if not callable(transform):
            raise ConfigError(f"transform: is {_kind(transform)}, should be a function of an image and its target")
        self.transform = _Albumentations(transform) if is_albumentations(transform) else transform

    def forward(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # A user's function may return a new dictionary.
        canvas = {"canvas": target.pop("canvas")} if "canvas" in target else {}
        found = self.transform(image, target)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
            raise ConfigError(f"transform: gave a {type(found).__name__}, should give (image, target)")
        image, target = found
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ConfigError(
                f"transform: gave an image {_kind(image)}, should be a tensor uint8 [3, H, W]; "
                "data.mean and data.std normalise it afterwards"
            )
        boxes, labels, size = target.get("boxes"), target.get("labels"), tuple(image.shape[-2:])
        if not isinstance(boxes, tv_tensors.BoundingBoxes) or boxes.format.value != "XYXY":
            raise ConfigError(
                f"transform: gave boxes {_kind(boxes)}, should be tv_tensors.BoundingBoxes of format XYXY"
            )
        if tuple(boxes.canvas_size) != size:
            raise ConfigError(f"transform: gave boxes of an image of {tuple(boxes.canvas_size)}, the image is {size}")
        if not isinstance(labels, Tensor) or labels.shape != boxes.shape[:1]:
            raise ConfigError(f"transform: gave labels {_kind(labels)} for {len(boxes)} boxes, should be one for each")
        return image.as_subclass(tv_tensors.Image), {**target, **canvas}


class _Albumentations:
    """An albumentations.Compose as a function of an image and its target; boxes that it drops lose all their rows."""

    def __init__(self, compose: Any):
        self.compose = compose
        processor = compose.processors.get("bboxes")
        found = None if processor is None else processor.params.format
        if found != "pascal_voc":
            raise ConfigError(
                f"transform: the format of its bbox_params is {found}, should be pascal_voc: "
                'albumentations.BboxParams("pascal_voc", label_fields=["labels"])'
            )
        self.label_fields = processor.params.label_fields or ()

    def __call__(self, image: Tensor, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = np.arange(len(target["boxes"]))
        found = run_albumentations(
            self.compose,
            np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
            # A fifth column tells which boxes are left, and in which order.
            bboxes=np.column_stack((target["boxes"].numpy(), rows)),
            **dict.fromkeys(self.label_fields, rows),
        )
        pixels = found["image"]
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 3:
            return pixels, target
        boxes = np.array(found["bboxes"], dtype=np.float32).reshape(-1, 5)
        kept = torch.from_numpy(boxes[:, 4]).long()
        selected = {key: x[kept] if isinstance(x, Tensor) else x for key, x in target.items()}
        selected["boxes"] = tv_tensors.BoundingBoxes(
            torch.from_numpy(boxes[:, :4].copy()), format="XYXY", canvas_size=pixels.shape[:2]
        )
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), selected


def _kind(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"of type {type(value).__name__}"
