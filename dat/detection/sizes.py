"""Sizes of images that follow from those of the objects and from the machine."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dat.detection.config import TRAIN_SIZES, VAL_SIZES, DetectionConfig
from dat.detection.data import Annotations
from dat.detection.data.box_checks import resized_sides
from dat.detection.data.transforms import resized_size
from dat.detection.models.backbone import fit_sizes
from dat.engine.config import LARGEST_SIDE

# The longest side of the COCO recipes.
LONGEST = 1333
# A CPU takes four times as long at twice the size.
LARGEST_ON_CPU = 2.0


def settle_sizes(config: DetectionConfig, train_set: Annotations, device: torch.device) -> tuple[DetectionConfig, str]:
    """The configuration with sizes at which nine in ten training objects have `data.least_side` pixels, and why.

    All sizes are raised by one factor: at most to the files' own (their median), to a longest side of 1333 pixels or
    the largest that the backbone takes, and on a CPU to twice those of the configuration. The new configuration has no
    `data.least_side`. The reason is "" where nothing changes.
    """
    data, least = config.data, config.data.least_side
    if not least:
        return config, ""
    settled = replace(config, data=replace(data, least_side=0))
    size, longest = data.val.size, max(data.train.max_size, data.val.max_size)
    crowd = np.concatenate([np.zeros(0, bool), *(record.crowd for record in train_set.records)])
    shorter = resized_sides(train_set, size, data.val.max_size)[~crowd]
    smallest = float(np.quantile(shorter, 0.1)) if shorter.size else math.inf
    if smallest >= least:
        return settled, ""
    files = [r.height / resized_size(r.height, r.width, size, data.val.max_size)[0] for r in train_set.records]
    limits = [
        float(np.median(files)),
        min(LONGEST, fit_sizes(config.model.backbone).largest) / longest,
        LARGEST_SIDE / max(longest, data.train.crop_max, *data.train.crop_resize),
    ]
    limits += [LARGEST_ON_CPU] if device.type == "cpu" else []
    quarters = min(math.ceil(4 * least / max(smallest, 0.1)), math.floor(4 * min(limits)))

    def grown(value: Any) -> Any:
        if isinstance(value, list):
            return [grown(side) for side in value]
        return max(value, value * quarters // (4 * data.pad_multiple) * data.pad_multiple)

    new = grown(size)
    if new == size:
        return settled, ""
    train = {name: grown(getattr(data.train, name)) for name in TRAIN_SIZES}
    train["max_pixels"] = round(data.train.max_pixels * (quarters / 4) ** 2)
    val = {name: grown(getattr(data.val, name)) for name in VAL_SIZES}
    data = replace(settled.data, train=replace(data.train, **train), val=replace(data.val, **val))
    reason = (
        f"sizes are {new / size:.3g} times the configuration's, data.val.size={new}: at {size} a tenth of the objects "
        f"has a side below {smallest:.1f} pixels, should be data.least_side={least}"
    )
    if new / size * smallest < least:
        reason += f"; still below {new / size * smallest:.1f}: larger are windows, data.train.tiles"
    return replace(settled, data=data), reason
