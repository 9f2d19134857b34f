"""Training of detectors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat.detection.checkpoint import class_state, read_classes
from dat.detection.config import DetectionConfig
from dat.detection.criterion import PAPER_WEIGHTS, Normalizers, build_criterion
from dat.detection.data import Annotations, AspectRatioBatchSampler, Batch, train_loader, val_loader
from dat.detection.data.cache import ImageCache
from dat.detection.data.readers import describe_sets, require_categories
from dat.detection.evaluation import Evaluation, average_precision, format_table
from dat.detection.matcher import Targets
from dat.detection.models import BaseDETR, ModelConfig, build_model
from dat.detection.models.denoising import Denoising
from dat.detection.param_groups import parameter_groups
from dat.detection.predictor import detect_split
from dat.detection.report import read_results, write_report
from dat.detection.sizes import settle_sizes
from dat.engine.backbones import starts_from_weights
from dat.engine.checkpoint import load_checkpoint
from dat.engine.distributed import Distributed, setup_distributed
from dat.engine.imbalance import class_weights
from dat.engine.pipelines import describe_transform
from dat.engine.task import first_few
from dat.engine.trainer import Trainer
from dat.utils.files import write_json


def settle_batch_norm(model: ModelConfig, resume: Path | None) -> ModelConfig:
    """`model` with `freeze_batch_norm` false if the backbone has random weights, whose statistics mean nothing.

    The checkpoints of the run hold the result. A run of earlier versions, which froze them anyway, is resumed as it is.
    """
    if not model.freeze_batch_norm or starts_from_weights(model):
        return model
    if resume is None:
        return replace(model, freeze_batch_norm=False)
    before = load_checkpoint(resume, "detection")["config"]["model"]
    return replace(model, freeze_batch_norm=before.get("freeze_batch_norm", True))


class DetectionTrainer(Trainer):
    """A run that trains a detector on `train_set` and evaluates it on `val_set`, of the same classes.

    `transform`: of the user, before the other augmentation, see UserTransform.
    The other arguments and errors are those of Trainer.
    """

    model: BaseDETR
    kind = "detection"
    metric = "AP"
    losses = tuple(PAPER_WEIGHTS)
    results_file = "detections.json"
    dynamic = True
    fixed_keys = (*Trainer.fixed_keys, "train.backbone_lr_scale", "train.sampling_lr_scale")

    def __init__(
        self,
        config: DetectionConfig,
        train_set: Annotations,
        val_set: Annotations,
        distributed: Distributed | None = None,
        resume: Path | None = None,
        transform: Callable[..., Any] | None = None,
    ):
        config = replace(config, model=settle_batch_norm(config.model, resume))
        if resume is not None and train_set.roots:
            train_set, val_set = _with_saved_classes(resume, train_set, val_set)
        distributed = distributed or setup_distributed(config.train.device)
        config, self.why_sizes = settle_sizes(config, train_set, distributed.device)
        self.train_set, self.val_set, self.transform = train_set, val_set, transform
        self.cache = ImageCache(config.data.cache_gib) if config.data.cache == "memory" else None
        super().__init__(config, distributed, resume)
        self.warnings += [*train_set.warnings, *val_set.warnings]
        self.criterion = build_criterion(self.model, config.train.loss, self._class_weights())
        if self.cache is not None:
            self.cache.fill([*train_set.records, *val_set.records])

    def _class_weights(self) -> Tensor | None:
        given = self.config.train.class_weights
        if given is None:
            return None
        names = [category.name for category in self.train_set.categories]
        labels = np.concatenate([record.labels[~record.crowd] for record in self.train_set.records])
        counts = np.bincount(labels, minlength=len(names))
        return class_weights(given, names, counts)

    def build_loaders(self) -> tuple[AspectRatioBatchSampler, DataLoader[Batch], DataLoader[Batch]]:
        loader, sampler = train_loader(self.train_set, self.config, self.distributed, self.cache, self.transform)
        return sampler, loader, val_loader(self.val_set, self.config, self.distributed, self.cache)

    def build_model(self, weights: bool = True) -> nn.Module:
        return build_model(self.config.model, len(self.train_set.categories), weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.config.train, self.lr, self.config.model.backbone)

    def normalizers(self, batches: Sequence[Batch]) -> Normalizers:
        """Numbers of boxes and class weights of the whole step, over all processes."""
        targets = [target for *_, targets in batches for target in targets]
        return self.criterion.normalizers(targets, self.model.num_queries, self.device)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None, None, Denoising | None]:
        images, mask, targets = batch
        # Here rather than in the model, so that the numbers of objects do not matter to a compiled one.
        denoising = self.model.make_denoising(self.on_device(targets)) if self.model.denoising else None
        return self.to_device(images, images=True), None if mask is None else self.to_device(mask), None, denoising

    def on_device(self, targets: Targets) -> Targets:
        """The tensors of targets, on the device of the run."""
        return [
            {name: self.to_device(value) for name, value in target.items() if isinstance(value, Tensor)}
            for target in targets
        ]

    def compute_loss(self, batch: Batch, outputs: dict[str, Any], normalizers: Normalizers) -> dict[str, Tensor]:
        """The weighted sum of all layers' losses, and the losses of the last layer."""
        *_, targets = batch
        losses = self.criterion(outputs, self.on_device(targets), normalizers)
        return {"loss": self.criterion.total(losses), **{name: losses[name] for name in self.losses}}

    def evaluate(self) -> dict[str, Any]:
        model = self.evaluation_model()
        self.results = detect_split(model, self.config, self.val_set, self.distributed, self.val_loader, self.cache)
        return average_precision(self.val_set, self.results, every=self.config.data.val.tiles > 0)

    def save_results(self, path: Path) -> None:
        write_json(path, self.results)

    def load_metrics(self, path: Path) -> dict[str, Any]:
        results = read_results(path, self.val_set)
        self.evaluation = Evaluation.of(self.val_set, results, every=self.config.data.val.tiles > 0)
        return self.evaluation.metrics()

    def write_report(self, metrics: dict[str, Any], text: str) -> list[Path]:
        return write_report(self.output, self.config, self.evaluation, metrics, text)

    def format_metrics(self, metrics: dict[str, Any]) -> str:
        return format_table(metrics)

    def class_state(self) -> dict[str, Any]:
        return class_state(self.train_set.categories)

    def _describe(self) -> str:
        """The lines at the start of the log; the first says how the data was read."""
        return f"{describe_sets(self.train_set, self.val_set)}\n{super()._describe()}"

    def describe_data(self) -> str:
        train, val = len(self.train_set.records), len(self.val_set.records)
        classes, note = len(self.train_set.categories), describe_transform(self.transform)
        return f"{train} training and {val} validation images, {classes} classes{note}"

    def describe_batch(self, batch: Batch) -> str:
        return f"images {first_few([target['image_id'] for target in batch[-1]])}"

    def describe_classes(self) -> str:
        """The label of each category of the annotation file, after why images have the sizes that they have."""
        start, classes = self.config.model.checkpoint_path, self.train_set.categories
        weights = f"starts from {start}\n" if start and self.resume is None else ""
        shown = [f"{label:>5}  {category.id:>8}  {category.name}" for label, category in enumerate(classes[:100])]
        more = [f"... and {len(classes) - 100} more"] if len(classes) > 100 else []
        why = f"{self.why_sizes}\n" if self.why_sizes else ""
        return weights + why + "\n".join([f"label  id in file  name of {len(classes)} classes", *shown, *more])


def _with_saved_classes(resume: Path, train_set: Annotations, val_set: Annotations) -> tuple[Annotations, Annotations]:
    """The data with the classes of a run of an earlier version, which trained supercategories without objects too."""
    train_set = train_set.with_categories(read_classes(resume))
    return train_set, require_categories(val_set, train_set.categories)
