"""A training run: model, optimizer, schedule, evaluation, checkpoints.

A run that was stopped and goes on with the same split ends with the same bits on a CPU. How the images of a step are
split, into processes and accumulated batches, may change between runs and in the midst of one: the order of the
pictures, their augmentation, mixup and learning rates stay the same, gradients and metrics to the rounding of sums.
Draws of dropout and drop path depend on the split, and so do the statistics of batch norm, those of one batch.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import distribute_bn
from torch import Tensor, nn

from dat.classification.classifier import Classifier
from dat.classification.config import ClassificationConfig, TrainConfig
from dat.classification.data import (
    EvalImages,
    MixPairs,
    SkippedImages,
    TrainImages,
    eval_loader,
    make_transform,
    train_loader,
)
from dat.classification.evaluate import evaluate
from dat.classification.model import build_classifier
from dat.classification.readers import Split
from dat.classification.report import write_report
from dat.classification.results import Results, format_table
from dat.classification.sheet import draw_predictions
from dat.engine.checkpoint import check_resumable, load_checkpoint, restore_weights
from dat.engine.config import save_config, to_dict
from dat.engine.distributed import Distributed, StopSignal, stop_on_sigterm
from dat.engine.fsdp import is_sharded, restore_optimizer, save_state, whole_model, wrap_model
from dat.engine.loaders import EpochBatchSampler
from dat.engine.logger import RunLogger, peak_memory
from dat.engine.optim import (
    amp_context,
    clip_gradients,
    layer_scales,
    make_ema,
    make_scheduler,
    param_groups,
    scaled_lr,
)
from dat.engine.report import errors_as_warnings
from dat.engine.seeds import seed_everything
from dat.utils.errors import CheckpointError, ConfigError
from dat.utils.files import write_json
from dat.utils.finite import check_finite, trace_non_finite

# what a resumed run cannot change besides the images of a step: what it draws, and what its tensors belong to
FIXED_KEYS = ("seed", "model", "train.optimizer", "train.layer_decay")

# pictures [B, 3, H, W], labels [B] or soft labels [B, K], indices asked for and used, epoch [B]
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass
class Progress:
    """Where a run stands, all of it in the checkpoint: finished steps and epochs, best top-1 in percent."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0
    # of training and evaluation, over all sessions
    seconds: float = 0.0


def make_loss(train: TrainConfig) -> nn.Module:
    """The loss (logits [B, K], labels [B] or soft labels [B, K]). With mixup, that smooths the labels."""
    smoothing = 0.0 if train.mixup or train.cutmix else train.smoothing
    if train.loss == "bce":
        return BinaryCrossEntropy(smoothing=smoothing)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


class Trainer:
    """A run: the model, what trains it, and its place in the schedule, which is that of the checkpoint `resume`.

    Args:
        config: of the run.
        pictures, val_pictures: the splits; the classes are those of the former.
        distributed: this process.
        resume: checkpoint to go on from.
    Raises:
        ConfigError, CheckpointError: what does not go together.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        pictures: Split,
        val_pictures: Split,
        distributed: Distributed,
        resume: Path | None,
    ):
        self.config, self.distributed, self.resume = config, distributed, resume
        self.device, self.output = distributed.device, Path(config.output)
        self.pictures, self.val_pictures, self.class_names = pictures, val_pictures, pictures.class_names
        data, train = config.data, config.train
        rank, world_size, pin = distributed.rank, distributed.world_size, self.device.type == "cuda"
        self.sampler = EpochBatchSampler(
            len(pictures), train.batch_size, config.seed, rank, world_size, train.accumulate
        )  # fmt: skip
        mix = MixPairs(train, len(self.class_names), config.seed) if train.mixup or train.cutmix else None
        samples = TrainImages(pictures, make_transform(data, training=True), config.seed)
        self.loader = train_loader(samples, self.sampler, train.workers, pin, mix)
        val_samples = EvalImages(val_pictures, make_transform(data, training=False), rank, world_size)
        self.val_loader = eval_loader(val_samples, train.batch_size, train.workers, pin)
        self.loss_function = make_loss(train)
        self.skipped = SkippedImages(pictures, self.output / "skipped.txt", resumed=resume is not None)
        self.val_skipped = SkippedImages(val_pictures, self.output / "skipped_val.txt")
        self.progress = Progress()
        self._make_model()

    def _make_model(self) -> None:
        train, distributed, resume = self.config.train, self.distributed, self.resume
        seed_everything(self.config.seed)
        # the files that a resumed run started from need not exist any more
        self.model = self._build(weights=resume is None)
        if train.grad_checkpointing:
            _checkpoint_gradients(self.model)
        # FSDP takes contiguous weights alone
        layout = torch.channels_last if train.channels_last and not train.fsdp else torch.preserve_format
        self.model.to(self.device, memory_format=layout)
        self.ema = make_ema(self.model, train.ema_decay)
        # whole weights first: what is loaded then, and what the optimizer holds, may be shares of them
        state = None if resume is None else self._restore(resume)
        if train.compile:
            self.model.compile()
        self.wrapped = wrap_model(self.model, self.ema, distributed, train.fsdp)
        lr = scaled_lr(train.lr, self.sampler.images, train.lr_batch_size, train.lr_scaling)
        scales = layer_scales(self.model, train.layer_decay) if train.layer_decay < 1 else None
        groups = param_groups(self.model, lr, train.weight_decay, scales=scales)
        try:
            self.optimizer = create_optimizer_v2(groups, train.optimizer, lr, train.weight_decay)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"train.optimizer: timm cannot make {train.optimizer!r}: {error}") from error
        steps, warmup = train.epochs * self.sampler.steps, round(train.warmup_epochs * self.sampler.steps)
        # before the optimizer's state, whose base rate is that of the checkpoint's configuration
        self.scheduler = make_scheduler(self.optimizer, steps, warmup, min_lr=train.min_lr)
        if state is not None and resume is not None:
            restore_optimizer(state, self.model, self.optimizer, resume)

    def _build(self, weights: bool = False) -> nn.Module:
        return build_classifier(self.config.model.backbone, len(self.class_names), weights)

    def _restore(self, path: Path) -> dict[str, Any]:
        """Puts weights and progress of a checkpoint back; returns it. Raises CheckpointError when it is of another run.

        The images of a step have to be as many, and may be split otherwise among processes and batches.
        """
        state = load_checkpoint(path, kind="classification")
        check_resumable(state["config"], self.config, FIXED_KEYS, path)
        if state["class_names"] != self.class_names:
            raise CheckpointError(f"{path}: was trained on classes other than those of data.root now")
        # older checkpoints do not say
        images = state.get("images_per_step", self.sampler.images)
        if images != self.sampler.images:
            raise CheckpointError(
                f"{path}: a step took {images} images, it is now {self._describe_step()}; "
                "resuming needs the same number"
            )
        restore_weights(state, self.model, self.ema, path)
        self.progress = progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
        if progress.step != progress.epoch * self.sampler.steps + progress.step_in_epoch:
            raise CheckpointError(
                f"{path}: is of step {progress.step}, epoch {progress.epoch}, but an epoch of this data has "
                f"{self.sampler.steps} steps; resuming needs as many pictures as before"
            )
        return state

    def save(self, name: str, optimizer: bool = True) -> None:
        """Writes output/name, and the list of skipped pictures. Every process has to call it.

        Raises NonFiniteError rather than replace a good checkpoint by NaN, and CheckpointError.
        """
        self.logger.flush()
        self.skipped.write(self.distributed)
        state = {
            "kind": "classification",
            "config": to_dict(self.config),
            "class_names": self.class_names,
            "images_per_step": self.sampler.images,
            **vars(self.progress),
        }
        kept, where = self.optimizer if optimizer else None, f"step {self.progress.step}, before saving {name}"
        save_state(self.output / name, state, self.model, self.ema, kept, self.distributed, where)

    def run(self, warnings: Sequence[str] = ()) -> None:
        """Trains the epochs that remain and writes the results; `warnings` are logged first."""
        start = None if self.resume is None else self.progress.step
        wandb_project, config = self.config.train.wandb_project, to_dict(self.config)
        self.logger = RunLogger(self.output, self.distributed.main, start, wandb_project, config)
        try:
            if self.distributed.main:
                save_config(self.config, self.output / "config.yaml")
            self.logger.info(self._describe())
            for warning in warnings:
                self.logger.warning(warning)
            with stop_on_sigterm() as stop:
                while self.progress.epoch < self.config.train.epochs:
                    self.train_epoch(stop)
                    self.finish_epoch()
            self.report()
            self.distributed.barrier()
        finally:
            self.logger.close()

    def train_epoch(self, stop: StopSignal) -> None:
        """The rest of the current epoch; "last.pth" is written after its last step too, before the evaluation."""
        progress, train = self.progress, self.config.train
        self.sampler.set_position(progress.epoch, progress.step_in_epoch)
        size, steps = self.sampler.images, self.sampler.steps
        self.wrapped.train()
        self._since, self._timed = time.perf_counter(), progress.step
        description = f"epoch {progress.epoch + 1}/{train.epochs}"
        with self.logger.progress(steps * size, description, progress.step_in_epoch * size) as bar:
            # each step takes the next `accumulate` batches
            for batches in zip(*[iter(self.loader)] * train.accumulate, strict=True):
                numbers = self.train_step(batches)
                progress.step += 1
                progress.step_in_epoch += 1
                bar.update(size)
                last = progress.step_in_epoch == steps
                if last or progress.step % train.log_steps == 0:
                    self._log_step(numbers)
                bar.set_postfix_str(self._status(numbers), refresh=False)
                stopping = stop.requested(self.distributed)
                # also before the evaluation, which may fail: the epoch is not to be lost
                if last or stopping or (train.checkpoint_steps and progress.step % train.checkpoint_steps == 0):
                    self.save("last.pth")
                if stopping:
                    stop.exit(self.distributed)

    def train_step(self, batches: tuple[Batch, ...]) -> dict[str, float]:
        """One optimizer step; returns {"loss", "lr", "grad_norm"}, the loss being the mean over all processes.

        Raises NonFiniteError, naming the first tensor that is not finite; the weights are untouched.
        """
        progress, where = self.progress, f"step {self.progress.step + 1}"
        self.scheduler.step_update(progress.step)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for part, (images, targets, index, used, _) in enumerate(batches):
            self.skipped.add(index, used)
            loss += self._accumulate(images, targets, part, where)
        norm = clip_gradients(self.model, self.config.train.clip_grad, where)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=progress.step + 1)
        loss = self.distributed.sum(loss) / self.distributed.world_size
        return {"loss": loss.item(), "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}

    def _accumulate(self, images: Tensor, targets: Tensor, part: int, where: str) -> Tensor:
        """Adds the gradients of one batch, the `part`-th of its step; returns its share of the step's loss."""
        train = self.config.train
        layout = torch.channels_last if train.channels_last else torch.preserve_format
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        targets = targets.to(self.device, non_blocking=True)

        def forward(network: Any) -> Tensor:
            # drawn anew from the counters, so that a resumed run meets the same dropout
            place = part * self.distributed.world_size + self.distributed.rank
            seed_everything(self.config.seed, self.progress.step, place)
            with amp_context(self.device, train.amp):
                logits = network(images)
            return self.loss_function(logits.float(), targets) / train.accumulate

        # gradients are averaged over the processes once a step
        last = part == train.accumulate - 1
        with nullcontext() if last else self.distributed.no_sync(self.wrapped):
            loss = forward(self.wrapped)
            if not torch.isfinite(loss):
                check_finite([("the batch of images", images), ("the targets", targets)], where)
                # neither what waits for other processes nor what was compiled, which has no hooks in its midst
                if not is_sharded(self.model):
                    trace_non_finite(self.model, lambda: forward(self.model.forward), where)
                check_finite([("the loss", loss)], where)
            loss.backward()
        return loss.detach()

    def finish_epoch(self) -> None:
        """Evaluates; saves "best.pth" when top-1 rose, and "last.pth"."""
        progress, train = self.progress, self.config.train
        start = time.perf_counter()
        results = self.evaluate()
        metrics = results.metrics()
        progress.seconds += time.perf_counter() - start
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
        better = metrics["top1"] > progress.best
        if better:
            progress.best, progress.best_epoch = metrics["top1"], progress.epoch
        # before the checkpoint: a run killed in between finds the line there, and not left out
        self.logger.log("val", progress.step, epoch=progress.epoch, **metrics)
        if better:
            if self.distributed.main:
                results.save(self.output / "results.npz")
            self.save("best.pth", optimizer=False)
        self.save("last.pth")
        self.logger.info(
            f"epoch {progress.epoch}/{train.epochs}: top-1 {metrics['top1']:.2f} top-5 {metrics['top5']:.2f} "
            f"loss {metrics['loss']:.3f}, best top-1 {progress.best:.2f}"
        )
        self._warn(self.skipped)

    def evaluate(self) -> Results:
        """What the model says of the validation pictures, averaged where there are averaged weights."""
        model = whole_model(self.model if self.ema is None else self.ema.module, self._build, self.device)
        if self.distributed.world_size > 1:
            # each process has statistics of its own where batch norm is trained
            distribute_bn(model, self.distributed.world_size)
        return evaluate(model, self.val_loader, self.distributed, self.config.train.amp, self.val_skipped)

    def report(self) -> None:
        """metrics.json, pictures and report.html of the best epoch, and a table in the log."""
        self._warn(self.val_skipped)
        output, progress, train = self.output, self.progress, self.config.train
        if not self.distributed.main or not (output / "results.npz").is_file():
            return
        best = Results.load(output / "results.npz")
        more = {
            "epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(progress.step * self.sampler.images / progress.seconds, 2),
            "memory_gib": round(peak_memory(self.device), 3),
        }
        metrics = best.summarize(self.class_names, **more)
        write_json(output / "metrics.json", metrics)
        with errors_as_warnings(self.logger.warning, f"python -m classification.report {output}"):
            if train.pictures:
                classifier = Classifier.from_checkpoint(output / "best.pth", device=self.device)
                path = output / "predictions.png"
                draw_predictions(classifier, self.val_pictures, train.pictures, path)
            text = self._describe_run()
            names, split = self.class_names, self.val_pictures
            for path in write_report(output, self.config, names, best, split, metrics, text):
                self.logger.figure(path.stem, path, progress.step)
        self.logger.info(f"best epoch {progress.best_epoch}\n{format_table(metrics)}\nresults are in {output}")

    def _warn(self, skipped: SkippedImages) -> None:
        warning = skipped.write(self.distributed)
        if warning:
            self.logger.warning(warning)

    def _log_step(self, numbers: dict[str, float]) -> None:
        progress, now = self.progress, time.perf_counter()
        seconds, self._since = now - self._since, now
        steps, self._timed = progress.step - self._timed, progress.step
        progress.seconds += seconds
        self.logger.log(
            "train",
            progress.step,
            epoch=progress.step / self.sampler.steps,
            **numbers,
            images_per_second=steps * self.sampler.images / seconds,
            eta_seconds=self._seconds_left(),
            memory_gib=peak_memory(self.device),
        )

    def _seconds_left(self) -> float:
        """Of the run, evaluations included, at its speed so far."""
        progress = self.progress
        return progress.seconds / max(1, self._timed) * (self.config.train.epochs * self.sampler.steps - progress.step)

    def _status(self, numbers: dict[str, float]) -> str:
        left = format_seconds(self._seconds_left()) if self.progress.seconds else "?"
        memory = peak_memory(self.device)
        return f"loss {numbers['loss']:.3f}, lr {numbers['lr']:.1e}, {memory:.1f} GiB, run ends in {left}"

    def _describe(self) -> str:
        """What is about to be trained, or resumed."""
        progress, train = self.progress, self.config.train
        lines = [self._describe_run()]
        if self.resume is not None:
            lines.append(f"resumed from {self.resume}: step {progress.step}, epoch {progress.epoch + 1}/{train.epochs}")
        if progress.epoch >= train.epochs:
            lines.append("nothing left to train; raise train.epochs to go on")
        return "\n".join(lines)

    def _describe_run(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        note = f"{self.val_pictures.note}\n" if self.val_pictures.note else ""
        return (
            f"{note}{self.config.model.backbone['name']}, {parameters:.2f} M parameters, {self.device}: "
            f"{len(self.class_names)} classes, {len(self.pictures)} + {len(self.val_pictures)} pictures\n"
            f"{self._describe_step()} images a step, {self.sampler.steps} steps an epoch, learning rate "
            f"{self.optimizer.param_groups[0]['initial_lr']:.3g}"
        )

    def _describe_step(self) -> str:
        train, processes = self.config.train, self.distributed.world_size
        return f"{self.sampler.images} ({train.batch_size} x {train.accumulate} accumulated x {processes} processes)"


def _checkpoint_gradients(model: Any) -> None:
    try:
        model.set_grad_checkpointing()
    # timm's models refuse by an assertion, or lack the method
    except (AssertionError, AttributeError) as error:
        raise ConfigError(f"train.grad_checkpointing is true, which {type(model).__name__} does not know") from error


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
