"""CVAT's own XML, "CVAT for images 1.1": one annotations.xml, and images/."""

import math
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dat.detection.data.box_checks import check_form
from dat.detection.data.image_names import find_files
from dat.detection.data.objects import Object, make_categories, make_record, parse_side
from dat.detection.data.readers import Found, Split, collecting, existing, register_reader
from dat.detection.data.records import Annotations
from dat.engine.audit import Findings
from dat.utils.errors import DataError, shown
from dat.utils.files import SPLIT_NAMES
from dat.utils.safe_xml import Node, read_xml

# The file has the annotations of all images.
_LARGEST = 1024 * 2**20
_SUBSET = re.compile(rb'<image\s[^>]*\bsubset="([^"]*)"')
_SUBSETS = SPLIT_NAMES | {"train": (*SPLIT_NAMES["train"], "default", "")}


def find(path: Path) -> Found | None:
    """The subsets of a folder or of its XML file; one split where the images have no subsets of these names."""
    file = path if path.suffix == ".xml" else existing(path, "annotations.xml")
    if file is None or not file.is_file() or b"<annotations>" not in _head(file):
        return None
    # Parsing the whole file would take as long as reading the split.
    subsets = {name.decode(errors="replace").lower() for name in _SUBSET.findall(file.read_bytes())}
    splits = {split: names for split, names in _SUBSETS.items() if subsets & set(names)}
    if len(splits) < 2:
        return Found("CVAT XML", {"train": Split(file.name, partial(_read, file, None))})
    reads = {split: partial(_read, file, names) for split, names in splits.items()}
    return Found("CVAT XML", {split: Split(f"{file.name} subset {split}", read) for split, read in reads.items()})


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096)


def _read(file: Path, subsets: tuple[str, ...] | None, problems: Findings, images: Path | None) -> Annotations:
    root = read_xml(file, _LARGEST)
    # Parts of skeletons are labels too, which belong to another.
    labels = [label for label in root.iter("label") if label.find("parent") is None]
    names = [label.findtext("name", "").strip() for label in labels]
    if not names:
        names = sorted({shape.get("label", "") for image in root.iter("image") for shape in image} - {""})
    categories = make_categories(list(dict.fromkeys(names)), file)
    label_of = {category.name: label for label, category in enumerate(categories)}
    folder = images or existing(file.parent, "images") or file.parent
    entries: list[tuple[str, tuple[int, int], Node]] = []
    for entry in root.iter("image"):
        assert isinstance(entry, Node)
        subset = entry.get("subset", "")
        if subsets is not None and subset.lower() not in subsets:
            continue
        with collecting(problems, "malformed image entry"):
            name, width, height = (entry.get(key, "") for key in ("name", "width", "height"))
            if not (name and parse_side(width) and parse_side(height)):
                text = f"name {shown(name)}, width {shown(width)}, height {shown(height)}"
                raise DataError(
                    f"{file}:{entry.line}: image has {text}, should have a name and sides of at least 1 pixel"
                )
            name = f"{subset}/{name}" if subset and os.path.isdir(folder / subset) else name
            entries.append((name, (int(width), int(height)), entry))
    paths = find_files(folder, [name for name, *_ in entries], problems, file)
    listed = [(size, list(_objects(entry, file, label_of, problems))) for _, size, entry in entries]
    records = [
        make_record(number, path, size, objects, problems)
        for number, (path, (size, objects)) in enumerate(zip(paths, listed, strict=True), start=1)
    ]
    check_form(file, listed, problems, "CVAT XML")
    return Annotations(file, categories, tuple(records))


def _objects(image: Node, file: Path, label_of: dict[str, int], problems: Findings) -> Iterator[Object]:
    for shape in image:
        assert isinstance(shape, Node)
        # Tags belong to the whole image.
        if shape.tag == "tag":
            continue
        if shape.tag not in ("box", "polygon"):
            problems.add("shape that is no box or polygon, left out", f"{file.name}:{shape.line}: {shape.tag}")
            continue
        with collecting(problems, "malformed annotation"):
            where = f"{file}:{shape.line}"
            label = shape.get("label", "")
            if label not in label_of:
                raise DataError(f"{where}: label is {label!r}, should be one of {', '.join(list(label_of)[:10])}")
            points = _box(shape, where) if shape.tag == "box" else _polygon(shape, where)
            xs, ys = zip(*points, strict=True)
            yield Object((min(xs), min(ys), max(xs), max(ys)), label_of[label], f"{file.name}:{shape.line}")


def _box(shape: Node, where: str) -> list[tuple[float, float]]:
    """The corners of a box, which may be rotated about its centre by `rotation` degrees."""
    values = [shape.get(key, "") for key in ("xtl", "ytl", "xbr", "ybr")]
    try:
        x0, y0, x1, y1 = map(float, values)
        angle = math.radians(float(shape.get("rotation", 0)))
    except ValueError:
        raise DataError(f"{where}: box is {values}, should be numbers xtl, ytl, xbr, ybr") from None
    if not angle:
        return [(x0, y0), (x1, y1)]
    x, y, cos, sin = (x0 + x1) / 2, (y0 + y1) / 2, math.cos(angle), math.sin(angle)
    corners = [(px - x, py - y) for px in (x0, x1) for py in (y0, y1)]
    return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in corners]


def _polygon(shape: Node, where: str) -> list[tuple[float, float]]:
    text = shape.get("points", "")
    try:
        points = [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split(";"))]
    except ValueError:
        raise DataError(f"{where}: points are {text[:100]!r}, should be x,y;x,y;...") from None
    return points


register_reader("cvat", find, "annotations.xml of CVAT for images, and images/")
