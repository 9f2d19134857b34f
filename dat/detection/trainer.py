"""Training of detectors."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from dat.detection.checkpoint import class_state
from dat.detection.config import DetectionConfig
from dat.detection.criterion import Normalizers, build_criterion
from dat.detection.data import Annotations, AspectRatioBatchSampler, Batch, train_loader, val_loader
from dat.detection.data.cache import ImageCache
from dat.detection.evaluation import Evaluation, average_precision, detect, format_table, gather_results
from dat.detection.models import BaseDETR, ModelConfig, build_model
from dat.detection.param_groups import parameter_groups
from dat.detection.report import write_report
from dat.engine.backbones import starts_from_weights
from dat.engine.checkpoint import load_checkpoint
from dat.engine.distributed import Distributed
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
    """A run that trains a detector on `train_set` and evaluates it on `val_set`, of the same categories.

    The other arguments and errors are those of Trainer.
    """

    model: BaseDETR
    kind = "detection"
    metric = "AP"
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
    ):
        config = replace(config, model=settle_batch_norm(config.model, resume))
        self.train_set, self.val_set = train_set, val_set
        self.cache = ImageCache(config.data.cache_gib) if config.data.cache == "memory" else None
        super().__init__(config, distributed, resume)
        self.warnings = [warning for warning in (train_set.warning, val_set.warning) if warning]
        self.criterion = build_criterion(self.model, config.train.loss)
        self.losses = tuple(self.criterion.weight_dict)
        if self.cache is not None:
            self.cache.fill([*train_set.records, *val_set.records])

    def build_loaders(self) -> tuple[AspectRatioBatchSampler, DataLoader[Batch], DataLoader[Batch]]:
        loader, sampler = train_loader(self.train_set, self.config, self.distributed, self.cache)
        return sampler, loader, val_loader(self.val_set, self.config, self.distributed, self.cache)

    def build_model(self, weights: bool = True) -> nn.Module:
        return build_model(self.config.model, len(self.train_set.categories), weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.config.train, self.lr, self.config.model.backbone)

    def normalizers(self, batches: Sequence[Batch]) -> Normalizers:
        """Numbers of boxes and class weights of the whole step, over all processes."""
        targets = [target for *_, targets in batches for target in targets]
        return self.criterion.normalizers(targets, self.model.num_queries, self.device)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        images, mask, _ = batch
        return self.to_device(images, images=True), None if mask is None else self.to_device(mask)

    def compute_loss(self, batch: Batch, outputs: dict[str, Any], normalizers: Normalizers) -> dict[str, Tensor]:
        """The weighted sum of all layers' losses, and the losses of the last layer."""
        *_, targets = batch
        on_device = [
            {name: self.to_device(value) for name, value in target.items() if isinstance(value, Tensor)}
            for target in targets
        ]
        losses = self.criterion(outputs, on_device, normalizers)
        return {"loss": self.criterion.total(losses), **{name: losses[name] for name in self.losses}}

    def evaluate(self) -> dict[str, Any]:
        data, amp, model = self.config.data, self.config.train.amp, self.evaluation_model()
        found = detect(model, self.val_loader, self.val_set.categories, self.device, amp, data.val.top_k)
        self.results = gather_results(found)
        return average_precision(self.val_set, self.results)

    def save_results(self, path: Path) -> None:
        write_json(path, self.results)

    def load_metrics(self, path: Path) -> dict[str, Any]:
        self.evaluation = Evaluation.of(self.val_set, json.loads(path.read_text(encoding="utf-8")))
        return self.evaluation.metrics()

    def write_report(self, metrics: dict[str, Any], text: str) -> list[Path]:
        return write_report(self.output, self.config, self.evaluation, metrics, text)

    def format_metrics(self, metrics: dict[str, Any]) -> str:
        return format_table(metrics)

    def class_state(self) -> dict[str, Any]:
        return class_state(self.train_set.categories)

    def describe_data(self) -> str:
        train, val = len(self.train_set.records), len(self.val_set.records)
        return f"{train} training and {val} validation images, {len(self.train_set.categories)} classes"

    def describe_batch(self, batch: Batch) -> str:
        return f"images {first_few([target['image_id'] for target in batch[-1]])}"

    def describe_classes(self) -> str:
        """The label of each category of the annotation file."""
        start, classes = self.config.model.checkpoint_path, self.train_set.categories
        weights = f"starts from {start}\n" if start and self.resume is None else ""
        shown = [f"{label:>5}  {category.id:>8}  {category.name}" for label, category in enumerate(classes[:100])]
        more = [f"... and {len(classes) - 100} more"] if len(classes) > 100 else []
        return weights + "\n".join([f"label  id in file  name of {len(classes)} classes", *shown, *more])
