"""Reads a split of a data set and collects all of its problems, where training stops at the first."""

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dat.detection.config import DataConfig
from dat.detection.data.readers import collecting, read_split
from dat.detection.data.records import Annotations, ImageRecord, load_image
from dat.detection.data.transforms import resized_size
from dat.engine.audit import Findings
from dat.utils.errors import DataError
from dat.utils.files import IMAGE_EXTENSIONS
from dat.utils.progress import progress_bar


@dataclass
class SplitAudit(Findings):
    """A split as far as it can be read; `hashes`: readable images by digest, `unlisted`: images that no split lists."""

    annotations: Annotations
    hashes: dict[str, list[ImageRecord]] = field(default_factory=lambda: defaultdict(list))
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

    def resized_sides(self, size: int, max_size: int) -> np.ndarray:
        """The shorter side [n] of every box when images are resized to a shortest edge of `size`, in pixels."""
        records = self.annotations.records
        scales = [resized_size(r.height, r.width, size, max_size)[0] / r.height for r in records]
        return self.sizes.min(1, initial=np.inf) * np.repeat(scales, [len(r.boxes) for r in records])

    def objects(self) -> np.ndarray:
        """Number of boxes of each category."""
        labels = [np.zeros(0, np.int64), *(record.labels for record in self.annotations.records)]
        return np.bincount(np.concatenate(labels), minlength=len(self.annotations.categories))


def audit_split(data: DataConfig, name: Literal["train", "val"]) -> SplitAudit:
    """Reads a split of the data set of a configuration and every image of it, and collects the problems."""
    found = SplitAudit(Annotations(Path(data.root) / getattr(data, name).annotations, (), ()))
    with collecting(found, "annotation file"):
        found.annotations = read_split(data, name, found)
    if not found.annotations.annotated:
        found.add("no annotations", "the file lists images only", stops=True)
    _check_objects(found)
    records = found.annotations.records
    folders = {record.path.parent for record in records}
    if records and not any(folder.is_dir() for folder in folders):
        text = f"{records[0].path.parent}: no such folder of images"
        found.add("missing image file", text, stops=True, count=len(records))
        return found
    with ThreadPoolExecutor() as pool:
        results = pool.map(_check_file, records)
        for record, digest, kind, example in progress_bar(results, total=len(records), desc="images", leave=False):
            if kind:
                found.add(kind, example, stops=True)
            else:
                found.hashes[digest].append(record)
    for same in found.hashes.values():
        names = sorted({record.path.name for record in same})
        if len(names) > 1:
            found.add("same image under two names", ", ".join(names[:3]), count=len(names) - 1)
    files = {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS}
    found.unlisted = files - {record.path for record in records}
    return found


def compare(train: SplitAudit, val: SplitAudit) -> None:
    """Adds to `val` the problems that only both splits together show: other categories, and training images.

    Images that the other split lists are no longer among the unlisted ones.
    """
    listed = {record.path for split in (train, val) for record in split.annotations.records}
    train.unlisted, val.unlisted = train.unlisted - listed, val.unlisted - listed
    names, expected = ([c.name for c in split.annotations.categories] for split in (val, train))
    if names != expected:
        only = ", ".join(sorted(set(names) ^ set(expected))[:5])
        text = f"in one split only: {only}" if only else f"in another order: {', '.join(names[:5])}"
        val.add("categories differ from training's", text, stops=True)
    for digest in val.hashes.keys() & train.hashes.keys():
        name, other = (split.hashes[digest][0].path.name for split in (val, train))
        val.add("image of training in validation", f"{name} is {other} of training", count=len(val.hashes[digest]))


def _check_objects(found: SplitAudit) -> None:
    categories, records = found.annotations.categories, found.annotations.records
    for path, count in Counter(record.path for record in records).items():
        if count > 1:
            found.add("file listed more than once", f"{path.name}: {count} times")
    for record in records:
        boxes = Counter(zip(record.labels.tolist(), map(tuple, record.boxes.tolist()), strict=True))
        for (label, box), count in boxes.items():
            if count > 1:
                found.add("same annotation twice", f"{categories[label].name} {box} in {record.path.name}")
    for category, count in zip(categories, found.objects(), strict=True):
        if not count:
            found.add("class without objects", f"{category.id} {category.name}")


def _check_file(record: ImageRecord) -> tuple[ImageRecord, str, str, str]:
    """The record, the digest of its file, or the kind of problem and an example."""
    if not record.path.is_file():
        return record, "", "missing image file", f"{record.path}"
    try:
        digest = hashlib.blake2b(record.path.read_bytes(), digest_size=16).hexdigest()
        load_image(record.path, (record.width, record.height))
    except (DataError, OSError) as error:
        kind = "image of another size" if "its annotations say" in str(error) else "unreadable image file"
        return record, "", kind, str(error)
    return record, digest, "", ""
