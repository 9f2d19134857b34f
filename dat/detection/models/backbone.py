"""Feature extractors from timm."""

from typing import Any

from torch import nn

import dat  # noqa: F401  registers the backbones with timm
from dat.engine.backbones import classifier_weights, create_timm_model
from dat.utils.errors import ConfigError


def build_backbone(arguments: dict[str, Any], num_maps: int = 3) -> nn.Module:
    """A timm feature extractor from `name`, `checkpoint_path` (of a classifier) and any arguments of its model.

    Gives the last `num_maps` maps, of strides 8, 16 and 32 when three, unless `out_indices` says otherwise.
    Raises ConfigError for arguments that do not work, CheckpointError for unfit weights.
    """
    arguments = {"out_indices": list(range(-num_maps, 0)), **arguments}
    checkpoint_path = arguments.pop("checkpoint_path", None)
    if not checkpoint_path:
        return create_timm_model(arguments, features_only=True)
    weights = {"state_dict": classifier_weights(arguments, checkpoint_path), "num_classes": 0}
    return create_timm_model(arguments, features_only=True, pretrained=True, pretrained_cfg_overlay=weights)


def freeze(backbone: nn.Module, names: list[str]) -> None:
    """Excludes modules of the backbone from training. Raises ConfigError for names that it lacks."""
    for name in names:
        try:
            backbone.get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join(name for name, _ in backbone.named_children())
            raise ConfigError(f"model.freeze: the backbone has no module {name!r}, it has {known}") from None
