"""Runs a detector over a data set, and measures average precision with faster-coco-eval."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from dat.detection.data import Annotations, Batch, Category
from dat.detection.models.base import BaseDETR
from dat.detection.post_process import best_detections, select_detections
from dat.engine.optim import amp_context
from dat.utils.modules import evaluating

# COCO's limits between small, medium and large objects: sides in pixels of squares of those areas.
SMALL, MEDIUM = 32, 96

# Overlap from which a detection counts in AP50, in confusions and among the worst mistakes.
MATCH_IOU = 0.5


@torch.inference_mode()
def detect(
    model: BaseDETR,
    batches: Iterable[Batch],
    categories: Sequence[Category],
    device: torch.device,
    amp: str = "none",
    top_k: int = 100,
    nms: float = 1.0,
    one_class: bool = False,
) -> list[dict[str, Any]]:
    """COCO results of every image, at most top_k: image_id, category_id (the file's own), bbox (x, y, w, h), score.

    The model runs in evaluation mode and returns to the mode that it was in. `nms`, `one_class`: see select_detections.
    """
    results: list[dict[str, Any]] = []
    with evaluating(model):
        for images, mask, targets in batches:
            with amp_context(device, amp):
                images = images.to(device, non_blocking=True)
                outputs = model(images, None if mask is None else mask.to(device, non_blocking=True))
            found = best_detections(outputs, torch.tensor([target["size"] for target in targets]), model.scores, top_k)
            for target, *values in zip(targets, *(tensor.cpu() for tensor in found), strict=True):
                scores, labels, boxes, _ = select_detections(values, nms, one_class)
                detections = {"scores": scores, "labels": labels, "boxes": boxes}
                results += to_results(target["image_id"], target["size"], detections, categories)
    return results


def to_results(
    image_id: int, size: tuple[int, int], detections: dict[str, Tensor], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """COCO results of one image of `size` (height, width), its boxes (xyxy in pixels) clipped to it."""
    boxes = box_convert(clip_boxes_to_image(detections["boxes"].float().cpu(), size), "xyxy", "xywh")
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


def _compare(annotations: Annotations, results: Sequence[dict[str, Any]], **options: Any) -> Any:
    # Models and training steps run without the library.
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(annotations.to_coco())
    return COCOeval_faster(truth, truth.loadRes([dict(result) for result in results]), "bbox", **options)


@dataclass(frozen=True)
class Evaluation:
    """COCO's comparison of results with annotations, at T = 10 overlaps .5, .55, ... .95 and for A = 4 sizes.

    Sizes are all, small, medium and large; -1 marks classes and sizes without objects.

    Attributes:
        annotations, results: compared with each other; results are in COCO's format.
        precision: [T, 101, K, A], the highest at each recall 0, .01, ... 1 or beyond it.
        scores: [T, 101, K, A], of the detection that reaches the recall; 0 where none does.
        recall: [T, K, A], of 100 detections of a class and image.
    """

    annotations: Annotations
    results: list[dict[str, Any]]
    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray

    @classmethod
    def of(cls, annotations: Annotations, results: list[dict[str, Any]], every: bool = False) -> "Evaluation":
        """Runs COCO's evaluation; crowds are ignored.

        `every`: AP counts every detection. COCO's counts 100 of a class and image, and large images have more objects.
        """
        evaluation = _compare(annotations, results)
        if every:
            evaluation.params.maxDets = [1, 10, 100, max(100, len(results))]
        evaluation.evaluate()
        evaluation.accumulate()
        precision, scores, recall = (np.asarray(evaluation.eval[name]) for name in ("precision", "scores", "recall"))
        # The library sorts classes by their ids.
        place = np.argsort(np.argsort([category.id for category in annotations.categories]))
        precision, scores, recall = precision[..., -1], scores[..., -1], recall[..., 2]
        return cls(annotations, results, precision[:, :, place], scores[:, :, place], recall[:, place])

    def metrics(self) -> dict[str, Any]:
        """AP as COCO defines it, 0 to 1; None where there is nothing to find.

        {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "per_class": {name: {"AP", "AP50", "objects"}}}.
        """
        precision, categories = self.precision, self.annotations.categories
        metrics: dict[str, Any] = {name: _mean(precision[..., a]) for a, name in enumerate(("AP", "APs", "APm", "APl"))}
        metrics |= {"AP50": _mean(precision[0, ..., 0]), "AP75": _mean(precision[5, ..., 0])}
        metrics["AR100"] = _mean(self.recall[..., 0])
        labels = np.concatenate([record.labels[~record.crowd] for record in self.annotations.records])
        counts = np.bincount(labels, minlength=len(categories)).tolist()
        metrics["per_class"] = {
            category.name: {"AP": _mean(precision[:, :, k, 0]), "AP50": _mean(precision[0, :, k, 0]), "objects": count}
            for k, (category, count) in enumerate(zip(categories, counts, strict=True))
        }
        return metrics

    def best_f1(self, label: int) -> tuple[float, float, float, float] | None:
        """(F1, score, recall, precision) of a class where F1 is highest at an overlap of .5; None without objects."""
        precision, recall = self.precision[0, :, label, 0], np.linspace(0, 1, self.precision.shape[1])
        if precision[0] < 0:
            return None
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1.argmax())
        return float(f1[best]), float(self.scores[0, best, label, 0]), float(recall[best]), float(precision[best])


def average_precision(annotations: Annotations, results: list[dict[str, Any]], every: bool = False) -> dict[str, Any]:
    """The metrics of an Evaluation."""
    return Evaluation.of(annotations, results, every).metrics()


def match_detections(
    annotations: Annotations, results: Sequence[dict[str, Any]], by_class: bool
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """COCO's matching at an overlap of MATCH_IOU: the highest scores choose first, and objects are found once.

    Args:
        annotations, results: compared with each other.
        by_class: match objects and detections of the same class only.

    Returns:
        The annotated objects without crowds, with "dt_id" of the detection that found them, if any; and all results by
        their ids, with "gt_id" where they found an object or are in a crowd.
    """
    evaluation = _compare(annotations, results, extra_calc=True)
    evaluation.params.useCats, evaluation.params.iouThrs = int(by_class), np.array([MATCH_IOU])
    evaluation.params.maxDets, evaluation.params.areaRng = [max(1, len(results))], [[0, 1e10]]
    evaluation.evaluate()
    evaluation.accumulate()
    return [target for target in evaluation.cocoGt.anns.values() if not target["iscrowd"]], evaluation.cocoDt.anns


def count_confusions(annotations: Annotations, results: Sequence[dict[str, Any]], threshold: float) -> np.ndarray:
    """Objects by class (row) and class of the detection that found them (column), [K + 1, K + 1] int64.

    Detections of score `threshold` or more find objects of any class. The last column counts objects that none found,
    the last row detections that found none. Crowds, and detections in them, are not counted.
    """
    kept = [result for result in results if result["score"] >= threshold]
    objects, detections = match_detections(annotations, kept, by_class=False)
    label_of = {category.id: label for label, category in enumerate(annotations.categories)}
    none = len(label_of)
    counts = np.zeros((none + 1, none + 1), dtype=np.int64)
    for target in objects:
        found = label_of[detections[target["dt_id"]]["category_id"]] if "dt_id" in target else none
        counts[label_of[target["category_id"]], found] += 1
    for detection in detections.values():
        if "gt_id" not in detection:
            counts[none, label_of[detection["category_id"]]] += 1
    return counts


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
    # COCO's evaluation gives -1 for classes and sizes without objects.
    values = values[values > -1]
    return round(float(values.mean()), 5) if values.size else None


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
