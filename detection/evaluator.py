"""Runs a detector over a data set, and measures average precision with faster-coco-eval."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from dat.training.distributed import gather
from dat.training.loop import amp_context

from .base import BaseDETR
from .data import Batch, Category, CocoAnnotations
from .post_process import post_process

# what is measured over all sizes, then over COCO's small, medium and large objects
_AREAS = {"AP": 0, "APs": 1, "APm": 2, "APl": 3}


@torch.inference_mode()
def detect(
    model: BaseDETR,
    batches: Iterable[Batch],
    categories: Sequence[Category],
    device: torch.device,
    amp: str = "none",
    top_k: int = 100,
) -> list[dict[str, Any]]:
    """COCO results of every image, at most top_k: image_id, category_id (the file's own), bbox (x, y, w, h), score.

    The model is run in evaluation mode and left as it was.
    """
    training = model.training
    model.eval()
    results: list[dict[str, Any]] = []
    for images, mask, targets in batches:
        with amp_context(device, amp):
            outputs = model(images.to(device), None if mask is None else mask.to(device))
        found = post_process(outputs, torch.tensor([target["size"] for target in targets]), model.scores, top_k)
        for target, detections in zip(targets, found, strict=True):
            results += to_results(target["image_id"], target["size"], detections, categories)
    model.train(training)
    return results


def to_results(
    image_id: int, size: tuple[int, int], detections: dict[str, Tensor], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """COCO results of one image of `size` (height, width), its boxes (xyxy in pixels) clipped to it."""
    height, width = size
    boxes = detections["boxes"].float().cpu().clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    boxes[:, 2:] -= boxes[:, :2]
    scores, labels = detections["scores"].float().tolist(), detections["labels"].tolist()
    return [
        {
            "image_id": image_id,
            "category_id": categories[label].id,
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 5),
        }
        for score, label, box in zip(scores, labels, boxes.tolist(), strict=True)
    ]


def gather_results(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of all processes, in the order of the ranks; shares may be of any size, or empty."""
    return [result for share in gather(results) for result in share]


def average_precision(annotations: CocoAnnotations, results: list[dict[str, Any]]) -> dict[str, Any]:
    """AP as COCO defines it, 0 to 1, crowds ignored; None where there is nothing to find.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "per_class": {name: {"AP", "AP50", "objects"}}}.
    """
    truth = COCO(annotations.to_coco())
    evaluation = COCOeval_faster(truth, truth.loadRes([dict(result) for result in results]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    # [IoU thresholds, recalls, classes, areas, most detections], [IoU thresholds, classes, areas, most detections]
    precision, recall = np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])
    metrics: dict[str, Any] = {name: _mean(precision[:, :, :, area, -1]) for name, area in _AREAS.items()}
    metrics |= {"AP50": _mean(precision[0, :, :, 0, -1]), "AP75": _mean(precision[5, :, :, 0, -1])}
    metrics["AR100"] = _mean(recall[:, :, 0, -1])
    counts = np.bincount(
        np.concatenate([record.labels[~record.crowd] for record in annotations.records]),
        minlength=len(annotations.categories),
    )
    metrics["per_class"] = {
        category.name: {
            "AP": _mean(precision[:, :, label, 0, -1]),
            "AP50": _mean(precision[0, :, label, 0, -1]),
            "objects": int(counts[label]),
        }
        for label, category in enumerate(annotations.categories)
    }
    return metrics


def format_table(metrics: dict[str, Any]) -> str:
    """The metrics as text: AP by class, then over all."""
    rows = [("class", "objects", "AP", "AP50")]
    rows += [(name, str(m["objects"]), _show(m["AP"]), _show(m["AP50"])) for name, m in metrics["per_class"].items()]
    total = str(sum(m["objects"] for m in metrics["per_class"].values()))
    rows.append(("all", total, _show(metrics["AP"]), _show(metrics["AP50"])))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {objects:>8}  {ap:>6}  {ap50:>6}" for name, objects, ap, ap50 in rows]
    others = "  ".join(f"{name} {_show(metrics[name])}" for name in ("AP75", "APs", "APm", "APl", "AR100"))
    return "\n".join([*lines, others])


def _mean(values: np.ndarray) -> float | None:
    # -1 marks classes and sizes without objects
    values = values[values > -1]
    return round(float(values.mean()), 5) if values.size else None


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
