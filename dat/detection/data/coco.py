"""Detection annotations in COCO's JSON format, checked on reading, and the images that they name."""

import json
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from dat.utils.errors import DataError
from dat.utils.images import read_image

PerImage = dict[int, list[Any]]


@dataclass(frozen=True)
class Category:
    """`id` is the annotation file's own, any integer."""

    id: int
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One image and what it shows: `boxes` [n, 4] float32 (x0, y0, x1, y1) in pixels, inside it and not empty.

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
class CocoAnnotations:
    """A COCO annotation file. A label is the index of its category, and categories are in the order of their ids.

    `warning` counts the boxes that reading dropped or clipped; empty where there are none.
    """

    path: Path
    categories: tuple[Category, ...]
    records: tuple[ImageRecord, ...]
    warning: str = ""

    def to_coco(self) -> dict[str, Any]:
        """The annotations as a COCO dictionary, without what reading dropped."""
        annotations = [
            {
                "id": 0,
                "image_id": record.id,
                "category_id": self.categories[record.labels[i]].id,
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                "area": float(record.areas[i]),
                "iscrowd": int(record.crowd[i]),
            }
            for record in self.records
            for i, (x0, y0, x1, y1) in enumerate(record.boxes.astype(np.float64))
        ]
        # evaluation reads id 0 as "not matched"
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        return {
            "images": [
                {"id": r.id, "file_name": r.path.name, "width": r.width, "height": r.height} for r in self.records
            ],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def read_coco(path: Path, images: Path, categories: tuple[Category, ...] | None = None) -> CocoAnnotations:
    """Reads and checks the annotation file `path`, whose images lie in the folder `images`.

    Boxes are clipped to their images; empty ones are dropped. `warning` of the result counts them.
    `categories`: those that the file must have (a validation file: those of training); None: any.
    Raises DataError for a file that is missing or is not COCO, absent images, and other categories.
    """
    data = read_json(path)
    found = _categories(path, data)
    if categories is not None and found != categories:
        raise DataError(
            f"{path}: categories are {_names(found)}; they should be those of training, {_names(categories)}"
        )
    images_by_id = _images(path, data)
    boxes, labels, crowd, areas, warning = _annotations(path, data, found, images_by_id)
    records = []
    for image_id, entry in images_by_id.items():
        of_image = (
            np.array(boxes[image_id], dtype=np.float32).reshape(-1, 4),
            np.array(labels[image_id], dtype=np.int64),
            np.array(crowd[image_id], dtype=bool),
            np.array(areas[image_id], dtype=np.float32),
        )
        records.append(ImageRecord(image_id, images / entry["file_name"], entry["width"], entry["height"], *of_image))
    if not records:
        raise DataError(f"{path}: 'images' is empty; it should list at least one image")
    _check_files(path, images, records)
    return CocoAnnotations(path, found, tuple(records), warning)


def read_categories(path: Path) -> tuple[Category, ...]:
    """The categories of an annotation file alone, in the order of their ids. Raises DataError as read_coco does."""
    return _categories(path, read_json(path))


def load_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as tv_tensors.Image [3, H, W] uint8, RGB, whatever its mode.

    `size` (width, height): what the annotations say; EXIF orientation is followed where that is what gives this size.
    None: EXIF orientation is always followed. Raises DataError for a file that cannot be decoded or has another size.
    """
    image = read_image(path, size)
    if size is not None and image.size != size:
        raise DataError(f"{path}: is {image.width}x{image.height}, but its annotations say {size[0]}x{size[1]}")
    return tv_tensors.Image(F.pil_to_tensor(image))


def read_sample(record: ImageRecord, image: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The image and its training target {"boxes" BoundingBoxes XYXY, "labels"}, crowds left out.

    `image`: as load_image gives it, where it is known already.
    """
    if image is None:
        image = load_image(record.path, (record.width, record.height))
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(record.boxes[~record.crowd]), format="XYXY", canvas_size=(record.height, record.width)
    )
    return image, {"boxes": boxes, "labels": torch.from_numpy(record.labels[~record.crowd])}


def _names(categories: tuple[Category, ...]) -> str:
    shown = ", ".join(f"{c.id} {c.name}" for c in categories[:10])
    return shown + (f" and {len(categories) - 10} more" if len(categories) > 10 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The contents of an annotation file. Raises DataError unless 'images', 'annotations', 'categories' are lists."""
    try:
        with path.open(encoding="utf-8") as file:
            data = json.load(file)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: is not COCO: holds a {type(data).__name__}, it should be an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            problem = f"'{key}' is not a list" if key in data else f"has no '{key}'"
            raise DataError(f"{path}: is not COCO: {problem}")
    return data


def _get(path: Path, entry: Any, where: str, key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{path}: is not COCO: {where} has no '{key}'")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        name = "a string" if kind is str else "a list" if kind is list else "an integer"
        raise DataError(f"{path}: is not COCO: {where} has '{key}' {value!r}; it should be {name}")
    return value


def _categories(path: Path, data: dict[str, Any]) -> tuple[Category, ...]:
    found = [parse_category(path, entry, f"categories[{i}]") for i, entry in enumerate(data["categories"])]
    for key in ("id", "name"):
        repeated = [value for value, count in Counter(getattr(c, key) for c in found).items() if count > 1]
        if repeated:
            raise DataError(f"{path}: category {key} {repeated[0]!r} is used more than once")
    if not found:
        raise DataError(f"{path}: 'categories' is empty; it should list at least one category")
    return tuple(sorted(found, key=lambda category: category.id))


def parse_category(path: Path, entry: Any, where: str) -> Category:
    """One of 'categories'; `where` is its place in the file at `path`. Raises DataError."""
    return Category(_get(path, entry, where, "id", int), _get(path, entry, where, "name", str))


def parse_image(path: Path, entry: Any, where: str) -> dict[str, Any]:
    """One of 'images', unchanged: it has "id", "file_name", "width" and "height". Raises DataError."""
    _get(path, entry, where, "id", int)
    _get(path, entry, where, "file_name", str)
    for key in ("width", "height"):
        if _get(path, entry, where, key, int) < 1:
            raise DataError(f"{path}: {where} has '{key}' {entry[key]}; it should be at least 1")
    return entry


def _images(path: Path, data: dict[str, Any]) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for i, entry in enumerate(data["images"]):
        image_id = parse_image(path, entry, f"images[{i}]")["id"]
        if image_id in images:
            raise DataError(f"{path}: image id {image_id} is used more than once")
        images[image_id] = entry
    return images


def _annotations(
    path: Path, data: dict[str, Any], categories: tuple[Category, ...], images: dict[int, dict[str, Any]]
) -> tuple[PerImage, PerImage, PerImage, PerImage, str]:
    """Boxes (x0, y0, x1, y1), labels, crowd flags and areas by image id; a warning of what was changed, or ""."""
    label_of = {category.id: label for label, category in enumerate(categories)}
    boxes: PerImage = {image_id: [] for image_id in images}
    labels: PerImage = {image_id: [] for image_id in images}
    crowd: PerImage = {image_id: [] for image_id in images}
    areas: PerImage = {image_id: [] for image_id in images}
    dropped = clipped = 0
    for i, entry in enumerate(data["annotations"]):
        where = f"annotations[{i}]"
        image_id, category_id, bbox = parse_annotation(path, entry, where, label_of, images)
        is_crowd, area = parse_crowd_and_area(path, entry, where)
        box, outside = clip_box(bbox, images[image_id]["width"], images[image_id]["height"])
        if box is None:
            dropped += 1
            continue
        clipped += outside
        boxes[image_id].append(box)
        labels[image_id].append(label_of[category_id])
        crowd[image_id].append(is_crowd)
        areas[image_id].append((box[2] - box[0]) * (box[3] - box[1]) if area is None else area)
    warning = (
        f"{path}: dropped {dropped} boxes of zero size or outside their image, clipped {clipped} that reach outside"
        if dropped or clipped
        else ""
    )
    return boxes, labels, crowd, areas, warning


def clip_box(bbox: Sequence[float], width: int, height: int) -> tuple[tuple[float, float, float, float] | None, bool]:
    """A bbox (x, y, w, h) in an image of width x height pixels as (x0, y0, x1, y1), and whether it reached outside.

    None where nothing of it is left, or it was empty or not a number.
    """
    x, y, w, h = bbox
    box = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
    # the negation also drops NaN
    if not (w > 0 and h > 0 and box[2] > box[0] and box[3] > box[1]):
        return None, False
    # less than half a pixel is rounding
    return box, max(box[0] - x, box[1] - y, x + w - box[2], y + h - box[3]) > 0.5


def parse_annotation(
    path: Path, entry: Any, where: str, categories: Container[int], images: Container[int]
) -> tuple[int, int, list[float]]:
    """Image id, category id and bbox of one annotation; both ids should be known. Raises DataError."""
    image_id = _get(path, entry, where, "image_id", int)
    category_id = _get(path, entry, where, "category_id", int)
    bbox = _get(path, entry, where, "bbox", list)
    if image_id not in images:
        raise DataError(f"{path}: {where} has 'image_id' {image_id}, which 'images' does not list")
    if category_id not in categories:
        raise DataError(f"{path}: {where} has 'category_id' {category_id}, which 'categories' does not list")
    if len(bbox) != 4 or not all(isinstance(value, (int, float)) for value in bbox):
        raise DataError(f"{path}: {where} has 'bbox' {bbox}; it should be four numbers, x, y, width, height")
    return image_id, category_id, bbox


def parse_crowd_and_area(path: Path, entry: dict[str, Any], where: str) -> tuple[bool, float | None]:
    """iscrowd, False where it is absent, and the area in pixels, None where it is absent or null. Raises DataError."""
    crowd, area = entry.get("iscrowd", 0), entry.get("area")
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise DataError(f"{path}: {where} has 'iscrowd' {crowd!r}; it should be 0 or 1")
    if area is None:
        return bool(crowd), None
    # not NaN either, which JSON as Python reads it may hold
    if isinstance(area, bool) or not isinstance(area, (int, float)) or not 0 <= area < math.inf:
        raise DataError(f"{path}: {where} has 'area' {area!r}; it should be a number of at least 0")
    return bool(crowd), area


def _check_files(path: Path, images: Path, records: list[ImageRecord]) -> None:
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of images")
    absent = [record for record in records if not record.path.is_file()]
    if absent:
        more = f" (and {len(absent) - 1} more of {len(records)})" if len(absent) > 1 else ""
        raise DataError(f"{path}: lists the image {absent[0].path.name}, which is absent from {images}{more}")
