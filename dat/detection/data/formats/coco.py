"""COCO's JSON format: one file of annotations and a folder of images for each split."""

import math
from collections import Counter
from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dat.detection.data.box_checks import CLIPPED, EMPTY, OUTSIDE, check_bboxes
from dat.detection.data.image_names import find_files
from dat.detection.data.readers import collecting, read_strictly
from dat.detection.data.records import Annotations, Category, ImageRecord
from dat.engine.audit import Findings
from dat.utils.errors import DataError, shown
from dat.utils.files import read_json

# Below the largest float32.
_LARGEST = 1e38


def read_coco(path: Path, images: Path, categories: tuple[Category, ...] | None = None) -> Annotations:
    """Reads and checks the annotation file `path`, whose images are in the folder `images`; see read_dataset.

    Boxes are clipped to their images; empty ones are dropped. `warning` of the result counts them.
    """
    return read_strictly(partial(parse_coco, path, images), categories)


def read_categories(path: Path) -> tuple[Category, ...]:
    """Reads only the categories of an annotation file, sorted by id. Raises DataError as read_coco does."""
    return read_strictly(
        lambda problems: Annotations(path, _categories(path, _read_json(path), problems)[0], ())
    ).categories


def parse_coco(path: Path, images: Path, problems: Findings) -> Annotations:
    """Parses the annotations that can be read, and adds all problems to `problems`."""
    data: dict[str, Any] = {}
    with collecting(problems, "annotation file"):
        data = _read_json(path)
    if not data:
        return Annotations(path, (), ())
    categories, roots = _categories(path, data, problems)
    entries = _images(path, data, problems)
    objects = _objects(path, data, categories, entries, problems)
    names = [image.file_name for image in entries.values()]
    files = find_files(images, names, problems, path)
    records = [
        ImageRecord(image_id, file, image.width, image.height, *_arrays(objects[image_id]), file_name=image.file_name)
        for (image_id, image), file in zip(entries.items(), files, strict=True)
    ]
    return Annotations(path, categories, tuple(records), annotated="annotations" in data, roots=roots)


def clip_box(bbox: Sequence[float], width: int, height: int) -> tuple[tuple[float, float, float, float] | None, bool]:
    """A bbox (x, y, w, h) in an image of width x height pixels as (x0, y0, x1, y1), and whether it reached outside.

    None where nothing of it is left, or it was empty or not a number.
    """
    x, y, w, h = bbox
    box = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
    # The negation also drops NaN.
    if not (w > 0 and h > 0 and box[2] > box[0] and box[3] > box[1]):
        return None, False
    # Less than half a pixel is rounding.
    return box, max(box[0] - x, box[1] - y, x + w - box[2], y + h - box[3]) > 0.5


def _read_json(path: Path) -> dict[str, Any]:
    """The contents of an annotation file. Raises DataError unless 'images', 'annotations', 'categories' are lists.

    'annotations' may be absent, as in COCO's image_info_test2017.json.
    """
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such annotation file") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: is not COCO: holds a {type(data).__name__}, it should be an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list) and (key in data or key != "annotations"):
            problem = "is not a list" if key in data else "is absent"
            raise DataError(f"{path}: is not COCO: '{key}' {problem}")
    return data


def _get(path: Path, entry: Any, where: str, **kinds: type) -> list[Any]:
    """The values of these keys of an entry. Raises DataError for one that is absent or of another type."""
    values = []
    for key, kind in kinds.items():
        if not isinstance(entry, dict) or key not in entry:
            raise DataError(f"{path}: is not COCO: {where} has no '{key}'")
        value: Any = entry[key]
        # pandas writes integers so, where a column lacks some.
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        known = isinstance(value, kind) and not isinstance(value, bool)
        if not known:
            name = {str: "a string", list: "a list", int: "an integer"}[kind]
            raise DataError(f"{path}: is not COCO: {where} has '{key}' {shown(value)}; it should be {name}")
        # Python's integers have no limit.
        if kind is int and abs(value) >= 2**63:
            raise DataError(f"{path}: {where} has '{key}' {shown(value)}; it should be below 2**63")
        values.append(value)
    return values


def _categories(
    path: Path, data: dict[str, Any], problems: Findings
) -> tuple[tuple[Category, ...], tuple[Category, ...]]:
    """The classes, and the supercategories without objects, both sorted by id."""
    listed: list[tuple[Category, Any]] = []
    for i, entry in enumerate(data["categories"]):
        with collecting(problems, "malformed category"):
            category = Category(*_get(path, entry, f"categories[{i}]", id=int, name=str))
            listed.append((category, entry.get("supercategory")))
    roots = _roots(data, listed)
    found: dict[int, Category] = {}
    for category, _ in listed:
        if category in roots:
            continue
        for key in ("id", "name"):
            value = getattr(category, key)
            if value in [getattr(other, key) for other in found.values()]:
                text = f"{path}: category {key} {value!r} is used more than once"
                problems.add(f"category {key} used twice", text, stops=True)
        found.setdefault(category.id, category)
    if not found:
        text = f"{path}: 'categories' is empty; it should list at least one category"
        problems.add("malformed category", text, stops=True)
    return tuple(found[category_id] for category_id in sorted(found)), tuple(sorted(roots, key=lambda c: c.id))


def _roots(data: dict[str, Any], listed: list[tuple[Category, Any]]) -> set[Category]:
    """Categories without objects whose name is another's supercategory; none if there are no others.

    Roboflow lists the name of the project so, with the id 0.
    """
    ids = [entry.get("category_id") for entry in data.get("annotations", ()) if isinstance(entry, dict)]
    used = {category_id for category_id in ids if isinstance(category_id, int)}
    members = Counter(parent for _, parent in listed if isinstance(parent, str))
    # A category may be its own supercategory, as COCO's person.
    roots = {
        category
        for category, parent in listed
        if category.id not in used and members[category.name] > (parent == category.name)
    }
    return roots if len(roots) < len({category for category, _ in listed}) else set()


class _Image(NamedTuple):
    file_name: str
    width: int
    height: int


def _images(path: Path, data: dict[str, Any], problems: Findings) -> dict[int, _Image]:
    """Entries by image id."""
    found: dict[int, _Image] = {}
    for i, entry in enumerate(data["images"]):
        with collecting(problems, "malformed image entry"):
            image_id, *values = _get(path, entry, f"images[{i}]", id=int, file_name=str, width=int, height=int)
            image = _Image(*values)
            for key in ("width", "height"):
                value = getattr(image, key)
                if not 1 <= value < 2**31:
                    should = "at least 1" if value < 1 else "below 2**31"
                    raise DataError(f"{path}: images[{i}] has '{key}' {value}; it should be {should}")
            if image_id in found:
                text = f"{path}: image id {image_id} is used more than once"
                problems.add("image id used twice", text, stops=True)
            found.setdefault(image_id, image)
    if not data["images"]:
        text = f"{path}: 'images' is empty; it should list at least one image"
        problems.add("malformed image entry", text, stops=True)
    return found


def _objects(
    path: Path,
    data: dict[str, Any],
    categories: tuple[Category, ...],
    images: dict[int, _Image],
    problems: Findings,
) -> dict[int, list[tuple[Any, ...]]]:
    """For each image id: box (x0, y0, x1, y1), label, crowd flag and area of its objects."""
    label_of = {category.id: label for label, category in enumerate(categories)}
    found: dict[int, list[tuple[Any, ...]]] = {image_id: [] for image_id in images}
    bboxes, sizes = [], []
    # Entries that cannot be read are problems already, and their objects are not further ones.
    unread = {_id(entry, "id") for entry in data["images"]} - {None, *images}
    for i, entry in enumerate(data.get("annotations", ())):
        if _id(entry, "image_id") in unread:
            continue
        with collecting(problems, "malformed annotation"):
            where = f"annotations[{i}]"
            image_id, category_id, bbox = _ids_and_bbox(path, entry, where, label_of, images)
            crowd, area = _crowd_and_area(path, entry, where)
            image = images[image_id]
            bboxes.append(bbox)
            sizes.append((image.width, image.height))
            box, outside = clip_box(bbox, *sizes[-1])
            text = f"{where}: {bbox} in {image.file_name}, {image.width}x{image.height}"
            if box is None:
                empty = not (bbox[2] > 0 and bbox[3] > 0) or not all(map(math.isfinite, bbox))
                problems.add(EMPTY if empty else OUTSIDE, text)
                continue
            if outside:
                problems.add(CLIPPED, text)
            area = (box[2] - box[0]) * (box[3] - box[1]) if area is None else area
            found[image_id].append((box, label_of[category_id], crowd, area))
    check_bboxes(path, np.array(bboxes, dtype=np.float64).reshape(-1, 4), np.array(sizes).reshape(-1, 2), problems)
    return found


def _id(entry: Any, key: str) -> Any:
    """A value that may be an id; None for others."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, (int, float, str)) else None


def _ids_and_bbox(
    path: Path, entry: Any, where: str, categories: Container[int], images: Container[int]
) -> tuple[int, int, list[float]]:
    """Image id, category id and bbox of an annotation; both ids should be known. Raises DataError."""
    image_id, category_id, bbox = _get(path, entry, where, image_id=int, category_id=int, bbox=list)
    if image_id not in images:
        raise DataError(f"{path}: {where} has 'image_id' {image_id}, which 'images' does not list")
    if category_id not in categories:
        raise DataError(f"{path}: {where} has 'category_id' {category_id}, which 'categories' does not list")
    if not is_box(bbox):
        raise DataError(f"{path}: {where} has 'bbox' {shown(bbox)}; it should be four numbers, x, y, width, height")
    return image_id, category_id, bbox


def _crowd_and_area(path: Path, entry: dict[str, Any], where: str) -> tuple[bool, float | None]:
    """iscrowd, False where it is absent or null, and the area in pixels or None likewise. Raises DataError."""
    crowd, area = entry.get("iscrowd"), entry.get("area")
    crowd = 0 if crowd is None else crowd
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise DataError(f"{path}: {where} has 'iscrowd' {shown(crowd)}; it should be 0 or 1")
    if area is not None and not (is_number(area) and 0 <= area < math.inf):
        raise DataError(f"{path}: {where} has 'area' {shown(area)}; it should be a number of at least 0")
    return bool(crowd), area


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that fits float32 or int64; NaN and infinity, which Python reads, do too."""
    if isinstance(value, float):
        return abs(value) < _LARGEST or not math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_box(value: Any) -> bool:
    """Whether a value of JSON is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _arrays(objects: list[tuple[Any, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [n, 4], labels, crowd and areas [n] of an image."""
    boxes, labels, crowd, areas = zip(*objects, strict=True) if objects else ((),) * 4
    return (
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(crowd, dtype=bool),
        np.array(areas, dtype=np.float32),
    )
