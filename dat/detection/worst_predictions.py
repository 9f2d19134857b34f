"""The worst mistakes of a detector: missed objects, and confident detections where there is no such object."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_convert, box_iou

from dat.detection.data import Annotations, ImageRecord
from dat.detection.draw import draw_boxes, open_record
from dat.detection.evaluation import MATCH_IOU, match_detections
from dat.utils.plots import draw_grid

# An object is missed if no detection of at least this score finds it; detections below it are no mistakes.
THRESHOLD = 0.3


@dataclass(frozen=True)
class Mistake:
    """A missed object, or a false detection.

    `entry` is the annotation or the result, in COCO's format. `score`: of the detection, or of the best that found the
    object, 0: none did. Of a false detection, `reason` is its fault and `near` the annotation that it overlaps most.
    """

    record: ImageRecord
    entry: dict[str, Any]
    missed: bool
    score: float
    reason: str = ""
    near: dict[str, Any] | None = None


def find_mistakes(annotations: Annotations, results: Sequence[dict[str, Any]]) -> list[Mistake]:
    """All objects by increasing best score, then all false detections by decreasing score.

    Objects and detections of a class are matched as for AP50. Crowds, and detections in them, are left out.
    """
    objects, detections = match_detections(annotations, results, by_class=True)
    records = {record.id: record for record in annotations.records}
    missed = [
        Mistake(records[o["image_id"]], o, True, detections[o["dt_id"]]["score"] if "dt_id" in o else 0.0)
        for o in objects
    ]
    false = [
        Mistake(records[d["image_id"]], d, False, d["score"], *_explain(annotations, records[d["image_id"]], d))
        for d in detections.values()
        if "gt_id" not in d
    ]
    missed.sort(key=lambda mistake: (mistake.score, -mistake.entry["bbox"][2] * mistake.entry["bbox"][3]))
    return missed + sorted(false, key=lambda mistake: -mistake.score)


def draw_worst(annotations: Annotations, results: Sequence[dict[str, Any]], path: Path, count: int) -> bool:
    """Writes a sheet of the `count` worst mistakes, half of each kind; False where there are none, or count is 0."""
    mistakes = find_mistakes(annotations, results)
    missed = [mistake for mistake in mistakes if mistake.missed and mistake.score < THRESHOLD]
    false = [mistake for mistake in mistakes if not mistake.missed and mistake.score >= THRESHOLD]
    shown = missed[: count - min(len(false), count // 2)]
    shown += false[: count - len(shown)]
    # Remove the sheet of an earlier call.
    path.unlink(missing_ok=True)
    if shown:
        images = [(_crop(annotations, mistake), _title(annotations, mistake)) for mistake in shown]
        heading = (
            f"{len(missed)} objects missed, {len(false)} false detections of score {THRESHOLD:g} or more; the worst"
        )
        draw_grid(images, path, columns=6, inches=2.7, heading=heading)
    return bool(shown)


def _explain(
    annotations: Annotations, record: ImageRecord, detection: dict[str, Any]
) -> tuple[str, dict[str, Any] | None]:
    """The fault of a false detection, and the annotation that it overlaps most."""
    box = box_convert(torch.tensor([detection["bbox"]], dtype=torch.float32), "xywh", "xyxy")
    overlaps = box_iou(box, torch.from_numpy(record.boxes))[0]
    if not len(overlaps) or overlaps.max() <= 0.1:
        return "nothing is there", None
    best = int(overlaps.argmax())
    near = annotations.objects(record)[best]
    if near["category_id"] != detection["category_id"]:
        return f"is {_name(annotations, near)}", near
    return "found twice" if overlaps[best] >= MATCH_IOU else f"overlap {overlaps[best]:.2f}", near


def _name(annotations: Annotations, entry: dict[str, Any]) -> str:
    return next(category.name for category in annotations.categories if category.id == entry["category_id"])


def _title(annotations: Annotations, mistake: Mistake) -> str:
    kind = f"{'missed' if mistake.missed else 'false'} {_name(annotations, mistake.entry)}"
    detail = f"best score {mistake.score:.2f}" if mistake.missed else f"{mistake.score:.2f}, {mistake.reason}"
    return f"{kind[:28]}, {detail[:24]}\n{mistake.record.path.name[-36:]}"


def _crop(annotations: Annotations, mistake: Mistake) -> Image.Image:
    """The surroundings of a mistake, three times its size, with the boxes of its entry and of the nearest object."""
    record = mistake.record
    x, y, w, h = mistake.entry["bbox"]
    side = round(max(3 * max(w, h), 0.25 * max(record.width, record.height)))
    # Shift the crop into the image where the image is large enough.
    left = max(0, min(round(x + (w - side) / 2), record.width - side))
    top = max(0, min(round(y + (h - side) / 2), record.height - side))
    corners = (left, top, min(record.width, left + side), min(record.height, top + side))
    image = open_record(record).crop(corners)
    shown = []
    for entry in filter(None, (mistake.entry, mistake.near)):
        x, y, w, h = entry["bbox"]
        shown.append({**entry, "bbox": (x - left, y - top, w, h)})
    return draw_boxes(image, shown, annotations.categories)
