"""Overfitting a few images: the quickest test that data, model and learning rates fit together."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from dat.detection.config import DetectionConfig, check_config
from dat.detection.data import Annotations, cut_into_windows, read_dataset, resized_size
from dat.detection.data.records import merge_classes
from dat.detection.evaluation import average_precision
from dat.detection.report import read_results
from dat.detection.sizes import settle_sizes
from dat.detection.trainer import DetectionTrainer
from dat.engine.checkpoint import LAST, PREVIOUS
from dat.engine.distributed import setup_distributed
from dat.engine.lock import lock_run
from dat.utils.files import read_jsonl
from dat.utils.text import echo

# AP at which a run ends, and the AP that it should reach.
ENOUGH, TARGET = 0.95, 0.9

STEPS = 800


def overfit(config: DetectionConfig, count: int) -> None:
    """Trains on `count` images without augmentation until AP on them is near 1.

    If AP stays lower, it prints the likely reasons and exits with code 1.

    Raises UserError for a configuration that cannot work.
    """
    check_config(config)
    distributed = setup_distributed(config.train.device)
    train_set = cut_into_windows(read_dataset(config.data, "train"), config.data.train, config.seed)
    config, why = settle_sizes(config, train_set, distributed.device)
    if why and distributed.main:
        echo(why)
    config = overfit_config(config, count)
    some = choose(train_set, count)
    output = Path(config.output)
    with lock_run(output, distributed):
        # Removes the checkpoints of an earlier attempt.
        if distributed.main:
            for name in (LAST, PREVIOUS, "best.pth"):
                (output / name).unlink(missing_ok=True)
        metrics = DetectionTrainer(config, some, some, distributed).run(until=ENOUGH)
    if not distributed.main:
        return
    if metrics["AP"] >= TARGET:
        echo(f"AP {metrics['AP']:.3f} on {len(some.records)} images after {metrics['seconds'] / 60:.1f} min: all works")
        return
    results = read_results(output / "detections.json", some)
    echo(f"AP {metrics['AP']:.3f} on {len(some.records)} images, should be at least {TARGET}:", error=True)
    for reason in diagnose(config, some, results, metrics, read_jsonl(output / "log.jsonl")):
        echo(f"  - {reason}", error=True)
    sys.exit(1)


def overfit_config(config: DetectionConfig, count: int) -> DetectionConfig:
    """The configuration of an overfitting run: no augmentation, dropout or weight decay, and its own schedule."""
    train, data = config.train, config.data
    backbone = {name: 0.0 if "drop" in name else value for name, value in config.model.backbone.items()}
    plain = replace(
        data.train,
        sizes=[data.val.size],
        max_size=data.val.max_size,
        horizontal_flip=0.0,
        vertical_flip=0.0,
        crop=0.0,
        photometric=0.0,
        mosaic=0.0,
        mixup=0.0,
        copy_paste=0.0,
        scale_jitter=[],
        balance=0.0,
    )
    batch_size = min(train.batch_size, count)
    return replace(
        config,
        output=str(Path(config.output) / "overfit"),
        model=replace(config.model, drop_rate=0.0, backbone=backbone),
        data=replace(data, train=plain, cache="memory"),
        train=replace(
            train,
            epochs=0,
            steps=STEPS,
            batch_size=batch_size,
            accumulate=1,
            warmup_epochs=0.0,
            warmup_steps=STEPS // 10 if train.warmup_epochs else min(train.warmup_steps, STEPS // 10),
            schedule="cosine",
            min_lr_scale=0.01,
            weight_decay=0.0,
            layer_decay=1.0,
            ema_decay=0.0,
            class_weights=None,
            early_stop=0,
            eval_epochs=max(1, STEPS // 20 * batch_size // count),
            pictures=min(count, train.pictures),
            resume=False,
            workers=0,
        ),
    )


def choose(annotations: Annotations, count: int) -> Annotations:
    """`count` of the images with objects, evenly spaced."""
    shown = [record for record in annotations.records if (~record.crowd).any()]
    chosen = np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)
    return replace(annotations, records=tuple(shown[i] for i in chosen))


def diagnose(
    config: DetectionConfig,
    annotations: Annotations,
    results: Sequence[dict[str, Any]],
    metrics: dict[str, Any],
    lines: Sequence[dict[str, Any]],
) -> list[str]:
    """Likely reasons why a few images were not learnt; `lines` are the entries of log.jsonl."""
    reasons = [*_about_data(config, annotations)]
    losses = [line["loss"] for line in lines if line["kind"] == "train" and line["loss"] is not None]
    if len(losses) > 1 and losses[-1] > 0.5 * losses[0]:
        reasons.append(
            f"the loss fell only from {losses[0]:.2f} to {losses[-1]:.2f}: the learning rate does not suit; "
            f"try train.lr={3 * config.train.lr:.1g} and train.lr={config.train.lr / 3:.1g}"
        )
    curve = [line["AP"] or 0.0 for line in lines if line["kind"] == "val"]
    if len(curve) > 2 and curve[-1] - curve[len(curve) // 2] > 0.05:
        reasons.append(
            f"AP still rose, from {curve[len(curve) // 2]:.2f} to {curve[-1]:.2f} in the second half: it takes longer, "
            f"more than {config.train.steps} steps"
        )
    merged = class_agnostic(annotations, results)
    if len(annotations.categories) > 1 and (merged["AP"] or 0.0) > metrics["AP"] + 0.1:
        reasons.append(
            f"boxes are better than classes, AP {merged['AP']:.2f} if classes do not count: "
            f"are objects that look alike annotated as different classes?"
        )
    if (metrics["AP50"] or 0.0) >= TARGET:
        reasons.append(
            f"objects are found (AP50 {metrics['AP50']:.2f}), but their boxes are not exact: "
            f"larger images, data.val.size={2 * config.data.val.size}, or more steps"
        )
    poor = min(metrics["per_class"].items(), key=lambda item: 2.0 if item[1]["AP"] is None else item[1]["AP"])
    reasons.append(f"the poorest class is {poor[0]}, AP {poor[1]['AP']}; see worst.png in {config.output}")
    return reasons


def class_agnostic(annotations: Annotations, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """average_precision as if all classes were one."""
    return average_precision(merge_classes(annotations), [{**result, "category_id": 1} for result in results])


def _about_data(config: DetectionConfig, annotations: Annotations) -> list[str]:
    """Reasons in the data why the model cannot learn some objects."""
    counted: dict[str, list[int]] = defaultdict(list)
    for record in annotations.records:
        boxes = torch.from_numpy(record.boxes[~record.crowd])
        if len(boxes) > config.model.num_queries:
            counted[f"hold more objects than model.num_queries={config.model.num_queries}"].append(record.id)
        size = resized_size(record.height, record.width, config.data.val.size, config.data.val.max_size)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (size[0] / record.height)
        if (sides.min(1).values < 6).any():
            counted[f"show objects below 6 pixels at data.val.size={config.data.val.size}"].append(record.id)
        if (box_iou(boxes, boxes).triu(1) > 0.9).any():
            counted["have the same box annotated twice or nearly so"].append(record.id)
    return [f"{len(ids)} images {problem}, such as image {ids[0]}" for problem, ids in counted.items()]
