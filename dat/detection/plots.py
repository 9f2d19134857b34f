"""Plots of an evaluation of boxes: precision against recall by class, and how large boxes are."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dat.detection.evaluation import MEDIUM, SMALL, Evaluation
from dat.utils.plots import save_plot
from dat.utils.text import printable

# Maximum number of classes that are drawn, those with most objects.
MOST_CLASSES = 100

# Index of an overlap among COCO's ten, and the style of its line.
OVERLAPS = {"IoU 0.5": (0, "-"), "IoU 0.75": (5, "--")}


def draw_precision_recall(evaluation: Evaluation, path: Path) -> None:
    """Draws a panel for each class, a dot where F1 is highest; of many classes those with most objects."""
    names = [category.name for category in evaluation.annotations.categories]
    objects = [metrics["objects"] for metrics in evaluation.metrics()["per_class"].values()]
    shown = sorted(sorted(range(len(names)), key=lambda label: -objects[label])[:MOST_CLASSES])
    columns = min(len(shown), max(3, math.isqrt(len(shown) - 1) + 1))
    rows = -(-len(shown) // columns)
    inches = 4.5 if columns == 1 else 3.0 if columns <= 4 else 2.2 if columns <= 6 else 1.35
    figure = Figure(figsize=(inches * columns, inches * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel in axes[len(shown) :]:
        panel.axis("off")
    for panel, label in zip(axes, shown, strict=False):
        panel.set_title(printable(names[label])[: int(11 * inches)], fontsize=min(9, 4.5 * inches), parse_math=False)
        _draw_class(panel, evaluation, label, with_text=inches > 2)
    handles = {line.get_label(): line for panel in axes for line in panel.lines}
    if handles:
        figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=3, fontsize=8)
    some = f" (the {len(shown)} classes with most objects of {len(names)})" if len(shown) < len(names) else ""
    figure.supxlabel(f"recall{some}", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    save_plot(figure, path)


def _draw_class(axes: Axes, evaluation: Evaluation, label: int, with_text: bool) -> None:
    """The curves of a class; `with_text`: F1 and its score, beside the dot."""
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    best = evaluation.best_f1(label)
    if best is None:
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", fontsize=7, color="gray")
        return
    recalls = np.linspace(0, 1, evaluation.precision.shape[1])
    for name, (overlap, line) in OVERLAPS.items():
        axes.plot(recalls, evaluation.precision[overlap, :, label, 0], line, color="tab:blue", lw=1.2, label=name)
    f1, score, recall, precision = best
    axes.plot(recall, precision, "o", color="tab:orange", ms=4, label="highest F1")
    if with_text:
        # There is room to the lower left of the dot, because curves fall to the right.
        place: dict[str, Any] = {"xytext": (-4, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
        axes.annotate(f"F1 {f1:.2f}\nscore {score:.2f}", (recall, precision), fontsize=7, **place)


def draw_box_sizes(evaluation: Evaluation, threshold: float, path: Path) -> None:
    """Draws how many annotated and predicted boxes have which size, with COCO's limits of small, medium and large.

    The size of an object is the square root of its area as annotated, which AP uses too; crowds are left out.

    Args:
        evaluation: holds the annotations and results to draw.
        threshold: least score of the predictions that are counted.
        path: of the plot.
    """
    areas = np.concatenate([record.areas[~record.crowd] for record in evaluation.annotations.records])
    found = [r["bbox"][2] * r["bbox"][3] for r in evaluation.results if r["score"] >= threshold]
    # A logarithmic axis has no place for 0.
    annotated, predicted = np.sqrt(areas).clip(0.5), np.sqrt(found).clip(0.5)
    both = np.concatenate((annotated, predicted, (SMALL / 2, MEDIUM * 2)))
    edges = np.geomspace(both.min() * 0.9, both.max() * 1.1, 41).tolist()
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(annotated, edges, color="tab:gray", alpha=0.5, label="annotated")
    axes.hist(predicted, edges, histtype="step", linewidth=1.5, color="tab:blue", label="predicted")
    limits = {"small": (edges[0], SMALL), "medium": (SMALL, MEDIUM), "large": (MEDIUM, edges[-1])}
    for name, (low, high) in limits.items():
        axes.axvline(low, color="tab:orange", linestyle="--", linewidth=1)
        counts = [int(((values >= low) & (values < high)).sum()) for values in (annotated, predicted)]
        text = f"{name}\n{counts[0]} annotated\n{counts[1]} predicted"
        where: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8, "transform": axes.get_xaxis_transform()}
        axes.text(math.sqrt(low * high), 0.98, text, **where)
    axes.set(xscale="log", xlim=(edges[0], edges[-1]), xlabel="square root of the area, pixels of the file")
    axes.set_ylabel("boxes")
    # Leave room for the texts above the bars.
    axes.set_ylim(bottom=0, top=1.3 * max(axes.get_ylim()[1], 1))
    ticks = [MEDIUM if i == 7 else 2**i for i in range(0, 14, 1 if edges[-1] < 2000 else 2)]
    axes.set_xticks([tick for tick in ticks if edges[0] <= tick <= edges[-1]])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    save_plot(figure, path)
