"""YOLO's text files: one for each image, with a line "class x y width height" for each object, in parts of the image.

A line may also be a polygon, "class x y x y x y ...", whose extent is the box. The classes and splits are in data.yaml
(Ultralytics, Roboflow), in obj.data and obj.names (Darknet, CVAT), or in classes.txt beside images/ and labels/ (Label
Studio).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dat.detection.data.box_checks import SHARED, check_form
from dat.detection.data.objects import (
    MOST_CLASSES,
    Object,
    image_sizes,
    lists_shapes,
    lost_areas,
    make_categories,
    make_record,
    number_classes,
    read_text,
    relative_names,
    same_labels,
)
from dat.detection.data.readers import Found, Split, collecting, existing, register_reader
from dat.detection.data.records import Annotations, Category, ImageRecord
from dat.engine.audit import Findings
from dat.utils.errors import DataError, shown
from dat.utils.files import SPLIT_NAMES, find_images, is_hidden, list_files, path_order
from dat.utils.images import to_upright
from dat.utils.safe_yaml import parse_yaml

# LabelImg writes classes.txt beside the labels.
_LISTS_OF_NAMES = (
    *("classes.txt", "obj.names", "labels/classes.txt", "classes.names"),
    *("labels/train/classes.txt", "train/labels/classes.txt", "train/classes.txt"),
    *("labels/val/classes.txt", "val/labels/classes.txt", "valid/labels/classes.txt"),
)
# How tools write the folder beside images/.
_LABEL_FOLDERS = ("labels", "Labels", "LABELS")
# Coordinates that rounding moved outside the image by less than this are no mistake.
_ROUNDING = 0.01


class _Folder(NamedTuple):
    """A data set: `file` names its classes, `keypoints`: of a line only the first five numbers are the box."""

    root: Path
    file: Path
    names: list[str] | None
    keypoints: bool = False


def find(path: Path) -> Found | None:
    """The splits of a folder, or of the one file that describes it."""
    file = path if path.is_file() else existing(path, "data.yaml", "dataset.yaml", "data.yml", "obj.data")
    if file is None:
        # Ultralytics' own are named after their data, such as coco8.yaml.
        files = (file for file in sorted(path.glob("*.y*ml")) if file.is_file() and not is_hidden(file.name))
        described = [(file, says) for file in files if _describes(file) and (says := _description(file))]
        for other, says in described[1:]:
            if says != described[0][1]:
                raise DataError(
                    f"{path}: {described[0][0].name} and {other.name} both describe data, but not the same; "
                    "data.train.annotations and data.val.annotations should name one"
                )
        file = described[0][0] if described else None
    if file is None:
        return _from_folders(path)
    if file.suffix == ".data":
        values = dict(line.split("=", 1) for line in read_text(file, "key = value").splitlines() if "=" in line)
        content: Any = {key.strip(): value.strip() for key, value in values.items()}
        listed = _below(file.parent, str(content.get("names", "")))
        names: list[str] | None = _read_names(listed)
        _check_count(file, content, "classes", names or [], listed.name)
    elif file.suffix in (".yaml", ".yml"):
        content = _read_yaml(file)
        names = _names(file, content) if isinstance(content, dict) else None
    else:
        return None
    if not isinstance(content, dict) or names is None:
        return None
    found = {
        split: next((content[key] for key in keys if content.get(key)), None) for split, keys in SPLIT_NAMES.items()
    }
    # `path` may be a folder of the machine that made the file.
    base = file.parent / str(content.get("path", ""))
    places = [_locate(base, value) for value in _listed(found["train"] or found["val"])]
    folder = _Folder(base if any(map(os.path.exists, places)) else file.parent, file, names, "kpt_shape" in content)
    # Roboflow names a folder of test images where it exports none.
    if found["test"] and not os.path.exists(_locate(folder.root, str(found["test"]))):
        found["test"] = None
    return Found("YOLO", {name: _split(folder, value) for name, value in found.items() if value is not None})


def _describes(file: Path) -> bool:
    """Whether a YAML file has the keys of a data set; others are not parsed."""
    with file.open("rb") as opened:
        start = opened.read(2**20)
    return all(re.search(keys, start, re.MULTILINE) for keys in (rb"^(train|val)\s*:", rb"^(names|nc)\s*:"))


def _description(file: Path) -> Any:
    """The names and splits in a YAML file; None if it describes no data, such as options with `train: true`."""
    content = _read_yaml(file)
    splits = [content.get(name) for name in ("train", "val")] if isinstance(content, dict) else []
    texts = [text for value in splits for text in _listed(value) if isinstance(value, (str, list))]
    paths = any(re.search(r"[/\\.]", text) or (file.parent / text).exists() for text in texts)
    return (_names(file, content), splits) if paths else None


def write(folder: Path, splits: Mapping[str, Annotations], place: Callable[[Path, Path], None]) -> list[str]:
    """Writes data.yaml, images/SPLIT/ and labels/SPLIT/; crowds are left out."""
    crowds = sum(int(record.crowd.sum()) for annotations in splits.values() for record in annotations.records)
    for split, annotations in splits.items():
        same_labels(annotations)
        for record, name in zip(annotations.records, relative_names(annotations), strict=True):
            path = folder / "images" / split / name
            place(record.path, path)
            label = _label_paths(path, folder)[0]
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(_lines(record)), encoding="utf-8")
    categories = next(iter(splits.values())).categories
    content = {split: f"images/{split}" for split in splits} | {"names": {i: c.name for i, c in enumerate(categories)}}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    lost = [f"{crowds} crowds are left out, as YOLO has none"] if crowds else []
    return [*lost, *lost_areas(splits)]


def _lines(record: ImageRecord) -> Iterator[str]:
    # YOLO has no sizes that would tell whether annotations follow the file's turn.
    (width, height), boxes = to_upright(record.path, (record.width, record.height), record.boxes.astype(float))
    objects = zip(boxes.tolist(), record.labels.tolist(), record.crowd.tolist(), strict=True)
    for (x0, y0, x1, y1), label, crowd in objects:
        if not crowd:
            parts = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            # The shortest text that Python reads back as the same number.
            yield f"{label} {' '.join(map(repr, parts))}\n"


def _from_folders(root: Path) -> Found | None:
    """images/ and labels/ with the splits inside or without, train/images/ and so on, or images with texts beside."""
    lists = {path: _read_names(path) for name in _LISTS_OF_NAMES if (path := root / name).is_file()}
    places = [place for name in _LABEL_FOLDERS for place in (name, f"{name}/train", f"train/{name}")]
    texts = (file for place in places for file in root.glob(f"{place}/*.txt"))
    if all(is_hidden(file.name) for file in texts):
        beside = any(file not in lists for file in root.glob("*.txt"))
        # LabelMe's files may have a list of classes too.
        if not lists or (not beside and any(map(lists_shapes, root.glob("*.json")))):
            return None
    # Tools add names at the end.
    names = max(lists.values(), key=len, default=None)
    folder = _Folder(root, next(iter(lists), root), names)
    for other, listed in lists.items():
        for number, (name, own) in enumerate(zip(listed, names or [], strict=False)):
            if name != own:
                text = f"{other}: class {number} is {shown(name)}, but {shown(own)} in another list of {root}"
                raise DataError(f"{text}; lists of classes should have the same order")
    for pattern in ("images/{}", "Images/{}", "{}/images", "{}/Images", "{}"):
        found = {
            split: name
            for split, words in SPLIT_NAMES.items()
            if (name := next((pattern.format(word) for word in words if (root / pattern.format(word)).is_dir()), ""))
        }
        if "train" in found:
            return Found("YOLO", {split: _split(folder, name) for split, name in found.items()})
    images = existing(root, "images", "Images")
    return Found("YOLO", {"train": _split(folder, images.name if images and images.is_dir() else ".")})


def _split(folder: _Folder, value: Any) -> Split:
    """The split of an entry of data.yaml: a folder, a text file that lists images, or a list of these."""
    values = _listed(value)
    places = [_locate(folder.root, text) for text in values]
    names = [
        f"{text.rstrip('/')}/" if os.path.isdir(place) else text for text, place in zip(values, places, strict=True)
    ]
    return Split(", ".join(names), partial(_read, folder, places), anywhere=True)


def _listed(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _read(folder: _Folder, places: Sequence[Path], problems: Findings, images: Path | None) -> Annotations:
    paths = sorted({path for place in ([images] if images else places) for path in _images(place)}, key=path_order)
    names = _numbers(folder.root) if folder.names is None else folder.names
    categories = make_categories(names, folder.file)
    found = {path: _find_label(path, folder.root) for path in paths}
    labels = {path: label for path, label in found.items() if os.path.isfile(label)}
    if not labels:
        wanted = _label_paths(paths[0], folder.root)[0] if paths else "labels/"
        problems.add("annotation file", f"{wanted}: no such file, nor labels of any other image", stops=True)
    elif len(labels) < len(paths):
        bare = [path for path in paths if path not in labels]
        problems.add("image without a label file, has no object", str(bare[0]), count=len(bare))
    shared = [label for label, count in Counter(labels.values()).items() if count > 1]
    if shared:
        one, other, *_ = (path for path, label in labels.items() if label == shared[0])
        text = f"{folder.file}: {one} and {other.name} have one label file, {shared[0]}, and so the same objects"
        problems.add(SHARED, f"{text} ({len(shared)} such files)" if len(shared) > 1 else text, count=len(shared))
    records, listed = [], []
    for number, (path, size) in enumerate(zip(paths, image_sizes(paths, problems), strict=True), start=1):
        if size is not None:
            label = labels.get(path)
            objects = list(_objects(label, size, categories, folder.keypoints, problems)) if label else []
            records.append(make_record(number, path, size, objects, problems))
            listed.append((size, objects))
    check_form(folder.file, listed, problems, "YOLO")
    return Annotations(folder.file, categories, tuple(records))


def _objects(
    path: Path, size: tuple[int, int], categories: Sequence[Category], keypoints: bool, problems: Findings
) -> Iterator[Object]:
    text = ""
    with collecting(problems, "label file"):
        text = read_text(path, "lines of class x y width height")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            with collecting(problems, "malformed line"):
                label, box = _parse(line.split(), f"{path}:{number}: {line[:100]!r}", len(categories), keypoints)
                scaled = (box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1])
                # Rounding must not move an edge off the border, where an equal box of another format has it.
                x0, y0 = (0.0 if abs(value) < 1e-9 else value for value in scaled[:2])
                yield Object((x0, y0, *scaled[2:]), label, f"{path.name}:{number}")


def _parse(
    words: Sequence[str], where: str, count: int, keypoints: bool
) -> tuple[int, tuple[float, float, float, float]]:
    """The class and box (x0, y0, x1, y1) of a line, in parts of the image. Raises DataError."""
    try:
        label, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise DataError(f"{where}, should be numbers: class x y width height, or class x y x y x y ...") from None
    values = values[:4] if keypoints else values
    # 2 marks a keypoint that is visible.
    hint = "; for keypoints data.yaml should have kpt_shape" if len(values) > 6 and max(values) <= 2 else ""
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        text = f"{where} has {len(words)} numbers, should be class x y width height, or class x y x y x y ..."
        raise DataError(f"{text}{hint}")
    if not label.is_integer() or not 0 <= label < count:
        raise DataError(f"{where} has class {words[0]}, should be 0 to {count - 1}, as there are {count} classes")
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
        text = f"{where} has coordinates outside 0 to 1, should be parts of the image's width and height"
        raise DataError(f"{text}{hint}")
    if len(values) == 4:
        x, y, w, h = values
        return int(label), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    xs, ys = values[::2], values[1::2]
    return int(label), (min(xs), min(ys), max(xs), max(ys))


def _images(place: Path) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    if os.path.isdir(place):
        return find_images(place)[0]
    if place.suffix != ".txt":
        raise DataError(f"{place}: no such folder or list of images")
    lines = [line.strip() for line in read_text(place, "a path of an image on each line").splitlines()]
    return [_locate(place.parent, line) for line in lines if line]


def _locate(root: Path, text: str) -> Path:
    """A path of a description, which may be of another machine or folder: its longest end that exists below `root`."""
    given, below = root / text, _below(root, text)
    # Roboflow's ../train/images is in the folder of the description, whatever lies beside that.
    inside = not text.startswith("..") or not os.path.exists(below)
    return given if inside and os.path.exists(given) else below


def _below(root: Path, text: str) -> Path:
    """The longest end of a path that exists below `root`; the path itself where there is none."""
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    # No path has more parts.
    parts = parts[-2048:]
    ends = [root.joinpath(*parts[i:]) for i in range(len(parts))]
    return next((path for path in ends if os.path.exists(path)), root.joinpath(*parts))


def _find_label(image: Path, root: Path) -> Path:
    beside = image.with_suffix(".txt")
    return next((label for label in _label_paths(image, root) if os.path.isfile(label)), beside)


def _label_paths(image: Path, root: Path) -> list[Path]:
    """The texts that may be those of an image: in labels/ where the image is in images/, else beside it."""
    inside = image.is_relative_to(root)
    parts = (image.relative_to(root) if inside else image).with_suffix(".txt").parts
    places = [i for i, part in enumerate(parts[:-1]) if part.lower() == "images"]
    if not places:
        return [image.with_suffix(".txt")]
    place = max(places, key=lambda i: (parts[i] == "images", i))
    start = root if inside else Path()
    return [start.joinpath(*parts[:place], name, *parts[place + 1 :]) for name in _LABEL_FOLDERS]


def _read_yaml(file: Path) -> Any:
    try:
        return parse_yaml(read_text(file, "YAML"), strings=True)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{file}: not valid YAML: {error}") from error


def _names(file: Path, content: dict[str, Any]) -> list[str] | None:
    """The names of data.yaml, a list or a dictionary by number, or numbers up to `nc`; None: it has neither.

    Raises DataError for anything else.
    """
    if "names" not in content:
        count = str(content.get("nc", ""))
        # A number of thousands of digits cannot be read.
        known = count.isdecimal() and len(count) < 7 and int(count) <= MOST_CLASSES
        return [str(i) for i in range(int(count))] if known else None
    names = value = content["names"]
    if isinstance(value, dict):
        names = [value.get(str(i)) for i in range(len(value))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{file}: names is {shown(value)}, should be class names, a list or 0: name, 1: name")
    _check_count(file, content, "nc", names, "names")
    return names


def _check_count(file: Path, content: dict[str, Any], key: str, names: Sequence[str], where: str) -> None:
    count = str(content.get(key, ""))
    if count.isdecimal() and count.lstrip("0") != str(len(names)):
        raise DataError(f"{file}: {key} is {count[:20]}, but {where} has {len(names)}")


def _read_names(file: Path) -> list[str]:
    lines = [line.strip() for line in read_text(file, "a class name on each line").strip().splitlines()]
    if "" in lines:
        raise DataError(f"{file}:{lines.index('') + 1}: is blank, should be a class name, as lines number the classes")
    return lines


def _numbers(root: Path) -> list[str]:
    """Numbers as the names of the classes, up to the largest that any label below `root` has."""
    largest = -1
    folders = (folder for name in _LABEL_FOLDERS for folder in root.glob(f"**/{name}"))
    for path in (Path(path) for folder in folders for path in list_files(folder) if path.endswith(".txt")):
        lines = [line.split() for line in read_text(path, "lines of class x y width height").splitlines()]
        # A longer number is no class.
        largest = max([largest, *(int(words[0]) for words in lines if words and re.fullmatch("[0-9]{1,18}", words[0]))])
    return number_classes(largest, root)


register_reader("yolo", find, "data.yaml, obj.data, or images/ and labels/ with classes.txt", write)
