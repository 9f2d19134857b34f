"""Trains Deformable DETR on a data set in COCO's JSON format.

    python -m detection.train CONFIG [key.path=value ...]
    torchrun --nproc-per-node N -m detection.train CONFIG [key.path=value ...]

Writes to `output`: config.yaml, last.pth, best.pth, train.log, log.jsonl, tensorboard/; in the end metrics.json,
curve.png and predictions/, all of the best epoch, whose detections are in detections.json.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from dat.training.checkpoint import (
    check_resumable,
    load_checkpoint,
    restore_training_state,
    save_checkpoint,
    training_state,
)
from dat.training.config import load_config, save_config, to_dict
from dat.training.distributed import Distributed, StopSignal, prepare_output, setup_distributed, stop_on_sigterm
from dat.training.errors import CheckpointError, NonFiniteError
from dat.training.files import write_json
from dat.training.finite import check_finite, check_state_finite, trace_non_finite
from dat.training.logger import RunLogger
from dat.training.loop import amp_context, main_guard, seed_everything
from dat.training.optim import clip_gradients, make_ema, make_scheduler, param_groups

from .build import build_model
from .config import DetectionConfig, LossConfig, TrainConfig, check_config
from .criterion import SetCriterion
from .data import (
    AspectRatioBatchSampler,
    Batch,
    CocoAnnotations,
    DetectionDataset,
    make_loader,
    read_coco,
    train_transform,
)
from .evaluate import val_loader
from .evaluator import average_precision, detect, format_table, gather_results
from .matcher import HungarianMatcher
from .report import plot_curve, save_pictures

LOSSES = ("loss_ce", "loss_bbox", "loss_giou")

# what a resumed run may not change: its place in an epoch, its weights or its optimizer's groups would not fit
RESUMED = (
    "seed",
    "model",
    "train.batch_size",
    "train.weight_decay",
    "train.backbone_lr_scale",
    "train.sampling_lr_scale",
)


@dataclass
class Progress:
    """Where a run stands, all of it in the checkpoint: finished epochs and steps, best AP."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    images: int = 0
    # mean over what the last line of the log covers
    loss: float = math.nan


@dataclass
class Meter:
    """What happened since the last line of the log."""

    start: float = field(default_factory=time.perf_counter)
    images: int = 0
    values: list[list[float]] = field(default_factory=list)

    def add(self, values: list[float], images: int) -> None:
        self.values.append(values)
        self.images += images

    def mean(self) -> list[float]:
        return [sum(column) / len(column) for column in zip(*self.values, strict=True)]


class Trainer:
    """A run: the model, what trains it, and its place in the schedule, which is that of the checkpoint `resume`."""

    def __init__(
        self,
        config: DetectionConfig,
        train: CocoAnnotations,
        val: CocoAnnotations,
        distributed: Distributed,
        resume: Path | None,
    ):
        self.config = config
        self.train_set, self.val_set = train, val
        self.distributed = distributed
        self.device = distributed.device
        seed_everything(config.seed)
        # the files of a resumed backbone need not exist any more
        self.model = build_model(config.model, len(train.categories), weights=resume is None).to(self.device)
        self.criterion = make_criterion(len(train.categories), config.train.loss)
        self.optimizer = make_optimizer(self.model, config.train)
        self.ema = make_ema(self.model, config.train.ema_decay)
        self.loader, self.sampler = self._train_loader()
        self.steps_per_epoch = len(self.sampler)
        total = config.train.epochs * self.steps_per_epoch
        self.scheduler = make_scheduler(
            self.optimizer,
            total,
            config.train.warmup_steps,
            config.train.schedule,
            [epoch * self.steps_per_epoch for epoch in config.train.decay_epochs],
            min_lr=config.train.min_lr_scale * config.train.lr,
        )
        self.progress = Progress()
        self.resume = resume
        if resume is not None:
            self.restore(resume)
        self.wrapped = distributed.wrap(self.model)
        self.val_loader = val_loader(val, config, distributed)

    def run(self) -> None:
        """Trains to the last epoch and writes the results."""
        self.output = Path(self.config.output)
        self.logger = RunLogger(self.output, self.distributed.main, None if self.resume is None else self.progress.step)
        try:
            if self.distributed.main:
                save_config(self.config, self.output / "config.yaml")
            self.logger.info(self._describe())
            for warning in filter(None, (self.train_set.warning, self.val_set.warning)):
                self.logger.warning(warning)
            with stop_on_sigterm() as stop:
                for _ in range(self.progress.epoch, self.config.train.epochs):
                    # a run that ended between the last step and the end of the evaluation only lacks the latter
                    if self.progress.step_in_epoch < self.steps_per_epoch:
                        self.train_epoch(stop)
                    self.finish_epoch()
            if self.distributed.main:
                self.report()
            self.distributed.barrier()
        finally:
            self.logger.close()

    def train_epoch(self, stop: StopSignal) -> None:
        """The rest of the current epoch; "last.pth" is written after its last step too, before the evaluation."""
        progress, train = self.progress, self.config.train
        self.sampler.set_position(progress.epoch, progress.step_in_epoch)
        images_per_step = train.batch_size * self.distributed.world_size
        description = f"epoch {progress.epoch + 1}/{train.epochs}"
        done = progress.step_in_epoch * images_per_step
        self.wrapped.train()
        with self.logger.progress(self.steps_per_epoch * images_per_step, description, done) as bar:
            meter = Meter()
            for batch in self.loader:
                values = self.train_step(batch)
                progress.step += 1
                progress.step_in_epoch += 1
                meter.add(values, len(batch[2]) * self.distributed.world_size)
                bar.set_postfix(loss=f"{values[0]:.3f}", lr=f"{self._lr():.1e}", refresh=False)
                bar.update(images_per_step)
                last = progress.step_in_epoch == self.steps_per_epoch
                if last or progress.step % train.log_steps == 0:
                    self._log_steps(meter)
                    meter = Meter()
                stopping = stop.requested(self.distributed)
                if last or stopping or (train.checkpoint_steps and progress.step % train.checkpoint_steps == 0):
                    self.save("last.pth")
                if stopping:
                    stop.exit()

    def train_step(self, batch: Batch) -> list[float]:
        """One optimizer step; returns the total loss, LOSSES and the norm of the gradients.

        Raises NonFiniteError, before any weight is changed, naming the first tensor that is not finite.
        """
        images, mask, targets = batch
        where = f"step {self.progress.step}, images {[target['image_id'] for target in targets]}"
        images = images.to(self.device, non_blocking=True)
        mask = None if mask is None else mask.to(self.device, non_blocking=True)
        truth = [{key: t[key].to(self.device, non_blocking=True) for key in ("boxes", "labels")} for t in targets]
        self.scheduler.step_update(self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            losses = self.criterion(self._forward(self.wrapped, images, mask), truth)
            total = self.criterion.total(losses)
            total.backward()
            norm = clip_gradients(self.model, self.config.train.clip_grad, where)
            values = torch.stack([total.detach(), *(losses[name].detach() for name in LOSSES), norm]).tolist()
            check_finite([("the total loss", torch.tensor(values[0]))], where)
        except NonFiniteError:
            # matching and gradients are where it shows, not always where it began
            self._trace_non_finite(images, mask, where)
            raise
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=self.progress.step + 1)
        return values

    def _forward(self, model: nn.Module, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        # drawn anew from the counters, so that a resumed run meets the same dropout
        seed_everything(self.config.seed, self.progress.step, self.distributed.rank)
        with amp_context(self.device, self.config.train.amp):
            return model(images, mask)

    def finish_epoch(self) -> None:
        """Evaluates where it is due and writes the checkpoints."""
        progress, train = self.progress, self.config.train
        progress.epoch += 1
        progress.step_in_epoch = 0
        scores = ""
        if progress.epoch % train.eval_epochs == 0 or progress.epoch == train.epochs:
            metrics = self.evaluate()
            numbers = {
                key: math.nan if value is None else value for key, value in metrics.items() if key != "per_class"
            }
            self.logger.log("val", progress.step, epoch=progress.epoch, **numbers)
            scores = f", AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}"
        self.save("last.pth")
        left = (progress.train_seconds + progress.eval_seconds) / progress.epoch * (train.epochs - progress.epoch)
        self.logger.info(
            f"epoch {progress.epoch}/{train.epochs}: loss {progress.loss:.3f}{scores}, "
            f"{progress.images / progress.train_seconds:.1f} images/s, about {left / 60:.0f} min left"
        )

    def evaluate(self) -> dict[str, Any]:
        """Measures AP, of the averaged weights where there are any; the best go to best.pth and detections.json."""
        start = time.perf_counter()
        progress = self.progress
        model = self.model if self.ema is None else self.ema.module
        if self.distributed.world_size > 1:
            # each process has statistics of its own where batch norm is trained
            distribute_bn(model, self.distributed.world_size)
        results = detect(model, self.val_loader, self.val_set.categories, self.device, self.config.train.amp)
        results = gather_results(results)
        metrics = average_precision(self.val_set, results)
        progress.eval_seconds += time.perf_counter() - start
        if (metrics["AP"] or 0.0) > progress.best:
            progress.best, progress.best_epoch = metrics["AP"] or 0.0, progress.epoch
            self.save("best.pth", weights_only=True)
            if self.distributed.main:
                write_json(self.output / "detections.json", results)
        return metrics

    def state(self, weights_only: bool = False) -> dict[str, Any]:
        """The checkpoint; `weights_only`: without what only training needs."""
        return {
            "kind": "detection",
            "config": to_dict(self.config),
            "class_names": [category.name for category in self.train_set.categories],
            "category_ids": [category.id for category in self.train_set.categories],
            **training_state(self.model, self.ema, None if weights_only else self.optimizer),
            **vars(self.progress),
        }

    def save(self, name: str, weights_only: bool = False) -> None:
        """Writes a checkpoint on the main process. Raises NonFiniteError rather than replace a good one by NaN."""
        if not self.distributed.main:
            return
        averaged = None if self.ema is None else self.ema.module
        check_state_finite(self.model, averaged, f"step {self.progress.step}, before saving {name}")
        self.logger.flush()
        save_checkpoint(self.output / name, self.state(weights_only))

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint. Raises CheckpointError when it is of another model, of other classes or data."""
        state = load_checkpoint(path, kind="detection")
        check_resumable(state["config"], self.config, RESUMED, path)
        found = list(zip(state["category_ids"], state["class_names"], strict=True))
        expected = [(category.id, category.name) for category in self.train_set.categories]
        if found != expected:
            raise CheckpointError(f"{path}: was trained on the classes {found}, the data has {expected}")
        restore_training_state(state, self.model, self.ema, self.optimizer, path)
        self.progress = Progress(**{name: state[name] for name in vars(Progress())})
        progress, steps = self.progress, self.steps_per_epoch
        if progress.step != progress.epoch * steps + progress.step_in_epoch:
            raise CheckpointError(
                f"{path}: is of step {progress.step}, epoch {progress.epoch}, but an epoch of this data and as many "
                f"processes has {steps} steps; resuming needs the same"
            )

    def report(self) -> None:
        """metrics.json, curve.png and pictures, of the best epoch."""
        progress, train = self.progress, self.config.train
        results = json.loads((self.output / "detections.json").read_text(encoding="utf-8"))
        metrics = average_precision(self.val_set, results)
        metrics |= {
            "epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "seconds": round(progress.train_seconds + progress.eval_seconds, 1),
            "images_per_second": round(progress.images / progress.train_seconds, 2),
        }
        write_json(self.output / "metrics.json", metrics)
        plot_curve(self.output / "log.jsonl", self.output / "curve.png", self.steps_per_epoch)
        self.logger.figure("curve", self.output / "curve.png", progress.step)
        folder = self.output / "predictions"
        for path in save_pictures(self.val_set, results, folder, train.pictures, train.picture_threshold):
            self.logger.figure(f"predictions/{path.stem}", path, progress.step)
        self.logger.info(f"best epoch {progress.best_epoch}\n{format_table(metrics)}\nresults are in {self.output}")

    def _train_loader(self) -> tuple[Any, AspectRatioBatchSampler]:
        config, data = self.config, self.config.data
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
        records = self.train_set.records
        sampler = AspectRatioBatchSampler(
            records, config.train.batch_size, config.seed, self.distributed.rank, self.distributed.world_size
        )
        dataset = DetectionDataset(records, transform, config.seed)
        pin = self.device.type == "cuda"
        return make_loader(dataset, sampler, data.pad_multiple, config.train.workers, pin), sampler

    def _log_steps(self, meter: Meter) -> None:
        seconds = time.perf_counter() - meter.start
        self.progress.train_seconds += seconds
        self.progress.images += meter.images
        self.progress.loss = meter.mean()[0]
        epoch = self.progress.step / self.steps_per_epoch
        named = dict(zip(("loss", *LOSSES, "grad_norm"), meter.mean(), strict=True))
        self.logger.log(
            "train", self.progress.step, epoch=epoch, lr=self._lr(), images_per_second=meter.images / seconds, **named
        )

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _describe(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return (
            f"{self.config.model.backbone['name']}, {parameters:.1f} M parameters, {self.device}: "
            f"{len(self.train_set.records)} training and {len(self.val_set.records)} validation images, "
            f"{len(self.train_set.categories)} classes; {self.steps_per_epoch} steps an epoch, "
            f"from step {self.progress.step}"
        )

    def _trace_non_finite(self, images: Tensor, mask: Tensor | None, where: str) -> None:
        """Repeats a forward pass; raises NonFiniteError at the first such tensor of images, weights and outputs.

        Of this process alone: no loss and no wrapped model, both of which wait for the other processes.
        """
        check_finite([("the batch of images", images)], where)
        trace_non_finite(self.model, lambda: self._forward(self.model, images, mask), where)


def make_criterion(num_classes: int, loss: LossConfig) -> SetCriterion:
    matcher = HungarianMatcher(loss.cost_class, loss.cost_box, loss.cost_giou)
    weights = {"loss_ce": loss.weight_class, "loss_bbox": loss.weight_box, "loss_giou": loss.weight_giou}
    return SetCriterion(num_classes, matcher, weights=weights, focal_alpha=loss.focal_alpha)


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with the learning rates of Deformable DETR: lower for the backbone and for what places the samples."""
    multipliers = {
        r"^backbone\.": train.backbone_lr_scale,
        r"sampling_offsets|reference_points": train.sampling_lr_scale,
    }
    # hundreds of small tensors: one call instead of a dozen for each
    return torch.optim.AdamW(param_groups(model, train.lr, train.weight_decay, multipliers), fused=True)


def train(config: DetectionConfig) -> None:
    """Runs the training of a configuration. Raises UserError, before it writes anything, for what cannot work."""
    check_config(config)
    distributed = setup_distributed(config.train.device)
    data = config.data
    root = Path(data.root)
    train_set = read_coco(root / data.train.annotations, root / data.train.images)
    val_set = read_coco(root / data.val.annotations, root / data.val.images, train_set.categories)
    resume = prepare_output(config.output, config.train.resume, distributed)
    Trainer(config, train_set, val_set, distributed, resume).run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detection.train", description="Trains a detector.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file, see configs/detection")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the configuration")
    options = parser.parse_args(arguments)
    train(load_config(DetectionConfig, options.config, options.overrides))


if __name__ == "__main__":
    main_guard(main)
