"""Object detection data of the Hugging Face hub, in a local folder: metadata.jsonl beside images, or .parquet files.

Each row has an image and `objects`, {"bbox": [[x, y, width, height], ...], "categories": [...]} in pixels, or a list of
{"bbox": [x, y, width, height], "category": ...}. Classes are names, or numbers whose names are in the features of
README.md or of the .parquet file. Images of .parquet files are extracted once, into the cache of huggingface_hub.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import cached_assets_path

from dat.detection.data.box_checks import check_form
from dat.detection.data.image_names import find_files
from dat.detection.data.objects import (
    Object,
    image_sizes,
    is_box,
    is_number,
    make_categories,
    make_record,
    number_classes,
    read_text,
    to_whole,
)
from dat.detection.data.readers import Found, Split, collecting, register_reader
from dat.detection.data.records import Annotations
from dat.engine.audit import Findings
from dat.utils.errors import ConfigError, DataError, shown
from dat.utils.files import SPLIT_NAMES, is_hidden, parse_json, path_order
from dat.utils.safe_yaml import parse_yaml

_NAMES = SPLIT_NAMES | {"val": (*SPLIT_NAMES["val"], "dev")}
# Box, class, crowd and area of an object.
_Entry = tuple[Any, Any, Any, Any]
_CLASS_KEYS = ("categories", "category", "labels", "label", "category_id")


class _Row(NamedTuple):
    """An image, a path or a name to look for, and its objects; `where` names its line or row in messages."""

    image: Any
    objects: Any
    where: str


def find(path: Path) -> Found | None:
    """The splits of a folder, or of one metadata.jsonl or .parquet file."""
    if path.is_file():
        files = {"train": [path]} if path.suffix in (".jsonl", ".parquet") else {}
        root = path.parent
    else:
        found = {split: _files(path, names) for split, names in _NAMES.items()}
        files, root = {split: some for split, some in found.items() if some}, path
        if not files and (path / "metadata.jsonl").is_file():
            files = {"train": [path / "metadata.jsonl"]}
    files = {split: some for split, some in files.items() if _has_objects(some[0])}
    everything = [file for some in files.values() for file in some]
    splits = {
        split: Split(
            ", ".join(f.relative_to(root).as_posix() for f in some[:2]), partial(_read, root, some, everything)
        )
        for split, some in files.items()
    }
    return Found("Hugging Face", splits)


def _files(root: Path, split_names: Sequence[str]) -> list[Path]:
    for word in split_names:
        for pattern in (f"{word}/metadata.jsonl", f"data/{word}-*.parquet", f"{word}/*.parquet", f"{word}*.parquet"):
            if found := sorted(path for path in root.glob(pattern) if not is_hidden(path.name)):
                return found
    return []


def _has_objects(file: Path) -> bool:
    """Whether a line has objects; .parquet files are opened only when they are read."""
    if file.suffix == ".parquet":
        return True
    with file.open("rb") as opened:
        return any(b'"objects"' in line for line in opened)


def _read(
    root: Path, files: Sequence[Path], everything: Sequence[Path], problems: Findings, images: Path | None
) -> Annotations:
    rows = []
    # The names of the classes come later: without them the fault would be that there are none.
    for row in sorted(_rows(files, problems, images), key=lambda row: path_order(row.image)):
        with collecting(problems, "malformed row"):
            rows.append((row, _entries(row)))
    known = _names_in_readme(root / "README.md") or next(filter(None, map(_names_in_parquet, everything)), None)
    names = known or _names_in_use(everything)
    categories = make_categories(names, files[0])
    numbers = {str(value): label for label, name in enumerate(names) for value in ((name, label) if known else (name,))}
    sizes = image_sizes([row.image for row, _ in rows], problems)
    records, listed = [], []
    for number, ((row, entries), size) in enumerate(zip(rows, sizes, strict=True), start=1):
        if size is not None:
            with collecting(problems, "malformed row"):
                objects = list(_objects(row, entries, numbers))
                records.append(make_record(number, row.image, size, objects, problems))
                listed.append((size, objects))
    check_form(files[0], listed, problems, "Hugging Face")
    return Annotations(files[0], categories, tuple(records))


def _objects(row: _Row, entries: Sequence[_Entry], numbers: dict[str, int]) -> Iterator[Object]:
    for box, name, crowd, area in entries:
        if not is_box(box):
            raise DataError(f"{row.where}: bbox is {shown(box)}, should be four numbers x, y, width, height")
        if isinstance(name, bool) or not isinstance(name, (int, str)) or str(name) not in numbers:
            raise DataError(f"{row.where}: category is {shown(name)}, should be one of {', '.join(list(numbers)[:10])}")
        if crowd not in (None, 0, 1) or not (area is None or (is_number(area) and 0 <= area < math.inf)):
            text = f"iscrowd is {shown(crowd)}, area {shown(area)}"
            raise DataError(f"{row.where}: {text}, should be 0 or 1, and a number of at least 0")
        x, y, w, h = box
        yield Object((x, y, x + w, y + h), numbers[str(name)], row.where, bool(crowd), area)


def _entries(row: _Row) -> list[_Entry]:
    """The objects, from a dictionary of lists or a list of dictionaries. Raises DataError for anything else."""
    # Images without objects may lack the key.
    objects: Any = row.objects or []
    if isinstance(objects, list) and all(isinstance(entry, dict) for entry in objects):
        keys = {key for entry in objects for key in entry}
        objects = {key: [entry.get(key) for entry in objects] for key in keys} or {"bbox": [], "category": []}
    key = next((key for key in _CLASS_KEYS if isinstance(objects, dict) and key in objects), "")
    boxes = objects.get("bbox") if isinstance(objects, dict) else None
    if not key or not isinstance(boxes, list) or not isinstance(objects[key], list) or len(objects[key]) != len(boxes):
        text = f"{row.where}: objects is {shown(row.objects)}"
        raise DataError(f"{text}, should be lists of equal lengths bbox and categories")
    crowds, areas = (objects.get(name) or [None] * len(boxes) for name in ("iscrowd", "area"))
    for name, values in (("iscrowd", crowds), ("area", areas)):
        if not isinstance(values, list) or len(values) != len(boxes):
            raise DataError(f"{row.where}: {name} is {shown(values)}, should be a list as long as bbox")
    return list(zip(boxes, map(to_whole, objects[key]), crowds, areas, strict=True))


def _rows(files: Sequence[Path], problems: Findings, images: Path | None) -> Iterator[_Row]:
    for file in files:
        folder = images or file.parent
        rows = list(_extracted(file) if file.suffix == ".parquet" else _lines(file, problems))
        # Folders of images may be links to other disks; other names are looked for.
        rows = [row._replace(image=folder / row.image) if _is_file(folder, row.image) else row for row in rows]
        paths = iter(find_files(folder, [row.image for row in rows if isinstance(row.image, str)], problems, file))
        for row in rows:
            yield row._replace(image=next(paths)) if isinstance(row.image, str) else row


def _is_file(folder: Path, name: Any) -> bool:
    inside = isinstance(name, str) and "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts
    return inside and os.path.isfile(folder / name)


def _lines(file: Path, problems: Findings) -> Iterator[_Row]:
    with file.open("rb") as opened:
        for number, content in enumerate(opened, start=1):
            line = content.decode("utf-8-sig", errors="replace")
            if not line.strip():
                continue
            with collecting(problems, "malformed line"):
                where = f"{file}:{number}"
                try:
                    row = parse_json(content)
                except ValueError as error:
                    raise DataError(f"{where}: {line.strip()[:100]!r} is not JSON: {error}") from error
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    raise DataError(f"{where}: {line.strip()[:100]!r} should be an object with file_name and objects")
                yield _Row(row["file_name"], row.get("objects"), where)


def _parquet(file: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ConfigError(f"{file}: reading .parquet files needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: cannot be read as .parquet: {' '.join(str(error).split())}") from error


def _extracted(file: Path) -> Iterator[_Row]:
    """The rows of a .parquet file, its images written to files."""
    opened = _parquet(file)
    columns = opened.schema_arrow.names
    if "image" not in columns or "objects" not in columns:
        raise DataError(f"{file}: has the columns {', '.join(columns)}, should have image and objects")
    state = file.stat()
    digest = hashlib.blake2b(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode(), digest_size=16)
    # The name comes first, since images are in the order of their paths.
    subfolder = f"{file.stem}_{digest.hexdigest()}"
    folder = cached_assets_path("dat", namespace="parquet", subfolder=subfolder)
    number = 0
    for batch in opened.iter_batches(batch_size=64, columns=["image", "objects"]):
        for row in batch.to_pylist():
            image, where = row["image"], f"{file}: row {number}"
            if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
                raise DataError(f"{where}: image is {shown(image)}, should have bytes or a path")
            content, name = image.get("bytes") or b"", image.get("path") or ""
            for key, value, kind, should in (("bytes", content, bytes, "those of a file"), ("path", name, str, "text")):
                if not isinstance(value, kind):
                    raise DataError(f"{where}: image.{key} is {shown(value)}, should be {should}")
            # Rows may have the same name; the number keeps the order of the file.
            path = folder / f"{file.stem}_{number:07d}_{Path(name or 'image').name}".replace("\0", "")
            if content and (not os.path.isfile(path) or path.stat().st_size != len(content)):
                # Other processes of torchrun may extract the same file.
                temporary = path.with_name(f"{path.name}.{os.getpid()}")
                temporary.write_bytes(content)
                os.replace(temporary, path)
            yield _Row(path if content else name, row["objects"], where)
            number += 1


def _names_in_use(files: Sequence[Path]) -> list[str]:
    """The classes of all splits, numbers as text: in the order of the numbers, names in alphabetical order."""
    found: set[Any] = set()
    for file in files:
        if file.suffix == ".parquet":
            batches = _parquet(file).iter_batches(columns=["objects"])
            # Splits without annotations may lack the column.
            rows = [_Row(None, row.get("objects"), str(file)) for batch in batches for row in batch.to_pylist()]
        else:
            rows = list(_lines(file, Findings()))
        for row in rows:
            try:
                found |= {
                    name
                    for _, name, _, _ in _entries(row)
                    if isinstance(name, (int, str)) and name is not True and name is not False
                }
            # The row is named when its split is read.
            except DataError:
                continue
    largest = max((name for name in found if isinstance(name, int)), default=-1)
    return number_classes(largest, files[0]) or sorted(name for name in found if isinstance(name, str))


def _names_in_readme(file: Path) -> list[str] | None:
    """The names of the class labels of `objects` in the front matter of a dataset card; None: there are none."""
    text = read_text(file, "a dataset card") if file.is_file() else ""
    front = text.split("---")[1] if text.startswith("---") else ""
    try:
        content = parse_yaml(front, strings=True)
    except ValueError as error:
        raise DataError(f"{file}: its front matter is not valid YAML: {error}") from error
    for entry in _walk(content):
        if entry.get("name") == "objects":
            labels = [inner["class_label"] for inner in _walk(entry) if isinstance(inner.get("class_label"), dict)]
            names = labels[0].get("names") if labels else None
            if isinstance(names, dict):
                names = [names.get(str(i)) for i in range(len(names))]
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return names
    return None


def _names_in_parquet(file: Path) -> list[str] | None:
    if file.suffix != ".parquet":
        return None
    metadata = (_parquet(file).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        content = parse_json(metadata)
    except ValueError:
        return None
    features = [entry["objects"] for entry in _walk(content) if "objects" in entry]
    names = [entry.get("names") for entry in _walk(features) if entry.get("_type") == "ClassLabel"]
    return (
        names[0] if names and isinstance(names[0], list) and all(isinstance(name, str) for name in names[0]) else None
    )


def _walk(content: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in nested lists and dictionaries, each once: YAML's aliases may repeat them without end."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, (dict, list)) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
            if isinstance(item, dict):
                yield item


register_reader("huggingface", find, "train/metadata.jsonl or data/train-*.parquet with objects")
