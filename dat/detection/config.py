"""The configuration of a detection run: what `configs/detection/*.yaml` may hold, with the defaults of the paper.

The defaults follow Zhu et al., "Deformable DETR" (ICLR 2021), section 5.1 and its official COCO recipe.
"""

from dataclasses import dataclass, field
from typing import Literal

from dat.detection.models import ModelConfig, check_model
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.engine.config import LARGEST_SIDE, MOST_WORKERS, check_range, get_value
from dat.utils.errors import ConfigError


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
    # The sides of batches are padded to a multiple of this many pixels.
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
class TrainConfig:
    """`batch_size` is per process; a step takes `accumulate` such batches of each process.

    `steps`: length of the run in optimizer steps; 0: that of `epochs`.
    `schedule`: "cosine" to `min_lr_scale * lr`, or "step": x 0.1 at `decay_epochs`.
    `lr` is for steps of `lr_batch_size` images, and scaled by the square root of, or linearly with ("lr_scaling"), the
    number in use; 0: for any number. `layer_decay`: factor on the rates of the backbone for each layer below its last.
    `lr` times `backbone_lr_scale` trains the backbone, times `sampling_lr_scale` the sampling offsets and reference
    points.
    `ema_decay` 0: no averaged weights. `eval_epochs`: evaluate every so many epochs, and after the last.
    `checkpoint_steps` 0: checkpoints at the ends of epochs only. `pictures`: validation images to draw.
    `worst`: objects that were missed, and false detections, to draw.
    `grad_checkpointing`: layers are computed again in the backward pass instead of kept in memory.
    `fsdp`: each process keeps a share of weights, gradients and optimizer state (FSDP2), for large backbones.
    `compile`: torch.compile, once for all image sizes, of which batches with and without padding are two graphs.
    `device`: auto, cpu or cuda.
    """

    epochs: int = 50
    steps: int = 0
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 2e-4
    lr_batch_size: int = 0
    lr_scaling: Literal["sqrt", "linear"] = "sqrt"
    layer_decay: float = 1.0
    backbone_lr_scale: float = 0.1
    sampling_lr_scale: float = 0.1
    weight_decay: float = 1e-4
    clip_grad: float = 0.1
    warmup_steps: int = 0
    schedule: Literal["cosine", "step"] = "step"
    min_lr_scale: float = 0.0
    decay_epochs: list[int] = field(default_factory=lambda: [40])
    amp: Literal["none", "bf16"] = "none"
    grad_checkpointing: bool = False
    fsdp: bool = False
    compile: bool = False
    ema_decay: float = 0.0
    eval_epochs: int = 1
    eval_batch_size: int = 4
    checkpoint_steps: int = 0
    pictures: int = 8
    worst: int = 24
    picture_threshold: float = 0.3
    resume: bool = False
    workers: int = 2
    log_steps: int = 20
    device: str = "auto"
    loss: LossConfig = field(default_factory=LossConfig)


@dataclass
class DetectionConfig:
    output: str = "runs/detection"
    seed: int = 0
    model: ModelConfig = field(default_factory=DeformableDETRConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def check_config(config: DetectionConfig) -> None:
    """Raises ConfigError on values that cannot work, before anything is written."""
    data = config.data
    at_least_1 = [
        "data.val.top_k",
        *_keys(
            "train", "epochs", "batch_size", "accumulate", "decay_epochs", "eval_epochs", "eval_batch_size", "log_steps"
        ),
    ]
    at_least_0 = [
        "seed",
        *_keys("train", "backbone_lr_scale", "sampling_lr_scale", "weight_decay", "clip_grad", "warmup_steps"),
        *_keys("train", "steps", "lr_batch_size", "checkpoint_steps", "pictures", "worst"),
        *("data.train.max_pixels", "data.cache_gib"),
        *_keys("train.loss", "cost_box", "cost_giou", "weight_box", "weight_giou", "no_object_weight"),
        *(key for key in _keys("train.loss", "cost_class", "weight_class") if get_value(config, key) is not None),
    ]
    fractions = [
        *("data.mean", "train.loss.focal_alpha"),
        *_keys("data.train", "horizontal_flip", "vertical_flip", "crop", "photometric"),
        *_keys("train", "min_lr_scale", "ema_decay", "picture_threshold"),
    ]
    sides = [
        *_keys("data.train", "sizes", "max_size", "crop_resize", "crop_min"),
        *_keys("data", "val.size", "val.max_size", "pad_multiple"),
    ]
    check_range(config, at_least_1, 1)
    check_range(config, sides, 1, LARGEST_SIDE)
    check_range(config, ["train.workers"], 0, MOST_WORKERS)
    check_range(config, at_least_0, 0)
    check_range(config, fractions, 0, 1)
    check_range(config, ["train.lr", "data.std"], 0, exclusive=True)
    check_range(config, ["train.layer_decay"], 0, 1, exclusive=True)
    for key in ("data.train.sizes", "data.train.crop_resize"):
        if not get_value(config, key):
            raise ConfigError(f"{key} is empty, should list one or more sizes")
    # torchvision requires the longest edge to be larger than the shortest
    if data.train.max_size < max(data.train.sizes) or data.val.max_size < data.val.size:
        raise ConfigError("data.train.max_size and data.val.max_size should be at least the largest shortest edge")
    if data.train.crop_max < data.train.crop_min:
        raise ConfigError(
            f"data.train.crop_max is {data.train.crop_max}, should be at least crop_min {data.train.crop_min}"
        )
    check_model(config.model)


def _keys(section: str, *names: str) -> list[str]:
    return [f"{section}.{name}" for name in names]
