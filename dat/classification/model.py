"""A timm classifier from a configuration."""

from typing import Any

from torch import nn

import dat  # noqa: F401  registers its models with timm
from dat.engine.backbones import create_timm_model, load_classifier_weights, without_weights


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
