"""Trains a classifier: python -m classification.train CONFIG [key.path=value ...]

Also under torchrun, one process per GPU. Killed at any moment, the same command with train.resume=true goes on.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from classification.config import ClassificationConfig, TrainConfig, check_config
from classification.data import (
    EvalPictures,
    SkippedPictures,
    TrainPictures,
    eval_loader,
    make_transform,
    open_split,
    train_loader,
)
from classification.evaluate import evaluate
from classification.model import build_classifier, load_classifier
from classification.sheet import draw_validation_sheet
from dat.training.checkpoint import (
    check_resumable,
    load_checkpoint,
    restore_training_state,
    save_checkpoint,
    training_state,
)
from dat.training.config import load_config, save_config, to_dict
from dat.training.distributed import Distributed, StopSignal, prepare_output, setup_distributed, stop_on_sigterm
from dat.training.errors import CheckpointError, ConfigError
from dat.training.finite import check_finite, check_state_finite, trace_non_finite
from dat.training.logger import RunLogger
from dat.training.loop import EpochBatchSampler, amp_context, main_guard, seed_everything
from dat.training.optim import clip_gradients, layer_scales, make_ema, make_scheduler, param_groups, scaled_lr

# what a resumed run cannot change: the order of the samples, and what the checkpoint's tensors belong to
FIXED_KEYS = ("seed", "model", "train.batch_size", "train.optimizer", "train.layer_decay")


@dataclass
class Run:
    """Everything that a training step changes, and with it what a checkpoint holds."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    config: ClassificationConfig
    class_names: list[str]
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -1.0

    def save(self, name: str, optimizer: bool = True) -> None:
        """Writes output/name, unless a weight is not finite. Raises NonFiniteError, CheckpointError."""
        averaged = None if self.ema is None else self.ema.module
        check_state_finite(self.model, averaged, f"step {self.step}, before saving {name}")
        state = {
            "kind": "classification",
            "config": to_dict(self.config),
            "class_names": self.class_names,
            "step": self.step,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "best": self.best,
            **training_state(self.model, self.ema, self.optimizer if optimizer else None),
        }
        save_checkpoint(Path(self.config.output) / name, state)

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint of the same model and classes. Raises CheckpointError."""
        state = load_checkpoint(path, kind="classification")
        check_resumable(state["config"], self.config, FIXED_KEYS, path)
        if state["class_names"] != self.class_names:
            raise CheckpointError(f"{path}: was trained on classes other than those of data.root now")
        restore_training_state(state, self.model, self.ema, self.optimizer, path)
        self.step, self.epoch, self.step_in_epoch = state["step"], state["epoch"], state["step_in_epoch"]
        self.best = state["best"]


def make_loss(train: TrainConfig, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    """The loss (logits [B, K], labels [B] or soft labels [B, K]) and timm's mixup, None when it is off.

    With mixup, mixup smooths the labels.
    """
    mixup = None
    if train.mixup or train.cutmix:
        mixup = Mixup(train.mixup, train.cutmix, label_smoothing=train.smoothing, num_classes=num_classes)
    smoothing = 0.0 if mixup else train.smoothing
    if train.loss == "bce":
        return BinaryCrossEntropy(smoothing=smoothing), mixup
    return nn.CrossEntropyLoss(label_smoothing=smoothing), mixup


def train_step(
    model: nn.Module,
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    amp: str,
    clip_grad: float,
    where: str,
) -> tuple[float, float]:
    """One optimizer step; returns the loss and the norm of the gradients.

    Raises:
        NonFiniteError: names the first tensor that is not finite; the weights are untouched.
    """

    def forward(network: nn.Module) -> Tensor:
        with amp_context(images.device, amp):
            logits = network(images)
        return loss_function(logits.float(), targets)

    loss = forward(model)
    value = loss.item()
    if not torch.isfinite(loss):
        check_finite([("the batch of images", images), ("the targets", targets)], where)
        # not DistributedDataParallel, whose forward waits for the other processes
        plain = unwrap_model(model)
        trace_non_finite(plain, lambda: forward(plain), where)
        check_finite([("the loss", loss)], where)
    optimizer.zero_grad()
    loss.backward()
    norm = clip_gradients(model, clip_grad, where)
    optimizer.step()
    return value, norm.item()


@dataclass
class Loop:
    """What an epoch uses and does not change."""

    wrapped: nn.Module
    loader: DataLoader[Any]
    sampler: EpochBatchSampler
    scheduler: Scheduler
    loss_function: nn.Module
    mixup: Mixup | None
    skipped: SkippedPictures
    distributed: Distributed
    logger: RunLogger
    stop: StopSignal


def advance(run: Run, loop: Loop, images: Tensor, targets: Tensor) -> dict[str, float]:
    """One step on a batch of the loader; returns {"loss", "lr", "grad_norm"}."""
    train, distributed = run.config.train, loop.distributed
    seed_everything(run.config.seed, run.step, distributed.rank)
    images, targets = images.to(distributed.device), targets.to(distributed.device)
    if loop.mixup is not None:
        images, targets = loop.mixup(images, targets)
    loop.scheduler.step_update(run.step)
    where = f"step {run.step + 1}"
    loss, norm = train_step(
        loop.wrapped, loop.loss_function, run.optimizer, images, targets, train.amp, train.clip_grad, where
    )
    run.step += 1
    run.step_in_epoch += 1
    if run.ema is not None:
        run.ema.update(run.model, step=run.step)
    return {"loss": loss, "lr": run.optimizer.param_groups[0]["lr"], "grad_norm": norm}


def train_epoch(run: Run, loop: Loop) -> None:
    """Trains to the end of run.epoch, from run.step_in_epoch on; saves "last.pth" there and every checkpoint_steps."""
    train, logger = run.config.train, loop.logger
    run.model.train()
    loop.sampler.set_position(run.epoch, run.step_in_epoch)
    size, batches = train.batch_size * loop.distributed.world_size, loop.sampler.batches
    started, since = time.perf_counter(), run.step
    bar = logger.progress(batches * size, f"epoch {run.epoch + 1}/{train.epochs}", run.step_in_epoch * size)
    with bar:
        for images, targets, index, used in loop.loader:
            loop.skipped.add(index, used)
            numbers = advance(run, loop, images, targets)
            bar.update(size)
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", lr=f"{numbers['lr']:.1e}", refresh=False)
            last = run.step_in_epoch == batches
            if last or run.step % train.log_steps == 0:
                speed = (run.step - since) * size / (time.perf_counter() - started)
                started, since = time.perf_counter(), run.step
                logger.log("train", run.step, epoch=run.epoch + 1, **numbers, images_per_second=speed)
            stopping = loop.stop.requested(loop.distributed)
            # also before the evaluation, which may fail: the epoch is not to be lost
            due = last or (train.checkpoint_steps > 0 and run.step % train.checkpoint_steps == 0)
            if (stopping or due) and loop.distributed.main:
                logger.flush()
                run.save("last.pth")
            if stopping:
                loop.stop.exit(loop.distributed)


def fit(run: Run, loop: Loop, measure: Callable[[nn.Module], dict[str, float]]) -> None:
    """Trains the epochs that remain; after each it measures, saves "best.pth" when top-1 rose, and "last.pth"."""
    train, logger = run.config.train, loop.logger
    for _ in range(run.epoch, train.epochs):
        train_epoch(run, loop)
        metrics = measure(run.ema.module if run.ema is not None else run.model)
        run.epoch, run.step_in_epoch = run.epoch + 1, 0
        better = metrics["top1"] > run.best
        run.best = max(run.best, metrics["top1"])
        # before the checkpoint: a run killed in between finds the line there, and not left out
        logger.log("val", run.step, epoch=run.epoch, **metrics)
        logger.flush()
        if loop.distributed.main:
            if better:
                run.save("best.pth", optimizer=False)
            run.save("last.pth")
        logger.info(
            f"epoch {run.epoch}/{train.epochs}: top-1 {metrics['top1']:.2f} top-5 {metrics['top5']:.2f} "
            f"loss {metrics['loss']:.3f}, best top-1 {run.best:.2f}"
        )
        warning = loop.skipped.report() if loop.distributed.main else None
        if warning:
            logger.warning(warning)


def make_run(config: ClassificationConfig, class_names: list[str], weights: bool, distributed: Distributed) -> Run:
    """A run at its start; `weights` False leaves out those that the configuration names. Raises ConfigError."""
    train = config.train
    seed_everything(config.seed)
    model = build_classifier(config.model.backbone, len(class_names), weights).to(distributed.device)
    lr = scaled_lr(train.lr, train.batch_size * distributed.world_size, train.lr_batch_size, train.lr_scaling)
    scales = layer_scales(model, train.layer_decay) if train.layer_decay < 1 else None
    groups = param_groups(model, lr, train.weight_decay, scales=scales)
    try:
        optimizer = create_optimizer_v2(groups, train.optimizer, lr, train.weight_decay)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"train.optimizer: timm cannot make {train.optimizer!r}: {error}") from error
    return Run(model, make_ema(model, train.ema_decay), optimizer, config, class_names)


def train(config: ClassificationConfig) -> dict[str, float]:
    """Runs a whole training, or what remains of it; returns {"best": top-1, "step", "epoch"}.

    Raises:
        UserError: configuration, data, checkpoint, or a loss that is not finite.
    """
    check_config(config)
    data, settings, output = config.data, config.train, Path(config.output)
    distributed = setup_distributed(settings.device)
    rank, world_size, pin = distributed.rank, distributed.world_size, distributed.device.type == "cuda"
    reader, class_names = open_split(data.root, data.train.path, "data.train.path")
    val_reader, val_names = open_split(data.root, data.val.path, "data.val.path", class_names)
    pictures = TrainPictures(reader, make_transform(data, training=True), config.seed)
    val_pictures = EvalPictures(val_reader, make_transform(data, training=False), rank, world_size)
    sampler = EpochBatchSampler(len(reader), settings.batch_size, config.seed, rank, world_size)

    checkpoint = prepare_output(output, settings.resume, distributed)
    run = make_run(config, class_names, checkpoint is None, distributed)
    steps, warmup_steps = settings.epochs * sampler.batches, round(settings.warmup_epochs * sampler.batches)
    scheduler = make_scheduler(run.optimizer, steps, warmup_steps, min_lr=settings.min_lr)
    # after the scheduler, which takes the base rate from this configuration and not from the checkpoint's
    if checkpoint is not None:
        run.load(checkpoint)
    loss_function, mixup = make_loss(settings, len(class_names))
    skipped = SkippedPictures(reader, output / "skipped.txt")
    val_skipped = SkippedPictures(val_reader, output / "skipped_val.txt")

    val_loader = eval_loader(val_pictures, settings.batch_size, settings.workers, pin)

    def measure(model: nn.Module) -> dict[str, float]:
        return evaluate(model, val_loader, distributed, settings.amp, val_skipped)

    logger = RunLogger(output, distributed.main, None if checkpoint is None else run.step)
    try:
        if distributed.main:
            save_config(config, output / "config.yaml")
        describe(run, logger, len(reader), len(val_reader), val_names, checkpoint)
        with stop_on_sigterm() as stop:
            wrapped, loader = distributed.wrap(run.model), train_loader(pictures, sampler, settings.workers, pin)
            loop = Loop(
                wrapped, loader, sampler, scheduler, loss_function, mixup, skipped, distributed, logger, stop
            )  # fmt: skip
            fit(run, loop, measure)
        if distributed.main:
            leave_sheet(run, val_reader, distributed.device, logger)
        warning = val_skipped.report() if distributed.main else None
        if warning:
            logger.warning(warning)
        logger.info(f"finished: best top-1 {run.best:.2f}, {output / 'best.pth'}")
    finally:
        logger.close()
    return {"best": run.best, "step": run.step, "epoch": run.epoch}


def leave_sheet(run: Run, val_reader: Any, device: torch.device, logger: RunLogger) -> None:
    """Draws output/predictions.png: validation pictures with the labels that the best checkpoint gives them."""
    output, count = Path(run.config.output), run.config.train.pictures
    if count > 0 and (output / "best.pth").is_file():
        classifier = load_classifier(output / "best.pth", [], device)
        if draw_validation_sheet(classifier, val_reader, device, count, output / "predictions.png"):
            logger.figure("predictions", output / "predictions.png", run.step)


def describe(
    run: Run, logger: RunLogger, images: int, val_images: int, val_names: list[str], checkpoint: Path | None
) -> None:
    """Says what is about to be trained, or resumed."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    name, classes = run.config.model.backbone["name"], len(run.class_names)
    logger.info(f"{name}: {parameters:.2f} M parameters, {classes} classes, {images} + {val_images} pictures")
    if len(val_names) < classes:
        lacking = next(name for name in run.class_names if name not in val_names)
        logger.warning(f"data.val has no pictures of {classes - len(val_names)} classes, such as {lacking!r}")
    if checkpoint is not None:
        logger.info(f"resumed from {checkpoint}: step {run.step}, epoch {run.epoch + 1}/{run.config.train.epochs}")
    if run.epoch >= run.config.train.epochs:
        logger.info("nothing left to train; raise train.epochs to go on")


def main() -> None:
    parser = argparse.ArgumentParser(prog="classification.train", description=__doc__)
    parser.add_argument("config", help="YAML file, see configs/classification")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as train.lr=1e-3")
    arguments = parser.parse_args()
    train(load_config(ClassificationConfig, arguments.config, arguments.overrides))


if __name__ == "__main__":
    main_guard(main)
