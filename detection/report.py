"""What a run leaves to look at: JSON files, the training curve, pictures of validation images."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from .data import CocoAnnotations, read_image
from .draw import draw_boxes, side_by_side

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_curve(log: Path, path: Path, steps_per_epoch: int) -> None:
    """Draws the training loss, and AP and AP50 where there are any, of a run's log.jsonl against its epochs."""
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in ("loss",) if entry["kind"] == "train" else ("AP", "AP50"):
            if entry.get(name) is not None:
                series[name].append((entry["step"] / steps_per_epoch, entry[name]))
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if series["loss"]:
        left.plot(*zip(*series["loss"], strict=True), color="tab:gray", label="training loss")
    left.set(xlabel="epoch", ylabel="training loss")
    right = left.twinx()
    right.set(ylabel="average precision", ylim=(0, 1.02))
    for name, color in (("AP50", "tab:blue"), ("AP", "tab:orange")):
        if series[name]:
            right.plot(*zip(*series[name], strict=True), color=color, marker=".", label=name)
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_pictures(
    annotations: CocoAnnotations, results: Sequence[dict[str, Any]], folder: Path, count: int, threshold: float
) -> list[Path]:
    """Writes `count` images, evenly chosen, with predictions scored at least `threshold` beside the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if result["score"] >= threshold:
            by_image[result["image_id"]].append(result)
    coco = annotations.to_coco()
    truth: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in coco["annotations"]:
        truth[annotation["image_id"]].append(annotation)
    chosen = torch.linspace(0, len(annotations.records) - 1, min(count, len(annotations.records))).long()
    paths = []
    for record in (annotations.records[i] for i in chosen.tolist()):
        image = to_pil(read_image(record.path, (record.width, record.height)))
        predicted = draw_boxes(image, by_image[record.id], annotations.categories, "predicted")
        annotated = draw_boxes(image, truth[record.id], annotations.categories, "annotated")
        paths.append(folder / f"{record.id:06d}_{record.path.stem}.png")
        side_by_side(predicted, annotated).save(paths[-1])
    return paths


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image [3, H, W] uint8 as Pillow's."""
    return F.to_pil_image(image)
