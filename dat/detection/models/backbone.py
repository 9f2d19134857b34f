"""Feature extractors from timm."""

from typing import Any

import torch
from torch import nn

import dat  # noqa: F401  registers the backbones with timm
from dat.engine.backbones import classifier_weights, create_timm_model, without_weights
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


def check_backbone(arguments: dict[str, Any], num_maps: int) -> int:
    """The number of maps that build_backbone's model would give, found without making its weights.

    Raises ConfigError for arguments that do not work, such as output_stride for a model that has none.
    """
    try:
        with torch.device("meta"):
            return len(build_backbone(without_weights(arguments), num_maps).feature_info.channels())
    except ConfigError as error:
        # A model that computes while it is made cannot be made without weights, which says nothing against it.
        if isinstance(error.__cause__, RuntimeError):
            return len(arguments.get("out_indices", range(num_maps)))
        raise


def freeze(backbone: nn.Module, names: list[str]) -> None:
    """Leaves the weights of these modules of the backbone as they are. Raises ConfigError for names that it lacks."""
    for name in names:
        try:
            backbone.get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join(name for name, _ in backbone.named_children())
            raise ConfigError(f"model.freeze: the backbone has no module {name!r}, it has {known}") from None
