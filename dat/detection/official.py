"""Checkpoints of the official implementations, of transformers and of detrex under this project's names."""

import argparse
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dat.detection.models.backbone import SwinMaps
from dat.engine.checkpoint import load_weights, read_weights
from dat.utils.errors import CheckpointError, ConfigError

_logger = logging.getLogger(__name__)

# Tensors that depend on the classes.
HEADS = ("class_embed.", "enc_out_class_embed.", "label_enc.")

# Applied in this order; names that none of them matches are already this project's.
_RENAMES = (
    # Names of transformers: those in its files ("conv_encoder", "out_proj", "fc1"), and in its models since version 5
    (r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone."),
    (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.conv1."),
    (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.bn1."),
    (r"^model\.", ""),
    (r"^input_projection\.", "input_proj."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^decoder\.layernorm\.", "decoder_norm."),
    (r"^((?:en|de)coder\.layers\.\d+)\.(?:mlp\.)?fc([12])\.", r"\1.linear\2."),
    (r"^((?:en|de)coder\.layers\.\d+\.(?:self|encoder)_attn)\.o_proj\.", r"\1.out_proj."),
    (r"^(decoder\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attn."),
    (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    # Names of detrex, and of detectron2's ResNet in it.
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"input_proj.\1.1."),
    (r"^transformer\.level_embeds$", "level_embed"),
    (r"^(transformer\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(transformer\.decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"^(transformer\.decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^(transformer\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"^(transformer\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"^(transformer\.decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    (r"^(transformer\.decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"^(transformer\.decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
    (r"^(transformer\.(?:en|de)coder\.layers\.\d+)\.ffns\.0\.layers\.0\.0\.", r"\1.linear1."),
    (r"^(transformer\.(?:en|de)coder\.layers\.\d+)\.ffns\.0\.layers\.1\.", r"\1.linear2."),
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone."),
    (r"^(backbone\.res\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(backbone\.res\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
    (r"^(backbone\.res\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    # Names of the official implementations.
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^transformer\.", ""),
    (r"^tgt_embed\.", "query_embed."),
    (r"^decoder\.ref_point_head\.", "ref_point_head."),
    # With box refinement the decoder holds the heads too.
    (r"^decoder\.(bbox|class)_embed\.", r"\1_embed."),
    (r"^(encoder|decoder)\.norm\.", r"\1_norm."),
    (r"^(decoder\.layers\.\d+)\.multihead_attn\.", r"\1.cross_attn."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
)
# Norms of the decoder in transformers; Deformable DETR's official numbering is the other way round.
_DETR_NORMS = {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2"}
_DEFORMABLE_NORMS = {"self_attn_layer_norm": "norm2", "encoder_attn_layer_norm": "norm1"}
# Stages of detectron2's ResNet.
_STAGE = re.compile(r"^backbone\.res(\d)\.")
# Names of transformers' own ResNet.
_RESNET = re.compile(r"^backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:shortcut|layer\.(\d+))\.(\w+)\.")
# Names of the official Swin and detectron2's, which merge patches at the end of a stage, not at the start of the next.
_SWIN = (
    (r"^backbone\.0\.", "backbone."),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"^backbone\.(patch_embed\.|layers\.)", r"backbone.body.\1"),
    (r"^(backbone\.body\.layers)\.(\d)\.downsample\.", lambda m: f"{m[1]}_{int(m[2]) + 1}.downsample."),
    (r"^backbone\.body\.layers\.", "backbone.body.layers_"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")


def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of an official or transformers' detector under `model`'s names, for `model.load_state_dict`.

    A renaming, except that transformers' projections of queries, keys and values are packed into one tensor, that
    DINO's table of labels loses its unused last one, or is left out if `model` has none, and that the unused counters
    of batch norm are added or left out to fit `model`.

    Args:
        state_dict: the "model" entry of a checkpoint of facebookresearch/detr, fundamentalvision/Deformable-DETR,
            IDEA-Research/DINO or detrex' DINO, or the weights of transformers' DetrForObjectDetection or
            DeformableDetrForObjectDetection; any part of them, or gradients under the same names. Tensors that have
            this project's names keep them.
        model: the DETR, DeformableDETR or DINO that is to load them, on timm's model of the same backbone.

    Raises:
        ValueError: when the tensors have different heads per decoder layer and `model` one for all.
    """
    is_detr = getattr(model, "kind", None) == "detr"
    converted: dict[str, Tensor] = {}
    for their_name, tensor in state_dict.items():
        name = _rename(their_name, is_detr)
        name = name if is_detr else _rename_heads(name, model)
        if isinstance(model.backbone, SwinMaps):
            if their_name.endswith("relative_position_index"):
                # timm computes it.
                continue
            name = _substitute(_SWIN, name)
        if name == "label_enc.weight":
            # Only training needs it. The official table has a label more than there are classes.
            if not hasattr(model, "label_enc"):
                continue
            tensor = tensor[:-1] if len(tensor) == getattr(model, "num_classes", 0) + 1 else tensor
        if name in converted and not torch.equal(converted[name], tensor):
            needed = "share_heads=False" if getattr(model, "kind", None) == "dino" else "box_refine=True"
            raise ValueError(f"{their_name} differs from the other layers' heads: it needs a model with {needed}")
        converted[name] = tensor
    return _fit_counters(_untie_heads(_pack_projections(converted), model), model)


def load(model: nn.Module, path: str | Path) -> bool:
    """Loads a whole detector to fine-tune: an official checkpoint, transformers' weights or a run's own checkpoint.

    Everything but the class heads must fit. They are loaded if they fit, and stay new if the checkpoint has another
    number of classes. Averaged weights are preferred where a checkpoint has them.

    Args:
        model: a detector.
        path: .pth, .bin or .safetensors file.

    Returns:
        whether the class heads were loaded.

    Raises:
        ConfigError: no such file.
        CheckpointError: not a checkpoint, or of another model; names the first tensor that differs.
    """
    theirs = read(path, "model.checkpoint_path")
    try:
        state = convert(theirs, model)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    own = model.state_dict()
    # Only training needs the labels of denoising queries: a detector that was trained without them fits too.
    state = {name: tensor for name, tensor in own.items() if name.startswith("label_enc.")} | state
    heads = {name: tensor for name, tensor in own.items() if name.startswith(HEADS)}
    fits = all(name in state and state[name].shape == tensor.shape for name, tensor in heads.items())
    if not fits:
        _logger.warning("%s has other classes: the class heads start anew", path)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEADS)} | heads
    load_weights(model, state, path)
    return fits


def num_classes(theirs: dict[str, Tensor], kind: str, path: str | Path) -> int:
    """Classes of a detector's tensors, "no object" left out; `kind` is that of its configuration.

    Raises:
        CheckpointError: not of a detector.
    """
    is_detr = kind == "detr"
    for name, tensor in theirs.items():
        if re.match(r"class_embed\..*bias$", _rename(name, is_detr)):
            return len(tensor) - is_detr
    raise CheckpointError(f"{path}: not of a DETR: it has no class heads")


def read(path: str | Path, key: str) -> dict[str, Tensor]:
    """The tensors of a detector's file, under its own names. Raises ConfigError and CheckpointError as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: {path}")
    # Official checkpoints hold their command line, and schedulers their milestones.
    with torch.serialization.safe_globals([argparse.Namespace, Counter]):
        return read_weights(path)


def _rename(name: str, is_detr: bool) -> str:
    name = _substitute(_RENAMES, name)
    norms = _DETR_NORMS if is_detr else _DEFORMABLE_NORMS
    name = re.sub(r"^(decoder\.\d+)\.(\w+_attn_layer_norm)\.", lambda m: f"{m[1]}.{norms[m[2]]}.", name)
    # The layers of their MLP have no activations between them.
    mlps = r"^((?:enc_out_)?bbox_embed\.(?:\d+\.)?|ref_point_head\.)layers\.(\d+)"
    name = re.sub(mlps, lambda m: f"{m[1]}{2 * int(m[2])}", name)
    name = _STAGE.sub(lambda m: f"backbone.layer{int(m[1]) - 1}.", name)
    return _RESNET.sub(_resnet_name, name)


def _substitute(renames: Iterable[tuple[str, Any]], name: str) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _rename_heads(name: str, model: Any) -> str:
    """A name with the head that `model` has in its place, and the number of a map among all levels."""
    match = re.match(r"neck\.extra_convs\.(\d+)\.(conv|norm)\.", name)
    if match is not None:
        level = len(model.backbone.feature_info.channels()) + int(match[1])
        return f"input_proj.{level}.{int(match[2] == 'norm')}.{name[match.end() :]}"
    match = re.match(r"(bbox_embed(?=\.\d+\.\d+\.)|class_embed(?=\.\d+\.))\.(\d+)", name)
    if match is not None and getattr(model, "kind", None) == "dino" and int(match[2]) == len(model.decoder):
        # detrex lists the encoder's head after those of the decoder.
        name, match = f"enc_out_{match[1]}{name[match.end() :]}", None
    if getattr(model, "share_encoder_heads", False):
        name = re.sub(r"^enc_out_(class|bbox)_embed\.", r"\1_embed.0.", name)
    # The one head of a model is listed once for each layer.
    return f"{match[1]}.0{name[match.end() :]}" if match is not None and model.share_heads else name


def _resnet_name(match: re.Match[str]) -> str:
    stage, block, layer, kind = match.groups()
    prefix = f"backbone.layer{int(stage) + 1}.{block}."
    if layer is None:
        return f"{prefix}downsample.{int(kind == 'normalization')}."
    return f"{prefix}{'bn' if kind == 'normalization' else 'conv'}{int(layer) + 1}."


def _pack_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts the projections of queries, keys and values together, as nn.MultiheadAttention has them."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = re.match(r"^((?:en|de)coder\.\d+\.\w+_attn)\.(?:q|k|v)_proj\.(weight|bias)$", name)
        if match is None:
            packed[name] = tensor
            continue
        parts = [state.get(f"{match[1]}.{part}.{match[2]}") for part in _PARTS]
        if any(part is None for part in parts):
            raise ValueError(f"{name} comes without the other two of {', '.join(_PARTS)}")
        packed[f"{match[1]}.in_proj_{match[2]}"] = torch.cat([part for part in parts if part is not None])
    return packed


def _untie_heads(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gives layers without a class head that of the first: recent versions of transformers tie them."""
    first = {name: re.sub(r"^(class_embed)\.\d+\.", r"\1.0.", name) for name in model.state_dict()}
    return state | {name: state[tied] for name, tied in first.items() if name not in state and tied in state}


def _fit_counters(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """num_batches_tracked where the model has it: frozen batch norm has none, in either project."""
    suffix = "num_batches_tracked"
    own = {name for name in model.state_dict() if name.endswith(suffix)}
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(suffix) or name in own}
    missing = {name for name in own - kept.keys() if name.removesuffix(suffix) + "running_mean" in kept}
    return kept | {name: torch.zeros((), dtype=torch.int64) for name in sorted(missing)}
