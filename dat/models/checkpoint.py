"""Loads checkpoints with official names, other image sizes or other classes into a model."""

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from dat.layers.position_bias import FixedBias, resize_table

# Official files may hold their yacs configuration beside the weights: a dictionary, and read as one.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

_logger = logging.getLogger(__name__)

# Class counts of ImageNet-22k classifiers, without and with the two classes that only Google's list has.
_CLASSES_22K = (21841, 21843)

_RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^cls_norm\.norm\.", "norm."),
        (r"^cls_head\.", "head.fc."),
        (r"^down_projs\.(\d+)\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
        (r"^down_projs\.(\d+)\.1\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
        (r"^stages\.(\d+)\.proj\.", r"stages.\1.downsample."),
        (r"\.layer_norms\.(\d+)\.norm\.", lambda m: f".blocks.{int(m[1]) // 2}.norm{int(m[1]) % 2 + 1}."),
        (r"\.layer_scales\.(\d+)\.weight", lambda m: f".blocks.{int(m[1]) // 2}.ls{int(m[1]) % 2 + 1}.gamma"),
        (r"\.ln_cnvnxt\.(\d+)\.norm\.", r".blocks.\1.norm."),
        (r"\.local_perception_units\.(\d+)\.", r".blocks.\1.lpu.conv."),
        (r"\.mlps\.(\d+)\.(?:chunk\.)?linear([12])\.(?:0\.)?", r".blocks.\1.mlp.fc\2."),
        (r"\.mlps\.(\d+)\.dwc\.", r".blocks.\1.mlp.dwconv."),
        # The attention of an X block is a convolution.
        (r"\.attns\.(\d+)\.(weight|bias)$", r".blocks.\1.conv.\2"),
        (r"\.attns\.(\d+)\.", r".blocks.\1.attn."),
        (r"\.attn\.proj_(qkv|q|k|v)\.", r".attn.\1."),
        (r"\.attn\.proj_out\.", ".attn.proj."),
        (r"\.attn\.proj_ds\.0\.", ".attn.sr."),
        (r"\.attn\.proj_ds\.1\.norm\.", ".attn.norm."),
        (r"\.attn\.dep_conv\.", ".attn.shift."),
        (r"\.attn\.dep_conv1\.", ".attn.conv."),
        (r"\.attn\.rpe_table\.(weight|bias)$", r".attn.lepe.\1"),
        (r"\.attn\.rpe_table\.0\.", ".attn.log_cpb.mlp.fc1."),
        (r"\.attn\.rpe_table\.2\.", ".attn.log_cpb.mlp.fc2."),
        (r"\.conv_offset\.0\.", ".offset_conv."),
        (r"\.conv_offset\.1\.norm\.", ".offset_norm."),
        (r"\.conv_offset\.3\.", ".offset_proj."),
    )
]
_STEMS = {
    "patch_proj.0.": ("patch_embed.proj.", "patch_embed.conv1."),
    "patch_proj.1.norm.": ("patch_embed.norm.", "patch_embed.norm1."),
    "patch_proj.3.": ("patch_embed.conv2.",),
    "patch_proj.4.norm.": ("patch_embed.norm2.",),
}
_BUFFERS = ("relative_position_index", "attn_mask")


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """State dict of an official or own checkpoint under `model`'s names and in its shapes.

    Bias tables are resampled as in the official fine-tuning. A classifier for ImageNet-22k is reduced to the classes of
    ImageNet-1k if the model has 1000. Any other classifier of a different size is dropped: the model keeps its own.
    """
    converted: dict[str, Tensor]
    if _is_official(state_dict):
        converted = convert(state_dict, model)
    else:
        # A copy of torch's own type keeps the versions of the modules' formats.
        converted = copy(state_dict) if isinstance(state_dict, OrderedDict) else dict(state_dict)
    parameters = dict(model.named_parameters())
    for name, value in converted.items():
        if name in parameters and value.shape != parameters[name].shape and not name.startswith("head."):
            converted[name] = _resample(name, value, model)
    return _fit_classifier(converted, parameters)


def _resample(name: str, value: Tensor, model: nn.Module) -> Tensor:
    """A bias table resampled to the shape of `model`'s; any other tensor unchanged, for the load to report."""
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
    """`state_dict` with a classifier that fits `parameters`, or without one if they have none."""
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
    # ImageNet-22k lacks the class teddy bear; the official map has this one in its place.
    index["n04399382"] = index["n03013580"]
    return torch.tensor([index[label] for label in ImageNetInfo("imagenet-1k").label_names()])


def _is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of the official repository."""
    return any(key.startswith(("patch_proj.", "down_projs.")) or ".attns." in key for key in state_dict)


def convert(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official tensors under `model`'s names, reshaped where a 1x1 convolution is a linear layer here.

    Args:
        state_dict: tensors by official name: a state dict or a part of one, or gradients.
        model: the DAT to convert for.

    Returns:
        A dictionary for `model.load_state_dict`, without the constant buffers relative_position_index and attn_mask and
        without parameters that the official code has but does not use: the offset network of blocks with no_off and
        the layer scales of X blocks. Names unknown to `model` are kept, so that a strict load reports them.
    """
    parameters = dict(model.named_parameters())
    converted = {}
    for key, value in state_dict.items():
        name = _rename(key, parameters)
        if key.endswith(_BUFFERS) or _is_unused(name, parameters):
            continue
        parameter = parameters.get(name)
        # This only removes dimensions of 1: a table of another size keeps its shape, to be resampled.
        if parameter is not None and value.ndim > parameter.ndim and value.numel() == parameter.numel():
            value = value.reshape(parameter.shape)
        converted[name] = value
    return converted


def _rename(name: str, parameters: Mapping[str, Tensor]) -> str:
    for prefix, stems in _STEMS.items():
        if name.startswith(prefix):
            candidates = [stem + name.removeprefix(prefix) for stem in stems]
            return next((candidate for candidate in candidates if candidate in parameters), candidates[0])
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    fixed = name.replace(".attn.rpe_table", ".attn.fixed_bias.rpe_table")
    return fixed if fixed in parameters else name


def _is_unused(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Whether the official code has this parameter of a block of `parameters` without using it."""
    if name in parameters:
        return False
    attention, offset, _ = name.partition(".offset_")
    block, scale, _ = name.partition(".ls")
    return bool((offset and f"{attention}.q.weight" in parameters) or (scale and f"{block}.conv.weight" in parameters))


def load_into_features(extractor: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Pre-hook of a timm feature extractor's load_state_dict that accepts a whole model's checkpoint.

    Parameters that the extractor has pruned are left out. A state dict of the extractor itself is not changed.
    """
    inner = f"{prefix}model."
    if any(name.startswith(inner) for name in state_dict):
        return
    model = extractor.get_submodule("model")
    kept = checkpoint_filter_fn(state_dict, model)
    known = model.state_dict().keys()
    state_dict.clear()
    state_dict.update({inner + name: value for name, value in kept.items() if name in known})
