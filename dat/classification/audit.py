"""Checks a data set of images and classes before training, and lists every problem.

Training leaves unreadable images out; only some problems would stop it.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from dat.classification.config import ClassificationConfig, DataConfig, check_config
from dat.classification.data import check_classes, check_readable_classes
from dat.classification.readers import Split, open_split
from dat.engine.audit import Findings, format_problems
from dat.engine.config import apply_overrides, load_config
from dat.utils.errors import DataError
from dat.utils.images import HEIC, UNREADABLE, check_size, decode, has_contrast, lacks_heif
from dat.utils.plots import draw_grid, thumbnail
from dat.utils.progress import progress_bar

# Classes with fewer images give a warning.
FEW = 10


@dataclass
class SplitAudit(Findings):
    """Statistics and problems of a split; `split` None: it cannot be opened.

    By index of the readable images: `sizes` (width, height) in pixels and `classes`. `modes`: how many images Pillow
    opens in each mode. `turned`: number of images whose EXIF orientation turns them. `hashes`: indices by the digest of
    the file.
    """

    place: str
    split: Split | None = None
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    hashes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def audit(data: DataConfig) -> dict[str, SplitAudit]:
    """Audits the splits "train" and "val"."""
    found: dict[str, SplitAudit] = {}
    class_names: list[str] | None = None
    names: tuple[Literal["train", "val"], ...] = ("train", "val")
    for name in names:
        place = f"{data.root}/{getattr(data, name).path}"
        try:
            split = open_split(data, name, class_names)
        except DataError as error:
            found[name] = SplitAudit(place)
            found[name].add("cannot be opened", str(error), stops=True)
            continue
        class_names = class_names or split.class_names
        found[name] = audit_split(split.note or place, split, class_names)
        if name == "train":
            for kind, check in (
                ("only one class", check_classes),
                ("class without an image that can be read", check_readable_classes),
            ):
                try:
                    check(split)
                except DataError as error:
                    found[name].add(kind, str(error), stops=True)
    _find_training_images(found["train"], found["val"])
    return found


def audit_split(place: str, split: Split, class_names: Sequence[str]) -> SplitAudit:
    """Reads every image of a split, on as many threads as there are cores."""
    found, lock = SplitAudit(place, split), Lock()

    def check(index: int) -> tuple[int, str, Any]:
        """The index, the file's digest, and the decoded image's facts and class, or an error."""
        try:
            # Readers of other packages may not be made for threads.
            with lock:
                file, label = split.open(index)
                with file:
                    content = file.read()
            decoded = decode(BytesIO(content))
            check_size(decoded.image)
            facts = (decoded.image.size, decoded.mode, decoded.orientation != 1, decoded.frames)
            dull = not has_contrast(decoded.image)
            return index, hashlib.blake2b(content, digest_size=16).hexdigest(), (*facts, dull, label)
        except UNREADABLE as error:
            return index, "", split.describe_error(index, error)

    with ThreadPoolExecutor() as pool:
        checks = pool.map(check, range(len(split)))
        for index, digest, result in progress_bar(checks, total=len(split), desc="images", leave=False):
            if not digest:
                found.add("image that cannot be read, left out", result)
                continue
            found.sizes[index], mode, turned, frames, dull, found.classes[index] = result
            found.modes[mode] += 1
            found.turned += turned
            if frames:
                found.add("image with several frames or pages, the first is read", split.name(index))
            if dull:
                found.add("image with hardly any contrast", split.name(index))
            found.hashes[digest].append(index)
    _find_problems(found, split, class_names)
    return found


def _find_problems(found: SplitAudit, split: Split, class_names: Sequence[str]) -> None:
    for name in split.left_out:
        # Names in tars and shards are not paths.
        kind = HEIC if lacks_heif(Path(getattr(split.reader, "root", ""), name)) else "file that is no image"
        found.add(f"{kind}, left out", name)
    for name in split.deep:
        found.add("image in a folder of a class folder, its class is the first folder", name)
    for name in split.empty:
        if name not in class_names:
            found.add("folder without images, no class", name)
    counts = Counter(found.classes.values())
    for k, name in enumerate(class_names):
        if not counts[k]:
            found.add("class without images", name)
        elif counts[k] < FEW:
            found.add(f"class of fewer than {FEW} images", f"{name}: {counts[k]}")
    for indices in found.hashes.values():
        if len(indices) > 1:
            names = ", ".join(split.name(index) for index in indices[:3])
            several = len({found.classes[index] for index in indices}) > 1
            found.add(f"same image {'in several classes' if several else 'twice'}", names, count=len(indices) - 1)
    if not found.sizes:
        found.add("no image can be read", found.place, stops=True)


def _find_training_images(train: SplitAudit, val: SplitAudit) -> None:
    """Adds a problem for validation images that are training images too."""
    if train.split is not None and val.split is not None:
        for digest in val.hashes.keys() & train.hashes.keys():
            here, there = val.hashes[digest], train.hashes[digest]
            text = f"{val.split.name(here[0])} is {train.split.name(there[0])} of training"
            val.add("image of training", text, count=len(here))


def summarize(found: SplitAudit, class_names: Sequence[str], img_size: int) -> dict[str, Any]:
    """Statistics as plain values; `img_size`: side of the images that the model is given."""
    sides = np.array(list(found.sizes.values())).reshape(-1, 2)
    counts = Counter(found.classes.values())
    shorter = sides.min(1) if len(sides) else sides
    return {
        "place": found.place,
        "images": 0 if found.split is None else len(found.split),
        "readable": len(sides),
        "modes": dict(found.modes.most_common()),
        "turned_by_exif": found.turned,
        "sides": {
            "smallest": int(sides.min()), "median": float(np.median(shorter)), "largest": int(sides.max()),
            "below_img_size": int((shorter < img_size).sum()),
        } if len(sides) else None,
        "classes": [{"name": name, "images": counts[k]} for k, name in enumerate(class_names)],
        "problems": [asdict(problem) for problem in found.problems.values()],
        "stops_training": found.stops,
    }  # fmt: skip


def format_summaries(summaries: dict[str, dict[str, Any]], img_size: int) -> str:
    """The summaries of all splits as text, with the classes side by side."""
    lines = []
    for name, summary in summaries.items():
        modes = ", ".join(f"{count} {mode}" for mode, count in summary["modes"].items())
        lines.append(f"{name}: {summary['place']}")
        lines.append(f"  {summary['images']} images, {summary['readable']} of them can be read ({modes})")
        lines.append(f"  {summary['turned_by_exif']} images are turned or mirrored as EXIF says")
        if sides := summary["sides"]:
            lines.append(
                f"  shortest side {sides['smallest']} pixels, median of the shorter sides {sides['median']:g}, longest "
                f"{sides['largest']}; {sides['below_img_size']} images are smaller than data.img_size, {img_size}"
            )
        lines += format_problems(summary["problems"])
    classes = [summary["classes"] for summary in summaries.values() if summary["classes"]]
    if classes:
        width = max(8, *(len(row["name"]) for row in classes[0]))
        lines.append(f"{len(classes[0])} classes".ljust(width) + "".join(f"  {name:>8}" for name in summaries))
        for rows in zip(*classes, strict=True):
            lines.append(f"{rows[0]['name']:<{width}}" + "".join(f"  {row['images']:>8}" for row in rows))
    return "\n".join(lines)


def draw_samples(found: SplitAudit, class_names: Sequence[str], path: Path, count: int) -> None:
    """Writes a sheet of `count` evenly chosen images, if any can be read."""
    readable, images = sorted(found.sizes), []
    for i in np.linspace(0, len(readable) - 1, min(count, len(readable))).astype(int):
        if found.split is not None:
            image, label = found.split.read(readable[i])
            images.append((thumbnail(image), class_names[label][:18]))
    if images:
        draw_grid(images, path)


def read_source(source: Path, overrides: Sequence[str]) -> ClassificationConfig:
    """The configuration of a YAML file or an installed name, or of a folder or .tar as `data.root`."""
    if source.exists() and source.suffix not in (".yaml", ".yml"):
        config = apply_overrides(ClassificationConfig(), [f"data.root={source}", *overrides])
    else:
        config = load_config(ClassificationConfig, source, overrides)
    check_config(config)
    return config
