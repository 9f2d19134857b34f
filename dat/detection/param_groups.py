"""Parameter groups of the optimizer."""

from typing import Any

import torch
from torch import nn

from dat.detection.config import TrainConfig
from dat.detection.models.backbone import SimplePyramid, SwinMaps
from dat.detection.models.deformable import DeformableModel
from dat.engine.backbones import create_timm_model, without_weights
from dat.engine.optim import layer_scales, param_groups


def parameter_groups(model: nn.Module, train: TrainConfig, lr: float, backbone: dict[str, Any]) -> list[dict[str, Any]]:
    """Optimizer groups with the learning rates of Deformable DETR: lower for the backbone and sampling locations.

    Args:
        model: a detector.
        train: rates and weight decay.
        lr: base learning rate.
        backbone: `model.backbone` of the configuration; `train.layer_decay` lowers the rates of its layers.
    """
    multipliers = {r"^backbone\.": train.backbone_lr_scale}
    # DETR has no sampling locations.
    if isinstance(model, DeformableModel):
        multipliers[r"sampling_offsets|reference_points"] = train.sampling_lr_scale
    scales = backbone_scales(model.backbone, backbone, train.layer_decay) if train.layer_decay < 1 else {}
    scales = {f"backbone.{name}": scale for name, scale in scales.items()}
    return param_groups(model, lr, train.weight_decay, multipliers, scales)


def backbone_scales(backbone: Any, arguments: dict[str, Any], decay: float) -> dict[str, float]:
    """layer_scales of a timm feature extractor, by its own parameter names.

    timm defines layers for classifiers only, so those of the classifier with the same `arguments` are taken.
    """
    body = {name: value for name, value in without_weights(arguments).items() if name != "out_indices"}
    with torch.device("meta"):
        known = layer_scales(create_timm_model(body), decay)
    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, (SimplePyramid, SwinMaps)):
        names = [name for name in names if name.startswith("body.")]
    return {name: known[_classifier_name(name.removeprefix("body."), known)] for name in names}


def _classifier_name(name: str, known: dict[str, float]) -> str:
    """The name that a feature extractor's parameter has in the classifier."""
    name = name.removeprefix("model.")
    if name in known:
        return name
    # timm flattens the first level of some models: stages_0.x is stages.0.x.
    places = [i for i, letter in enumerate(name) if letter == "_"]
    return next(other for i in places if (other := f"{name[:i]}.{name[i + 1 :]}") in known)
