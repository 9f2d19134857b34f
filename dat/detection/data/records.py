"""Images and their objects as every reader gives them, and the samples that models are trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from dat.utils.errors import DataError
from dat.utils.images import read_image


@dataclass(frozen=True)
class Category:
    """`id` is the annotation file's own, any integer."""

    id: int
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One image and its objects: `boxes` [n, 4] float32 (x0, y0, x1, y1) in pixels, inside the image and not empty.

    `labels` [n] int64 index the categories, `crowd` [n] bool marks COCO's iscrowd, `areas` [n] are in pixels.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class Annotations:
    """A split of a data set. A label is the index of its category, and categories are in the order of their ids.

    `path` is the file or folder that messages name; `warning` counts boxes that reading dropped or clipped, "" if none.
    """

    path: Path
    categories: tuple[Category, ...]
    records: tuple[ImageRecord, ...]
    warning: str = ""

    def objects(self, record: ImageRecord) -> list[dict[str, Any]]:
        """The objects of an image as COCO annotations without ids: "bbox" is (x, y, width, height) in pixels."""
        return [
            {
                "image_id": record.id,
                "category_id": self.categories[label].id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": area,
                "iscrowd": int(crowd),
            }
            for (x0, y0, x1, y1), label, crowd, area in zip(
                record.boxes.tolist(), record.labels, record.crowd, record.areas.tolist(), strict=True
            )
        ]

    def to_coco(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary, without the boxes that reading dropped."""
        objects = [entry for record in self.records for entry in self.objects(record)]
        return {
            "images": [
                {"id": r.id, "file_name": r.path.name, "width": r.width, "height": r.height} for r in self.records
            ],
            # COCO's evaluation reads id 0 as "not matched".
            "annotations": [{"id": number, **entry} for number, entry in enumerate(objects, start=1)],
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


class Sample(NamedTuple):
    """An image [3, H, W] and its target, a dictionary of "boxes", "labels" and any other entries."""

    image: Tensor
    target: dict[str, Any]


def load_image(path: Path, size: tuple[int, int] | None = None) -> tv_tensors.Image:
    """An image file [3, H, W] uint8 as `dat.utils.images.read_image` gives it.

    Args:
        path: of the file.
        size: (width, height) by its annotations; None: EXIF orientation is always followed.

    Raises:
        DataError: a file that cannot be decoded, or has another size.
    """
    image = read_image(path, size)
    if size is not None:
        check_annotated_size(path, image, size)
    return tv_tensors.Image(F.pil_to_tensor(image))


def check_annotated_size(path: Path, image: Image.Image, size: tuple[int, int]) -> None:
    """Raises DataError for an image that is not of the size (width, height) of its annotations."""
    if image.size != size:
        raise DataError(f"{path}: is {image.width}x{image.height}, but its annotations say {size[0]}x{size[1]}")


def read_sample(record: ImageRecord, image: Tensor | None = None) -> Sample:
    """The image and its training target {"boxes" BoundingBoxes XYXY, "labels"}, crowds left out.

    `image`: as load_image gives it, if it is in memory already.
    """
    if image is None:
        image = load_image(record.path, (record.width, record.height))
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(record.boxes[~record.crowd]), format="XYXY", canvas_size=(record.height, record.width)
    )
    return Sample(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels[~record.crowd])})
