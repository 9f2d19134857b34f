"""Images and their objects as every reader gives them, and the samples that models are trained on."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
    `file_name`: of the image as the annotations give it, "": as in `path`.
    The record of a `window` (left, top, right, bottom) of a `whole` image has the size and the objects of the window.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    file_name: str = ""
    window: tuple[int, int, int, int] | None = field(default=None, kw_only=True)
    whole: "ImageRecord | None" = field(default=None, kw_only=True)

    @property
    def file(self) -> "ImageRecord":
        """The record of the whole image in the file."""
        return self.whole or self


@dataclass(frozen=True)
class Annotations:
    """A split of a data set. A label is the index of its category. Categories are in the order of their ids, or in
    that of training.

    `path` is the file or folder that messages name; `warning` counts boxes that reading dropped or clipped, "" if none.
    `annotated` is False where the images have no annotations at all, as in COCO's test files. `format` and `extent` say
    how the data set was read, and which part of it.
    `roots`: supercategories without objects, which the file lists as categories, but which are no classes.
    `notes`: further lines for the user, on the split beside the other one.
    """

    path: Path
    categories: tuple[Category, ...]
    records: tuple[ImageRecord, ...]
    warning: str = ""
    annotated: bool = True
    format: str = ""
    extent: str = ""
    roots: tuple[Category, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Lines for the user: boxes and categories that are left out, and `notes`."""
        texts = (*self.dropped_roots, *self.notes)
        return [*filter(None, [self.warning]), *(f"{self.path}: {text}" for text in texts)]

    @property
    def dropped_roots(self) -> list[str]:
        """A text, if any category is left out."""
        names = ", ".join(f"{c.id} {c.name}" for c in self.roots)
        return [f"supercategory without objects, no class: {names}"] if names else []

    def with_categories(self, categories: Iterable[Category]) -> "Annotations":
        """The same with those of `roots` as classes whose names are among `categories`.

        Checkpoints of earlier versions, and splits in which a supercategory has objects, have such classes.
        """
        names = {category.name for category in categories} - {category.name for category in self.categories}
        chosen = [root for root in self.roots if root.name in names]
        if not chosen:
            return self
        roots = tuple(root for root in self.roots if root not in chosen)
        ordered = sorted((*self.categories, *chosen), key=lambda category: category.id)
        return replace(self.renumbered(tuple(ordered)), roots=roots)

    def renumbered(self, categories: tuple[Category, ...]) -> "Annotations":
        """The same objects, with the labels that `categories` give their names; all names must be among them."""
        names = [category.name for category in categories]
        labels = np.array([names.index(category.name) for category in self.categories], dtype=np.int64)
        records = tuple(replace(record, labels=labels[record.labels]) for record in self.records)
        return replace(self, categories=categories, records=records)

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


def merge_classes(annotations: Annotations) -> Annotations:
    """The annotations with all objects of one class, "object", whose category id is 1."""
    records = tuple(replace(record, labels=np.zeros_like(record.labels)) for record in annotations.records)
    return replace(annotations, categories=(Category(1, "object"),), records=records, roots=())


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


def load_record(record: ImageRecord, image: Tensor | None = None) -> Tensor:
    """The image of a record, [3, H, W] uint8; `image`: the file's, if it is in memory already. Raises as load_image."""
    if image is None:
        image = load_image(record.path, (record.file.width, record.file.height))
    if record.window is None:
        return image
    left, top, right, bottom = record.window
    return F.crop(image, top, left, bottom - top, right - left)


def read_sample(record: ImageRecord, image: Tensor | None = None) -> Sample:
    """The image and its training target {"boxes" BoundingBoxes XYXY, "labels"}, crowds left out.

    `image`: the file's, as load_image gives it, if it is in memory already.
    """
    image = load_record(record, image)
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(record.boxes[~record.crowd]), format="XYXY", canvas_size=(record.height, record.width)
    )
    return Sample(image, {"boxes": boxes, "labels": torch.from_numpy(record.labels[~record.crowd])})
