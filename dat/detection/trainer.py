"""A training run: model, optimizer, schedule, evaluation, checkpoints."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from dat.detection.checkpoint import detector_state
from dat.detection.config import DetectionConfig
from dat.detection.criterion import Normalizers, build_criterion
from dat.detection.data import Annotations, Batch
from dat.detection.data.cache import ImageCache
from dat.detection.evaluate import val_loader
from dat.detection.evaluation import Evaluation, average_precision, detect, format_table, gather_results
from dat.detection.models import build_model
from dat.detection.recipe import make_optimizer, train_loader
from dat.detection.report import write_report
from dat.engine.checkpoint import check_resumable, load_checkpoint, restore_weights
from dat.engine.config import save_config
from dat.engine.distributed import Distributed, StopSignal, stop_on_sigterm
from dat.engine.fsdp import is_sharded, restore_optimizer, save_state, whole_model, wrap_model
from dat.engine.logger import RunLogger, peak_memory
from dat.engine.optim import amp_context, clip_gradients, make_ema, make_scheduler, scaled_lr
from dat.engine.report import errors_as_warnings
from dat.engine.seeds import seed_everything
from dat.utils.errors import CheckpointError, NonFiniteError
from dat.utils.files import write_json
from dat.utils.finite import check_finite, trace_non_finite

LOSSES = ("loss_ce", "loss_bbox", "loss_giou")

# what a resumed run may not change: its place in an epoch, its weights or its optimizer's groups would not fit
RESUMED = (
    "seed",
    "model",
    "train.batch_size",
    "train.accumulate",
    "train.weight_decay",
    "train.layer_decay",
    "train.backbone_lr_scale",
    "train.sampling_lr_scale",
)


@dataclass
class Progress:
    """Where a run stands, all of it in the checkpoint: finished epochs and steps, best AP.

    `closed` is the step at the end of the last epoch that was evaluated, where that was due.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    closed: int = 0
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
        train: Annotations,
        val: Annotations,
        distributed: Distributed,
        resume: Path | None,
    ):
        self.config = config
        self.train_set, self.val_set = train, val
        self.distributed = distributed
        self.device = distributed.device
        seed_everything(config.seed)
        train_config, classes = config.train, len(train.categories)
        # the files that a resumed run started from need not exist any more
        self.model = build_model(config.model, classes, weights=resume is None)
        if train_config.grad_checkpointing:
            self.model.set_grad_checkpointing()
        self.model.to(self.device)
        self.criterion = build_criterion(self.model, train_config.loss)
        cache = ImageCache(config.data.cache_gib) if config.data.cache == "memory" else None
        self.loader, self.sampler = train_loader(train, config, distributed, cache)
        self.val_loader = val_loader(val, config, distributed, cache)
        self.steps_per_epoch = self.sampler.steps
        self.total_steps = train_config.steps or train_config.epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.lr = scaled_lr(train_config.lr, self.sampler.images, train_config.lr_batch_size, train_config.lr_scaling)
        self.ema = make_ema(self.model, train_config.ema_decay)
        self.progress = Progress()
        self.resume = resume
        # whole weights first: what is loaded then, and what the optimizer holds, may be shares of them
        state = None if resume is None else self._restore(resume)
        if train_config.compile:
            self.model.compile(dynamic=True)
        self.wrapped = wrap_model(self.model, self.ema, distributed, train_config.fsdp)
        self.optimizer = make_optimizer(self.model, train_config, self.lr, config.model.backbone)
        self.scheduler = make_scheduler(
            self.optimizer,
            self.total_steps,
            train_config.warmup_steps,
            train_config.schedule,
            [epoch * self.steps_per_epoch for epoch in train_config.decay_epochs],
            min_lr=train_config.min_lr_scale * self.lr,
        )
        if state is not None and resume is not None:
            restore_optimizer(state, self.model, self.optimizer, resume)
        if cache is not None:
            cache.fill([*train.records, *val.records])

    def run(self, until: float = math.inf) -> None:
        """Trains to the last step, or until an evaluation gives an AP of at least `until`, and writes the results."""
        self.output = Path(self.config.output)
        self.logger = RunLogger(self.output, self.distributed.main, None if self.resume is None else self.progress.step)
        try:
            if self.distributed.main:
                save_config(self.config, self.output / "config.yaml")
            self.logger.info(self._describe())
            for warning in filter(None, (self.train_set.warning, self.val_set.warning)):
                self.logger.warning(warning)
            with stop_on_sigterm() as stop:
                while self.progress.closed < self.total_steps and self.progress.best < until:
                    # a run that ended between the last step and the end of the evaluation only lacks the latter
                    if self.progress.step < self._end_of_epoch():
                        self.train_epoch(stop)
                    self.finish_epoch()
            if self.distributed.main:
                self.report()
            self.distributed.barrier()
        finally:
            self.logger.close()

    def _end_of_epoch(self) -> int:
        """The step at which the current epoch ends, or the run in its midst."""
        progress = self.progress
        return min(progress.step - progress.step_in_epoch + self.steps_per_epoch, self.total_steps)

    def train_epoch(self, stop: StopSignal) -> None:
        """The rest of the current epoch; "last.pth" is written after its last step too, before the evaluation."""
        progress, train = self.progress, self.config.train
        self.sampler.set_position(progress.epoch, progress.step_in_epoch)
        end, images_per_step = self._end_of_epoch(), self.sampler.images
        description = f"epoch {progress.epoch + 1}/{self.epochs}"
        done = progress.step_in_epoch * images_per_step
        self.wrapped.train()
        with self.logger.progress(self.steps_per_epoch * images_per_step, description, done) as bar:
            meter = Meter()
            for batches in self._steps(end - progress.step):
                values = self.train_step(batches)
                progress.step += 1
                progress.step_in_epoch += 1
                meter.add(values, sum(len(targets) for *_, targets in batches) * self.distributed.world_size)
                bar.set_postfix(loss=f"{values[0]:.3f}", lr=f"{self._lr():.1e}", refresh=False)
                bar.update(images_per_step)
                last = progress.step == end
                if last or progress.step % train.log_steps == 0:
                    self._log_steps(meter)
                    meter = Meter()
                stopping = stop.requested(self.distributed)
                if last or stopping or (train.checkpoint_steps and progress.step % train.checkpoint_steps == 0):
                    self.save("last.pth")
                if stopping:
                    stop.exit(self.distributed)

    def _steps(self, count: int) -> Iterator[tuple[Batch, ...]]:
        """The batches of each of the next `count` optimizer steps."""
        batches = iter(self.loader)
        for _ in range(count):
            yield tuple(next(batches) for _ in range(self.config.train.accumulate))

    def train_step(self, batches: tuple[Batch, ...]) -> list[float]:
        """One optimizer step; returns the total loss, LOSSES and the norm of the gradients, over all processes.

        Losses are divided by what all batches of all processes hold, so that the gradients are those of one batch.
        Raises NonFiniteError, before any weight is changed, naming the first tensor that is not finite.
        """
        truths = [
            [{key: t[key].to(self.device, non_blocking=True) for key in ("boxes", "labels")} for t in targets]
            for *_, targets in batches
        ]
        shares = self.criterion.normalizers([t for truth in truths for t in truth], self.model.num_queries, self.device)
        self.scheduler.step_update(self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        values = torch.zeros(1 + len(LOSSES), device=self.device)
        for part, (batch, truth) in enumerate(zip(batches, truths, strict=True)):
            values += self._accumulate(batch, truth, shares, part)
        ids = [target["image_id"] for *_, targets in batches for target in targets]
        try:
            norm = clip_gradients(self.model, self.config.train.clip_grad, self._where(ids))
            check_finite([("the total loss", values[0])], self._where(ids))
        except NonFiniteError:
            # gradients are where it shows, not always where it began
            for part, (images, mask, targets) in enumerate(batches):
                self._trace_non_finite(images, mask, self._where([t["image_id"] for t in targets]), part)
            raise
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=self.progress.step + 1)
        # each process divides by the mean over processes
        values = self.distributed.sum(values) / self.distributed.world_size
        return [*values.tolist(), float(norm)]

    def _accumulate(self, batch: Batch, truth: list[dict[str, Tensor]], shares: Normalizers, part: int) -> Tensor:
        """Adds the gradients of one batch, the `part`-th of its step; returns its total loss and LOSSES."""
        images, mask, targets = batch
        images = images.to(self.device, non_blocking=True)
        mask = None if mask is None else mask.to(self.device, non_blocking=True)
        where = self._where([target["image_id"] for target in targets])
        last = part == self.config.train.accumulate - 1
        # gradients are averaged over the processes once a step
        with nullcontext() if last else self.distributed.no_sync(self.wrapped):
            try:
                losses = self.criterion(self._forward(self.wrapped, images, mask, part), truth, shares)
            except NonFiniteError:
                # matching is where it shows, not always where it began
                self._trace_non_finite(images, mask, where, part)
                raise
            total = self.criterion.total(losses)
            total.backward()
        return torch.stack([total.detach(), *(losses[name].detach() for name in LOSSES)])

    def _where(self, image_ids: list[int]) -> str:
        return f"step {self.progress.step}, images {image_ids}"

    def _forward(
        self, model: Callable[..., dict[str, Any]], images: Tensor, mask: Tensor | None, part: int
    ) -> dict[str, Any]:
        # drawn anew from the counters, so that a resumed run meets the same dropout
        place = part * self.distributed.world_size + self.distributed.rank
        seed_everything(self.config.seed, self.progress.step, place)
        with amp_context(self.device, self.config.train.amp):
            return model(images, mask)

    def finish_epoch(self) -> None:
        """Evaluates where it is due and writes the checkpoints."""
        progress, train = self.progress, self.config.train
        if progress.step_in_epoch == self.steps_per_epoch:
            progress.epoch += 1
            progress.step_in_epoch = 0
        progress.closed = progress.step
        scores = ""
        if progress.epoch % train.eval_epochs == 0 or progress.step == self.total_steps:
            metrics = self.evaluate()
            numbers = {
                key: math.nan if value is None else value for key, value in metrics.items() if key != "per_class"
            }
            self.logger.log("val", progress.step, epoch=progress.epoch, **numbers)
            scores = f", AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}"
        self.save("last.pth")
        left = (progress.train_seconds + progress.eval_seconds) / progress.step * (self.total_steps - progress.step)
        self.logger.info(
            f"epoch {progress.epoch}/{self.epochs}: loss {progress.loss:.3f}{scores}, "
            f"{progress.images / progress.train_seconds:.1f} images/s, about {left / 60:.0f} min left"
        )

    def evaluate(self) -> dict[str, Any]:
        """Measures AP, of the averaged weights where there are any; the best go to best.pth and detections.json."""
        start = time.perf_counter()
        progress = self.progress
        averaged = self.model if self.ema is None else self.ema.module
        model = whole_model(averaged, self._build, self.device)
        if self.distributed.world_size > 1:
            # each process has statistics of its own where batch norm is trained
            distribute_bn(model, self.distributed.world_size)
        top_k, amp = self.config.data.val.top_k, self.config.train.amp
        results = detect(model, self.val_loader, self.val_set.categories, self.device, amp, top_k)
        results = gather_results(results)
        metrics = average_precision(self.val_set, results)
        progress.eval_seconds += time.perf_counter() - start
        if (metrics["AP"] or 0.0) > progress.best:
            progress.best, progress.best_epoch = metrics["AP"] or 0.0, progress.epoch
            self.save("best.pth", weights_only=True)
            if self.distributed.main:
                write_json(self.output / "detections.json", results)
        return metrics

    def _build(self) -> nn.Module:
        return build_model(self.config.model, len(self.train_set.categories), weights=False)

    def save(self, name: str, weights_only: bool = False) -> None:
        """Writes a checkpoint; `weights_only`: without what only training needs. Every process has to call it."""
        self.logger.flush()
        state = {**detector_state(self.config, self.train_set.categories), **vars(self.progress)}
        optimizer, where = None if weights_only else self.optimizer, f"step {self.progress.step}, before saving {name}"
        save_state(self.output / name, state, self.model, self.ema, optimizer, self.distributed, where)

    def _restore(self, path: Path) -> dict[str, Any]:
        """Puts weights and progress of a checkpoint back; returns it.

        Raises CheckpointError when it is of another model, of other classes or data.
        """
        state = load_checkpoint(path, kind="detection")
        check_resumable(state["config"], self.config, RESUMED, path)
        found = list(zip(state["category_ids"], state["class_names"], strict=True))
        expected = [(category.id, category.name) for category in self.train_set.categories]
        if found != expected:
            raise CheckpointError(f"{path}: was trained on the classes {found}, the data has {expected}")
        restore_weights(state, self.model, self.ema, path)
        steps = self.steps_per_epoch
        # checkpoints of before runs could end in the midst of an epoch lack `closed`
        known = {"closed": state["epoch"] * steps, **state}
        self.progress = Progress(**{name: known[name] for name in vars(Progress())})
        progress = self.progress
        if progress.step != progress.epoch * steps + progress.step_in_epoch:
            raise CheckpointError(
                f"{path}: is of step {progress.step}, epoch {progress.epoch}, but an epoch of this data and as many "
                f"processes has {steps} steps; resuming needs the same"
            )
        return state

    def report(self) -> None:
        """metrics.json, pictures and report.html, of the best epoch."""
        progress = self.progress
        results = json.loads((self.output / "detections.json").read_text(encoding="utf-8"))
        evaluation = Evaluation.of(self.val_set, results)
        metrics = evaluation.metrics() | {
            "epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "seconds": round(progress.train_seconds + progress.eval_seconds, 1),
            "images_per_second": round(progress.images / progress.train_seconds, 2),
        }
        write_json(self.output / "metrics.json", metrics)
        with errors_as_warnings(self.logger.warning, f"python -m detection.report {self.output}"):
            text = f"{self._describe_run()}\n{self._describe_rate()}"
            for path in write_report(self.output, self.config, evaluation, metrics, text):
                tag = path.relative_to(self.output).with_suffix("").as_posix()
                self.logger.figure(tag, path, progress.step)
        self.logger.info(f"best epoch {progress.best_epoch}\n{format_table(metrics)}\nresults are in {self.output}")

    def _log_steps(self, meter: Meter) -> None:
        seconds = time.perf_counter() - meter.start
        self.progress.train_seconds += seconds
        self.progress.images += meter.images
        self.progress.loss = meter.mean()[0]
        epoch = self.progress.step / self.steps_per_epoch
        named = dict(zip(("loss", *LOSSES, "grad_norm"), meter.mean(), strict=True))
        named |= {"images_per_second": meter.images / seconds, "memory_gib": peak_memory(self.device)}
        self.logger.log("train", self.progress.step, epoch=epoch, lr=self._lr(), **named)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _describe(self) -> str:
        start = f"{self._describe_run()}, from step {self.progress.step}"
        return f"{start}\n{self._describe_rate()}\n{self._describe_classes()}"

    def _describe_run(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return (
            f"{self.config.model.backbone['name']}, {parameters:.1f} M parameters, {self.device}: "
            f"{len(self.train_set.records)} training and {len(self.val_set.records)} validation images, "
            f"{len(self.train_set.categories)} classes; {self.steps_per_epoch} steps an epoch, "
            f"{self.total_steps} in all"
        )

    def _describe_rate(self) -> str:
        train, images = self.config.train, self.sampler.images
        parts = f"{train.batch_size} x {train.accumulate} accumulated x {self.distributed.world_size} processes"
        scaled = f", {train.lr:.3g} for {train.lr_batch_size} images" if train.lr_batch_size else ""
        return f"{images} images a step ({parts}), learning rate {self.lr:.3g}{scaled}"

    def _describe_classes(self) -> str:
        """Which class of the file became which label."""
        start, classes = self.config.model.checkpoint_path, self.train_set.categories
        weights = f"starts from {start}\n" if start and self.resume is None else ""
        shown = [f"{label:>5}  {category.id:>8}  {category.name}" for label, category in enumerate(classes[:100])]
        more = [f"... and {len(classes) - 100} more"] if len(classes) > 100 else []
        return weights + "\n".join([f"label  id in file  name of {len(classes)} classes", *shown, *more])

    def _trace_non_finite(self, images: Tensor, mask: Tensor | None, where: str, part: int) -> None:
        """Repeats a forward pass; raises NonFiniteError at the first such tensor of images, weights and outputs.

        Of this process alone: no loss and no wrapped model, both of which wait for the other processes; nothing at all
        where weights are shared.
        """
        check_finite([("the batch of images", images)], where)
        if is_sharded(self.model):
            return
        images, mask = images.to(self.device), None if mask is None else mask.to(self.device)
        # not what was compiled, which has no hooks in its midst
        trace_non_finite(self.model, lambda: self._forward(self.model.forward, images, mask, part), where)
