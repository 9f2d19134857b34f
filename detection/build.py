"""A detector from its configuration, or from a checkpoint that carries it."""

import pickle
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

import dat  # noqa: F401  registers the backbones with timm
from dat.training.checkpoint import load_checkpoint, load_weights
from dat.training.config import from_dict
from dat.training.errors import CheckpointError, ConfigError
from dat.training.loop import create_timm_model

from .config import DetectionConfig, ModelConfig
from .data import Category
from .deformable_detr import DeformableDETR

# strides 8, 16 and 32
DEFAULT_OUT_INDICES = (1, 2, 3)


@dataclass(frozen=True)
class Detector:
    """What a checkpoint holds: the model in evaluation mode, its configuration, its classes (label i: the i-th)."""

    model: nn.Module
    config: DetectionConfig
    categories: tuple[Category, ...]


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Raises ConfigError for a backbone or numbers that do not work, CheckpointError for unfit backbone weights."""
    backbone = build_backbone(config.backbone)
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
    weights = {"state_dict": classifier_weights(arguments, Path(checkpoint_path)), "num_classes": 0}
    return create_timm_model(arguments, features_only=True, pretrained=True, pretrained_cfg_overlay=weights)


def classifier_weights(arguments: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """State of timm's headless `arguments["name"]`, all of it from the checkpoint of a classifier at `path`.

    timm's own loading into a feature extractor is not strict: weights of another model pass in silence.
    Raises CheckpointError naming the first tensor that differs.
    """
    if not path.is_file():
        raise ConfigError(f"model.backbone.checkpoint_path: no such file: {path}")
    try:
        state_dict = timm.models.load_state_dict(str(path))
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    if any(key.startswith("backbone.") for key in state_dict):
        raise CheckpointError(f"{path}: is of a detector; model.backbone.checkpoint_path should be of a classifier")
    arguments = {key: value for key, value in arguments.items() if key != "out_indices"}
    model = create_timm_model(arguments, num_classes=0)
    # resizes what depends on the image size, such as position tables
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        state_dict = adapt(state_dict, model)
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    body = {key: value for key, value in state_dict.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    load_weights(model, body, path)
    return model.state_dict()


def load_detector(path: Path, device: torch.device) -> Detector:
    """The detector of a checkpoint, with its averaged weights where it has them.

    Raises CheckpointError for anything but a detection checkpoint whose weights fit its configuration.
    """
    state = load_checkpoint(path, kind="detection")
    config = from_dict(DetectionConfig, state["config"], str(path))
    categories = tuple(Category(*pair) for pair in zip(state["category_ids"], state["class_names"], strict=True))
    model = build_model(without_weights(config.model), len(categories))
    load_weights(model, state.get("state_dict_ema") or state["state_dict"], path)
    return Detector(model.to(device).eval(), config, categories)


def without_weights(config: ModelConfig) -> ModelConfig:
    """The model's configuration without the files that its backbone starts from."""
    backbone = {key: value for key, value in config.backbone.items() if key not in ("checkpoint_path", "pretrained")}
    return replace(config, backbone=backbone)
