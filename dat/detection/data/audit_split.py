"""Reads a split of a data set and collects all of its problems, where training stops at the first."""

import hashlib
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dat.detection.config import DataConfig
from dat.detection.data.box_checks import check_objects
from dat.detection.data.image_names import absent_text, suggest_override
from dat.detection.data.objects import check_repeats
from dat.detection.data.readers import collecting, read_split, require_categories
from dat.detection.data.records import Annotations, ImageRecord, check_annotated_size
from dat.engine.audit import Findings
from dat.utils.errors import DataError, TooManyFilesError, one_line
from dat.utils.files import is_image, list_files
from dat.utils.images import UNREADABLE, decode, has_contrast
from dat.utils.progress import progress_bar

MISSING = "missing image file"


@dataclass
class SplitAudit(Findings):
    """A split as far as it can be read.

    `hashes`: readable images by digest, `turned`: number of images turned or mirrored as EXIF says, `unlisted`: visible
    images that no split lists.
    """

    annotations: Annotations
    hashes: dict[str, list[ImageRecord]] = field(default_factory=lambda: defaultdict(list))
    turned: int = 0
    unlisted: set[Path] = field(default_factory=set)

    def add(self, kind: str, example: str, stops: bool = False, count: int = 1) -> None:
        """Counts a problem; its example need not repeat the file of the annotations."""
        example = example.removeprefix(f"{self.annotations.path}: ").removeprefix("is not COCO: ")
        super().add(kind, example, stops, count)

    @property
    def sizes(self) -> np.ndarray:
        """(width, height) [n, 2] float64 of all boxes in pixels, clipped to their images; crowds included."""
        boxes = [record.boxes.astype(np.float64) for record in self.annotations.records]
        joined = np.concatenate([np.zeros((0, 4)), *boxes])
        return joined[:, 2:] - joined[:, :2]

    def objects(self) -> np.ndarray:
        """Number of boxes of each category."""
        labels = [np.zeros(0, np.int64), *(record.labels for record in self.annotations.records)]
        return np.bincount(np.concatenate(labels), minlength=len(self.annotations.categories))


def audit_split(data: DataConfig, name: Literal["train", "val"]) -> SplitAudit:
    """Reads a split of the data set of a configuration and every image of it, and collects the problems."""
    found = SplitAudit(Annotations(Path(data.root) / getattr(data, name).annotations, (), ()))
    with collecting(found, "annotation file"):
        found.annotations = read_split(data, name, found)
    if found.annotations.annotated:
        check_objects(found.annotations, getattr(data, name), found)
    else:
        found.add("no annotations", "the file lists images only", stops=True)
    _check_objects(found)
    records = found.annotations.records
    root, key = Path(data.root), f"data.{name}.images"
    folders = {record.path.parent for record in records}
    if records and not any(os.path.isdir(folder) for folder in folders):
        text = f"{records[0].path.parent}: no such folder of images{suggest_override(root, key, records[0])}"
        found.add(MISSING, text, stops=True, count=len(records))
        return found
    suggestion = None
    with ThreadPoolExecutor() as pool:
        results = pool.map(_check_file, records)
        for record, checked in progress_bar(results, total=len(records), desc="images", leave=False):
            for kind, example in checked.problems.items():
                # The search takes long: one example of a missing image is enough.
                if kind == MISSING and suggestion is None:
                    suggestion = suggest_override(root, key, record)
                    example += suggestion
                found.add(kind, example, stops=not checked.digest)
            if checked.digest:
                found.hashes[checked.digest].append(record)
                found.turned += checked.turned
    for same in found.hashes.values():
        names = sorted({os.path.relpath(record.path, root) for record in same})
        if len(names) > 1:
            found.add("same image under two names", ", ".join(names[:3]), count=len(names) - 1)
    files = {Path(path) for folder in folders for path in list_files(folder) if is_image(path)}
    found.unlisted = files - {record.path for record in records}
    return found


def compare(train: SplitAudit, val: SplitAudit) -> None:
    """Adds to `val` the problems that only both splits together show: classes that training lacks, and its images.

    Images that the other split lists are no longer among the unlisted ones.
    """
    listed = {record.path for split in (train, val) for record in split.annotations.records}
    train.unlisted, val.unlisted = train.unlisted - listed, val.unlisted - listed
    train.annotations = train.annotations.with_categories(val.annotations.categories)
    with collecting(val, "categories that training does not have"):
        val.annotations = require_categories(val.annotations, train.annotations.categories)
    for split in (train, val):
        for text in split.annotations.dropped_roots:
            split.add("category left out", text, count=len(split.annotations.roots))
    for digest in val.hashes.keys() & train.hashes.keys():
        name, other = (split.hashes[digest][0].path.name for split in (val, train))
        val.add("image of training in validation", f"{name} is {other} of training", count=len(val.hashes[digest]))


def _check_objects(found: SplitAudit) -> None:
    categories, records = found.annotations.categories, found.annotations.records
    for path, count in Counter(record.path for record in records).items():
        if count > 1:
            found.add("file listed more than once", f"{path.name}: {count} times")
    check_repeats(found.annotations, found)
    for category, count in zip(categories, found.objects(), strict=True):
        if not count:
            found.add("class without objects", f"{category.id} {category.name}")


class CheckedFile(NamedTuple):
    """The digest of an image file, "" if it is unusable, its problems {kind: example}, and whether EXIF turns it."""

    digest: str
    problems: dict[str, str]
    turned: bool = False


def _check_file(record: ImageRecord) -> tuple[ImageRecord, CheckedFile]:
    path, size = record.path, (record.width, record.height)
    if not os.path.isfile(path):
        return record, CheckedFile("", {MISSING: absent_text(record)})
    try:
        content = path.read_bytes()
        decoded = decode(BytesIO(content), size)
    except UNREADABLE as error:
        TooManyFilesError.check(error)
        text = f"{path}: cannot be read as an image: {one_line(error)}"
        return record, CheckedFile("", {"unreadable image file": text})
    try:
        check_annotated_size(path, decoded.image, size)
    except DataError as error:
        return record, CheckedFile("", {"image of another size": str(error)})
    problems = {}
    if not decoded.followed:
        problems["EXIF orientation ignored, since only the stored size fits the annotations"] = path.name
    elif decoded.orientation != 1 and (decoded.orientation < 5 or record.width == record.height):
        problems["EXIF orientation followed, though the annotations' size fits the stored image too"] = path.name
    if decoded.frames:
        problems["image with several frames or pages, the first is read"] = path.name
    if not has_contrast(decoded.image):
        problems["image with hardly any contrast"] = path.name
    turned = decoded.followed and decoded.orientation != 1
    return record, CheckedFile(hashlib.blake2b(content, digest_size=16).hexdigest(), problems, turned)
