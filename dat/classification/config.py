"""The keys of `configs/classification/*.yaml`.

The defaults are DAT's ImageNet-1K recipe (Xia et al., "Vision Transformer with Deformable Attention", CVPR 2022,
section 5.1), which is DeiT's.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from dat.engine.config import LARGEST_SIDE, check_range
from dat.engine.train_config import TrainConfig as BaseTrainConfig
from dat.engine.train_config import check_train_config
from dat.utils.errors import ConfigError


@dataclass
class ModelConfig:
    """`backbone` is `name` and any argument of `timm.create_model`; the number of classes comes from the data."""

    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "dat_tiny"})


@dataclass
class SplitConfig:
    """The images of a split: by default a folder with one folder of images per class, or a tar of the same.

    `path` is relative to `data.root`, or names a dataset of another library:
    hfds/NAME: a dataset of the Hugging Face hub, or a folder that its package `datasets` loads. `split`, `image_key`
        ("": image) and `label_key` ("": label) are its names; `data.root` is its cache folder, empty for the default.
    wds/FOLDER: WebDataset shards in a folder below `data.root`. `split` is a split in its _info.json or a pattern such
        as train-{0000..0127}.tar, `image_key` the extensions of images ("": jpg;jpeg;png;webp), `label_key` the field
        of the .json with the class ("": the .cls file has it).
    tfds/NAME: a dataset that TensorFlow Datasets has prepared in `data.root`, empty for the default. `split` is its
        expression, such as train[:10%]; `image_key` and `label_key` are as for hfds.
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
    """Images are `img_size` pixels square for the model.

    `root`: without train/ and val/, or tars of these names, it may have others such as Training and valid, or itself
    hold class folders or be a .tar; then every fifth image of each class is for validation.
    `class_names`: file below `root` with a class name per line, for wds/ data whose classes are numbers.
    Evaluation takes the central `crop_pct` of the image: of its shorter side ("center"), or after squeezing ("squash")
    or padding ("border") it to a square.
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
class TrainConfig(BaseTrainConfig):
    """Options of classifiers, and their defaults.

    `mixup` and `cutmix` are timm's alphas, 0: off. They are drawn for each pair of images (timm's mode "pair"), so that
    they do not depend on how a step is split into batches and processes. With them, `smoothing` is applied by timm's
    Mixup. `class_weights` needs the cross-entropy. `balance`: draw all classes equally often. `cuda_graphs`: on one
    GPU, replay the model's forward and backward passes as CUDA graphs, which a slow host does not hold up.
    """

    epochs: int = 300
    batch_size: int = 128
    eval_batch_size: int = 128
    lr: float = 1e-3
    lr_scaling: Literal["sqrt", "linear"] = "linear"
    min_lr_scale: float = 0.01
    weight_decay: float = 0.05
    warmup_epochs: float = 20.0
    clip_grad: float = 5.0
    log_steps: int = 50
    pictures: int = 32
    worst: int = 32
    workers: int = 4
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    balance: bool = False
    cuda_graphs: bool = False


@dataclass
class ClassificationConfig:
    folder = "classification"
    output: str = "runs/classification"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def check_config(config: ClassificationConfig) -> None:
    """Raises ConfigError for values that cannot work, before anything is written."""
    check_train_config(config)
    augment, train = config.data.augment, config.train
    probabilities = ("data.augment.hflip", "data.augment.vflip", "data.augment.re_prob", "train.smoothing")
    check_range(config, (*probabilities, "data.mean"), 0, 1)
    check_range(config, ("data.img_size",), 1, LARGEST_SIDE)
    check_range(config, ("train.mixup", "train.cutmix", "data.augment.color_jitter"), 0)
    check_range(config, ("data.std", "data.augment.scale", "data.augment.ratio"), 0, exclusive=True)
    check_range(config, ("data.crop_pct",), 0, 1, exclusive=True)
    if augment.scale[0] > augment.scale[1] or augment.ratio[0] > augment.ratio[1]:
        raise ConfigError("data.augment.scale and ratio should be [smallest, largest]")
    if train.class_weights is not None and train.loss != "cross_entropy":
        raise ConfigError(f"train.class_weights needs train.loss=cross_entropy, it is {train.loss}")
    if train.cuda_graphs:
        for key, only in (("compile", False), ("fsdp", False), ("grad_checkpointing", False), ("accumulate", 1)):
            if (value := getattr(train, key)) != only:
                raise ConfigError(f"train.{key} is {value}, should be {only} with train.cuda_graphs")
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        raise ConfigError(f"train.batch_size is {train.batch_size}, should be even with train.mixup or train.cutmix")
