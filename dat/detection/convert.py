"""Official and transformers' detectors as checkpoints of this project, with the classes of an annotation file.

These detectors number classes by COCO's category ids. Ids that no class has are left out.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dat.detection import official
from dat.detection.config import DetectionConfig
from dat.detection.data import Category
from dat.detection.models import build_model
from dat.detection.models.base import BaseDETR
from dat.detection.models.deformable_detr import DeformableDETR
from dat.engine.checkpoint import check_fits
from dat.utils.errors import CheckpointError


def keep_classes(state: dict[str, Tensor], model: BaseDETR, ids: Sequence[int]) -> dict[str, Tensor]:
    """`state` of `model` with only the rows `ids` of its class heads, and the last, "no object", where there is one.

    The encoder of a two-stage Deformable DETR separates objects from background by its first row, which stays there.
    """
    last = [model.num_classes] if model.scores == "softmax" else []
    rows = torch.tensor([*ids, *last])
    kept = state | {name: tensor[rows] for name, tensor in state.items() if name.startswith(official.HEADS)}
    if isinstance(model, DeformableDETR) and model.two_stage:
        for name in (f"class_embed.{len(model.class_embed) - 1}.{part}" for part in ("weight", "bias")):
            kept[name] = torch.cat([state[name][:1], kept[name][1:]])
    return kept


def convert(config: DetectionConfig, weights: Path, categories: Sequence[Category]) -> dict[str, Tensor]:
    """The state dict of the detector of `config` for `categories`, from a file whose class k has the category id k.

    Raises CheckpointError for weights of another model, or with fewer classes than the largest category id.
    """
    theirs = official.read(weights, "WEIGHTS")
    with torch.device("meta"):
        model = build_model(config.model, official.num_classes(theirs, config.model.kind, weights), weights=False)
    try:
        state = official.convert(theirs, model)
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    check_fits(model, state, weights)
    largest = max(category.id for category in categories)
    if largest >= model.num_classes or min(category.id for category in categories) < 0:
        raise CheckpointError(
            f"{weights}: has classes for the ids 0 to {model.num_classes - 1}, the annotations have the id {largest}"
        )
    return keep_classes(state, model, [category.id for category in categories])
