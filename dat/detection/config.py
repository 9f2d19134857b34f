"""The keys of `configs/detection/*.yaml`, with the defaults of the paper.

The defaults follow Zhu et al., "Deformable DETR" (ICLR 2021), section 5.1 and its official COCO recipe.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dat.detection.models.backbone import check_backbone
from dat.engine.config import LARGEST_SIDE, check_range, get_value
from dat.engine.train_config import TrainConfig as BaseTrainConfig
from dat.engine.train_config import check_train_config
from dat.utils.errors import ConfigError


def default_backbone() -> dict[str, Any]:
    return {"name": "dat_tiny"}


@dataclass
class ModelConfig:
    """`kind`: deformable_detr, or detr, which knows neither levels, points, box_refine nor two_stage.

    `backbone` is `name`, `checkpoint_path` (of a classifier) and any argument of `timm.create_model`: output_stride=16
    makes the DC5 models, `out_indices` chooses the maps. Left out, it is the last one for detr and the last
    `num_levels`, at most three, for deformable_detr.
    `checkpoint_path`: a whole detector to start from, official, of transformers or of a run here. Its class heads stay
    new where its number of classes is another.
    `freeze`: modules of the backbone that are not trained, such as [conv1, bn1, layer1] of a ResNet.
    `pre_norm`: of detr, normalise before attention instead of after.
    """

    kind: Literal["deformable_detr", "detr"] = "deformable_detr"
    backbone: dict[str, Any] = field(default_factory=default_backbone)
    checkpoint_path: str | None = None
    num_queries: int = 300
    embed_dim: int = 256
    num_heads: int = 8
    encoder_depth: int = 6
    decoder_depth: int = 6
    mlp_dim: int = 1024
    drop_rate: float = 0.1
    pre_norm: bool = False
    num_levels: int = 4
    num_points: int = 4
    box_refine: bool = False
    two_stage: bool = False
    # sensible for a backbone that starts from trained weights only
    freeze_batch_norm: bool = True
    freeze: list[str] = field(default_factory=list)

    @property
    def num_maps(self) -> int:
        """Of the backbone, where `backbone` has no out_indices."""
        return 1 if self.kind == "detr" else min(3, self.num_levels)


@dataclass
class TrainDataConfig:
    """One split and its augmentation. Paths are relative to `data.root`; probabilities are 0 to 1.

    `sizes`: shortest edges in pixels, one is drawn per image. `max_size`: limit of the longest edge.
    `max_pixels`: most pixels of a batch of one process, padding included, so that its memory is bounded; 0: no limit.
    `crop`: probability of DETR's resize, crop, resize branch: the shortest edge is drawn from `crop_resize`, the crop's
    sides from `crop_min` to `crop_max` pixels.
    """

    annotations: str = "annotations/instances_train2017.json"
    images: str = "train2017"
    sizes: list[int] = field(default_factory=lambda: list(range(480, 801, 32)))
    max_size: int = 1333
    max_pixels: int = 0
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    crop: float = 0.5
    crop_resize: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_min: int = 384
    crop_max: int = 600
    photometric: float = 0.0


@dataclass
class ValDataConfig:
    """One split, resized to a shortest edge of `size` pixels and a longest of at most `max_size`.

    `top_k`: how many detections of an image count; COCO's own limit is 100 of a class.
    """

    annotations: str = "annotations/instances_val2017.json"
    images: str = "val2017"
    size: int = 800
    max_size: int = 1333
    top_k: int = 100


@dataclass
class DataConfig:
    """`cache` "memory": decoded images stay in memory, `cache_gib` of them at most for each process.

    With more than fit in, the first of the training file stay.
    """

    root: str = "data/coco"
    train: TrainDataConfig = field(default_factory=TrainDataConfig)
    val: ValDataConfig = field(default_factory=ValDataConfig)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # batches are padded to a multiple of this many pixels
    pad_multiple: int = 1
    cache: Literal["none", "memory"] = "none"
    cache_gib: float = 4.0


@dataclass
class LossConfig:
    """Costs of the assignment, weights of the losses, alpha of the focal loss (of the loss, not of the cost).

    `cost_class` and `weight_class` null: those of the paper of `model.kind`, 2 for deformable_detr and 1 for detr.
    `focal_alpha` is of deformable_detr alone, `no_object_weight`, of that class in the cross-entropy, of detr.
    """

    cost_class: float | None = None
    cost_box: float = 5.0
    cost_giou: float = 2.0
    weight_class: float | None = None
    weight_box: float = 5.0
    weight_giou: float = 2.0
    focal_alpha: float = 0.25
    no_object_weight: float = 0.1


@dataclass
class TrainConfig(BaseTrainConfig):
    """Options of detectors, and their defaults.

    `backbone_lr_scale` times `lr` trains the backbone, `sampling_lr_scale` times `lr` the sampling offsets and
    reference points. `picture_threshold`: lowest score of detections that are drawn. `compile`: one graph for all image
    sizes of padded batches, and one for those without padding.
    """

    clip_grad: float = 0.1
    schedule: Literal["cosine", "step"] = "step"
    backbone_lr_scale: float = 0.1
    sampling_lr_scale: float = 0.1
    picture_threshold: float = 0.3
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class DetectionConfig:
    output: str = "runs/detection"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def check_config(config: DetectionConfig) -> None:
    """Raises ConfigError for values that cannot work, before anything is written."""
    data = config.data
    check_train_config(config)
    at_least_1 = [
        *_keys(
            "model", "num_queries", "embed_dim", "num_heads", "decoder_depth", "mlp_dim", "num_levels", "num_points"
        ),
        "data.val.top_k",
    ]
    at_least_0 = [
        *("model.encoder_depth", "data.train.max_pixels", "data.cache_gib"),
        *_keys("train", "backbone_lr_scale", "sampling_lr_scale"),
        *_keys("train.loss", "cost_box", "cost_giou", "weight_box", "weight_giou", "no_object_weight"),
        *(key for key in _keys("train.loss", "cost_class", "weight_class") if get_value(config, key) is not None),
    ]
    fractions = [
        *("model.drop_rate", "data.mean", "train.loss.focal_alpha"),
        *_keys("data.train", "horizontal_flip", "vertical_flip", "crop", "photometric"),
        "train.picture_threshold",
    ]
    sides = [
        *_keys("data.train", "sizes", "max_size", "crop_resize", "crop_min"),
        *_keys("data", "val.size", "val.max_size", "pad_multiple"),
    ]
    check_range(config, at_least_1, 1)
    check_range(config, sides, 1, LARGEST_SIDE)
    check_range(config, at_least_0, 0)
    check_range(config, fractions, 0, 1)
    check_range(config, ["data.std"], 0, exclusive=True)
    for key in ("data.train.sizes", "data.train.crop_resize"):
        if not get_value(config, key):
            raise ConfigError(f"{key} is empty, should list one or more sizes")
    # torchvision requires the longest edge to be larger than the shortest.
    if data.train.max_size < max(data.train.sizes) or data.val.max_size < data.val.size:
        raise ConfigError("data.train.max_size and data.val.max_size should be at least the largest shortest edge")
    if data.train.crop_max < data.train.crop_min:
        raise ConfigError(
            f"data.train.crop_max is {data.train.crop_max}, should be at least crop_min {data.train.crop_min}"
        )
    check_model(config.model)


def check_model(model: ModelConfig) -> None:
    """Raises ConfigError on parts of a model that do not go together, before any of it is made."""
    if "name" not in model.backbone:
        raise ConfigError("model.backbone: has no 'name'; it should name a timm model, such as dat_tiny")
    if model.kind == "detr" and (model.two_stage or model.box_refine):
        wrong = "two_stage" if model.two_stage else "box_refine"
        raise ConfigError(f"model.{wrong} is true, which needs model.kind=deformable_detr; it is detr")
    if model.two_stage and not model.box_refine:
        raise ConfigError("model.two_stage is true, which needs model.box_refine=true")
    if model.kind != "detr" and model.pre_norm:
        raise ConfigError(f"model.pre_norm is true, which needs model.kind=detr; it is {model.kind}")
    if model.embed_dim % 4 or model.embed_dim % model.num_heads:
        raise ConfigError(
            f"model.embed_dim is {model.embed_dim}, should be a multiple of 4 and of model.num_heads, {model.num_heads}"
        )
    maps = check_backbone(model.backbone, model.num_maps)
    if model.kind == "detr" and maps != 1:
        raise ConfigError(f"model.backbone.out_indices gives {maps} maps, model.kind=detr takes one, such as [-1]")
    if model.kind != "detr" and maps > model.num_levels:
        raise ConfigError(
            f"model.num_levels is {model.num_levels}, fewer than the {maps} maps of model.backbone: "
            "raise it, or give fewer model.backbone.out_indices"
        )


def _keys(section: str, *names: str) -> list[str]:
    return [f"{section}.{name}" for name in names]
