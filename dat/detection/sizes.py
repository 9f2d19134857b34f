"""Sizes of images that follow from those of the objects and from the machine."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dat.detection.config import DataConfig, DetectionConfig
from dat.detection.data import Annotations
from dat.detection.data.box_checks import resized_sides
from dat.detection.models.backbone import fit_sizes
from dat.engine.checkpoint import load_checkpoint
from dat.engine.config import from_dict

# The longest side of the COCO recipes.
LONGEST = 1333
# A CPU takes four times as long at twice the size.
LARGEST_ON_CPU = 2.0
# Keys of the sides of images, which grow together.
SIDES = {"train": ("sizes", "max_size", "crop_resize", "crop_min", "crop_max"), "val": ("size", "max_size")}


def settle_sizes(
    config: DetectionConfig, train_set: Annotations, device: torch.device, resume: Path | None = None
) -> tuple[DetectionConfig, str]:
    """The configuration with sizes at which nine in ten training objects have `data.least_side` pixels, and why.

    All sizes are raised by one factor, a multiple of 1/4: at most to the files' own (their median), to a longest side
    of 1333 pixels or the largest that the backbone takes, and on a CPU to twice those of the configuration. A run that
    is resumed keeps its sizes. The reason is "" where nothing changes.
    """
    data = config.data
    if not data.least_side:
        return config, ""
    if resume is not None:
        before = from_dict(DetectionConfig, load_checkpoint(resume, "detection")["config"], str(resume)).data
        return _with_sides(config, _map_sides(before, lambda side: side), before.train.max_pixels), ""
    shorter = resized_sides(train_set, data.val.size, data.val.max_size)
    smallest = float(np.quantile(shorter, 0.1)) if shorter.size else math.inf
    if smallest >= data.least_side:
        return config, ""
    files = float(np.median([min(record.height, record.width) for record in train_set.records]))
    longest = max(data.train.max_size, data.val.max_size)
    limits = [files / data.val.size, min(LONGEST, fit_sizes(config.model.backbone).largest) / longest]
    limits += [LARGEST_ON_CPU] if device.type == "cpu" else []
    quarters = min(math.ceil(4 * data.least_side / max(smallest, 0.1)), math.floor(4 * min(limits)))
    if quarters <= 4:
        return config, ""
    factor, unit = quarters / 4, data.pad_multiple
    sides = _map_sides(data, lambda side: round(side * factor / unit) * unit)
    reason = (
        f"sizes are {factor:g} times the configuration's, data.val.size={sides['val']['size']}: at {data.val.size} a "
        f"tenth of the objects has a side below {smallest:.1f} pixels, should be data.least_side={data.least_side}"
    )
    if factor * smallest < data.least_side:
        reason += f"; still below {factor * smallest:.1f}: larger are windows, data.train.tiles"
    return _with_sides(config, sides, round(data.train.max_pixels * factor**2)), reason


def _map_sides(data: DataConfig, function: Callable[[int], int]) -> dict[str, dict[str, Any]]:
    """The values of SIDES, each side as `function` gives it."""

    def mapped(value: Any) -> Any:
        return [function(side) for side in value] if isinstance(value, list) else function(value)

    return {
        split: {name: mapped(getattr(getattr(data, split), name)) for name in names} for split, names in SIDES.items()
    }


def _with_sides(config: DetectionConfig, sides: dict[str, dict[str, Any]], max_pixels: int) -> DetectionConfig:
    data = config.data
    train = replace(data.train, **sides["train"], max_pixels=max_pixels)
    return replace(config, data=replace(data, train=train, val=replace(data.val, **sides["val"])))
