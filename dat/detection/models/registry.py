"""Detectors by name: the registry that `model.kind` chooses from, and how a configuration becomes a model."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.layers import freeze_batch_norm_2d

from dat.detection import official
from dat.detection.models.backbone import build_backbone, freeze
from dat.detection.models.base import BaseDETR, ModelConfig
from dat.engine.backbones import without_weights
from dat.utils.errors import ConfigError
from dat.utils.hub import find_checkpoint

M = TypeVar("M", bound=type[BaseDETR])

DETECTORS: dict[str, type[BaseDETR]] = {}


def register(name: str, config: type[ModelConfig]) -> Callable[[M], M]:
    """Makes the decorated class the detector of `model.kind: name`, configured by the dataclass `config`.

    The constructor takes the backbone, the number of classes, and an argument for each field of `config.arguments()`.
    """

    def decorate(model: M) -> M:
        DETECTORS[name], ModelConfig.variants[name], model.kind = model, config, name
        return model

    return decorate


def build_model(config: ModelConfig, num_classes: int, weights: bool = True) -> BaseDETR:
    """A new model; `weights` False leaves out those that the configuration starts it or its backbone from.

    Raises ConfigError for a backbone or numbers that do not work, CheckpointError for weights that do not fit.
    """
    arguments = config.backbone if weights and not config.checkpoint_path else without_weights(config.backbone)
    backbone = build_backbone(arguments, config.num_maps, config.norm_maps)
    if config.freeze_batch_norm:
        backbone = freeze_batch_norm_2d(backbone)
    freeze(backbone, config.freeze)
    try:
        model = DETECTORS[config.kind](backbone, num_classes, **config.arguments())
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    if weights and config.checkpoint_path:
        official.load(model, find_checkpoint(config.checkpoint_path))
    return model


def check_model(config: ModelConfig, largest_side: int = 0) -> None:
    """Raises ConfigError on a configuration that makes no model for such images, without allocating any weights."""
    config.check()
    try:
        with torch.device("meta"):
            backbone: Any = build_model(config, num_classes=1, weights=False).backbone
        if backbone.largest_side < largest_side:
            raise ConfigError(
                f"model.backbone.img_size is {backbone.largest_side}, should be at least data.train.max_size and "
                f"data.val.max_size, {largest_side}: {config.backbone['name']} takes images of one size"
            )
    except ConfigError as error:
        # A backbone that computes during construction cannot be built on the meta device, which is not an error.
        if not isinstance(error.__cause__, RuntimeError):
            raise
