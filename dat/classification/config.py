"""The configuration of a classification run: what `configs/classification/*.yaml` may hold.

The defaults are DAT's ImageNet-1K recipe (Xia et al., "Vision Transformer with Deformable Attention", CVPR 2022,
section 5.1), which is DeiT's.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dat.engine.config import LARGEST_SIDE, MOST_WORKERS, check_range
from dat.utils.errors import ConfigError


@dataclass
class ModelConfig:
    """`backbone` is `name` and any argument of `timm.create_model`; the number of classes comes from the data."""

    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "dat_tiny"})


@dataclass
class SplitConfig:
    """A folder with one folder of pictures per class, or a tar of the same; relative to `data.root`.

    `path` hfds/NAME: a data set of the Hugging Face hub, or a folder that its package `datasets` can load; `split`,
    `image_key` ("": image) and `label_key` ("": label) are names in it, and `data.root` is the folder of its cache,
    empty for its own.
    wds/FOLDER: WebDataset shards in a folder, relative to `data.root`; `split` is one of its _info.json or a pattern of
    shards such as train-{0000..0127}.tar, `image_key` the extensions of pictures ("": jpg;jpeg;png;webp), `label_key`
    the field of the .json that holds the class ("": the file .cls does).
    tfds/NAME: a data set that TensorFlow Datasets has prepared, in `data.root`, empty for its own folder; `split` is as
    there, also train[:10%], `image_key` and `label_key` as for hfds.
    """

    path: str = ""
    split: str = "train"
    image_key: str = ""
    label_key: str = ""


@dataclass
class AugmentConfig:
    """Arguments of timm.data.create_transform. Probabilities are 0 to 1; `auto_augment` null: none."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    re_prob: float = 0.25
    re_mode: Literal["const", "rand", "pixel"] = "pixel"


@dataclass
class DataConfig:
    """Pictures become `img_size` pixels square.

    `class_names`: file, relative to `root`, that names a class on each line, where those of wds/ data are numbers.
    Evaluation takes the centre `crop_pct` of the shorter side ("center"), or squeezes ("squash") or pads ("border") the
    whole picture before it takes the centre `crop_pct` of that.
    """

    root: str = "data/imagenet"
    train: SplitConfig = field(default_factory=lambda: SplitConfig("train"))
    val: SplitConfig = field(default_factory=lambda: SplitConfig("val", "validation"))
    class_names: str = ""
    img_size: int = 224
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TrainConfig:
    """`batch_size` is per process; a step takes `accumulate` such batches of each process.

    `mixup` and `cutmix` are timm's alphas, 0: off; they are drawn for each pair of pictures (timm's mode "pair"), so
    that they do not depend on how a step is split. `ema_decay` 0: no averaged weights.
    `lr` is for steps of `lr_batch_size` images, and scaled linearly with, or by the square root of (`lr_scaling`), the
    number in use; 0: for any number. `layer_decay`: factor on the rates for each layer below the head.
    `grad_checkpointing`: blocks are computed again in the backward pass instead of kept in memory.
    `fsdp`: each process keeps a share of weights, gradients and optimizer state (FSDP2), for large models.
    `channels_last`: maps, and without fsdp weights, lie in memory with the channels last. `compile`: torch.compile.
    `checkpoint_steps` 0: checkpoints at the ends of epochs only. `log_steps`: steps between lines of log.jsonl.
    `pictures`: of the validation data, on the sheet that the run leaves; 0: no sheet. `worst`: mistakes on another.
    `wandb_project`: of Weights & Biases, that the numbers go to as well.
    """

    epochs: int = 300
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_batch_size: int = 0
    lr_scaling: Literal["sqrt", "linear"] = "linear"
    layer_decay: float = 1.0
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 20.0
    clip_grad: float = 5.0
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    ema_decay: float = 0.0
    amp: Literal["none", "bf16"] = "none"
    grad_checkpointing: bool = False
    fsdp: bool = False
    channels_last: bool = False
    compile: bool = False
    checkpoint_steps: int = 0
    log_steps: int = 50
    pictures: int = 32
    worst: int = 32
    wandb_project: str = ""
    resume: bool = False
    workers: int = 4
    device: str = "auto"


@dataclass
class ClassificationConfig:
    output: str = "runs/classification"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def check_config(config: ClassificationConfig) -> None:
    """Raises ConfigError on values that cannot work, before anything is written."""
    counts = ("train.epochs", "train.batch_size", "train.accumulate", "train.log_steps")
    check_range(config, counts, 1)
    check_range(config, ("data.img_size",), 1, LARGEST_SIDE)
    check_range(config, ("train.workers",), 0, MOST_WORKERS)
    check_range(config, ("train.layer_decay",), 0, 1, exclusive=True)
    names = (
        "min_lr",
        "lr_batch_size",
        "weight_decay",
        "warmup_epochs",
        "clip_grad",
        "mixup",
        "cutmix",
        "checkpoint_steps",
    )
    check_range(config, ("seed", *(f"train.{name}" for name in (*names, "pictures", "worst"))), 0)
    shares = ("data.augment.hflip", "data.augment.vflip", "data.augment.re_prob", "train.smoothing", "train.ema_decay")
    check_range(config, (*shares, "data.mean"), 0, 1)
    check_range(config, ("data.augment.color_jitter",), 0)
    check_range(config, ("train.lr", "data.std", "data.augment.scale", "data.augment.ratio"), 0, exclusive=True)
    check_range(config, ("data.crop_pct",), 0, 1, exclusive=True)
    augment, train = config.data.augment, config.train
    if augment.scale[0] > augment.scale[1] or augment.ratio[0] > augment.ratio[1]:
        raise ConfigError("data.augment.scale and ratio should be [smallest, largest]")
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        raise ConfigError(f"train.batch_size is {train.batch_size}, should be even with train.mixup or train.cutmix")
