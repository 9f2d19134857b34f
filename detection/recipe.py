"""From a configuration to what trains a model: criterion, optimizer, batches, first weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat.training.checkpoint import load_checkpoint, load_weights
from dat.training.distributed import Distributed
from dat.training.errors import ConfigError
from dat.training.loop import create_timm_model
from dat.training.optim import layer_scales, param_groups
from dat.training.weights import without_weights

from .config import DetectionConfig, LossConfig, TrainConfig
from .criterion import SetCriterion
from .data import AspectRatioBatchSampler, Batch, CocoAnnotations, DetectionDataset, make_loader, train_transform
from .data.cache import ImageCache
from .matcher import HungarianMatcher, Scores


def model_scores(model: nn.Module) -> Scores:
    """How a model's logits become probabilities."""
    return getattr(model, "scores", "sigmoid")


def make_criterion(model: nn.Module, num_classes: int, loss: LossConfig) -> SetCriterion:
    """The losses of a model."""
    scores = model_scores(model)
    matcher = HungarianMatcher(loss.cost_class, loss.cost_box, loss.cost_giou, scores)
    weights = {"loss_ce": loss.weight_class, "loss_bbox": loss.weight_box, "loss_giou": loss.weight_giou}
    return SetCriterion(num_classes, matcher, scores, weights, loss.focal_alpha)


def make_optimizer(model: nn.Module, train: TrainConfig, lr: float, backbone: dict[str, Any]) -> torch.optim.AdamW:
    """AdamW with the learning rates of Deformable DETR: lower for the backbone and for what places the samples.

    Args:
        model: a detector.
        train: its other numbers.
        lr: base learning rate.
        backbone: `model.backbone` of the configuration: its layers' rates fall by `train.layer_decay`.
    """
    multipliers = {
        r"^backbone\.": train.backbone_lr_scale,
        r"sampling_offsets|reference_points": train.sampling_lr_scale,
    }
    if not any("sampling_offsets" in name or "reference_points" in name for name, _ in model.named_parameters()):
        multipliers.popitem()
    scales = backbone_scales(model.backbone, backbone, train.layer_decay) if train.layer_decay < 1 else {}
    groups = param_groups(model, lr, train.weight_decay, multipliers, {f"backbone.{n}": s for n, s in scales.items()})
    # hundreds of small tensors: one call instead of a dozen for each
    return torch.optim.AdamW(groups, fused=True)


def backbone_scales(backbone: Any, arguments: dict[str, Any], decay: float) -> dict[str, float]:
    """layer_scales of a timm feature extractor, by its own parameter names.

    Feature extractors have no layers of their own: those of the classifier of the same `arguments` count.
    """
    body = {name: value for name, value in without_weights(arguments).items() if name != "out_indices"}
    with torch.device("meta"):
        known = layer_scales(create_timm_model(body), decay)
    return {name: known[_classifier_name(name, known)] for name, _ in backbone.named_parameters()}


def _classifier_name(name: str, known: dict[str, float]) -> str:
    """The classifier's name of a feature extractor's parameter."""
    name = name.removeprefix("model.")
    if name in known:
        return name
    # timm flattens the first level of some models: stages_0.x is stages.0.x
    places = [i for i, letter in enumerate(name) if letter == "_"]
    return next(other for i in places if (other := f"{name[:i]}.{name[i + 1 :]}") in known)


def set_grad_checkpointing(model: nn.Module) -> None:
    """Makes every part of a detector that can recompute its layers in the backward pass instead of keeping them.

    Raises ConfigError where no part can.
    """
    backbone: Any = model.backbone
    parts = [part for part in (model, backbone, getattr(backbone, "model", None)) if _can_checkpoint(part)]
    if not parts:
        raise ConfigError("train.grad_checkpointing is true, but neither this detector nor its backbone can do that")
    for part in parts:
        part.set_grad_checkpointing(True)


def _can_checkpoint(part: Any) -> bool:
    return callable(getattr(part, "set_grad_checkpointing", None))


def start_from(model: nn.Module, path: str | Path) -> list[str]:
    """Loads a detector's weights, averaged ones where it has them; returns the names of the tensors left as they are.

    Those are of the class heads, where the checkpoint has another number of classes.

    Raises:
        CheckpointError: not a detection checkpoint, or of another architecture; names the first tensor that differs.
    """
    state = load_checkpoint(path, kind="detection")
    weights: dict[str, Tensor] = state.get("state_dict_ema") or state["state_dict"]
    own = model.state_dict()
    new = [
        name
        for name, value in own.items()
        if "class_embed" in name and name in weights and weights[name].shape != value.shape
    ]
    load_weights(model, weights | {name: own[name] for name in new}, path)
    return new


def train_loader(
    annotations: CocoAnnotations, config: DetectionConfig, distributed: Distributed, cache: ImageCache | None
) -> tuple[DataLoader[Batch], AspectRatioBatchSampler]:
    """This process's batches, augmented as `data.train` says, and what orders them."""
    data, train = config.data, config.train
    transform = train_transform(
        sizes=data.train.sizes,
        max_size=data.train.max_size,
        horizontal_flip=data.train.horizontal_flip,
        vertical_flip=data.train.vertical_flip,
        crop=data.train.crop,
        crop_resize=data.train.crop_resize,
        crop_min=data.train.crop_min,
        crop_max=data.train.crop_max,
        photometric=data.train.photometric,
        mean=data.mean,
        std=data.std,
    )
    sampler = AspectRatioBatchSampler(
        annotations.records,
        train.batch_size,
        config.seed,
        distributed.rank,
        distributed.world_size,
        train.accumulate,
        data.train.max_pixels,
        data.pad_multiple,
    )
    dataset = DetectionDataset(annotations.records, transform, config.seed, cache)
    pin = distributed.device.type == "cuda"
    return make_loader(dataset, sampler, data.pad_multiple, train.workers, pin), sampler
