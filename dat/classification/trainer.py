"""Training of classifiers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat.classification.config import ClassificationConfig, TrainConfig
from dat.classification.data import (
    EvalImages,
    MixPairs,
    SkippedImages,
    TrainImages,
    UserTransform,
    check_classes,
    check_readable,
    check_readable_classes,
    make_transform,
)
from dat.classification.evaluate import evaluate
from dat.classification.model import build_classifier
from dat.classification.readers import Split, first_class, shared_images
from dat.classification.report import write_report
from dat.classification.results import Results, format_table
from dat.engine.distributed import Distributed
from dat.engine.imbalance import balanced_factors, class_weights
from dat.engine.loaders import EpochBatchSampler, Loader
from dat.engine.optim import amp_context
from dat.engine.pipelines import describe_transform
from dat.engine.task import first_few
from dat.engine.trainer import Trainer
from dat.utils.errors import ConfigError

# Images [B, 3, H, W], labels [B] or soft labels [B, K], indices that were asked for and used [B], epoch [B].
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy with class weights, whose mean is over images and not over their weights.

    The mean then does not depend on how the images of a step are split into batches, and is the same for soft labels.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, self.weight, reduction="none", label_smoothing=self.label_smoothing
        ).mean()


def make_loss(train: TrainConfig, weights: Tensor | None = None) -> nn.Module:
    """The loss of logits [B, K] and labels [B] or soft labels [B, K]; Mixup smooths the latter itself.

    `weights` [K]: of the classes.
    """
    smoothing = 0.0 if train.mixup or train.cutmix else train.smoothing
    if train.loss == "bce":
        return BinaryCrossEntropy(smoothing=smoothing)
    if weights is not None:
        return WeightedCrossEntropy(weights, label_smoothing=smoothing)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


class Graphed(nn.Module):
    """A model whose training passes, for images of one shape, are CUDA graphs.

    The model itself stays as it is, for evaluation and for the search of numbers that are not finite.
    """

    def __init__(self, model: nn.Module, images: Tensor, amp: str) -> None:
        super().__init__()
        self.model = model
        # Passes before the capture count batches in norms.
        before = [buffer.clone() for buffer in model.buffers()]
        # Copies in autocast's cache would not outlive the capture.
        with amp_context(images.device, amp, cache=False):
            torch.cuda.make_graphed_callables(self.train(), (images,))
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class ClassificationTrainer(Trainer):
    """A run that trains a classifier of the classes of `train_set`, and evaluates it on `val_set`.

    `transform`: of the user, before the other augmentation, see UserTransform.
    The other arguments and errors are those of Trainer.
    """

    kind = "classification"
    metric = "top1"
    results_file = "results.npz"

    def __init__(
        self,
        config: ClassificationConfig,
        train_set: Split,
        val_set: Split,
        distributed: Distributed | None = None,
        resume: Path | None = None,
        transform: Callable[..., Any] | None = None,
    ):
        check_classes(train_set)
        check_readable(train_set, "train")
        check_readable_classes(train_set)
        check_readable(val_set, "val")
        self.train_set, self.val_set, self.class_names = train_set, val_set, train_set.class_names
        self.transform = transform
        super().__init__(config, distributed, resume)
        self.loss_function = make_loss(config.train, self._class_weights()).to(self.device)
        self.skipped = SkippedImages(train_set, self.output / "skipped.txt", resumed=resume is not None)
        self.val_skipped = SkippedImages(val_set, self.output / "skipped_val.txt")
        missing = [name for name in self.class_names if name not in val_set.class_names]
        if missing:
            self.warnings.append(f"data.val has no images of {len(missing)} classes, such as {missing[0]!r}")
        if shared := shared_images(config.data, train_set, val_set):
            self.warnings.append(f"{shared} of {len(val_set)} validation images are training images")
        for name, split in (("train", train_set), ("val", val_set)):
            if deep := split.deep:
                text = f"{len(deep)} images in folders of class folders; {first_class(deep[0])}"
                self.warnings.append(f"data.{name} has {text}")
                break
        if empty := train_set.empty:
            self.warnings.append(
                f"data.train has {len(empty)} folders without images, no classes, such as {empty[0]!r}"
            )

    def _class_weights(self) -> Tensor | None:
        given = self.config.train.class_weights
        if given is None:
            return None
        counts = np.bincount(self.train_set.labels(), minlength=len(self.class_names))
        return class_weights(given, self.class_names, counts)

    def build_loaders(self) -> tuple[EpochBatchSampler, DataLoader[Any], DataLoader[Any]]:
        data, train, seed = self.config.data, self.config.train, self.config.seed
        rank, world_size, pin = self.distributed.rank, self.distributed.world_size, self.device.type == "cuda"
        factors = balanced_factors(self.train_set.labels(), len(self.class_names)) if train.balance else None
        sampler = EpochBatchSampler(
            len(self.train_set), train.batch_size, seed, rank, world_size, train.accumulate, factors
        )
        augment = make_transform(data, training=True)
        if self.transform is not None:
            augment = UserTransform(self.transform, augment)
        samples = TrainImages(self.train_set, augment, seed)
        mix = MixPairs(train, len(self.class_names), seed) if train.mixup or train.cutmix else None
        loader = Loader(samples, train.workers, pin, batch_sampler=sampler, collate_fn=mix)
        val_samples = EvalImages(self.val_set, make_transform(data, training=False), rank, world_size)
        return sampler, loader, Loader(val_samples, train.workers, pin, batch_size=train.eval_batch_size)

    def build_model(self, weights: bool = True) -> nn.Module:
        return build_classifier(self.config.model.backbone, len(self.class_names), weights)

    def _prepare_model(self) -> None:
        train, distributed, size = self.config.train, self.distributed, self.config.data.img_size
        if train.cuda_graphs and (self.device.type != "cuda" or distributed.world_size > 1):
            found = f"device: {self.device.type}, processes: {distributed.world_size}"
            raise ConfigError(f"train.cuda_graphs is true, which needs one process on a GPU; {found}")
        super()._prepare_model()
        if train.cuda_graphs:
            # Before the loader pins memory, which must not happen during a capture.
            images = self.to_device(torch.zeros(train.batch_size, 3, size, size), images=True)
            self.wrapped = Graphed(self.model, images, train.amp)

    def train_step(self, batches: Sequence[Batch]) -> None:
        for *_, index, used, _ in batches:
            self.skipped.add(index, used)
        super().train_step(batches)

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (self.to_device(batch[0], images=True),)

    def compute_loss(self, batch: Batch, outputs: Tensor, normalizers: int) -> dict[str, Tensor]:
        return {"loss": self.loss_function(outputs.float(), self.to_device(batch[1])) / normalizers}

    def evaluate(self) -> dict[str, Any]:
        model, amp = self.evaluation_model(), self.config.train.amp
        self.results = evaluate(model, self.val_loader, self.distributed, amp, self.val_skipped)
        return self.results.metrics()

    def finish_epoch(self) -> None:
        super().finish_epoch()
        self._warn(self.skipped)

    def save(self, name: str, weights_only: bool = False) -> None:
        """Writes a checkpoint like Trainer.save, and the list of unreadable images."""
        self.skipped.write(self.distributed)
        super().save(name, weights_only)

    def report(self) -> dict[str, Any]:
        self._warn(self.val_skipped)
        return super().report()

    def save_results(self, path: Path) -> None:
        self.results.save(path)

    def load_metrics(self, path: Path) -> dict[str, Any]:
        self.results = Results.load(path)
        return self.results.summarize(self.class_names)

    def write_report(self, metrics: dict[str, Any], text: str) -> list[Path]:
        return write_report(self.output, self.config, self.class_names, self.results, self.val_set, metrics, text)

    def format_metrics(self, metrics: dict[str, Any]) -> str:
        return format_table(metrics)

    def class_state(self) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def describe_data(self) -> str:
        train, val = len(self.train_set), len(self.val_set)
        # Both splits have the same note where they are parts of one folder.
        notes = dict.fromkeys(filter(None, (self.train_set.note, self.val_set.note)))
        more = "".join([describe_transform(self.transform), *(f"; {note}" for note in notes)])
        return f"{train} training and {val} validation images, {len(self.class_names)} classes{more}"

    def describe_batch(self, batch: Batch) -> str:
        return f"images {first_few([self.train_set.name(index) for index in batch[3].tolist()])}"

    def _warn(self, skipped: SkippedImages) -> None:
        warning = skipped.write(self.distributed)
        if warning:
            self.logger.warning(warning)
