"""The official repository's configurations and checkpoints (https://github.com/LeapLabTHU/DAT)."""

from collections.abc import Mapping
from typing import Any

from dat.models.checkpoint import convert as convert
from dat.models.dat import DAT, StageConfig

# Keys of MODEL.DAT that do not affect the model, or only Q blocks.
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
        # Stages without D blocks have -1 and do not use it.
        num_groups=max(config["groups"][i], 1),
        # The code of 2022 ignores this key.
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
    """The position bias, by the precedence of the official code, which has none without offsets."""
    if not config["use_pes"][i] or config["no_offs"][i]:
        return "none"
    for key, position_bias in (("dwc_pes", "dwc_pe"), ("fixed_pes", "fixed_pe"), ("log_cpb", "log_cpb")):
        if config[key][i]:
            return position_bias
    return "table"
