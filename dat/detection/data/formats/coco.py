"""COCO's JSON format: one file of annotations and a folder of images for each split."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dat.detection.data.box_checks import check_form
from dat.detection.data.image_names import find_files
from dat.detection.data.objects import Object, image_sizes, is_box, is_number, make_record, to_whole
from dat.detection.data.readers import collecting, read_strictly
from dat.detection.data.records import Annotations, Category
from dat.engine.audit import Findings
from dat.utils.errors import DataError, shown
from dat.utils.files import read_json


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


def parse_coco(path: Path, images: Path | None, problems: Findings) -> Annotations:
    """Parses the annotations that can be read, and adds all problems to `problems`.

    `images`: the folder of the images; None: the one near the file that has the first of them.
    """
    data: dict[str, Any] = {}
    with collecting(problems, "annotation file"):
        data = _read_json(path)
    if not data:
        return Annotations(path, (), ())
    categories, roots = _categories(path, data, problems)
    entries = _images(path, data, problems)
    names = [image.file_name for image in entries.values()]
    files = find_files(images or _folder_near(path, names[0] if names else ""), names, problems, path)
    sizes = _sizes(entries, files, problems)
    objects = _objects(path, data, categories, sizes, problems)
    check_form(path, ((size, objects[image_id]) for image_id, size in sizes.items()), problems)
    records = [
        # The size of an absent file does not matter, as it stops training.
        make_record(image_id, file, sizes.get(image_id, (1, 1)), objects.get(image_id, ()), problems, name)
        for image_id, file, name in zip(entries, files, names, strict=True)
        if image_id in sizes or not os.path.isfile(file)
    ]
    return Annotations(path, categories, tuple(records), annotated="annotations" in data, roots=roots)


def _folder_near(file: Path, name: str) -> Path:
    """The folder near an annotation file that holds the image `name`."""
    tag = re.sub(r"^(instances|image_info|person_keypoints)_", "", file.stem).replace("-dev", "")
    above = [file.parent.parent] if file.parent.name.lower() in ("annotations", "labels") else []
    folders = [
        folder
        for base in (file.parent, *above)
        for folder in (base / "images" / tag, base / tag, base / "images", base / "data", base)
        if folder.is_dir()
    ]
    return next((folder for folder in folders if os.path.isfile(folder / name)), folders[0])


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
        value: Any = to_whole(entry[key]) if kind is int else entry[key]
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
        if not category.name.strip():
            text = f"{path}: the category with id {category.id} has the name {category.name!r}; it should have one"
            problems.add("category without a name", text, stops=True)
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
    """An entry of 'images'; `size` is (width, height), None: the file gives it."""

    file_name: str
    size: tuple[int, int] | None


def _images(path: Path, data: dict[str, Any], problems: Findings) -> dict[int, _Image]:
    """Entries by image id."""
    found: dict[int, _Image] = {}
    for i, entry in enumerate(data["images"]):
        with collecting(problems, "malformed image entry"):
            where = f"images[{i}]"
            image_id, file_name = _get(path, entry, where, id=int, file_name=str)
            size = None
            # pycocotools needs no sizes, so that some tools leave them out.
            if entry.get("width") is not None or entry.get("height") is not None:
                width, height = _get(path, entry, where, width=int, height=int)
                for key, value in (("width", width), ("height", height)):
                    if not 1 <= value < 2**31:
                        should = "at least 1" if value < 1 else "below 2**31"
                        raise DataError(f"{path}: {where} has '{key}' {value}; it should be {should}")
                size = (width, height)
            if image_id in found:
                text = f"{path}: image id {image_id} is used more than once"
                problems.add("image id used twice", text, stops=True)
            found.setdefault(image_id, _Image(file_name, size))
    if not data["images"]:
        text = f"{path}: 'images' is empty; it should list at least one image"
        problems.add("malformed image entry", text, stops=True)
    return found


def _sizes(images: dict[int, _Image], files: Sequence[Path], problems: Findings) -> dict[int, tuple[int, int]]:
    """(width, height) by image id; an image whose entry has none, and whose file cannot be read, is left out."""
    bare = {i: file for i, file in zip(images, files, strict=True) if not images[i].size and os.path.isfile(file)}
    found = dict(zip(bare, image_sizes([*bare.values()], problems), strict=True))
    sizes = {image_id: image.size or found.get(image_id) for image_id, image in images.items()}
    return {image_id: size for image_id, size in sizes.items() if size}


def _objects(
    path: Path, data: dict[str, Any], categories: tuple[Category, ...], images: Collection[int], problems: Findings
) -> dict[int, list[Object]]:
    """The objects of each of `images`, by image id."""
    label_of = {category.id: label for label, category in enumerate(categories)}
    found: dict[int, list[Object]] = {image_id: [] for image_id in images}
    # Images that cannot be read are problems already, and their objects are not further ones.
    unread = {_id(entry, "id") for entry in data["images"]} - {None, *images}
    for i, entry in enumerate(data.get("annotations", ())):
        if _id(entry, "image_id") in unread:
            continue
        with collecting(problems, "malformed annotation"):
            where = f"annotations[{i}]"
            image_id, category_id, (x, y, w, h) = _ids_and_bbox(path, entry, where, label_of, images)
            crowd, area = _crowd_and_area(path, entry, where)
            found[image_id].append(Object((x, y, x + w, y + h), label_of[category_id], where, crowd, area))
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
    crowd, area = to_whole(entry.get("iscrowd")), entry.get("area")
    crowd = 0 if crowd is None else crowd
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise DataError(f"{path}: {where} has 'iscrowd' {shown(crowd)}; it should be 0 or 1")
    if area is not None and not (is_number(area) and 0 <= area < math.inf):
        raise DataError(f"{path}: {where} has 'area' {shown(area)}; it should be a number of at least 0")
    return bool(crowd), area
