"""Options of a training run that detection and classification have in common."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dat.engine.config import MOST_WORKERS, check_range
from dat.engine.imbalance import ClassWeights
from dat.utils.errors import ConfigError

# More images in a batch or batches in a step are a mistake, whose lists of indices would not fit into memory.
MOST_IMAGES, MOST_BATCHES = 65536, 1024


@dataclass
class TrainConfig:
    """Options of `train.*`; each task adds its own and sets defaults.

    Length: `epochs`, or `steps` optimizer steps (0: not given); one replaces the other. `least_steps`: `epochs` are as
        many more as make this many steps, so that a configuration fits data of any size; a file or argument that
        gives `epochs` or `steps` sets it back to 0.
    Batches: `batch_size` images per process; an optimizer step takes `accumulate` batches of each process.
        `eval_batch_size` images in evaluation.
    Optimizer: any name of timm's optimizers; "adamw" is torch's fused AdamW.
    Learning rate: `lr` is for steps of `lr_batch_size` images and is scaled by the square root of, or linearly with
        (`lr_scaling`), the number in use; 0: never scaled. `layer_decay` multiplies the rate of each layer of the
        backbone once more than that of the layer above.
    Schedule: linear warm-up over `warmup_epochs` or `warmup_steps`; then "cosine" down to `min_lr_scale` * lr, or
        "step": times 0.1 at each of `decay_epochs`.
    Loss: `class_weights` of the classification loss: "balanced", inverse to the number of examples of each class, or
        {name: weight} of some classes, the others weighing 1; null: none.
    `clip_grad`: largest norm of the gradients, 0: not clipped. `ema_decay`: of averaged weights, 0: none.
    Speed and memory: `amp`; `grad_checkpointing` recomputes layers in the backward pass; `fsdp` splits weights,
        gradients and optimizer state among the processes (FSDP2); `compile`: torch.compile; `channels_last`: memory
        format of images and weights.
    `eval_epochs`: evaluate after every so many epochs and after the last. `early_stop`: stop after so many evaluations
        without a new best (AP, top1), 0: never. `checkpoint_steps`: steps between checkpoints within an epoch, 0: only
        at its end. `log_steps`: steps between lines of log.jsonl.
    Report: `pictures` validation images and `worst` mistakes to draw.
    `resume`: continue from last.pth in `output`, if it exists. `workers`: processes that read images.
    `device`: auto, cpu, cuda or mps. `wandb_project`: project of Weights & Biases for the same numbers, "": none.
    """

    epochs: int = 50
    steps: int = 0
    least_steps: int = 0
    batch_size: int = 4
    accumulate: int = 1
    eval_batch_size: int = 4
    optimizer: str = "adamw"
    lr: float = 2e-4
    lr_batch_size: int = 0
    lr_scaling: Literal["sqrt", "linear"] = "sqrt"
    layer_decay: float = 1.0
    weight_decay: float = 1e-4
    class_weights: ClassWeights | None = None
    clip_grad: float = 0.0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "step"] = "cosine"
    min_lr_scale: float = 0.0
    decay_epochs: list[int] = field(default_factory=lambda: [40])
    ema_decay: float = 0.0
    amp: Literal["none", "bf16"] = "none"
    grad_checkpointing: bool = False
    fsdp: bool = False
    compile: bool = False
    channels_last: bool = False
    eval_epochs: int = 1
    early_stop: int = 0
    checkpoint_steps: int = 0
    log_steps: int = 20
    pictures: int = 8
    worst: int = 24
    resume: bool = False
    workers: int = 2
    device: str = "auto"
    wandb_project: str = ""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a run whose epochs have `steps_per_epoch`."""
        return self.steps or max(self.epochs * steps_per_epoch, self.least_steps)


def check_train_config(config: Any) -> None:
    """Raises ConfigError for values of `train.*`, and a seed, that cannot work."""
    train: TrainConfig = config.train

    def check(low: float, *names: str, high: float = float("inf"), exclusive: bool = False) -> None:
        check_range(config, [f"train.{name}" for name in names], low, high, exclusive=exclusive)

    check(1, "batch_size", "eval_batch_size", high=MOST_IMAGES)
    check(1, "accumulate", high=MOST_BATCHES)
    check(1, "decay_epochs", "eval_epochs", "log_steps")
    check(0 if train.steps else 1, "epochs")
    check(0, "steps", "least_steps", "lr_batch_size", "weight_decay", "clip_grad", "warmup_epochs", "warmup_steps")
    check(0, "early_stop", "checkpoint_steps", "pictures", "worst")
    check(0, "workers", high=MOST_WORKERS)
    check(0, "min_lr_scale", "ema_decay", high=1)
    check(0, "layer_decay", high=1, exclusive=True)
    check(0, "lr", exclusive=True)
    check_range(config, ["seed"], 0)
    for name, weight in train.class_weights.items() if isinstance(train.class_weights, dict) else ():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"train.class_weights has {weight} for {name!r}, should be at least 0")
