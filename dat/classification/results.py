"""What a classifier says of the pictures of a split, and what follows from that."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dat.utils.files import atomic_write

# rows of a printed table of classes
MOST_ROWS = 40


@dataclass
class Results:
    """One entry for each of the n pictures that could be read, in their order in the split.

    `index`, `labels` [n] int64; `top` [n, k] int64, the k = 5 (or all) likeliest classes; `scores` [n, k] float32,
    their probabilities; `truth` [n] float32, the probability of the label; `losses` [n] float64, cross-entropy.
    """

    index: np.ndarray
    labels: np.ndarray
    top: np.ndarray
    scores: np.ndarray
    truth: np.ndarray
    losses: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Results"]) -> "Results":
        """Those of several batches or processes, of one or more pictures."""
        joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        order = np.argsort(joined["index"], kind="stable")
        return cls(**{name: array[order] for name, array in joined.items()})

    def save(self, path: Path) -> None:
        """Replaces `path`, .npz; a crash leaves the old file or the new one."""
        with atomic_write(path) as temporary:
            np.savez(temporary, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "Results":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def hits(self, k: int) -> np.ndarray:
        """Whether the label is among the k likeliest classes, [n] bool."""
        return (self.top[:, :k] == self.labels[:, None]).any(1)

    def metrics(self) -> dict[str, float]:
        """{"top1", "top5"} in percent, {"loss"} the mean cross-entropy, {"images"} counted."""
        return {
            "top1": 100 * float(self.hits(1).mean()),
            "top5": 100 * float(self.hits(5).mean()),
            "loss": float(self.losses.mean()),
            "images": len(self.index),
        }

    def confusion(self, num_classes: int) -> np.ndarray:
        """Pictures by label (row) and likeliest class (column), [num_classes, num_classes] int64."""
        counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(counts, (self.labels, self.top[:, 0]), 1)
        return counts

    def mistakes(self) -> np.ndarray:
        """Positions of the pictures whose label is not the likeliest class, the surest mistakes first."""
        wrong = np.flatnonzero(~self.hits(1))
        return wrong[np.argsort(-self.scores[wrong, 0], kind="stable")]


def class_table(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """{"name", "images", "top1", "mistaken_for"} of each class: percent, and the class it is most often taken for.

    top1 is None without pictures, mistaken_for without mistakes.
    """
    rows = []
    for k, (name, counts) in enumerate(zip(class_names, confusion, strict=True)):
        images, others = int(counts.sum()), np.where(np.arange(len(counts)) == k, 0, counts)
        rows.append(
            {
                "name": name,
                "images": images,
                "top1": round(100 * int(counts[k]) / images, 2) if images else None,
                "mistaken_for": class_names[int(others.argmax())] if others.any() else None,
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of class_table as text: all classes in order, or the worst of many."""
    shown, heading = list(rows), f"{len(rows)} classes"
    if len(rows) > MOST_ROWS:
        shown = sorted(rows, key=lambda row: 101 if row["top1"] is None else row["top1"])[:MOST_ROWS]
        heading = f"the worst {MOST_ROWS} of {len(rows)} classes"
    width = max(len(heading), *(len(row["name"]) for row in shown))
    lines = [f"{heading:<{width}}  {'images':>7}  {'top-1':>6}  most often taken for"]
    for row in shown:
        accuracy = "-" if row["top1"] is None else f"{row['top1']:.1f}"
        lines.append(f"{row['name']:<{width}}  {row['images']:>7}  {accuracy:>6}  {row['mistaken_for'] or ''}".rstrip())
    return "\n".join(lines)
