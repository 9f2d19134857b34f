"""The official repository's configurations and checkpoints (https://github.com/LeapLabTHU/DAT), release 2022."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dat.models.dat import DAT, StageConfig

# Official files may hold their yacs configuration beside the weights: a dictionary, and read as one.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

# Keys of MODEL.DAT that change nothing in a model of L, S and D blocks.
_UNUSED = {"sr_ratios", "ns_per_pts", "heads_q", "ksize_qnas", "nqs", "qna_activation", "nat_ksizes", "lower_lr_kvs"}
# Options of the official code that no model of release 2022 uses, and the values that leave them off.
_OFF: dict[str, Any] = {
    "attn_drop_rate": 0.0,
    "use_conv_patches": False,
    "use_dwc_mlps": False,
    "dwc_pes": False,
    "fixed_pes": False,
    "no_offs": False,
    "use_lpus": False,
    "log_cpb": False,
    "layer_scale_values": -1,
}
_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 4,
    "num_classes": 1000,
    "expansion": 4,
    "dim_stem": 96,
    "dims": (96, 192, 384, 768),
    "depths": (2, 2, 6, 2),
    "heads": (3, 6, 12, 24),
    "window_sizes": (7, 7, 7, 7),
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "strides": (-1, -1, -1, -1),
    "offset_range_factor": (1, 2, 3, 4),
    "stage_spec": ("LD", "LD", "LDLDLD", "LD"),
    "groups": (-1, -1, 3, 6),
    "use_pes": (False, False, False, False),
    "ksizes": (9, 7, 5, 3),
}

_RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^patch_proj\.0\.", "patch_embed.proj."),
        (r"^patch_proj\.1\.norm\.", "patch_embed.norm."),
        (r"^cls_norm\.norm\.", "norm."),
        (r"^cls_head\.", "head.fc."),
        (r"^down_projs\.(\d+)\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv."),
        (r"^down_projs\.(\d+)\.1\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm."),
        (
            r"\.layer_norms\.(\d+)\.norm\.",
            lambda m: f".blocks.{int(m[1]) // 2}.norm{int(m[1]) % 2 + 1}.",
        ),
        (r"\.mlps\.(\d+)\.chunk\.linear([12])\.", r".blocks.\1.mlp.fc\2."),
        (r"\.attns\.(\d+)\.", r".blocks.\1.attn."),
        (r"\.attn\.proj_(qkv|q|k|v)\.", r".attn.\1."),
        (r"\.attn\.proj_out\.", ".attn.proj."),
        (r"\.conv_offset\.0\.", ".offset_conv."),
        (r"\.conv_offset\.1\.norm\.", ".offset_norm."),
        (r"\.conv_offset\.3\.", ".offset_proj."),
    )
]
_BUFFERS = ("relative_position_index", "attn_mask")


def build(config: Mapping[str, Any], release: str) -> DAT:
    """The model of an official configuration.

    Args:
        config: a MODEL.DAT dictionary of the official YAML files; keys in lower or upper case, missing ones take the
            official defaults.
        release: "2022".

    Returns:
        DAT with num_classes of the configuration and fresh weights.

    Raises:
        ValueError: the release, a key or a value is not supported; the message names it.
    """
    if release != "2022":
        raise ValueError(f"release must be '2022', got {release!r}")
    config = {key.lower(): value for key, value in config.items()}
    _check_keys(config)
    config = {**_DEFAULTS, **config}
    for key, default in _DEFAULTS.items():
        if isinstance(default, tuple) and len(config[key]) != len(config["dims"]):
            raise ValueError(f"{key} must have an entry for each of dims {config['dims']}, got {config[key]}")
    if config["dim_stem"] != config["dims"][0]:
        raise ValueError(f"dim_stem must equal dims[0] = {config['dims'][0]}, got {config['dim_stem']}")
    return DAT(
        [_stage(config, i) for i in range(len(config["dims"]))],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        mlp_ratio=config["expansion"],
        proj_drop_rate=config["drop_rate"],
        drop_path_rate=config["drop_path_rate"],
    )


def _check_keys(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if key in _OFF:
            values = value if isinstance(value, Iterable) else (value,)
            if any(v != _OFF[key] for v in values):
                raise ValueError(f"{key} must be {_OFF[key]} throughout in release 2022, got {value}")
        elif key not in _DEFAULTS and key not in _UNUSED:
            raise ValueError(f"unknown key {key!r} in the official configuration of release 2022")


def _stage(config: Mapping[str, Any], i: int) -> StageConfig:
    blocks = "".join(config["stage_spec"][i])
    if not set(blocks) <= set("LSD"):
        raise ValueError(f"stage_spec[{i}]: letters must be L, S or D in release 2022, got {blocks!r}")
    if len(blocks) != config["depths"][i]:
        raise ValueError(f"stage_spec[{i}] must have depths[{i}] = {config['depths'][i]} letters, got {blocks!r}")
    if "D" in blocks and min(config["groups"][i], config["strides"][i]) < 1:
        raise ValueError(
            f"groups[{i}] and strides[{i}] must be at least 1 for a stage with D blocks, "
            f"got {config['groups'][i]} and {config['strides'][i]}"
        )
    return StageConfig(
        blocks,
        config["dims"][i],
        config["heads"][i],
        window_size=config["window_sizes"][i],
        # -1 fills the place of what a stage without D blocks does not use.
        num_groups=max(config["groups"][i], 1),
        kernel_size=config["ksizes"][i],
        stride=max(config["strides"][i], 1),
        offset_range_factor=config["offset_range_factor"][i],
        position_bias=config["use_pes"][i],
    )


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of the official repository."""
    return any(key.startswith(("patch_proj.", "down_projs.")) or ".attns." in key for key in state_dict)


def convert(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official tensors under `model`'s names: renamed, and reshaped where a 1x1 convolution became a linear layer.

    Args:
        state_dict: official names to tensors, a state dict or any part of one (gradients, for example).
        model: the DAT that they belong to.

    Returns:
        A dictionary for `model.load_state_dict`, without the constant buffers relative_position_index and attn_mask.
        Names that `model` does not have come through, so that a strict load reports them.
    """
    parameters = dict(model.named_parameters())
    converted = {}
    for key, value in state_dict.items():
        if key.endswith(_BUFFERS):
            continue
        name = key
        for pattern, replacement in _RENAMES:
            name = pattern.sub(replacement, name)
        parameter = parameters.get(name)
        # Only trailing 1x1 kernels go: a table of another size keeps its shape, for the caller to see.
        if parameter is not None and value.ndim == 4 and parameter.ndim == 2:
            value = value.flatten(1)
        converted[name] = value
    return converted
