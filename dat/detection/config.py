"""The keys of `configs/detection/*.yaml`, with the defaults of the paper.

The defaults follow Zhu et al., "Deformable DETR" (ICLR 2021), section 5.1 and its official COCO recipe.
"""

from dataclasses import dataclass, field
from typing import Literal

from dat.detection.models import DETECTORS, ModelConfig, check_model
from dat.detection.models.deformable_detr import DeformableDETRConfig
from dat.engine.config import LARGEST_SIDE, check_range, get_value
from dat.engine.train_config import TrainConfig as BaseTrainConfig
from dat.engine.train_config import check_train_config
from dat.utils.errors import ConfigError

ClassLoss = Literal["focal", "varifocal", "matchability"]
# Least side of a tile in pixels.
SMALLEST_TILE = 16
# The sizes of images in `data.train` and `data.val`, which `data.least_side` raises by one factor.
TRAIN_SIZES = ("sizes", "max_size", "crop_resize", "crop_min", "crop_max")
VAL_SIZES = ("size", "max_size")


@dataclass
class TrainDataConfig:
    """One split and its augmentation. Probabilities are 0 to 1.

    `annotations`, `images`: paths relative to `data.root`, "": found there, see docs/detection.md.
    `sizes`: shortest edges in pixels, one is drawn per image. `max_size`: limit of the longest edge.
    `max_pixels`: most pixels of a batch of one process, padding included, so that its memory is bounded; 0: no limit.
    `crop`: probability of DETR's resize, crop, resize branch: the shortest edge is drawn from `crop_resize`, the crop's
    sides from `crop_min` to `crop_max` pixels.
    `mosaic`, `mixup`, `copy_paste`: probabilities of these, see dat.detection.data.mixing; the last `close_mosaic`
    epochs are without mosaic and mixup, as in YOLOX. `scale_jitter` [smallest, largest]: large-scale jitter of images
    without mosaic, [0.1, 2.0] in arXiv:2012.07177; []: none.
    `balance`: images of a class that fewer than this share of the images show are repeated within an epoch, as in LVIS,
    which has 0.001; 0: no image is. See dat.engine.imbalance.repeat_factors.
    `tiles`: larger images are cut into windows with sides of this many pixels, which overlap by the fraction
    `tile_overlap` and are samples of their own; 0: none. A window has the objects of which a fraction of at least
    `tile_visible` is inside. `tile_empty`: fraction of the windows without objects that are kept.
    """

    annotations: str = ""
    images: str = ""
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
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    close_mosaic: int = 0
    scale_jitter: list[float] = field(default_factory=list)
    balance: float = 0.0
    tiles: int = 0
    tile_overlap: float = 0.25
    tile_visible: float = 0.5
    tile_empty: float = 0.1


@dataclass
class ValDataConfig:
    """One split, resized to a shortest edge of `size` pixels and a longest of at most `max_size`.

    `annotations`, `images`: as for training; annotations that are absent from a COCO file are not scored.
    `top_k`: how many detections of an image, or of a tile, count; COCO's own limit is 100 of a class.
    `tiles`: larger images are searched in windows with sides of this many pixels, which overlap by the fraction
    `tile_overlap`, and with `whole_image` once as a whole, for objects larger than the overlap; 0: as a whole only.
    `nms`: detections are dropped whose IoU with a better one of their class is larger; 1: none.
    `one_class`: only the best class of each query counts.
    """

    annotations: str = ""
    images: str = ""
    size: int = 800
    max_size: int = 1333
    top_k: int = 100
    tiles: int = 0
    tile_overlap: float = 0.25
    whole_image: bool = True
    nms: float = 1.0
    one_class: bool = False


@dataclass
class DataConfig:
    """`cache` "memory": decoded images stay in memory, `cache_gib` of them at most for each process.

    With more than fit in, the first by name stay, those of training before others.
    `least_side`: if more than a tenth of the training objects have a side of fewer pixels than this at `val.size`, all
    sizes are raised until they have it, see dat.detection.sizes; 0: never. Any size that is given switches it off.
    `single_class`: all objects are of one class, "object".
    `outside`: images that a list or data.yaml names outside of `root` are read.
    """

    root: str = "data/coco"
    train: TrainDataConfig = field(default_factory=TrainDataConfig)
    val: ValDataConfig = field(default_factory=ValDataConfig)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # The sides of batches are padded to a multiple of this many pixels.
    pad_multiple: int = 1
    least_side: int = 0
    single_class: bool = False
    outside: bool = False
    cache: Literal["none", "memory"] = "none"
    cache_gib: float = 4.0


@dataclass
class LossConfig:
    """Costs of the assignment, weights of the losses, alpha of the focal loss (of the loss, not of the cost).

    `cost_class`, `weight_class`: null uses the paper's value. `focal_alpha` applies to sigmoid detectors only;
    `no_object_weight` weights the no-object class in softmax detectors.
    `class_loss`: of sigmoid detectors; with "varifocal" (arXiv:2008.13367) and "matchability" (DEIM, arXiv:2412.04234)
    the score learns the IoU of the box. `one_to_many`: how many of `model.one_to_many_queries` are matched to each
    target.
    """

    cost_class: float | None = None
    cost_box: float = 5.0
    cost_giou: float = 2.0
    weight_class: float | None = None
    weight_box: float = 5.0
    weight_giou: float = 2.0
    focal_alpha: float = 0.25
    no_object_weight: float = 0.1
    class_loss: ClassLoss = "focal"
    one_to_many: int = 6


@dataclass
class TrainConfig(BaseTrainConfig):
    """Options of detectors, and their defaults.

    `backbone_lr_scale` times `lr` trains the backbone, `sampling_lr_scale` times `lr` the sampling offsets and the
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
    folder = "detection"
    raised_by = (
        *((f"data.train.{name}", "data.least_side") for name in (*TRAIN_SIZES, "max_pixels")),
        *((f"data.val.{name}", "data.least_side") for name in VAL_SIZES),
    )
    output: str = "runs/detection"
    seed: int = 0
    model: ModelConfig = field(default_factory=DeformableDETRConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def check_config(config: DetectionConfig) -> None:
    """Raises ConfigError for values that cannot work, before anything is written."""
    data = config.data
    check_train_config(config)
    at_least_0 = [
        *("data.train.max_pixels", "data.train.close_mosaic", "data.train.tiles", "data.val.tiles"),
        *_keys("data", "cache_gib", "least_side"),
        *_keys("train", "backbone_lr_scale", "sampling_lr_scale"),
        *_keys("train.loss", "cost_box", "cost_giou", "weight_box", "weight_giou", "no_object_weight"),
        *(key for key in _keys("train.loss", "cost_class", "weight_class") if get_value(config, key) is not None),
    ]
    fractions = [
        *("data.mean", "train.loss.focal_alpha"),
        *_keys("data.train", "horizontal_flip", "vertical_flip", "crop", "photometric"),
        *_keys("data.train", "mosaic", "mixup", "copy_paste", "balance", "tile_visible", "tile_empty"),
        "data.val.nms",
        "train.picture_threshold",
    ]
    sides = [
        *_keys("data.train", "sizes", "max_size", "crop_resize", "crop_min"),
        *_keys("data", "val.size", "val.max_size", "pad_multiple"),
    ]
    check_range(config, ["data.val.top_k", "train.loss.one_to_many"], 1)
    check_range(config, sides, 1, LARGEST_SIDE)
    check_range(config, at_least_0, 0)
    check_range(config, fractions, 0, 1)
    # Windows that are smaller or overlap by more would be a great many.
    tiles = [key for key in ("data.train.tiles", "data.val.tiles") if get_value(config, key)]
    check_range(config, tiles, SMALLEST_TILE)
    check_range(config, ["data.train.tile_overlap", "data.val.tile_overlap"], 0, 0.9)
    if not data.val.whole_image and not data.val.tiles:
        raise ConfigError("data.val.whole_image is false (--tiles-only), which needs data.val.tiles")
    check_range(config, ["data.std"], 0, exclusive=True)
    # The enlarged image is in memory as a whole before it is cropped.
    check_range(config, ["data.train.scale_jitter"], 0, 8, exclusive=True)
    jitter = data.train.scale_jitter
    if jitter and (len(jitter) != 2 or jitter[0] > jitter[1]):
        raise ConfigError(f"data.train.scale_jitter is {jitter}, should be [] or [smallest, largest]")
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
    loss = config.train.loss
    if loss.cost_class == loss.cost_box == loss.cost_giou == 0:
        raise ConfigError("train.loss: cost_class, cost_box and cost_giou are all 0, one should not be")
    check_model(config.model, max(data.train.max_size, data.val.max_size))
    kind = config.model.kind
    if loss.class_loss != "focal" and DETECTORS[kind].scores != "sigmoid":
        raise ConfigError(f"train.loss.class_loss is {loss.class_loss!r}, should be 'focal' for model.kind={kind}")


def _keys(section: str, *names: str) -> list[str]:
    return [f"{section}.{name}" for name in names]
