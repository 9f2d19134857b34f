"""Detectors of transformers, config.json beside model.safetensors, as detectors here: DETR and Deformable DETR."""

from pathlib import Path
from typing import Any

from dat.detection.config import DetectionConfig
from dat.detection.data import Category
from dat.engine.config import from_dict
from dat.utils.errors import CheckpointError
from dat.utils.files import parse_json

# Keys of a configuration here, and in transformers.
_COMMON = {
    "embed_dim": "d_model",
    "num_heads": "encoder_attention_heads",
    "encoder_depth": "encoder_layers",
    "decoder_depth": "decoder_layers",
    "mlp_dim": "encoder_ffn_dim",
    "drop_rate": "dropout",
}
_DEFORMABLE = {
    "num_levels": "num_feature_levels",
    "num_points": "encoder_n_points",
    "box_refine": "with_box_refine",
    "two_stage": "two_stage",
}
# Name of ids that no class has.
_UNUSED = "N/A"


def read_config(weights: Path) -> tuple[DetectionConfig, tuple[Category, ...]]:
    """The configuration and classes of transformers' detector whose file of weights this is.

    Raises:
        CheckpointError: no config.json beside it, or one of another model.
    """
    path = weights.with_name("config.json")
    try:
        theirs = parse_json(path.read_bytes())
        kind, names = theirs["model_type"], theirs["id2label"]
        if kind not in ("detr", "deformable_detr"):
            raise CheckpointError(f"{path}: model_type is {kind!r}, should be detr or deformable_detr")
        keys = _COMMON | (_DEFORMABLE if kind == "deformable_detr" else {})
        model = {"kind": kind, **{ours: theirs[name] for ours, name in keys.items() if name in theirs}}
        queries = "two_stage_num_proposals" if model.get("two_stage") else "num_queries"
        model["num_queries"] = theirs.get(queries, 100 if kind == "detr" else 300)
        if kind == "detr":
            model.setdefault("mlp_dim", 2048)
        model["backbone"] = _backbone(theirs)
        _check_the_rest(theirs, path)
        categories = tuple(Category(int(i), name) for i, name in names.items() if name != _UNUSED)
    except FileNotFoundError:
        raise CheckpointError(f"{weights}: has no config.json beside it, as transformers writes it") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not of transformers' DETR: {type(error).__name__}: {error}") from error
    return from_dict(DetectionConfig, {"model": model}, str(path)), categories


def _check_the_rest(theirs: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for what our models do otherwise, and weights do not show."""
    heads = theirs.get("encoder_attention_heads", 8)
    inner = theirs.get("backbone_config") or {}
    for name, found, wanted in (
        ("activation_function", theirs.get("activation_function", "relu"), "relu"),
        ("backbone_config.hidden_act", inner.get("hidden_act", "relu"), "relu"),
        ("decoder_attention_heads", theirs.get("decoder_attention_heads", heads), heads),
    ):
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is {found!r}, should be {wanted!r}")


def _backbone(theirs: dict[str, Any]) -> dict[str, Any]:
    """`model.backbone`: a timm model by its name, or transformers' ResNet."""
    inner = theirs.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        bottleneck = inner.get("layer_type", "bottleneck") == "bottleneck"
        sizes = inner.get("hidden_sizes", [256, 512, 1024, 2048])
        backbone: dict[str, Any] = {
            "name": "resnet50" if bottleneck else "resnet18",
            "layers": inner.get("depths", [3, 4, 6, 3]),
            "channels": [size // 4 if bottleneck else size for size in sizes],
        }
    else:
        backbone = {"name": inner.get("backbone") or theirs.get("backbone") or "resnet50"}
    return backbone | ({"output_stride": 16} if theirs.get("dilation") else {})
