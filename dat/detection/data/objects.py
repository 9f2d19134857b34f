"""Parts that several formats need: records of objects, names of images, and sizes of image files."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dat.detection.data.box_checks import CLIPPED, EMPTY, OUTSIDE
from dat.detection.data.image_names import broken_link
from dat.detection.data.records import Annotations, Category, ImageRecord
from dat.engine.audit import Findings
from dat.utils.errors import DataError, one_line, shown
from dat.utils.images import UNREADABLE, upright_size

# Annotations of one image, or a list of images, are no larger than this many bytes.
LARGEST_FILE = 64 * 2**20

# Classes without names are fewer than these.
MOST_CLASSES = 100_000

# Below the largest float32.
_LARGEST = 1e38


class Object(NamedTuple):
    """An object of an image: `box` (x0, y0, x1, y1) in pixels; `where` names its line in messages."""

    box: tuple[float, float, float, float]
    label: int
    where: str
    crowd: bool = False
    area: float | None = None


def make_record(
    image_id: int,
    path: Path,
    size: tuple[int, int],
    objects: Iterable[Object],
    problems: Findings,
    file_name: str = "",
) -> ImageRecord:
    """The record of an image of `size` (width, height); boxes are clipped to it, and empty ones dropped."""
    width, height = size
    kept: list[tuple[tuple[float, float, float, float], Object]] = []
    for entry in objects:
        x0, y0, x1, y1 = entry.box
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
        # The negation also finds NaN.
        if not (box[2] > box[0] and box[3] > box[1]):
            empty = not (x1 > x0 and y1 > y0) or not all(map(math.isfinite, entry.box))
            kind = EMPTY if empty else OUTSIDE
        else:
            # Less than half a pixel is rounding.
            kind = CLIPPED if max(box[0] - x0, box[1] - y0, x1 - box[2], y1 - box[3]) > 0.5 else ""
            kept.append((box, entry))
        if kind:
            problems.add(kind, f"{entry.where}: {x0:g} {y0:g} {x1:g} {y1:g} in {path.name}, {width}x{height}")
    areas = [(x1 - x0) * (y1 - y0) if o.area is None else o.area for (x0, y0, x1, y1), o in kept]
    return ImageRecord(
        image_id,
        path,
        width,
        height,
        np.array([box for box, _ in kept], dtype=np.float32).reshape(-1, 4),
        np.array([entry.label for _, entry in kept], dtype=np.int64),
        np.array([entry.crowd for _, entry in kept], dtype=bool),
        np.array(areas, dtype=np.float32),
        file_name,
    )


def make_categories(names: Sequence[str], where: Path) -> tuple[Category, ...]:
    """Classes with the ids 0, 1, 2, ... Raises DataError for a name that is empty or used twice, or for none at all."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        fault = f"class {twice[0]!r} is listed more than once" if twice else "names no classes, should name one or more"
        raise DataError(f"{where}: {fault}")
    for i, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{where}: class {i} has the name {name!r}, should have one")
    return tuple(Category(i, name) for i, name in enumerate(names))


def check_repeats(found: Annotations, problems: Findings) -> None:
    """Adds to `problems` the equal objects of an image, and the entries of one image that differ in their objects."""
    counts = Counter(record.path for record in found.records)
    first: dict[Path, Counter[Any]] = {}
    for record in found.records:
        objects = Counter(zip(record.labels.tolist(), map(tuple, record.boxes.tolist()), strict=True))
        if len(objects) < len(record.labels):
            for (label, box), count in objects.items():
                if count > 1:
                    text = f"{found.categories[label].name} {box} in {record.path.name}"
                    problems.add("same annotation twice", text)
        # An image that is listed again with the same objects only counts for more.
        if counts[record.path] > 1 and first.setdefault(record.path, objects) != objects:
            problems.add("image listed again with other objects, each time without the others", record.path.name)


def parse_side(text: str) -> int:
    """The width or height of an image that an attribute gives; 0: it is no whole number of 1 to 9 digits."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def number_classes(largest: int, where: Path) -> list[str]:
    """Numbers up to `largest` as the names of classes. Raises DataError for more than MOST_CLASSES."""
    if largest >= MOST_CLASSES:
        raise DataError(f"{where}: has class {shown(largest)} without a name, should be below {MOST_CLASSES}")
    return [str(i) for i in range(largest + 1)]


def image_sizes(paths: Sequence[Path], problems: Findings) -> list[tuple[int, int] | None]:
    """(width, height) of image files as viewers and annotation tools show them; None and a problem: unreadable."""
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_image_size, paths))
    for path, size in zip(paths, found, strict=True):
        if isinstance(size, str):
            kind = "unreadable image file" if os.path.isfile(path) else "missing image file"
            problems.add(kind, f"{path}: {size}", stops=True)
    return [None if isinstance(size, str) else size for size in found]


def _image_size(path: Path) -> tuple[int, int] | str:
    try:
        return upright_size(path)
    except FileNotFoundError:
        return broken_link(path) or "no such image"
    except UNREADABLE as error:
        return f"cannot be read as an image: {one_line(error)}"


def relative_names(annotations: Annotations) -> list[Path]:
    """Paths of the images below the folder that holds them all."""
    paths = [record.path for record in annotations.records]
    base = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [path.relative_to(base) for path in paths]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that fits float32 or int64; NaN and infinity, which Python reads, do too."""
    if isinstance(value, float):
        return abs(value) < _LARGEST or not math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_box(value: Any) -> bool:
    """Whether a value of JSON is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def to_whole(value: Any) -> Any:
    """The integer that a float stands for, as pandas writes integers where a column lacks some; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_text(path: Path, what: str) -> str:
    """The text of a small file. Raises DataError where it is not UTF-8, or absurdly large."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataError(f"{path}: is larger than {LARGEST_FILE >> 20} MiB, should be {what}")
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{path}: no such file, should be {what}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8, should be {what}") from error


def lists_shapes(file: Path) -> bool:
    """Whether a file of JSON is one of LabelMe, with a list of shapes; COCO's have one of images."""
    try:
        # The image itself, if the file has it, may come first.
        if not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return False
        with file.open("rb") as opened:
            content = opened.read(4096)
            if re.search(rb'"(flags|imageData|imagePath)"\s*:', content):
                content += opened.read()
    except OSError:
        return False
    return bool(re.search(rb'"shapes"\s*:\s*\[', content)) and not re.search(rb'"images"\s*:\s*\[', content)


def same_labels(annotations: Annotations) -> None:
    """Raises DataError where two images would have the same label file, as their names differ in the suffix only."""
    seen: dict[Path, Path] = {}
    for name in relative_names(annotations):
        other = seen.setdefault(name.with_suffix(""), name)
        if other is not name:
            raise DataError(
                f"{annotations.path}: lists {other} and {name}, whose labels would be one file; "
                "the names of images should differ without their suffixes"
            )


def lost_areas(splits: Mapping[str, Annotations]) -> list[str]:
    """A line for formats without areas, if some are not those of the boxes, by which COCO's APs, APm and APl go."""
    count = 0
    for record in (record for annotations in splits.values() for record in annotations.records):
        areas = (record.boxes[:, 2:].astype(float) - record.boxes[:, :2]).prod(1)
        count += int((abs(areas - record.areas) > 1e-3 * areas).sum())
    return [f"{count} areas become those of the boxes"] if count else []
