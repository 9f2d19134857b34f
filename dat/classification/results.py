"""Predictions for the images of a split, and the metrics that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dat.utils.files import atomic_write

# Most rows of a printed table of classes.
MOST_ROWS = 40


@dataclass
class Results:
    """Arrays with an entry for each of the n readable images, in their order in the split.

    Attributes:
        index, labels: [n] int64.
        top: [n, k] int64, the k = 5 (or all) most probable classes, and `scores` [n, k] float32, their probabilities.
        losses: [n] float64, cross-entropy.
    """

    index: np.ndarray
    labels: np.ndarray
    top: np.ndarray
    scores: np.ndarray
    losses: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Results"]) -> "Results":
        """Joins the results of one or more batches or processes."""
        joined = [np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)]
        order = np.argsort(joined[0], kind="stable")
        return cls(*(array[order] for array in joined))

    def save(self, path: Path) -> None:
        """Replaces `path`, .npz; a crash leaves the old file or the new one."""
        with atomic_write(path) as temporary:
            np.savez(temporary, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def correct(self, k: int) -> np.ndarray:
        """Whether the label is among the k most probable classes, [n] bool."""
        return (self.top[:, :k] == self.labels[:, None]).any(1)

    def metrics(self) -> dict[str, float]:
        """{"top1", "top5"} in percent, {"loss"} the mean cross-entropy, {"images"} their number."""
        top1, top5 = (100 * float(self.correct(k).mean()) for k in (1, 5))
        return {"top1": top1, "top5": top5, "loss": float(self.losses.mean()), "images": len(self.index)}

    def confusion(self, num_classes: int) -> np.ndarray:
        """Images by label (row) and predicted class (column), [num_classes, num_classes] int64."""
        counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(counts, (self.labels, self.top[:, 0]), 1)
        return counts

    def mistakes(self) -> np.ndarray:
        """Positions of the images whose label is not the most probable class, by decreasing score."""
        wrong = np.flatnonzero(~self.correct(1))
        return wrong[np.argsort(-self.scores[wrong, 0], kind="stable")]

    def summarize(self, class_names: Sequence[str], **more: Any) -> dict[str, Any]:
        """The content of metrics.json: the metrics, `more`, and "per_class", see class_metrics."""
        return {**self.metrics(), **more, "per_class": class_metrics(self.confusion(len(class_names)), class_names)}


def class_metrics(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{name: {"images", "top1", "mistaken_for"}}: percent, and the class that most mistakes are predicted as.

    top1 is None without images, mistaken_for without mistakes.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for k, (name, counts) in enumerate(zip(class_names, confusion, strict=True)):
        images, others = int(counts.sum()), np.where(np.arange(len(counts)) == k, 0, counts)
        # ImageNet has two classes named crane.
        metrics[f"{name} ({k})" if name in metrics else name] = {
            "images": images,
            "top1": round(100 * int(counts[k]) / images, 2) if images else None,
            "mistaken_for": class_names[int(others.argmax())] if others.any() else None,
        }
    return metrics


def format_table(metrics: dict[str, Any]) -> str:
    """Metrics as text: a table of all classes in order, or of the worst of many, then the other numbers on a line."""
    shown = list(metrics["per_class"].items())
    heading = f"{len(shown)} classes"
    if len(shown) > MOST_ROWS:
        heading = f"the worst {MOST_ROWS} of {heading}"
        shown = sorted(shown, key=lambda item: 101 if item[1]["top1"] is None else item[1]["top1"])[:MOST_ROWS]
    width = max(len(heading), *(len(name) for name, _ in shown))
    lines = [f"{heading:<{width}}  {'images':>7}  {'top-1':>6}  most often taken for"]
    for name, row in shown:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.1f}"
        lines.append(f"{name:<{width}}  {row['images']:>7}  {top1:>6}  {row['mistaken_for'] or ''}".rstrip())
    return "\n".join([*lines, "  ".join(f"{name} {value:.6g}" for name, value in flat_metrics(metrics).items())])


def flat_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of metrics.json without those of classes; nested ones are named like "real top1"."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and name != "per_class":
            flat |= {f"{name} {inner}": number for inner, number in value.items()}
        elif name != "per_class":
            flat[name] = value
    return flat
