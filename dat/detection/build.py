"""A detector from its configuration, or from a checkpoint that carries it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import freeze_batch_norm_2d

from dat.detection import official
from dat.detection.config import DetectionConfig, LossConfig, ModelConfig, check_config
from dat.detection.criterion import PAPER_WEIGHTS, SetCriterion
from dat.detection.data import Category
from dat.detection.matcher import HungarianMatcher
from dat.detection.models.backbone import build_backbone, freeze
from dat.detection.models.base import BaseDETR
from dat.detection.models.deformable_detr import DeformableDETR
from dat.detection.models.detr import DETR
from dat.engine.backbones import without_weights
from dat.engine.checkpoint import build_and_load, checkpoint_errors, limit_parameters, read_trained
from dat.engine.config import from_dict, to_dict
from dat.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Detector:
    """What a checkpoint holds: the model in evaluation mode, its configuration, its classes (label i: the i-th)."""

    model: BaseDETR
    config: DetectionConfig
    categories: tuple[Category, ...]


def build_model(config: ModelConfig, num_classes: int, weights: bool = True) -> BaseDETR:
    """A new model; `weights` False leaves out those that the configuration starts it or its backbone from.

    Raises ConfigError for a backbone or numbers that do not work, CheckpointError for unfit weights.
    """
    arguments = config.backbone if weights and not config.checkpoint_path else without_weights(config.backbone)
    backbone = build_backbone(arguments, config.num_maps)
    if config.freeze_batch_norm:
        backbone = freeze_batch_norm_2d(backbone)
    freeze(backbone, config.freeze)
    common: dict[str, Any] = {
        "num_queries": config.num_queries,
        "embed_dim": config.embed_dim,
        "num_heads": config.num_heads,
        "encoder_depth": config.encoder_depth,
        "decoder_depth": config.decoder_depth,
        "mlp_dim": config.mlp_dim,
        "drop_rate": config.drop_rate,
    }
    model: BaseDETR
    try:
        if config.kind == "detr":
            model = DETR(backbone, num_classes, **common, pre_norm=config.pre_norm)
        else:
            model = DeformableDETR(
                backbone,
                num_classes,
                **common,
                num_levels=config.num_levels,
                num_points=config.num_points,
                box_refine=config.box_refine,
                two_stage=config.two_stage,
            )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if weights and config.checkpoint_path:
        official.load(model, config.checkpoint_path)
    return model


def build_criterion(model: BaseDETR, loss: LossConfig) -> SetCriterion:
    """The losses of a model; what `loss` leaves open is as in the paper of the model."""
    paper = PAPER_WEIGHTS[model.scores]["loss_ce"]
    cost_class, weight_class = (paper if x is None else x for x in (loss.cost_class, loss.weight_class))
    return SetCriterion(
        model.num_classes,
        HungarianMatcher(cost_class, loss.cost_box, loss.cost_giou, model.scores),
        model.scores,
        weights={"loss_ce": weight_class, "loss_bbox": loss.weight_box, "loss_giou": loss.weight_giou},
        focal_alpha=loss.focal_alpha,
        no_object_weight=loss.no_object_weight,
    )


def detector_state(config: DetectionConfig, categories: Sequence[Category]) -> dict[str, Any]:
    """What a checkpoint holds beside weights, so that `load_detector` can rebuild the detector."""
    return {
        "kind": "detection",
        "config": to_dict(config),
        "class_names": [category.name for category in categories],
        "category_ids": [category.id for category in categories],
    }


def load_detector(path: Path, device: torch.device) -> Detector:
    """The detector of a checkpoint, with its averaged weights where it has them.

    Raises CheckpointError for anything but a detection checkpoint whose weights fit its configuration.
    """
    trained = read_trained(path, "detection")
    ids, names = trained.state.get("category_ids"), trained.class_names
    categories = check_categories(ids, names, path)
    with checkpoint_errors(path), limit_parameters(trained.weights, path):
        config = from_dict(DetectionConfig, trained.config, str(path))
        check_config(config)
    model = build_and_load(lambda: build_model(config.model, len(categories), weights=False), trained.weights, path)
    return Detector(model.to(device).eval(), config, categories)


def check_categories(ids: Any, names: Sequence[str], path: Path) -> tuple[Category, ...]:
    """The classes of a file. Raises CheckpointError unless there is one integer of its own for each name."""
    whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not whole or len(ids) != len(names) or len(set(ids)) < len(ids):
        raise CheckpointError(f"{path}: its category_ids should be {len(names)} different integers, one for each class")
    return tuple(Category(*pair) for pair in zip(ids, names, strict=True))
