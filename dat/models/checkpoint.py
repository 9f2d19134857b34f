"""Checkpoints of other sizes, classes and names, made to fit a model."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from dat.layers.position_bias import FixedBias, resize_table

_logger = logging.getLogger(__name__)

# Sizes of classifiers trained on ImageNet-22k: with and without the classes that only Google's list has.
_CLASSES_22K = (21841, 21843)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """State dict of an official or own checkpoint under `model`'s names and in its shapes.

    Bias tables are resampled as the official fine-tuning does. The classifier of a checkpoint trained on ImageNet-22k
    is cut down to the classes of ImageNet-1k for a model that has 1000; one of any other number of classes than the
    model's is left out, and the model keeps its own.
    """
    # official.py builds on the model, which builds on this module.
    from dat.models import official

    state_dict = official.convert(state_dict, model) if official.is_official(state_dict) else dict(state_dict)
    parameters = dict(model.named_parameters())
    for name, value in state_dict.items():
        if name in parameters and value.shape != parameters[name].shape and not name.startswith("head."):
            state_dict[name] = _resample(name, value, model)
    return _fit_classifier(state_dict, parameters)


def _resample(name: str, value: Tensor, model: nn.Module) -> Tensor:
    """A bias table in the shape of `model`'s; any other tensor as it is, for the load to report."""
    shape = model.get_parameter(name).shape
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, FixedBias) and value.shape[0] == shape[0]:
        return owner.fit(value)
    if name.endswith("rpe_table") and value.shape[0] == shape[0]:
        return resize_table(value, tuple(shape[1:]))
    if name.endswith("relative_position_bias_table") and value.shape[1] == shape[1]:
        side, new_side = math.isqrt(len(value)), math.isqrt(shape[0])
        table = resize_table(value.T.reshape(-1, side, side), (new_side, new_side))
        return table.flatten(1).T
    return value


def _fit_classifier(state_dict: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with the classifier for `parameters`, which may have none."""
    for name in ("head.fc.weight", "head.fc.bias"):
        if name not in state_dict:
            continue
        value, own = state_dict[name], parameters.get(name)
        if own is None:
            del state_dict[name]
        elif len(value) in _CLASSES_22K and len(own) == 1000:
            state_dict[name] = value[imagenet_22k_to_1k()]
        elif len(value) != len(own) and value.shape[1:] == own.shape[1:]:
            if name.endswith("weight"):
                _logger.warning("the checkpoint has %d classes: the model keeps its own %d", len(value), len(own))
            state_dict[name] = own.detach()
    return state_dict


def imagenet_22k_to_1k() -> Tensor:
    """Index of each class of ImageNet-1k among those of ImageNet-22k: [1000], the official map_22kto1k.pth."""
    index = {label: i for i, label in enumerate(ImageNetInfo("imagenet-21k-goog").label_names())}
    # ImageNet-22k has no teddy bears; the official map has this class in their place.
    index["n04399382"] = index["n03013580"]
    return torch.tensor([index[label] for label in ImageNetInfo("imagenet-1k").label_names()])


def load_into_features(extractor: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Hook of a timm feature extractor's load_state_dict: takes a whole model's checkpoint, official or own.

    Of that, what the extractor has pruned is left out. A state dict of the extractor itself goes through unchanged.
    """
    inner = f"{prefix}model."
    if any(name.startswith(inner) for name in state_dict):
        return
    model = extractor.get_submodule("model")
    kept = checkpoint_filter_fn(state_dict, model)
    known = model.state_dict().keys()
    state_dict.clear()
    state_dict.update({inner + name: value for name, value in kept.items() if name in known})
