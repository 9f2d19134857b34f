"""The worst mistakes of a detector: objects that it missed, and confident detections of nothing."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dat.detection.data import Annotations, ImageRecord, load_image
from dat.detection.draw import draw_boxes, to_pil
from dat.detection.evaluation import MATCH_IOU
from dat.utils.image_grid import draw_grid


@dataclass(frozen=True)
class Mistake:
    """An object that was missed, or a detection of what is no object of its class.

    `box` is (x0, y0, x1, y1) in pixels; `score`: of the detection, or the best that found the object, 0: none did.
    `near`: annotated box and label that a false detection overlaps most, None without overlap.
    """

    record: ImageRecord
    missed: bool
    box: tuple[float, ...]
    label: int
    score: float
    reason: str
    near: tuple[tuple[float, ...], int] | None = None


def find_mistakes(annotations: Annotations, results: Sequence[dict[str, Any]]) -> list[Mistake]:
    """Every missed object, from the least score that found it up, then every false detection, from the highest down.

    Objects and detections of a class are matched as in AP50: the highest score chooses first. Objects that were found
    are in the list too, at the scores that found them. Crowds are no objects, and detections in them no mistakes.
    """
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    label_of = {category.id: label for label, category in enumerate(annotations.categories)}
    missed: list[Mistake] = []
    false: list[Mistake] = []
    for record in annotations.records:
        found = sorted(by_image[record.id], key=lambda result: -result["score"])
        boxes = box_convert(torch.tensor([r["bbox"] for r in found]).reshape(-1, 4).float(), "xywh", "xyxy")
        overlap = box_iou(boxes, torch.from_numpy(record.boxes))
        labels = torch.tensor([label_of[r["category_id"]] for r in found], dtype=torch.int64)
        taken = _match(record, overlap, labels)
        scores = {target: found[detection]["score"] for detection, target in taken.items()}
        for target in (~record.crowd).nonzero()[0].tolist():
            box, label = tuple(record.boxes[target].tolist()), int(record.labels[target])
            missed.append(Mistake(record, True, box, label, scores.get(target, 0.0), ""))
        for detection, result in enumerate(found):
            if detection not in taken and not _in_crowd(record, boxes[detection], int(labels[detection])):
                false.append(_false(annotations, record, boxes, overlap, int(labels[detection]), detection, result))
    missed.sort(key=lambda mistake: (mistake.score, -_area(mistake.box)))
    return missed + sorted(false, key=lambda mistake: -mistake.score)


def draw_worst(annotations: Annotations, results: Sequence[dict[str, Any]], path: Path, count: int) -> bool:
    """Writes a sheet of the `count` worst mistakes, half of each kind; False where there are none, or count is 0.

    Objects that a detection of score 0.3 or more found, and false detections below it, are not shown.
    """
    mistakes = find_mistakes(annotations, results)
    missed = [mistake for mistake in mistakes if mistake.missed and mistake.score < 0.3]
    false = [mistake for mistake in mistakes if not mistake.missed and mistake.score >= 0.3]
    shown = missed[: count - min(len(false), count // 2)]
    shown += false[: count - len(shown)]
    # of an earlier call
    path.unlink(missing_ok=True)
    if shown:
        pictures = [(_crop(annotations, mistake), _title(annotations, mistake)) for mistake in shown]
        heading = (
            f"{len(missed)} objects missed, {len(false)} false detections of score 0.3 and more; the worst of them"
        )
        draw_grid(pictures, path, columns=6, inches=2.7, heading=heading)
    return bool(shown)


def _match(record: ImageRecord, overlap: Tensor, labels: Tensor) -> dict[int, int]:
    """Which object each detection (rows of `overlap`, by falling score) found; both occur once at most."""
    taken: dict[int, int] = {}
    free = torch.from_numpy(~record.crowd)
    targets = torch.from_numpy(record.labels)
    if not len(targets):
        return taken
    for detection in range(len(labels)):
        overlaps = overlap[detection].masked_fill(~free | (targets != labels[detection]), -1.0)
        best = int(overlaps.argmax())
        if overlaps[best] >= MATCH_IOU:
            taken[detection] = best
            free[best] = False
    return taken


def _in_crowd(record: ImageRecord, box: Tensor, label: int) -> bool:
    """Whether half of a box lies in a crowd of its class."""
    crowds = torch.from_numpy(record.boxes[record.crowd & (record.labels == label)])
    corners = torch.stack((box[:2].maximum(crowds[:, :2]), box[2:].minimum(crowds[:, 2:])))
    inside = (corners[1] - corners[0]).clamp(min=0).prod(1)
    return bool((inside >= MATCH_IOU * (box[2:] - box[:2]).prod()).any())


def _false(
    annotations: Annotations,
    record: ImageRecord,
    boxes: Tensor,
    overlap: Tensor,
    label: int,
    detection: int,
    result: dict[str, Any],
) -> Mistake:
    """A detection that found nothing, with what is the matter with it."""
    near, reason = None, "nothing is there"
    if len(record.boxes) and overlap[detection].max() > 0.1:
        best = int(overlap[detection].argmax())
        other = int(record.labels[best])
        near = (tuple(record.boxes[best].tolist()), other)
        iou = float(overlap[detection, best])
        if other != label:
            reason = f"is {annotations.categories[other].name}"
        else:
            reason = "found twice" if iou >= MATCH_IOU else f"overlap {iou:.2f}"
    return Mistake(record, False, tuple(boxes[detection].tolist()), label, result["score"], reason, near)


def _area(box: tuple[float, ...]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _title(annotations: Annotations, mistake: Mistake) -> str:
    name = annotations.categories[mistake.label].name
    what = f"missed {name}" if mistake.missed else f"false {name}"
    detail = f"best score {mistake.score:.2f}" if mistake.missed else f"{mistake.score:.2f}, {mistake.reason}"
    return f"{what[:28]}, {detail}\n{mistake.record.path.name[-36:]}"


def _crop(annotations: Annotations, mistake: Mistake) -> Any:
    """The surroundings of a mistake, of thrice its size, with its box and the object that a false one overlaps most."""
    record = mistake.record
    x0, y0, x1, y1 = mistake.box
    side = max(3 * max(x1 - x0, y1 - y0), 0.25 * max(record.width, record.height))
    # inside the image where the image is large enough
    left = max(0, min(round((x0 + x1 - side) / 2), record.width - round(side)))
    top = max(0, min(round((y0 + y1 - side) / 2), record.height - round(side)))
    right, bottom = min(record.width, left + round(side)), min(record.height, top + round(side))
    image = to_pil(load_image(record.path, (record.width, record.height))).crop((left, top, right, bottom))
    score = {} if mistake.missed else {"score": mistake.score}
    drawn = [(mistake.box, mistake.label, score), *([(*mistake.near, {})] if mistake.near else [])]
    results = [
        {
            "category_id": annotations.categories[label].id,
            "bbox": (box[0] - left, box[1] - top, box[2] - box[0], box[3] - box[1]),
            **extra,
        }
        for box, label, extra in drawn
    ]
    return draw_boxes(image, results, annotations.categories)
