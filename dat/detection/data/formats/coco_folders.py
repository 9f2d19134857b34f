"""Folders with COCO's JSON: which file and which images belong to a split, and how such a folder is written.

COCO's own, those that Roboflow, CVAT, Label Studio and FiftyOne export, and plain train.json, val.json and images/.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from dat.detection.data.formats.coco import parse_coco
from dat.detection.data.objects import lists_shapes, relative_names
from dat.detection.data.readers import Found, Split, existing, register_reader
from dat.detection.data.records import Annotations
from dat.engine.audit import Findings
from dat.utils.errors import DataError
from dat.utils.files import SPLIT_NAMES, is_hidden, write_json

_ROBOFLOW = "_annotations.coco.json"


def find(path: Path) -> Found | None:
    """The splits of a folder, or of one file of annotations."""
    if path.is_file():
        return Found("COCO", {"train": _split(path, path.parent)}) if path.suffix.lower() == ".json" else None
    files = {split: file for split, names in SPLIT_NAMES.items() if (file := _file(path, names))}
    if "train" in files or "val" in files:
        roboflow = any(file.name == _ROBOFLOW for file in files.values())
        splits = {split: _split(file, path) for split, file in files.items()}
        return Found("Roboflow COCO" if roboflow else "COCO", splits)
    single = {
        _ROBOFLOW: "Roboflow COCO",
        "annotations/instances_default.json": "CVAT COCO",
        "result.json": "Label Studio COCO",
        "annotations.json": "COCO",
        "labels.json": "COCO",
    }
    file = existing(path, *(name for name in single if not lists_shapes(path / name)))
    return Found(single[file.relative_to(path).as_posix()], {"train": _split(file, path)}) if file else None


def write(folder: Path, splits: Mapping[str, Annotations], place: Callable[[Path, Path], None]) -> list[str]:
    """Writes annotations/instances_SPLIT.json and images/SPLIT/."""
    (folder / "annotations").mkdir()
    for split, annotations in splits.items():
        content, names = annotations.to_coco(), relative_names(annotations)
        for entry, record, name in zip(content["images"], annotations.records, names, strict=True):
            place(record.path, folder / "images" / split / name)
            entry["file_name"] = name.as_posix()
        if not annotations.annotated:
            del content["annotations"]
        write_json(folder / "annotations" / f"instances_{split}.json", content)
    return []


def _file(root: Path, split_names: tuple[str, ...]) -> Path | None:
    """The annotations of a split. Raises DataError where several files could be meant."""
    for word in split_names:
        for pattern in (f"{word}.json", f"annotations/{word}.json", f"annotations/instances_{word}*.json",
                        f"instances_{word}*.json", f"{word}/{_ROBOFLOW}", f"{word}/*.json"):  # fmt: skip
            files = sorted(file for file in root.glob(pattern) if not is_hidden(file.name) and not lists_shapes(file))
            if len(files) > 1:
                names = ", ".join(file.relative_to(root).as_posix() for file in files[:5])
                keys = "data.train.annotations and data.val.annotations"
                raise DataError(f"{root} holds {names}, of which any could be COCO's; {keys} should name one each")
            if files:
                return files[0]
    return None


def _split(file: Path, root: Path) -> Split:
    def read(problems: Findings, images: Path | None) -> Annotations:
        return parse_coco(file, images, problems)

    name = file.relative_to(root)
    return Split(f"{name.parent}/" if name.name == _ROBOFLOW and name.parent.parts else name.as_posix(), read)


register_reader(
    "coco",
    find,
    "train.json and val.json, annotations/instances_train*.json, or train/_annotations.coco.json",
    write,
)
