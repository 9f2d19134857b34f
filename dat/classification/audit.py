"""Looks through a data set of pictures in class folders before it is trained on, and lists every problem that it finds.

    python -m classification.audit CONFIG_OR_FOLDER [key.path=value ...] [--out runs/audit]

CONFIG is the configuration that is to train. FOLDER holds train/ and val/ (other names: data.train.path=...), folders
or .tar files of a folder per class each, or data of a library (data.train.path=wds/shards), or is such a folder or .tar
itself. Prints tables and writes audit.json and a sheet of pictures for each split into the folder `--out`. Pictures
that cannot be read are left out by training; the exit code is 1 where something would stop it, else 0.
"""

import argparse
import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

from dat.classification.config import ClassificationConfig, check_config
from dat.classification.readers import Split, library, open_place, open_split
from dat.engine.audit import Findings, format_problems
from dat.engine.config import apply_overrides, load_config
from dat.utils.errors import DataError, one_line
from dat.utils.files import write_json
from dat.utils.images import UNREADABLE, open_image, to_rgb
from dat.utils.plots import draw_grid, thumbnail

# fewer pictures of a class than this are remarked on
FEW = 10


@dataclass
class PictureSurvey(Findings):
    """What a split holds; `split` None: it cannot be opened.

    `sizes`: (width, height) in pixels of the pictures that can be read by index, `classes` their classes, `modes`
    Pillow's modes by number, `hashes` indices by the digest of the file.
    """

    place: str
    split: Split | None = None
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    hashes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def survey(place: str, split: Split, class_names: Sequence[str]) -> PictureSurvey:
    """Reads every picture of a split, on as many threads as there are cores. `class_names`: what labels number."""
    found, lock = PictureSurvey(place, split), Lock()

    def check(index: int) -> tuple[int, str, Any]:
        """The index, the file's digest, and its size, mode and class, or what is wrong with it."""
        try:
            # a tar is one open file for all
            with lock:
                file, label = split.reader[index]
                with file:
                    content = file.read()
            with open_image(BytesIO(content)) as picture:
                mode = picture.mode
                to_rgb(picture)
                return index, hashlib.blake2b(content, digest_size=16).hexdigest(), (picture.size, mode, int(label))
        except UNREADABLE as error:
            return index, "", f"{split.name(index)}: {one_line(error, 120)}"

    with ThreadPoolExecutor() as pool:
        checks = pool.map(check, range(len(split)))
        for index, digest, result in tqdm(checks, total=len(split), desc="pictures", leave=False, disable=None):
            if not digest:
                found.add("picture that cannot be read, left out", result)
                continue
            found.sizes[index], mode, found.classes[index] = result
            found.modes[mode] += 1
            found.hashes[digest].append(index)
    for name in split.left_out:
        found.add("file that is no picture, left out", name)
    _survey_classes(found, class_names)
    for indices in found.hashes.values():
        if len(indices) > 1:
            names = ", ".join(split.name(index) for index in indices[:3])
            several = len({found.classes[index] for index in indices}) > 1
            found.add(f"same picture {'in several classes' if several else 'twice'}", names, count=len(indices) - 1)
    if not found.sizes:
        found.add("no picture can be read", place, stops=True)
    return found


def _survey_classes(found: PictureSurvey, class_names: Sequence[str]) -> None:
    counts = Counter(found.classes.values())
    for k, name in enumerate(class_names):
        if not counts[k]:
            found.add("class without pictures", name)
        elif counts[k] < FEW:
            found.add(f"class of fewer than {FEW} pictures", f"{name}: {counts[k]}")


def audit(splits: dict[str, Any]) -> dict[str, PictureSurvey]:
    """The surveys of splits, each a function of class names (None: its own) that opens it; the first is training's."""
    found: dict[str, PictureSurvey] = {}
    class_names: list[str] | None = None
    for name, (place, open_it) in splits.items():
        try:
            split = open_it(class_names)
        except DataError as error:
            found[name] = PictureSurvey(place)
            found[name].add("cannot be opened", str(error), stops=True)
            continue
        class_names = class_names or split.class_names
        found[name] = survey(place, split, class_names)
    first, *others = found.values()
    for other in others:
        _compare(first, other)
    return found


def _compare(train: PictureSurvey, val: PictureSurvey) -> None:
    if train.split is None or val.split is None:
        return
    for digest in val.hashes.keys() & train.hashes.keys():
        here, there = val.hashes[digest], train.hashes[digest]
        text = f"{val.split.name(here[0])} is {train.split.name(there[0])} of training"
        val.add("picture of training", text, count=len(here))


def summarize(found: PictureSurvey, class_names: Sequence[str], img_size: int) -> dict[str, Any]:
    """Counts of a split as plain values; `img_size`: the side that pictures are resized to."""
    sides = np.array(list(found.sizes.values())).reshape(-1, 2)
    counts = Counter(found.classes.values())
    shorter = sides.min(1) if len(sides) else sides
    return {
        "place": found.place,
        "pictures": 0 if found.split is None else len(found.split),
        "readable": len(sides),
        "modes": dict(found.modes.most_common()),
        "sides": {
            "smallest": int(sides.min()), "median": float(np.median(shorter)), "largest": int(sides.max()),
            "below_img_size": int((shorter < img_size).sum()),
        } if len(sides) else None,
        "classes": [{"name": name, "pictures": counts[k]} for k, name in enumerate(class_names)],
        "problems": [asdict(problem) for problem in found.problems.values()],
        "stops_training": found.stops,
    }  # fmt: skip


def format_summaries(summaries: dict[str, dict[str, Any]], img_size: int) -> str:
    """The summaries of all splits as text, classes beside each other."""
    lines = []
    for name, summary in summaries.items():
        lines.append(f"{name}: {summary['place']}")
        modes = ", ".join(f"{count} {mode}" for mode, count in summary["modes"].items())
        lines.append(f"  {summary['pictures']} pictures, {summary['readable']} of them can be read ({modes})")
        sides = summary["sides"]
        if sides:
            lines.append(
                f"  shortest side {sides['smallest']} pixels, median of the shorter sides {sides['median']:g}, longest "
                f"{sides['largest']}; {sides['below_img_size']} pictures are smaller than data.img_size, {img_size}"
            )
        lines += format_problems(summary["problems"])
    classes = [summary["classes"] for summary in summaries.values() if summary["classes"]]
    if classes:
        width = max(8, *(len(row["name"]) for row in classes[0]))
        lines.append(f"{len(classes[0])} classes".ljust(width) + "".join(f"  {name:>8}" for name in summaries))
        for rows in zip(*classes, strict=True):
            lines.append(f"{rows[0]['name']:<{width}}" + "".join(f"  {row['pictures']:>8}" for row in rows))
    return "\n".join(lines)


def draw_samples(found: PictureSurvey, class_names: Sequence[str], path: Path, count: int) -> bool:
    """Writes a sheet of `count` pictures, evenly chosen among those that can be read; False when there are none."""
    readable, pictures = sorted(found.sizes), []
    for i in np.linspace(0, len(readable) - 1, min(count, len(readable))).astype(int):
        if found.split is not None:
            picture, label = found.split.read(readable[i])
            pictures.append((thumbnail(picture), class_names[label][:18]))
    if pictures:
        draw_grid(pictures, path)
    return bool(pictures)


def find_splits(source: Path, overrides: Sequence[str]) -> tuple[ClassificationConfig, dict[str, Any]]:
    """The configuration, and by name the place of each split and a function that opens it, for audit."""
    if source.suffix in (".yaml", ".yml"):
        config = load_config(ClassificationConfig, source, overrides)
    else:
        config = apply_overrides(ClassificationConfig(), [f"data.root={source}", *overrides])
        if not source.exists():
            raise DataError(f"{source}: no such configuration or folder")
    check_config(config)
    data = config.data
    single = not library(data.train.path) and not (source / data.train.path).exists()
    if single and source.suffix not in (".yaml", ".yml"):
        return config, {"all": (str(source), lambda names: open_place(source, str(source), names))}
    return config, {
        "train": (f"{data.root}/{data.train.path}", lambda names: open_split(data, "train", names)),
        "val": (f"{data.root}/{data.val.path}", lambda names: open_split(data, "val", names)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m classification.audit", description="Checks pictures of classes.")
    parser.add_argument(
        "source", type=Path, metavar="CONFIG_OR_FOLDER", help="YAML file, or folder or .tar of the data"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as data.val.path=test")
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), help="folder for what it writes (runs/audit)")
    parser.add_argument("--samples", type=int, default=32, help="pictures on a sheet (32)")
    options = parser.parse_intermixed_args(arguments)
    config, splits = find_splits(options.source, options.overrides)
    found = audit(splits)
    class_names = next((part.split.class_names for part in found.values() if part.split is not None), [])
    img_size = config.data.img_size
    summaries = {name: summarize(part, class_names, img_size) for name, part in found.items()}
    print(format_summaries(summaries, img_size))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "audit.json", summaries)
    for name, part in found.items():
        draw_samples(part, class_names, options.out / f"samples_{name}.png", options.samples)
    stops = any(part.stops for part in found.values())
    print(f"{'training would stop, see above' if stops else 'training can start'}; written to {options.out}")
    if stops:
        sys.exit(1)
