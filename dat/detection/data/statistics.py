"""All that is wrong with a COCO annotation file and its images, where read_coco stops at the first problem."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dat.detection.data.coco import (
    Category,
    clip_box,
    load_image,
    parse_annotation,
    parse_category,
    parse_crowd_and_area,
    parse_image,
    read_json,
)
from dat.engine.audit import Findings
from dat.utils.errors import DataError


@dataclass
class Survey(Findings):
    """What a split holds. `boxes` [n, 4] float64 are (x, y, w, h) in pixels, clipped to their image; crowds included.

    `image_of` and `category_of` give the image and category id of each box, `hashes` the image ids by the digest of
    the file; `files` are those listed, `unlisted` others in the folder of the images.
    """

    path: Path
    categories: list[Category] = field(default_factory=list)
    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    image_of: list[int] = field(default_factory=list)
    category_of: list[int] = field(default_factory=list)
    crowds: int = 0
    hashes: dict[str, list[int]] = field(default_factory=dict)
    files: set[Path] = field(default_factory=set)
    unlisted: set[Path] = field(default_factory=set)

    def add(self, kind: str, example: str, stops: bool = False, count: int = 1) -> None:
        """Counts a problem of a kind; what each message about this file opens with is left out."""
        super().add(kind, example.removeprefix(f"{self.path}: ").removeprefix("is not COCO: "), stops, count)

    def objects(self) -> dict[int, int]:
        """Number of boxes by category id, 0 for categories without."""
        return {category.id: 0 for category in self.categories} | Counter(self.category_of)

    def per_image(self) -> dict[int, int]:
        """Number of boxes by image id, 0 for images without."""
        return dict.fromkeys(self.images, 0) | Counter(self.image_of)


def survey(
    path: Path, folder: Path, progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items
) -> Survey:
    """Reads the annotation file `path` and every image that it lists in `folder`, and collects the problems.

    `progress`: wraps the iteration over the images, whose number it is given.
    """
    found = Survey(path)
    try:
        data = read_json(path)
    except DataError as error:
        found.add("annotation file", str(error), stops=True)
        return found
    _survey_categories(found, data["categories"])
    _survey_images(found, data["images"])
    _survey_annotations(found, data["annotations"])
    if not folder.is_dir():
        found.add("missing image file", f"{folder}: no such folder of images", stops=True, count=len(found.images))
    else:
        _survey_files(found, folder, progress)
    return found


def compare(train: Survey, val: Survey) -> None:
    """Adds to `val` what only the two splits together show: other categories, and images of training.

    What the other split lists is no longer among the unlisted files.
    """
    train.unlisted, val.unlisted = train.unlisted - val.files, val.unlisted - train.files
    if sorted(train.categories, key=lambda c: c.id) != sorted(val.categories, key=lambda c: c.id):
        only = set(train.categories) ^ set(val.categories)
        names = ", ".join(f"{c.id} {c.name}" for c in sorted(only, key=lambda c: c.id)[:5])
        val.add("categories differ from training's", f"in one file only: {names}", stops=True)
    for digest in val.hashes.keys() & train.hashes.keys():
        name = val.images[val.hashes[digest][0]]["file_name"]
        other = train.images[train.hashes[digest][0]]["file_name"]
        val.add("image of training in validation", f"{name} is {other} of training", count=len(val.hashes[digest]))


def _survey_categories(found: Survey, entries: list[Any]) -> None:
    for i, entry in enumerate(entries):
        try:
            category = parse_category(found.path, entry, f"categories[{i}]")
        except DataError as error:
            found.add("malformed category", str(error), stops=True)
            continue
        for key in ("id", "name"):
            if getattr(category, key) in {getattr(other, key) for other in found.categories}:
                found.add(f"category {key} used twice", f"{getattr(category, key)!r}", stops=True)
        if category.id not in {other.id for other in found.categories}:
            found.categories.append(category)
    if not found.categories:
        found.add("malformed category", "'categories' lists no category", stops=True)
    found.categories.sort(key=lambda category: category.id)


def _survey_images(found: Survey, entries: list[Any]) -> None:
    names: Counter[str] = Counter()
    for i, entry in enumerate(entries):
        try:
            image = parse_image(found.path, entry, f"images[{i}]")
        except DataError as error:
            found.add("malformed image entry", str(error), stops=True)
            continue
        if image["id"] in found.images:
            found.add("image id used twice", f"images[{i}] has 'id' {image['id']}", stops=True)
            continue
        found.images[image["id"]] = image
        names[image["file_name"]] += 1
    for name, count in names.items():
        if count > 1:
            found.add("file listed more than once", f"{name}: {count} times")
    if not found.images:
        found.add("malformed image entry", "'images' lists no image", stops=True)


def _survey_annotations(found: Survey, entries: list[Any]) -> None:
    known = {category.id for category in found.categories}
    seen: Counter[tuple[Any, ...]] = Counter()
    boxes = []
    for i, entry in enumerate(entries):
        where = f"annotations[{i}]"
        try:
            image_id, category_id, bbox = parse_annotation(found.path, entry, where, known, found.images)
            crowd, _ = parse_crowd_and_area(found.path, entry, where)
        except DataError as error:
            found.add("malformed annotation", str(error), stops=True)
            continue
        image = found.images[image_id]
        box, outside = clip_box(bbox, image["width"], image["height"])
        text = f"{where}: {bbox} in {image['file_name']}, {image['width']}x{image['height']}"
        if box is None:
            empty = not (bbox[2] > 0 and bbox[3] > 0) or not all(map(math.isfinite, bbox))
            found.add("empty box, dropped" if empty else "box outside its image, dropped", text)
            continue
        if outside:
            found.add("box reaches outside its image, clipped", text)
        key = (image_id, category_id, *bbox)
        seen[key] += 1
        if seen[key] == 2:
            found.add("same annotation twice", text)
        found.crowds += crowd
        boxes.append((box[0], box[1], box[2] - box[0], box[3] - box[1]))
        found.image_of.append(image_id)
        found.category_of.append(category_id)
    found.boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    for category in found.categories:
        if not found.objects()[category.id]:
            found.add("class without objects", f"{category.id} {category.name}")


def _survey_files(found: Survey, folder: Path, progress: Callable[[Iterable[Any], int], Iterable[Any]]) -> None:
    """Reads every image file, on as many threads as there are cores."""

    def check(image: dict[str, Any]) -> tuple[dict[str, Any], str, str, str]:
        """The image, and its digest or what is wrong: the kind of problem and an example."""
        path = folder / image["file_name"]
        if not path.is_file():
            return image, "", "missing image file", f"{path}"
        try:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            load_image(path, (image["width"], image["height"]))
        except (DataError, OSError) as error:
            kind = "image of another size" if "its annotations say" in str(error) else "unreadable image file"
            return image, "", kind, str(error)
        return image, digest, "", ""

    same: dict[str, list[int]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        for image, digest, kind, example in progress(pool.map(check, found.images.values()), len(found.images)):
            if kind:
                found.add(kind, example, stops=True)
            else:
                same[digest].append(image["id"])
    for ids in same.values():
        names = sorted({found.images[image_id]["file_name"] for image_id in ids})
        if len(names) > 1:
            found.add("same picture under two names", ", ".join(names[:3]), count=len(names) - 1)
    found.hashes = dict(same)
    found.files = {folder / image["file_name"] for image in found.images.values()}
    found.unlisted = {path for path in folder.rglob("*") if path.is_file()} - found.files
