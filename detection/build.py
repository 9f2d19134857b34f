"""A detector from its configuration, or from a checkpoint that carries it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

import dat  # noqa: F401  registers the backbones with timm
from dat.training.checkpoint import load_checkpoint, load_weights
from dat.training.config import from_dict
from dat.training.errors import ConfigError
from dat.training.loop import create_timm_model
from dat.training.weights import classifier_weights, without_weights

from .config import DetectionConfig, ModelConfig
from .data import Category
from .deformable_detr import DeformableDETR

# strides 8, 16 and 32: the last three of four levels, or of five
DEFAULT_OUT_INDICES = (-3, -2, -1)


@dataclass(frozen=True)
class Detector:
    """What a checkpoint holds: the model in evaluation mode, its configuration, its classes (label i: the i-th)."""

    model: nn.Module
    config: DetectionConfig
    categories: tuple[Category, ...]


def build_model(config: ModelConfig, num_classes: int, weights: bool = True) -> nn.Module:
    """A new model; `weights` False leaves out those that the configuration starts its backbone from.

    Raises ConfigError for a backbone or numbers that do not work, CheckpointError for unfit backbone weights.
    """
    backbone = build_backbone(config.backbone if weights else without_weights(config.backbone))
    if config.freeze_batch_norm:
        backbone = freeze_batch_norm_2d(backbone)
    try:
        return DeformableDETR(
            backbone,
            num_classes,
            num_queries=config.num_queries,
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            encoder_depth=config.encoder_depth,
            decoder_depth=config.decoder_depth,
            mlp_dim=config.mlp_dim,
            drop_rate=config.drop_rate,
            num_levels=config.num_levels,
            num_points=config.num_points,
            box_refine=config.box_refine,
            two_stage=config.two_stage,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def build_backbone(arguments: dict[str, Any]) -> nn.Module:
    """A timm feature extractor from `name`, `checkpoint_path` (of a classifier) and any arguments of its model.

    Gives the maps at strides 8, 16 and 32 unless `out_indices` says otherwise.
    """
    arguments = {"out_indices": list(DEFAULT_OUT_INDICES), **arguments}
    checkpoint_path = arguments.pop("checkpoint_path", None)
    if not checkpoint_path:
        return create_timm_model(arguments, features_only=True)
    weights = {"state_dict": classifier_weights(arguments, checkpoint_path), "num_classes": 0}
    return create_timm_model(arguments, features_only=True, pretrained=True, pretrained_cfg_overlay=weights)


def load_detector(path: Path, device: torch.device) -> Detector:
    """The detector of a checkpoint, with its averaged weights where it has them.

    Raises CheckpointError for anything but a detection checkpoint whose weights fit its configuration.
    """
    state = load_checkpoint(path, kind="detection")
    config = from_dict(DetectionConfig, state["config"], str(path))
    categories = tuple(Category(*pair) for pair in zip(state["category_ids"], state["class_names"], strict=True))
    model = build_model(config.model, len(categories), weights=False)
    load_weights(model, state.get("state_dict_ema") or state["state_dict"], path)
    return Detector(model.to(device).eval(), config, categories)
