"""The official repository's configurations and checkpoints (https://github.com/LeapLabTHU/DAT)."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dat.models.dat import DAT, StageConfig

# Official files may hold their yacs configuration beside the weights: a dictionary, and read as one.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])

# Keys of MODEL.DAT that change nothing in a model, or only Q blocks.
_UNUSED = {"ns_per_pts", "heads_q", "ksize_qnas", "nqs", "qna_activation", "lower_lr_kvs"}
# The official defaults; a tuple has an entry for each stage.
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
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "strides": (-1, -1, -1, -1),
    "offset_range_factor": (1, 2, 3, 4),
    "stage_spec": ("LD", "LD", "LDLDLD", "LD"),
    "groups": (-1, -1, 3, 6),
    "use_pes": (False, False, False, False),
    "dwc_pes": (False, False, False, False),
    "fixed_pes": (False, False, False, False),
    "log_cpb": (False, False, False, False),
    "no_offs": (False, False, False, False),
    "sr_ratios": (8, 4, 2, 1),
    "use_dwc_mlps": (False, False, False, False),
    "use_conv_patches": False,
    "ksizes": (9, 7, 5, 3),
    "nat_ksizes": (3, 3, 3, 3),
    "layer_scale_values": (-1, -1, -1, -1),
    "use_lpus": (False, False, False, False),
}
# Options that only the code of 2023 has, or that fail in the code of 2022.
_NEW = ("fixed_pes", "log_cpb", "no_offs", "layer_scale_values", "use_lpus")
_LETTERS = {"2022": "LSD", "2023": "LSDNPXE"}

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


def build(config: Mapping[str, Any], release: str) -> DAT:
    """The model of an official configuration.

    Args:
        config: a MODEL.DAT dictionary of the official YAML files; keys in lower or upper case, missing ones take the
            official defaults.
        release: "2022" or "2023": which official code the configuration is for.

    Returns:
        DAT with num_classes of the configuration and fresh weights.

    Raises:
        ValueError: the release, a key or a value is not supported; the message names it.
    """
    if release not in _LETTERS:
        raise ValueError(f"release must be '2022' or '2023', got {release!r}")
    config = {key.lower(): value for key, value in config.items()}
    for key in config:
        if key not in _DEFAULTS and key not in _UNUSED:
            raise ValueError(f"unknown key {key!r} in the official configuration of release {release}")
    config = {**_DEFAULTS, **config}
    _check(config, release)
    stem = "patch"
    if config["use_conv_patches"]:
        stem = "conv" if release == "2023" else "overlap"
    return DAT(
        [_stage(config, i, release) for i in range(len(config["dims"]))],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        stem=stem,
        stem_dims=config["dim_stem"],
        num_classes=config["num_classes"],
        mlp_ratio=config["expansion"],
        proj_drop_rate=config["drop_rate"],
        drop_path_rate=config["drop_path_rate"],
    )


def _check(config: Mapping[str, Any], release: str) -> None:
    for key, default in _DEFAULTS.items():
        if isinstance(default, tuple) and len(config[key]) != len(config["dims"]):
            raise ValueError(f"{key} must have an entry for each of dims {config['dims']}, got {config[key]}")
    if config["attn_drop_rate"]:
        raise ValueError(f"attn_drop_rate must be 0.0, got {config['attn_drop_rate']}")
    for key in _NEW:
        if release == "2022" and tuple(config[key]) != _DEFAULTS[key]:
            raise ValueError(f"{key} must be {_DEFAULTS[key][0]} throughout in release 2022, got {config[key]}")


def _stage(config: Mapping[str, Any], i: int, release: str) -> StageConfig:
    blocks = "".join(config["stage_spec"][i])
    _check_blocks(config, i, blocks, release)
    scale = config["layer_scale_values"][i]
    return StageConfig(
        blocks,
        config["dims"][i],
        config["heads"][i],
        window_size=config["window_sizes"][i],
        # -1 fills the place of what a stage without D blocks does not use.
        num_groups=max(config["groups"][i], 1),
        # The code of 2022 does not read this key.
        kernel_size=config["ksizes"][i] if release == "2023" else _DEFAULTS["ksizes"][i],
        stride=max(config["strides"][i], 1),
        offset_range_factor=config["offset_range_factor"][i],
        position_bias=_position_bias(config, i),
        no_off=config["no_offs"][i],
        release=release,
        neighborhood_size=config["nat_ksizes"][i],
        sr_ratio=config["sr_ratios"][i],
        lpu=config["use_lpus"][i],
        conv_mlp=config["use_dwc_mlps"][i],
        layer_scale=scale if scale > 0 else None,
    )


def _check_blocks(config: Mapping[str, Any], i: int, blocks: str, release: str) -> None:
    if "Q" in blocks:
        raise ValueError(
            f"stage_spec[{i}]: Q (QnA) is not supported: no paper of DAT uses it, by the official code's own note; "
            f"got {blocks!r}"
        )
    letters = _LETTERS[release]
    if not set(blocks) <= set(letters):
        raise ValueError(f"stage_spec[{i}]: letters must be of {letters} in release {release}, got {blocks!r}")
    if len(blocks) != config["depths"][i]:
        raise ValueError(f"stage_spec[{i}] must have depths[{i}] = {config['depths'][i]} letters, got {blocks!r}")
    if "D" in blocks and min(config["groups"][i], config["strides"][i]) < 1:
        raise ValueError(
            f"groups[{i}] and strides[{i}] must be at least 1 for a stage with D blocks, "
            f"got {config['groups'][i]} and {config['strides'][i]}"
        )
    if "D" in blocks and config["no_offs"][i] and config["use_pes"][i] and config["dwc_pes"][i]:
        raise ValueError(f"dwc_pes[{i}] must be False where no_offs is True: the official code fails with both")


def _position_bias(config: Mapping[str, Any], i: int) -> str:
    """By the precedence of the official code, which has no position bias without offsets."""
    if not config["use_pes"][i] or config["no_offs"][i]:
        return "none"
    for key, position_bias in (("dwc_pes", "dwc_pe"), ("fixed_pes", "fixed_pe"), ("log_cpb", "log_cpb")):
        if config[key][i]:
            return position_bias
    return "table"


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Whether names are those of the official repository."""
    return any(key.startswith(("patch_proj.", "down_projs.")) or ".attns." in key for key in state_dict)


def convert(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official tensors under `model`'s names: renamed, and reshaped where a 1x1 convolution became a linear layer.

    Args:
        state_dict: official names to tensors, a state dict or any part of one (gradients, for example).
        model: the DAT that they belong to.

    Returns:
        A dictionary for `model.load_state_dict`, without the constant buffers relative_position_index and attn_mask and
        without parameters that the official code has but does not use: the offset network of blocks with no_off and
        the layer scales of X blocks. Names that `model` does not have come through, so that a strict load reports them.
    """
    parameters = dict(model.named_parameters())
    converted = {}
    for key, value in state_dict.items():
        name = _rename(key, parameters)
        if key.endswith(_BUFFERS) or _is_unused(name, parameters):
            continue
        parameter = parameters.get(name)
        # Only dimensions of 1 go: a table of another size keeps its shape, for the caller to see.
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
