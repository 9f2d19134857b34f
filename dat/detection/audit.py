"""The audit of a data set: summaries as text and JSON, sheets of annotated images, a plot of box sizes."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dat.detection.config import DetectionConfig
from dat.detection.data.audit_split import SplitAudit, audit_split, compare
from dat.detection.data.box_checks import resized_sides
from dat.detection.draw import draw_boxes, open_record
from dat.detection.evaluation import MEDIUM, SMALL
from dat.engine.audit import format_problems
from dat.utils.plots import draw_grid, save_plot

# COCO's AP counts no more detections of an image.
MOST_DETECTIONS = 100


def audit(config: DetectionConfig) -> dict[str, SplitAudit]:
    """Audits "train" and "val" of the data of a configuration."""
    found = {"train": audit_split(config.data, "train"), "val": audit_split(config.data, "val")}
    compare(found["train"], found["val"])
    for split in found.values():
        most = max((len(record.boxes) for record in split.annotations.records), default=0)
        if most > config.model.num_queries:
            split.add("more objects in an image than model.num_queries", f"{most}, model.num_queries is lower")
        elif most > MOST_DETECTIONS:
            split.add(f"more than {MOST_DETECTIONS} objects in an image", f"{most}, COCO's AP counts no more")
    return found


def summarize(found: SplitAudit, size: int, max_size: int) -> dict[str, Any]:
    """Counts of a split as plain values; `size` and `max_size` are the edges that its images are resized to."""
    categories, records = found.annotations.categories, found.annotations.records
    sizes, resized = found.sizes, resized_sides(found.annotations, size, max_size)
    sides = np.sqrt(sizes.prod(1))
    per_image = [len(record.boxes) for record in records]
    ids = [category.id for category in categories]
    return {
        "file": str(found.annotations.path),
        "images": len(records),
        "without_annotations": per_image.count(0),
        "turned_by_exif": found.turned,
        "unlisted_files": len(found.unlisted),
        "objects": len(sides),
        "crowds": int(sum(record.crowd.sum() for record in records)),
        "most_objects_in_an_image": max(per_image, default=0),
        "sparse_ids": bool(ids) and ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))),
        "classes": [
            {"label": label, "id": category.id, "name": category.name, "objects": int(count)}
            for label, (category, count) in enumerate(zip(categories, found.objects(), strict=True))
        ],
        "box_sides": {
            "small": int((sides < SMALL).sum()),
            "medium": int(((sides >= SMALL) & (sides < MEDIUM)).sum()),
            "large": int((sides >= MEDIUM).sum()),
            "smallest": _rounded(np.min, sizes),
            "median": _rounded(np.median, sides),
            "largest": _rounded(np.max, sizes),
            "smallest_resized": _rounded(np.min, resized),
            "below_8_resized": int((resized < 8).sum()),
        },
        "problems": [asdict(problem) for problem in found.problems.values()],
        "stops_training": found.stops,
    }


def format_summary(name: str, summary: dict[str, Any], size: int) -> str:
    """The summary of a split as text."""
    sides = summary["box_sides"]
    sparse = ", ids are not 0, 1, 2, ... (no problem: labels are)" if summary["sparse_ids"] else ""
    lines = [
        f"{name}: {summary['file']}",
        f"  {summary['images']} images, {summary['without_annotations']} without annotations, "
        f"{summary['unlisted_files']} images in its folders that no split lists",
        f"  {summary['turned_by_exif']} images are turned or mirrored as EXIF says",
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


def draw_samples(found: SplitAudit, path: Path, count: int) -> None:
    """Writes a sheet of `count` evenly chosen annotated images, if any can be read."""
    annotations = found.annotations
    readable = sorted((record for same in found.hashes.values() for record in same), key=lambda record: record.id)
    chosen = np.linspace(0, len(readable) - 1, min(count, len(readable))).astype(int)
    images = []
    for record in (readable[i] for i in chosen):
        drawn = draw_boxes(open_record(record), annotations.objects(record), annotations.categories)
        images.append((drawn, record.path.name))
    if images:
        draw_grid(images, path, columns=4, inches=4)


def draw_sizes(found: dict[str, SplitAudit], config: DetectionConfig, path: Path) -> None:
    """Plots widths against heights of the boxes, and a histogram of their sides in the image that the model sees."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    size, max_size = config.data.val.size, config.data.val.max_size
    for name, split in found.items():
        sizes, sides = split.sizes, resized_sides(split.annotations, size, max_size)
        if not len(sizes):
            continue
        left.scatter(*sizes.T, s=4, alpha=0.4, label=name)
        edges = np.geomspace(max(sides.min(), 0.1), max(sides.max(), 1) * 1.01, 40)
        right.hist(sides, edges, histtype="step", label=name)
    left.set(xlabel="width, pixels of the file", ylabel="height", xscale="log", yscale="log", title="boxes")
    right.set(xlabel=f"shorter side, pixels at a shortest edge of {size}", ylabel="boxes", xscale="log")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    save_plot(figure, path)


def _rounded(statistic: Callable[[np.ndarray], Any], values: np.ndarray) -> float | None:
    return round(float(statistic(values)), 2) if values.size else None
