"""Looks through a data set in COCO's format before it is trained on, and lists every problem that it finds.

    python -m detection.audit DIR [key.path=value ...] [--config CONFIG] [--out runs/audit]

DIR holds train.json, val.json and images/; other names: data.train.annotations=..., data.val.images=... and so on.
CONFIG (default: configs/detection/finetune.yaml) is the configuration that is to train. Prints tables and writes
audit.json, samples_train.png, samples_val.png (annotated images) and boxes.png (their sizes) into the folder `--out`.
The exit code is 1 where something would stop training, else 0.
"""

import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from dat.detection.config import DetectionConfig
from dat.detection.data import load_image, resized_size
from dat.detection.data.statistics import Survey, compare, survey
from dat.detection.draw import draw_boxes, to_pil
from dat.detection.evaluation import MEDIUM, SMALL
from dat.engine.audit import format_problems
from dat.utils.plots import draw_grid

FINETUNE = Path(__file__).parents[1] / "configs/detection/finetune.yaml"

# more detections of an image do not count in COCO's AP
MOST_DETECTIONS = 100


def audit(config: DetectionConfig, show_progress: bool = False) -> dict[str, Survey]:
    """The surveys "train" and "val" of the data of a configuration."""

    def progress(items: Any, total: int) -> Any:
        return tqdm(items, total=total, desc="images", leave=False, disable=None if show_progress else True)

    root = Path(config.data.root)
    splits = {"train": config.data.train, "val": config.data.val}
    found = {name: survey(root / s.annotations, root / s.images, progress) for name, s in splits.items()}
    compare(found["train"], found["val"])
    for split in found.values():
        most = max(split.per_image().values(), default=0)
        if most > config.model.num_queries:
            split.add("more objects in an image than model.num_queries", f"{most}, model.num_queries is lower")
        elif most > MOST_DETECTIONS:
            split.add(f"more than {MOST_DETECTIONS} objects in an image", f"{most}, COCO's AP counts no more")
    return found


def summarize(found: Survey, size: int, max_size: int) -> dict[str, Any]:
    """Counts of a split as plain values; `size` and `max_size` are the edges that its images are resized to."""
    sides = np.sqrt(found.boxes[:, 2] * found.boxes[:, 3])
    resized = resized_sides(found, size, max_size)
    per_image = list(found.per_image().values())
    ids = [category.id for category in found.categories]
    objects = found.objects()
    return {
        "file": str(found.path),
        "images": len(found.images),
        "without_annotations": per_image.count(0),
        "unlisted_files": len(found.unlisted),
        "objects": len(sides),
        "crowds": found.crowds,
        "most_objects_in_an_image": max(per_image, default=0),
        "sparse_ids": bool(ids) and ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))),
        "classes": [
            {"label": label, "id": category.id, "name": category.name, "objects": objects[category.id]}
            for label, category in enumerate(found.categories)
        ],
        "box_sides": {
            "small": int((sides < SMALL).sum()),
            "medium": int(((sides >= SMALL) & (sides < MEDIUM)).sum()),
            "large": int((sides >= MEDIUM).sum()),
            "smallest": _round(found.boxes[:, 2:].min()) if len(sides) else None,
            "median": _round(np.median(sides)) if len(sides) else None,
            "largest": _round(found.boxes[:, 2:].max()) if len(sides) else None,
            "smallest_resized": _round(resized.min()) if len(sides) else None,
            "below_8_resized": int((resized < 8).sum()),
        },
        "problems": [asdict(problem) for problem in found.problems.values()],
        "stops_training": found.stops,
    }


def resized_sides(found: Survey, size: int, max_size: int) -> np.ndarray:
    """The shorter side of every box, in pixels of the image that the model sees."""
    scale = {
        image_id: resized_size(image["height"], image["width"], size, max_size)[0] / image["height"]
        for image_id, image in found.images.items()
    }
    return found.boxes[:, 2:].min(1, initial=math.inf) * np.array([scale[image_id] for image_id in found.image_of])


def format_summary(name: str, summary: dict[str, Any], size: int) -> str:
    """The summary of a split as text."""
    sides = summary["box_sides"]
    sparse = ", ids are not 0, 1, 2, ... (no problem: labels are)" if summary["sparse_ids"] else ""
    lines = [
        f"{name}: {summary['file']}",
        f"  {summary['images']} images, {summary['without_annotations']} without annotations, "
        f"{summary['unlisted_files']} files in its folder that no split lists",
        f"  {summary['objects']} objects, {summary['crowds']} of them crowds, "
        f"at most {summary['most_objects_in_an_image']} in an image",
        f"  {len(summary['classes'])} classes{sparse}",
    ]
    width = max((len(c["name"]) for c in summary["classes"]), default=4)
    lines.append(f"    {'label':>5}  {'id':>8}  {'name':<{width}}  {'objects':>8}")
    lines += [f"    {c['label']:>5}  {c['id']:>8}  {c['name']:<{width}}  {c['objects']:>8}" for c in summary["classes"]]
    lines.append(
        f"  boxes: {sides['small']} small (below {SMALL} pixels), {sides['medium']} medium, {sides['large']} large "
        f"(from {MEDIUM}); shortest side {sides['smallest']}, median {sides['median']}, longest side {sides['largest']}"
    )
    lines.append(
        f"  resized to a shortest edge of {size}: shortest side {sides['smallest_resized']}, "
        f"{sides['below_8_resized']} boxes below 8 pixels"
    )
    return "\n".join([*lines, *format_problems(summary["problems"])])


def draw_samples(found: Survey, folder: Path, path: Path, count: int) -> bool:
    """Writes a sheet of `count` annotated images, evenly chosen; False when none can be read."""
    boxes = defaultdict(list)
    for image_id, category_id, box in zip(found.image_of, found.category_of, found.boxes.tolist(), strict=True):
        boxes[image_id].append({"category_id": category_id, "bbox": box})
    readable = sorted(image_id for ids in found.hashes.values() for image_id in ids)
    pictures = []
    for i in np.linspace(0, len(readable) - 1, min(count, len(readable))).astype(int):
        image = found.images[readable[i]]
        picture = to_pil(load_image(folder / image["file_name"], (image["width"], image["height"])))
        pictures.append((draw_boxes(picture, boxes[image["id"]], found.categories), image["file_name"]))
    if pictures:
        draw_grid(pictures, path, columns=4, inches=4)
    return bool(pictures)


def draw_sizes(found: dict[str, Survey], config: DetectionConfig, path: Path) -> None:
    """Plots widths against heights of the boxes, and how many have which size in the image that the model sees."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    size, max_size = config.data.val.size, config.data.val.max_size
    for name, split in found.items():
        if not len(split.boxes):
            continue
        left.scatter(split.boxes[:, 2], split.boxes[:, 3], s=4, alpha=0.4, label=name)
        sides = resized_sides(split, size, max_size)
        edges = np.geomspace(max(sides.min(), 0.1), max(sides.max(), 1) * 1.01, 40)
        right.hist(sides, edges, histtype="step", label=name)
    left.set(xlabel="width, pixels of the file", ylabel="height", xscale="log", yscale="log", title="boxes")
    right.set(xlabel=f"shorter side, pixels at a shortest edge of {size}", ylabel="boxes", xscale="log")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)


def _round(value: float) -> float:
    return round(float(value), 2)
