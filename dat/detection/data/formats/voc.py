"""Pascal VOC's XML: one file for each image, which lists its objects.

The format counts pixels from 1 and its boxes include their last pixel: a box that covers an image of W x H pixels is
xmin 1, ymin 1, xmax W, ymax H (Everingham et al., "The PASCAL VOC Challenge 2012 Development Kit"). Here it is
(0, 0, W, H): 1 is subtracted from xmin and ymin. Many tools write edges counted from 0 instead, so that xmin or ymin
below 1 anywhere in a data set means that the coordinates of all its files are taken as they are. Objects that are
"difficult" are neither trained nor scored, as VOC's own evaluation does not score them; they are COCO's crowds here.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from dat.detection.data.box_checks import check_form
from dat.detection.data.image_names import ImagesByStem
from dat.detection.data.objects import (
    Object,
    image_sizes,
    lost_areas,
    make_categories,
    make_record,
    parse_side,
    read_text,
    relative_names,
    same_labels,
)
from dat.detection.data.readers import Found, Split, collecting, existing, register_reader
from dat.detection.data.records import Annotations, Category, ImageRecord
from dat.engine.audit import Findings
from dat.utils.errors import DataError
from dat.utils.files import SPLIT_NAMES, list_files, path_order
from dat.utils.safe_xml import Node, read_xml

_LISTS = SPLIT_NAMES | {"train": (*SPLIT_NAMES["train"], "trainval")}
# The XML of one image.
_LARGEST = 16 * 2**20
_BELOW_1 = re.compile(rb"<[xy]min>\s*(-|(0+(\.\d*)?|\.\d+)\s*<)")


class _Folder(NamedTuple):
    """XML files of a split, in `folder` and below it, and the folder of their images.

    `names`: paths in `folder` without suffix; None: all. `everything`: all XML files of the data set.
    """

    folder: Path
    images: Path
    names: list[str] | None
    everything: list[Path]
    root: Path


def find(path: Path) -> Found | None:
    """The splits of a folder, of a folder of XML files, or of a list in ImageSets/Main or beside Annotations."""
    if path.is_file():
        if path.suffix != ".txt":
            return None
        root = path.parent.parent.parent if path.parent.parent.name == "ImageSets" else path.parent
        given = root / "Annotations"
        known = _is_voc(given) and (root != path.parent or _lists_names(path, given))
        return Found("Pascal VOC", {"train": _split(given, root, path)} if known else {})
    devkits = [*path.glob("VOCdevkit/VOC*/Annotations"), *path.glob("VOC*/Annotations")]
    if len(devkits) == 1:
        return find(devkits[0].parent)
    folder = existing(path, "Annotations", "annotations")
    if folder and _is_voc(folder):
        lists = {
            split: existing(path, *(f"ImageSets/Main/{name}.txt" for name in names)) for split, names in _LISTS.items()
        }
        if not any(lists.values()):
            beside = {split: existing(path, *(f"{name}.txt" for name in names)) for split, names in _LISTS.items()}
            if beside["train"] and _lists_names(beside["train"], folder):
                lists = {split: file if file and _lists_names(file, folder) else None for split, file in beside.items()}
        # trainval.txt has the images of val.txt too.
        both, val = lists["train"], lists["val"]
        left_out = val if both and both.stem == "trainval" else None
        splits = {
            split: _split(folder, path, file, left_out if split == "train" else None)
            for split, file in lists.items()
            if file
        }
        return Found("Pascal VOC", splits or {"train": _split(folder, path)})
    folders = {split: existing(path, *names) for split, names in SPLIT_NAMES.items()}
    splits = {split: _split(place, path) for split, place in folders.items() if place and _is_voc(place)}
    if "train" in splits:
        return Found("Pascal VOC", splits)
    folder = next((folder for folder in (path, path / "images", path / "labels") if _is_voc(folder)), None)
    return Found("Pascal VOC", {"train": _split(folder, path)}) if folder else None


def write(folder: Path, splits: Mapping[str, Annotations], place: Callable[[Path, Path], None]) -> list[str]:
    """Writes Annotations/, JPEGImages/, ImageSets/Main/SPLIT.txt and labels.txt; boxes may have decimals."""
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    used: set[Path] = set()
    for split, annotations in splits.items():
        same_labels(annotations)
        names = relative_names(annotations)
        # Splits have one folder of images here.
        if used & {name.with_suffix("") for name in names}:
            names = [Path(split) / name for name in names]
        used |= {name.with_suffix("") for name in names}
        for record, name in zip(annotations.records, names, strict=True):
            place(record.path, folder / "JPEGImages" / name)
            path = folder / "Annotations" / name.with_suffix(".xml")
            path.parent.mkdir(parents=True, exist_ok=True)
            ElementTree.ElementTree(_to_xml(record, name, annotations.categories)).write(path, encoding="utf-8")
        text = "".join(f"{name.with_suffix('').as_posix()}\n" for name in names)
        (lists / f"{split}.txt").write_text(text, encoding="utf-8")
    categories = next(iter(splits.values())).categories
    (folder / "labels.txt").write_text("".join(f"{category.name}\n" for category in categories), encoding="utf-8")
    return lost_areas(splits)


def _to_xml(record: ImageRecord, name: Path, categories: Sequence[Category]) -> Element:
    root = Element("annotation")
    SubElement(root, "folder").text = "JPEGImages"
    SubElement(root, "filename").text = name.as_posix()
    size = SubElement(root, "size")
    for tag, value in (("width", record.width), ("height", record.height), ("depth", 3)):
        SubElement(size, tag).text = str(value)
    boxes = record.boxes.astype(float).tolist()
    for (x0, y0, x1, y1), label, crowd in zip(boxes, record.labels.tolist(), record.crowd.tolist(), strict=True):
        entry = SubElement(root, "object")
        SubElement(entry, "name").text = categories[label].name
        SubElement(entry, "difficult").text = str(int(crowd))
        box = SubElement(entry, "bndbox")
        for tag, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            SubElement(box, tag).text = repr(value).removesuffix(".0")
    ElementTree.indent(root)
    return root


def _is_voc(folder: Path) -> bool:
    """Whether a folder has XML files, the first of which is VOC's."""
    first = next(_xml_files(folder), None)
    return first is not None and re.search(rb"<annotation[\s>]", first.read_bytes()[:4096]) is not None


def _xml_files(folder: Path) -> Iterator[Path]:
    """In any order, and without hidden ones, such as those that macOS leaves."""
    return (Path(path) for path in list_files(folder) if path.endswith(".xml"))


def _lists_names(file: Path, folder: Path) -> bool:
    """Whether a line of a list begins with the name of an XML file in the folder; other tools' lists have paths."""
    lines = file.read_bytes()[: 2**20].decode("utf-8-sig", errors="replace").replace("\0", "").splitlines()
    return any(os.path.isfile(folder / f"{line.split()[0][:200]}.xml") for line in lines if line.strip())


def _split(folder: Path, root: Path, file: Path | None = None, left_out: Path | None = None) -> Split:
    """The split of a folder, or of the images that `file` lists; without those that the list `left_out` has."""
    images = existing(root, "JPEGImages", "images") if folder.name.lower() in ("annotations", "labels") else folder
    names = None
    if file:
        lines = [line.strip() for line in read_text(file, "names of images").splitlines()]
        others = {line.strip() for line in read_text(left_out, "names of images").splitlines()} if left_out else set()
        lines = [line for line in lines if line not in others]
        # A list of one class has a column that says whether the image shows it.
        shorter = {line: re.sub(r"\s+(-1|0|1)$", "", line) for line in lines if line}
        names = [line if os.path.isfile(folder / f"{line}.xml") else short for line, short in shorter.items()]
    name = (file or folder).relative_to(root).as_posix()
    found = _Folder(folder, images or root, names, sorted(_xml_files(root)), root)
    if left_out:
        name += f" without {left_out.name}"
    return Split(name if file else f"{name}/", partial(_read, found))


def _read(folder: _Folder, problems: Findings, images: Path | None) -> Annotations:
    images = images or folder.images
    if folder.names is None:
        files = sorted(_xml_files(folder.folder))
    else:
        files = [folder.folder / f"{name}.xml" for name in folder.names]
    below_1 = any(_BELOW_1.search(path.read_bytes()) for path in folder.everything)
    index = ImagesByStem(images)
    roots: list[tuple[Path, Path, Node]] = []
    for file in files:
        with collecting(problems, "annotation file"):
            root = read_xml(file, _LARGEST)
            image = index.find(file.relative_to(folder.folder), root.findtext("filename") or "")
            roots.append((image, file, root))
    roots.sort(key=lambda item: path_order(item[0]))
    # After the files: if none can be read, the first says why.
    categories = make_categories(_class_names(folder), folder.folder)
    label_of = {category.name: label for label, category in enumerate(categories)}
    sizes = _sizes(roots, problems)
    records, listed = [], []
    for number, ((image, file, root), size) in enumerate(zip(roots, sizes, strict=True), start=1):
        if size is not None:
            objects = list(_objects(root, file, label_of, 0 if below_1 else 1, problems))
            records.append(make_record(number, image, size, objects, problems))
            listed.append((size, objects))
    check_form(folder.folder, listed, problems, "VOC")
    return Annotations(folder.folder, categories, tuple(records))


def _class_names(folder: _Folder) -> list[str]:
    """Names in the order of labels.txt or CVAT's labelmap.txt; without these in alphabetical order."""
    names: set[str] = set()
    for path in folder.everything:
        # A file that cannot be read is named when its split is read.
        try:
            names |= {entry.findtext("name", "").strip() for entry in read_xml(path, _LARGEST).iter("object")}
        except DataError:
            continue
    names.discard("")
    file = existing(folder.root, "labels.txt", "labelmap.txt")
    if file is None:
        return sorted(names)
    lines = [line.strip() for line in read_text(file, "a class name on each line").splitlines()]
    if file.name == "labelmap.txt":
        lines = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
        # The first class of segmentation is no class of objects.
        lines = [line for line in lines if line != "background" or line in names]
    return [line for line in lines if line]


def _sizes(roots: Iterable[tuple[Path, Path, Node]], problems: Findings) -> list[tuple[int, int] | None]:
    """(width, height) of each image; from its file where the XML gives none, as some tools leave it out."""
    found: list[tuple[int, int] | None] = []
    for image, _, root in roots:
        width, height = (parse_side(root.findtext(f"size/{side}", "").strip()) for side in ("width", "height"))
        if width and height:
            found.append((width, height))
        else:
            found += image_sizes([image], problems)
    return found


def _objects(root: Node, file: Path, label_of: Mapping[str, int], first: int, problems: Findings) -> Iterator[Object]:
    """The objects of an XML file, whose pixels are counted from `first`."""
    for entry in root.iter("object"):
        assert isinstance(entry, Node)
        with collecting(problems, "malformed object"):
            where = f"{file}:{entry.line}"
            name = entry.findtext("name", "").strip()
            if name not in label_of:
                known = ", ".join(list(label_of)[:10])
                raise DataError(f"{where}: the object's name is {name!r}, should be a class: {known}")
            texts = [entry.findtext(f"bndbox/{tag}", "") for tag in ("xmin", "ymin", "xmax", "ymax")]
            try:
                x0, y0, x1, y1 = map(float, texts)
            except ValueError:
                raise DataError(f"{where}: bndbox is {texts}, should be numbers xmin, ymin, xmax, ymax") from None
            difficult = entry.findtext("difficult", "0").strip() == "1"
            yield Object((x0 - first, y0 - first, x1, y1), label_of[name], f"{file.name}:{entry.line}", difficult)


register_reader(
    "voc", find, "Annotations/ and JPEGImages/ of Pascal VOC, or XML files beside images in train/ and valid/", write
)
