"""A classifier from a configuration, and from a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dat  # noqa: F401  registers its models with timm
from dat.classification.config import ClassificationConfig, check_config
from dat.engine.backbones import create_timm_model, load_classifier_weights, without_weights
from dat.engine.checkpoint import build_and_load, checkpoint_errors, read_trained
from dat.engine.config import apply_overrides, from_dict


def build_classifier(backbone: dict[str, Any], num_classes: int, weights: bool = True) -> nn.Module:
    """The timm model that `model.backbone` describes, with a new head of `num_classes`.

    Args:
        backbone: {"name": ..., any timm argument}; `checkpoint_path` may have another number of classes.
        num_classes: outputs of the head.
        weights: False ignores `pretrained` and `checkpoint_path`: a checkpoint is about to be loaded.
    Raises:
        ConfigError: timm has no such model or it does not take these arguments, or no file is at `checkpoint_path`.
        CheckpointError: that file is not a checkpoint of this model.
    """
    if not weights:
        return create_timm_model(without_weights(backbone), num_classes=num_classes)
    path = backbone.get("checkpoint_path")
    rest = {name: value for name, value in backbone.items() if name != "checkpoint_path"}
    model = create_timm_model(rest, num_classes=num_classes)
    if path:
        load_classifier_weights(model, path)
    return model


@dataclass
class Classifier:
    """What a checkpoint holds: a model in evaluation mode, its configuration and class names."""

    model: nn.Module
    config: ClassificationConfig
    class_names: list[str]


def load_classifier(path: str | Path, overrides: Sequence[str], device: torch.device) -> Classifier:
    """Rebuilds a trained classifier, with its averaged weights where it has them.

    Raises:
        CheckpointError: not a classification checkpoint, or its weights do not fit the model.
        ConfigError: an override is wrong.
    """
    path = Path(path)
    trained = read_trained(path, "classification")
    with checkpoint_errors(path):
        config = from_dict(ClassificationConfig, trained.config, str(path))
        check_config(config)
    config = apply_overrides(config, overrides)
    check_config(config)
    names = trained.class_names
    model = build_and_load(
        lambda: build_classifier(config.model.backbone, len(names), weights=False), trained.weights, path
    )
    return Classifier(model.to(device).eval(), config, names)
