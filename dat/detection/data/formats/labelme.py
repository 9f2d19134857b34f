"""LabelMe's JSON, which AnyLabeling and X-AnyLabeling write too: one file for each image, which lists its shapes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

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
from dat.utils.files import SPLIT_NAMES, is_hidden, list_files, path_order, read_json

# Folders of annotations, whose images may be in a folder beside them.
_SEPARATE = ("annotations", "labels", "json")
# Shapes whose points span their boxes; a mask has the corners of its own.
_SPANNED = ("rectangle", "polygon", "rotation", "mask")
# LabelMe's names for pixels of no class.
_NO_CLASS = ("__ignore__", "_background_")
_LONGEST_LABEL, _LONGEST_PATH = 200, 4096


class _Image(NamedTuple):
    """An image as its file describes it: its name or "", its `size` (width, height) or None, and its shapes."""

    name: str
    size: tuple[int, int] | None
    shapes: list[dict[str, Any]]


def find(path: Path) -> Found | None:
    """The folders of the splits, or the one folder of all files."""
    if not path.is_dir():
        return None
    for base in (path, *_inner(path)):
        folders = {split: existing(base, *names) for split, names in SPLIT_NAMES.items()}
        found = {split: _annotations(folder) for split, folder in folders.items() if folder}
        splits = {split: _split(folder, path) for split, folder in found.items() if folder}
        if "train" in splits:
            return Found("LabelMe", splits)
    folder = _annotations(path)
    return Found("LabelMe", {"train": _split(folder, path)}) if folder else None


def _annotations(folder: Path) -> Path | None:
    """The folder of the files of LabelMe: this one or one in it."""
    if not folder.is_dir():
        return None
    for place in (folder, *_inner(folder)):
        if _has_labelme(place, "*"):
            return place
    # Folders of classes, say.
    return folder if _has_labelme(folder, "*/*") else None


def _inner(folder: Path) -> list[Path]:
    """What is in a folder under the names that folders of annotations or images have."""
    return [child for child in sorted(folder.iterdir()) if child.name.lower() in (*_SEPARATE, "images")]


def _has_labelme(folder: Path, pattern: str) -> bool:
    """Whether one of the first files of JSON is LabelMe's."""
    files = (file for file in folder.glob(pattern) if _is_json(file))
    return any(map(lists_shapes, islice(files, 10)))


def _is_json(file: Path) -> bool:
    return file.suffix.lower() == ".json" and not is_hidden(file.name)


def _split(folder: Path, root: Path) -> Split:
    return Split(f"{folder.relative_to(root).as_posix()}/", partial(_read, folder, root))


def _images(folder: Path, root: Path) -> Path:
    """The folder of the images of a folder of annotations: itself, or the one that corresponds to it in images/."""
    parts = folder.relative_to(root).parts
    for i, part in enumerate(parts):
        if part.lower() in _SEPARATE:
            above = root.joinpath(*parts[:i])
            return (existing(above, "images", "Images") or above).joinpath(*parts[i + 1 :])
    return folder


def _read(folder: Path, root: Path, problems: Findings, images: Path | None) -> Annotations:
    index = ImagesByStem(images or _images(folder, root))
    found: list[tuple[Path, Path, _Image]] = []
    labels: set[str] = set()
    for file in sorted(filter(_is_json, map(Path, list_files(root))), key=path_order):
        # Files of other splits count for the classes only, and are named when their split is read.
        own = problems if folder in file.parents else Findings()
        with collecting(own, "annotation file"):
            image = _load(file, own)
            if image is not None:
                labels |= {shape["label"] for shape in image.shapes}
                if own is problems:
                    found.append((index.find(file.relative_to(folder), image.name), file, image))
    found.sort(key=lambda item: path_order(item[0]))
    # After the files: if none can be read, the first says why.
    listing = existing(root, "labels.txt", "classes.txt")
    names = sorted(labels)
    if listing:
        lines = [line.strip() for line in read_text(listing, "a class name on each line").splitlines()]
        names = [line for line in lines if line and line not in _NO_CLASS]
    categories = make_categories(names, listing or folder)
    label_of = {category.name: label for label, category in enumerate(categories)}
    records, listed = [], []
    for number, (path, file, image) in enumerate(found, start=1):
        size = image.size or image_sizes([path], problems)[0]
        if size is not None:
            objects = list(_objects(image.shapes, file, label_of, problems))
            records.append(make_record(number, path, size, objects, problems))
            listed.append((size, objects))
    check_form(folder, listed, problems, "LabelMe")
    return Annotations(folder, categories, tuple(records))


def _load(file: Path, problems: Findings) -> _Image | None:
    """The image that a file describes, with the shapes that have boxes; None: the file is not LabelMe's."""
    if file.stat().st_size > LARGEST_FILE:
        raise DataError(f"{file}: is larger than {LARGEST_FILE >> 20} MiB, should be the annotations of one image")
    content = read_json(file)
    if not isinstance(content, dict) or "shapes" not in content:
        problems.add("JSON that is not LabelMe's, left out", str(file))
        return None
    shapes = content["shapes"]
    if not isinstance(shapes, list):
        raise DataError(f"{file}: shapes is {shown(shapes)}, should be a list")
    kept = []
    for i, shape in enumerate(shapes):
        label = shape.get("label") if isinstance(shape, dict) else None
        if not _is_label(label):
            raise DataError(f"{file}: the label of shape {i} is {shown(label)}, should be the name of a class")
        kind, where = shape.get("shape_type", "polygon"), f"{file.name}: shape {i}"
        if kind not in (*_SPANNED, "circle"):
            problems.add("shape that is no box or polygon, left out", f"{where} is a {shown(kind)}")
        elif label.strip() not in _NO_CLASS:
            kept.append({**shape, "label": label.strip(), "shape_type": kind, "where": where})
    sides = [content.get(key) for key in ("imageWidth", "imageHeight")]
    width, height = (side if type(side) is int and 0 < side < 10**9 else 0 for side in sides)
    name = content.get("imagePath")
    name = name if isinstance(name, str) and len(name) <= _LONGEST_PATH else ""
    return _Image(name, (width, height) if width and height else None, kept)


def _is_label(label: Any) -> TypeGuard[str]:
    return isinstance(label, str) and bool(label.strip()) and len(label) <= _LONGEST_LABEL and label.isprintable()


def _objects(
    shapes: Sequence[dict[str, Any]], file: Path, label_of: Mapping[str, int], problems: Findings
) -> Iterator[Object]:
    """The objects of an image. Shapes of one class and group are parts of one, as in LabelMe's own labelme2coco."""
    parts: dict[Any, tuple[dict[str, Any], list[tuple[float, float]]]] = {}
    for i, shape in enumerate(shapes):
        with collecting(problems, "malformed annotation"):
            label, group, where = shape["label"], shape.get("group_id"), str(file.parent / shape["where"])
            if label not in label_of:
                known = ", ".join(list(label_of)[:10])
                raise DataError(f"{where} has the label {label!r}, should be one of {known}")
            points = _points(shape.get("points"), shape["shape_type"], where)
            key = (label, group) if type(group) is int else i
            if key in parts:
                problems.add("shapes of one class and group_id, made one object", shape["where"])
            parts.setdefault(key, (shape, []))[1].extend(points)
    for shape, points in parts.values():
        xs, ys = zip(*points, strict=True)
        box = (min(xs), min(ys), max(xs), max(ys))
        yield Object(box, label_of[shape["label"]], shape["where"], shape.get("difficult") is True)


def _points(points: Any, kind: str, where: str) -> list[tuple[float, float]]:
    """Points that span a shape's box; those of a circle are its centre and one at its edge."""
    known = isinstance(points, list) and all(isinstance(p, list) and len(p) == 2 for p in points)
    numbers = [value for point in points for value in point] if known else []
    if len(numbers) < 4 or not all(is_number(value) and math.isfinite(value) for value in numbers):
        raise DataError(f"{where}: points are {shown(points)}, should be a list of two or more [x, y]")
    if kind != "circle":
        return [(x, y) for x, y in points]
    (x, y), (x1, y1) = points[:2]
    radius = math.hypot(x1 - x, y1 - y)
    return [(x - radius, y - radius), (x + radius, y + radius)]


register_reader(
    "labelme",
    find,
    "LabelMe's JSON files beside images, also in train/ and valid/, or in labels/ beside images/",
)
