"""LabelMe's JSON, which AnyLabeling and X-AnyLabeling write too: one file for each image, which lists its shapes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dat.detection.data.box_checks import check_form
from dat.detection.data.image_names import ImagesByStem
from dat.detection.data.objects import (
    LARGEST_FILE,
    Object,
    image_sizes,
    is_number,
    lists_shapes,
    make_categories,
    make_record,
    read_text,
)
from dat.detection.data.readers import Found, Split, collecting, existing, register_reader
from dat.detection.data.records import Annotations
from dat.engine.audit import Findings
from dat.utils.errors import DataError, shown
from dat.utils.files import SPLIT_NAMES, list_files, path_order, read_json

# Shapes whose points span their boxes; a mask has the corners of its own.
_SPANNED = ("rectangle", "polygon", "rotation", "mask")
# LabelMe's names for pixels of no class.
_NO_CLASS = ("__ignore__", "_background_")


def find(path: Path) -> Found | None:
    """The folders of the splits, or the one folder of all files."""
    if not path.is_dir():
        return None
    folders = {split: existing(path, *names) for split, names in SPLIT_NAMES.items()}
    splits = {split: _split(folder, path) for split, folder in folders.items() if folder and _is_labelme(folder)}
    if "train" in splits:
        return Found("LabelMe", splits)
    folder = next((folder for folder in (path, path / "annotations", path / "labels") if _is_labelme(folder)), None)
    return Found("LabelMe", {"train": _split(folder, path)}) if folder else None


def _is_labelme(folder: Path) -> bool:
    """Whether one of the first files of JSON in a folder, not below it, lists shapes."""
    return any(map(lists_shapes, islice(sorted(folder.glob("[!.]*.json")), 10)))


def _split(folder: Path, root: Path) -> Split:
    return Split(f"{folder.relative_to(root).as_posix()}/", partial(_read, folder, root))


def _read(folder: Path, root: Path, problems: Findings, images: Path | None) -> Annotations:
    if images is None:
        images = (existing(root, "images") or root) if folder.name in ("annotations", "labels") else folder
    files = [Path(file) for file in list_files(root) if file.endswith(".json")]
    index = ImagesByStem(images)
    found: list[tuple[Path, Path, dict[str, Any]]] = []
    names: set[str] = set()
    for file in sorted(files, key=path_order):
        # Files of other splits count for the classes only, and are named when their split is read.
        inside = folder in file.parents
        with collecting(problems if inside else Findings(), "annotation file"):
            content = _load(file)
            names |= {shape["label"].strip() for shape in content["shapes"]}
            if inside:
                found.append((index.find(file.relative_to(folder), content["imagePath"]), file, content))
    found.sort(key=lambda item: path_order(item[0]))
    categories = make_categories(_class_names(root, names), folder)
    label_of = {category.name: label for label, category in enumerate(categories)}
    records, listed = [], []
    for number, (image, file, content) in enumerate(found, start=1):
        size = content["size"] or image_sizes([image], problems)[0]
        if size is not None:
            objects = list(_objects(content["shapes"], file, label_of, problems))
            records.append(make_record(number, image, size, objects, problems))
            listed.append((size, objects))
    check_form(folder, listed, problems, "LabelMe")
    return Annotations(folder, categories, tuple(records))


def _load(file: Path) -> dict[str, Any]:
    """The shapes, the image's name, and its size or None; not the image itself, which may be in the file too."""
    if file.stat().st_size > LARGEST_FILE:
        raise DataError(f"{file}: is larger than {LARGEST_FILE >> 20} MiB, should be the annotations of one image")
    content = read_json(file)
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise DataError(f"{file}: is not LabelMe: has no list 'shapes'")
    for i, shape in enumerate(shapes):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
            raise DataError(f"{file}: shape {i} has no 'label', should have the name of a class")
    sides = [content.get(key) for key in ("imageWidth", "imageHeight")]
    given = all(isinstance(side, int) and 0 < side < 10**9 for side in sides)
    name = content.get("imagePath")
    return {
        "shapes": shapes,
        "size": tuple(sides) if given else None,
        "imagePath": name if isinstance(name, str) else "",
    }


def _class_names(root: Path, names: set[str]) -> list[str]:
    """Names in the order of labels.txt; without it in alphabetical order."""
    names -= set(_NO_CLASS)
    file = existing(root, "labels.txt")
    if file is None:
        return sorted(names)
    lines = [line.strip() for line in read_text(file, "a class name on each line").splitlines()]
    return [line for line in lines if line and line not in _NO_CLASS]


def _objects(
    shapes: Sequence[dict[str, Any]], file: Path, label_of: Mapping[str, int], problems: Findings
) -> Iterator[Object]:
    """The objects of an image. Shapes of one class and group are parts of one, as in LabelMe's own labelme2coco."""
    parts: dict[Any, list[tuple[float, float]]] = {}
    first: dict[Any, tuple[int, str]] = {}
    crowds = set()
    for i, shape in enumerate(shapes):
        label, kind, group = shape["label"].strip(), shape.get("shape_type", "polygon"), shape.get("group_id")
        if label in _NO_CLASS:
            continue
        if kind not in (*_SPANNED, "circle"):
            problems.add("shape that is no box or polygon, left out", f"{file.name}: shape {i} is a {shown(kind)}")
            continue
        with collecting(problems, "malformed annotation"):
            if label not in label_of:
                known = ", ".join(list(label_of)[:10])
                raise DataError(f"{file}: the label of shape {i} is {label!r}, should be one of {known}")
            points = _points(shape.get("points"), kind, f"{file}: shape {i}")
            key = (label, group) if isinstance(group, int) else i
            parts.setdefault(key, []).extend(points)
            first.setdefault(key, (label_of[label], f"{file.name}: shape {i}"))
            if shape.get("difficult") is True:
                crowds.add(key)
    for key, points in parts.items():
        xs, ys = zip(*points, strict=True)
        label, where = first[key]
        yield Object((min(xs), min(ys), max(xs), max(ys)), label, where, key in crowds)


def _points(points: Any, kind: str, where: str) -> list[tuple[float, float]]:
    """Points that span a shape's box; those of a circle are its centre and one at its edge."""
    known = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    if not known or len(points) < 2 or not all(is_number(value) for point in points for value in point):
        raise DataError(f"{where}: points are {shown(points)}, should be a list of two or more [x, y]")
    if kind != "circle":
        return [(x, y) for x, y in points]
    (x, y), (x1, y1) = points[:2]
    radius = math.hypot(x1 - x, y1 - y)
    return [(x - radius, y - radius), (x + radius, y + radius)]


register_reader("labelme", find, "LabelMe's JSON files beside images, or in train/ and valid/")
