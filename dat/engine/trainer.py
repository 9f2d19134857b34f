"""A training run of any task: model, optimizer, schedule, evaluation, checkpoints and report.

A run that was stopped and resumed ends with the same bits on a CPU. The images of a step may be split otherwise, into
processes and accumulated batches, between runs and within one: order, augmentation and learning rates stay the same,
gradients and metrics to the rounding of sums. Dropout and the statistics of batch norm depend on the split.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from dat.engine import optim
from dat.engine.backbones import starts_from_weights
from dat.engine.checkpoint import (
    LAST,
    PREVIOUS,
    check_resumable,
    check_training_state,
    check_weights_finite,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from dat.engine.config import save_config, to_dict
from dat.engine.distributed import (
    Distributed,
    StopSignal,
    is_sharded,
    setup_distributed,
    shard,
    shard_optimizer_state,
    stop_on_sigterm,
    whole_tensors,
)
from dat.engine.lock import lock_run
from dat.engine.logger import RunLogger, peak_memory
from dat.engine.optimizer_state import load_optimizer
from dat.engine.progress import Progress, StepRecord, format_seconds
from dat.engine.report import errors_as_warnings
from dat.engine.seeds import seed_device, seed_everything
from dat.engine.task import Task
from dat.utils.errors import CheckpointError, ConfigError, NonFiniteError
from dat.utils.files import name_full_disk, write_json
from dat.utils.finite import check_finite, trace_non_finite


class Trainer(Task):
    """A training run, from its start or from the checkpoint `resume`.

    Args:
        config: of the task; `config.train` is a TrainConfig.
        distributed: this process; None: setup_distributed(config.train.device).
        resume: checkpoint to continue from.
    Raises:
        ConfigError, CheckpointError: arguments that do not fit together, or a checkpoint of another run.
    """

    # A resumed run may not change these: its random draws or the optimizer's groups would not fit.
    fixed_keys: ClassVar[tuple[str, ...]] = (
        "seed", "model", "train.optimizer", "train.weight_decay", "train.layer_decay",
    )  # fmt: skip

    def __init__(self, config: Any, distributed: Distributed | None = None, resume: Path | None = None) -> None:
        self.config, self.resume = config, resume
        self.distributed = distributed or setup_distributed(config.train.device)
        self.device, self.output = self.distributed.device, Path(config.output)
        self.warnings: list[str] = []
        self.last_intact = resume is None or resume.name != PREVIOUS
        if not self.last_intact:
            self.warnings.append(f"{self.output / LAST} is missing or damaged: the run goes on from {resume}")
        train = config.train
        if self.device.type == "mps" and train.amp != "none":
            raise ConfigError(f"train.amp is {train.amp}, should be none on mps, which computes in float32")
        half = self.device.type == "cuda" and train.amp == "bf16"
        if half and torch.cuda.get_device_capability(self.device) < (8, 0):
            name = torch.cuda.get_device_name(self.device)
            self.warnings.append(f"{name} has no bfloat16 and emulates it slowly; train.amp=none is faster")
        self.sampler, self.loader, self.val_loader = self.build_loaders()
        self.steps_per_epoch = self.sampler.steps
        self.total_steps = train.total_steps(self.steps_per_epoch)
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.warmup_steps = train.warmup_steps or round(train.warmup_epochs * self.steps_per_epoch)
        if self.warmup_steps >= self.total_steps:
            key = "warmup_steps" if train.warmup_steps else "warmup_epochs"
            self.warnings.append(
                f"train.{key} is {getattr(train, key):g}, a warm-up of {self.warmup_steps} steps in a run of "
                f"{self.total_steps}: the learning rate only rises; the warm-up should be a small part of the run"
            )
        self.lr = optim.scaled_lr(train.lr, self.sampler.images, train.lr_batch_size, train.lr_scaling)
        self.progress = Progress()
        # On a GPU the values of a step are read during the next one.
        self.pending: StepRecord | None = None
        self.latest: list[float] = []
        self.stop = StopSignal()
        # Before the checkpoint is read, which another training might be about to replace.
        self.lock = lock_run(self.output, self.distributed)
        with ExitStack() as failed:
            failed.push(self.lock)
            self._prepare_model()
            failed.pop_all()

    def _prepare_model(self) -> None:
        """Model, averaged weights, optimizer and schedule, with the state of the checkpoint to resume from."""
        train, distributed = self.config.train, self.distributed
        seed_everything(self.config.seed)
        # The files that a resumed run started from need not exist any more.
        self.model = self.build_model(weights=self.resume is None)
        if train.grad_checkpointing:
            _checkpoint_gradients(self.model)
        self.memory_format = torch.channels_last if train.channels_last else torch.preserve_format
        # FSDP takes contiguous weights only.
        self.model.to(self.device, memory_format=torch.preserve_format if train.fsdp else self.memory_format)
        self.ema = optim.make_ema(self.model, train.ema_decay)
        # Whole weights are loaded before they are sharded; the optimizer's state afterwards.
        state = None if self.resume is None else self._restore(self.resume)
        if train.compile:
            self.model.compile(dynamic=self.dynamic)
        self.wrapped = self._shard() if train.fsdp else distributed.wrap(self.model)
        self.optimizer = optim.make_optimizer(self.parameter_groups(), train.optimizer, self.lr, train.weight_decay)
        self.reads_late = optim.can_skip_on_device(self.optimizer, self.device)
        # Before the optimizer's state is restored, whose base rate is that of the checkpoint's configuration.
        self.scheduler = optim.make_scheduler(
            self.optimizer,
            self.total_steps,
            self.warmup_steps,
            train.schedule,
            [epoch * self.steps_per_epoch for epoch in train.decay_epochs],
            min_lr=train.min_lr_scale * self.lr,
        )
        if state is not None and self.resume is not None:
            shard = shard_optimizer_state if is_sharded(self.model) else None
            load_optimizer(self.optimizer, state, self.resume, shard)

    def parameter_groups(self) -> list[dict[str, Any]]:
        train = self.config.train
        scales = optim.layer_scales(self.model, train.layer_decay) if train.layer_decay < 1 else None
        return optim.param_groups(self.model, self.lr, train.weight_decay, scales=scales)

    def to_device(self, tensor: Tensor, images: bool = False) -> Tensor:
        layout = self.memory_format if images else torch.preserve_format
        return tensor.to(self.device, non_blocking=True, memory_format=layout)

    def run(self, until: float = math.inf) -> dict[str, Any]:
        """Trains to the last step, until `metric` reaches `until` or stops rising, and writes the results.

        Returns:
            metrics.json of the best epoch on the main process, {} on the others.
        """
        with self.lock, name_full_disk(self.output):
            return self._run(until)

    def _run(self, until: float) -> dict[str, Any]:
        progress, config, main = self.progress, self.config, self.distributed.main
        start = None if self.resume is None else progress.step
        self.logger = RunLogger(self.output, main, start, config.train.wandb_project, to_dict(config))
        try:
            if main:
                save_config(config, self.output / "config.yaml")
            self.logger.info(self._describe())
            for warning in self.warnings:
                self.logger.warning(warning)
            with stop_on_sigterm() as self.stop:
                while progress.closed < self.total_steps and progress.best < until and not self._stopped_early():
                    # A run that was stopped between the last step of an epoch and its evaluation lacks only that.
                    if progress.step < self._end_of_epoch():
                        self.train_epoch()
                    self.finish_epoch()
            if self._stopped_early():
                self.logger.info(self._stopped_early())
            metrics = self.report()
            self.distributed.barrier()
            return metrics
        finally:
            self.logger.close()

    def _end_of_epoch(self) -> int:
        """The step at which the current epoch ends, or the run within it."""
        progress = self.progress
        return min(progress.step - progress.step_in_epoch + self.steps_per_epoch, self.total_steps)

    def train_epoch(self) -> None:
        """Trains to the end of the epoch. "last.pth" is also written before the evaluation, which may fail."""
        progress, train = self.progress, self.config.train
        self.sampler.set_position(progress.epoch, progress.step_in_epoch)
        end, images = self._end_of_epoch(), self.sampler.images
        batches = iter(self.loader)
        self.wrapped.train()
        self._clock = (time.perf_counter(), progress.step)
        description, done = f"epoch {progress.epoch + 1}/{self.epochs}", progress.step_in_epoch * images
        with self.logger.progress(self.steps_per_epoch * images, description, done) as bar:
            while progress.step < end:
                self.train_step([next(batches) for _ in range(train.accumulate)])
                progress.step += 1
                progress.step_in_epoch += 1
                last = progress.step == end
                if last or progress.step % train.log_steps == 0:
                    self._log_steps()
                if not bar.disable:
                    bar.set_postfix_str(self._status(), refresh=False)
                bar.update(images)
                stopping = self._stopping()
                if last or stopping or (train.checkpoint_steps and progress.step % train.checkpoint_steps == 0):
                    self.save(LAST)
                if stopping:
                    self.stop.exit(self.distributed)

    def train_step(self, batches: Sequence[Any]) -> None:
        """One optimizer step; its gradients are those of one batch of all images of all processes.

        Raises:
            NonFiniteError: names the first tensor that is not finite; the weights are those before that step. On a GPU
                it is raised during the next step, so that no step waits for the device, or before anything is saved.
        """
        step = self.progress.step + 1
        self.scheduler.step_update(self.progress.step)
        self.optimizer.zero_grad()
        try:
            normalizers = self.normalizers(batches)
            values = self._backward(self.wrapped, batches, normalizers, step)
        # The matcher may raise before the loss is computed.
        except NonFiniteError:
            self._read_pending()
            self._trace_non_finite(batches, step)
            raise
        norm = optim.clip_gradients(self.model, self.config.train.clip_grad)
        stop = torch.full((1,), float(self.stop.received), device=self.device)
        values = self.distributed.sum(torch.cat((values, stop))) / self.distributed.world_size
        values = torch.cat((values, norm.to(values)[None]))
        record = StepRecord(step, batches, normalizers, values)
        if self.reads_late:
            self._read_pending()
            self.pending = record
            optim.step_unless(self.optimizer, ~values.isfinite().all())
        else:
            self._read(record)
            self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=step)

    def _backward(self, model: Any, batches: Sequence[Any], normalizers: Any, step: int) -> Tensor:
        """Adds the gradients of a step's batches; returns the sums of "loss" and `losses` of this process."""
        names = ("loss", *self.losses)
        values = torch.zeros(len(names), device=self.device)
        for part, batch in enumerate(batches):
            # Gradients are averaged over the processes once per step.
            last = part == len(batches) - 1
            with nullcontext() if last else self.distributed.no_sync(model):
                outputs = self._forward(model, batch, step, part)
                losses = self.compute_loss(batch, outputs, normalizers)
                losses["loss"].backward()
            values += torch.stack([losses[name].detach() for name in names])
        return values

    def _forward(self, model: Any, batch: Any, step: int, part: int) -> Any:
        # Dropout is drawn from counters, so that a resumed run draws the same.
        place = part * self.distributed.world_size + self.distributed.rank
        seed_device(self.device, self.config.seed, step - 1, place)
        with optim.amp_context(self.device, self.config.train.amp):
            return model(*self.inputs(batch))

    def _read_pending(self) -> None:
        record, self.pending = self.pending, None
        if record is not None:
            self._read(record)

    def _read(self, record: StepRecord) -> None:
        """Adds the values of a step to the log while its weights are in place. Raises NonFiniteError."""
        *losses, _, norm = self.latest = record.read()
        if not all(map(math.isfinite, self.latest)):
            self._raise_non_finite(record)
        self.progress.add([*losses, norm])

    def _raise_non_finite(self, record: StepRecord) -> None:
        """Raises NonFiniteError for the first tensor of the step that is not finite on this process."""
        self._trace_non_finite(record.batches, record.step)
        where = f"step {record.step}, {', '.join(map(self.describe_batch, record.batches))}"
        if self.reads_late:
            # The gradients are those of the next step by now. Other processes may have raised an error already.
            self.optimizer.zero_grad()
            self._backward(self.model, record.batches, record.normalizers, record.step)
        optim.check_gradients(self.model, where)
        names = ("the loss", *self.losses, "the stop signal", "the norm of the gradients")
        check_finite(((name, torch.tensor(value)) for name, value in zip(names, self.latest, strict=True)), where)

    def _trace_non_finite(self, batches: Sequence[Any], step: int) -> None:
        """Repeats forward passes; raises NonFiniteError for the first such tensor of images, weights and outputs.

        It takes the model of this process without DistributedDataParallel, which would wait for the other processes,
        and without torch.compile, which skips hooks. Sharded models cannot be run by one process.
        """
        for part, batch in enumerate(batches):
            where = f"step {step}, {self.describe_batch(batch)}"
            check_finite([("the batch of images", self.inputs(batch)[0])], where)
            if not is_sharded(self.model):
                forward = partial(self._forward, self.model.forward, batch, step, part)
                trace_non_finite(self.model, forward, where)

    def _stopping(self) -> bool:
        """Whether any process received SIGTERM; all processes get the same answer in the same step."""
        if self.distributed.world_size == 1:
            return self.stop.received
        return bool(self.latest) and self.latest[-2] > 0

    def finish_epoch(self) -> None:
        """Evaluates if that is due, and writes the checkpoints."""
        progress, train = self.progress, self.config.train
        if progress.step_in_epoch == self.steps_per_epoch:
            progress.epoch += 1
            progress.step_in_epoch = 0
        progress.closed = progress.step
        text = ""
        if progress.epoch % train.eval_epochs == 0 or progress.step == self.total_steps:
            text = self._evaluate()
        self.save(LAST)
        speed, left = progress.images_per_second(self.sampler.images), progress.seconds_left(self.total_steps)
        self.logger.info(
            f"epoch {progress.epoch}/{self.epochs}: loss {progress.loss:.3f}{text}, {speed:.1f} images/s, "
            f"{format_seconds(left)} left"
        )

    def _evaluate(self) -> str:
        """Evaluates, logs the metrics and saves the best weights; returns the main metric as text."""
        progress, start = self.progress, time.perf_counter()
        metrics = self.evaluate()
        progress.eval_seconds += time.perf_counter() - start
        numbers = {name: math.nan if value is None else value for name, value in metrics.items() if name != "per_class"}
        # Before the checkpoint: a run that is killed in between finds this line and does not write it again.
        self.logger.log("val", progress.step, epoch=progress.epoch, **numbers)
        value = metrics[self.metric] or 0.0
        if value > progress.best:
            progress.best, progress.best_epoch, progress.stale = value, progress.epoch, 0
            if self.distributed.main:
                self.save_results(self.output / self.results_file)
            self.save("best.pth", weights_only=True)
        else:
            progress.stale += 1
        return f", {self.metric} {value:.4g}, best {progress.best:.4g}"

    def _stopped_early(self) -> str:
        """Why the run ends before its last step; "": it does not."""
        progress, most = self.progress, self.config.train.early_stop
        if not most or progress.stale < most or progress.closed >= self.total_steps:
            return ""
        return (
            f"stopped early, after epoch {progress.epoch} of {self.epochs}: {self.metric} has not risen above "
            f"{progress.best:.4g}, of epoch {progress.best_epoch}, in {progress.stale} evaluations "
            f"(train.early_stop={most})"
        )

    def evaluation_model(self) -> Any:
        """The model with averaged weights, if there are any, that one process can run."""
        model = self.model if self.ema is None else self.ema.module
        if is_sharded(model):
            weights = whole_tensors(model.state_dict())
            model = self.build_model(weights=False)
            model.load_state_dict(weights)
            model.to(self.device)
        if self.distributed.world_size > 1:
            # Each process has its own statistics of trained batch norm.
            distribute_bn(model, self.distributed.world_size)
        return model

    def save(self, name: str, weights_only: bool = False) -> None:
        """Writes a checkpoint to output/name; every process has to call it.

        `weights_only`: without the state of training, and only the averaged weights if there are any.

        Raises:
            NonFiniteError: weights are not finite; the previous file is kept.
            CheckpointError: the file cannot be written.
        """
        self._read_pending()
        self.logger.flush()
        averaged = None if self.ema is None else self.ema.module
        tensors: dict[str, Any] = {"state_dict": self.model.state_dict()}
        if averaged is not None:
            tensors["state_dict" if weights_only else "state_dict_ema"] = averaged.state_dict()
        if not weights_only:
            tensors["optimizer"] = self.optimizer.state_dict()
        # Shards are gathered by all processes.
        if self.distributed.main or is_sharded(self.model):
            tensors = whole_tensors(tensors)
        if self.distributed.main:
            check_weights_finite(tensors, f"step {self.progress.step}, before saving {name}")
            # A run that went on from previous.pth must not lose it to the damaged last.pth.
            keep = PREVIOUS if name == LAST and self.last_intact else None
            save_checkpoint(self.output / name, {**self._state(), **tensors}, keep)
            self.last_intact = self.last_intact or name == LAST

    def _state(self) -> dict[str, Any]:
        """The entries of a checkpoint other than tensors."""
        return {
            "kind": self.kind,
            "config": to_dict(self.config),
            **self.class_state(),
            "images_per_step": self.sampler.images,
            **vars(self.progress),
        }

    def _restore(self, path: Path) -> dict[str, Any]:
        """Loads weights and progress from a checkpoint; returns it.

        Raises CheckpointError if it is of another model, other classes, data or images per step.
        """
        state, classes = load_checkpoint(path, kind=self.kind), self.class_state()
        # The logged values of a step are the loss, its parts and the norm of the gradients.
        check_training_state(state, classes, len(self.losses) + 2, path)
        self.changes = check_resumable(state["config"], self.config, self.fixed_keys, path)
        for name, now in classes.items():
            if state[name] != now:
                raise CheckpointError(f"{path}: {name} were {state[name]}, are now {now}; resuming needs the same")
        # Earlier versions did not save the number of images.
        images = state.get("images_per_step", self.sampler.images)
        if images != self.sampler.images:
            raise CheckpointError(
                f"{path}: a step took {images} images, it is now {self._describe_step()}; "
                "resuming needs the same number"
            )
        load_weights(self.model, state["state_dict"], path)
        if self.ema is not None:
            load_weights(self.ema.module, state.get("state_dict_ema", state["state_dict"]), path)
        self.progress = progress = Progress.from_state(state, self.steps_per_epoch)
        if progress.step != progress.epoch * self.steps_per_epoch + progress.step_in_epoch:
            raise CheckpointError(
                f"{path}: is of step {progress.step}, epoch {progress.epoch}, but an epoch of this data has "
                f"{self.steps_per_epoch} steps; resuming needs the same number of images"
            )
        return state

    def _shard(self) -> nn.Module:
        if self.distributed.world_size == 1:
            raise ConfigError("train.fsdp is true, but there is only one process, should be several: see torchrun")
        shard(self.model, self.device)
        if self.ema is not None:
            shard(self.ema.module, self.device)
            # Buffers are not sharded, and torch's foreach functions do not take both kinds in one call.
            self.ema.foreach = False
        return self.model

    def report(self) -> dict[str, Any]:
        """Writes metrics.json, images and report.html of the best epoch on the main process; returns the metrics."""
        progress, results = self.progress, self.output / self.results_file
        if not self.distributed.main or not results.is_file():
            return {}
        metrics = self.load_metrics(results) | {
            "epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "steps": progress.step,
            "seconds": round(progress.seconds, 1),
            "images_per_second": round(progress.images_per_second(self.sampler.images), 2),
            "memory_gib": round(peak_memory(self.device), 3),
        }
        write_json(self.output / "metrics.json", metrics)
        task = "detect" if self.kind == "detection" else "classify"
        with errors_as_warnings(self.logger.warning, f"dat {task} report {self.output}"):
            text = "\n".join(filter(None, [self._describe_run(), self._stopped_early()]))
            for path in self.write_report(metrics, text):
                tag = path.relative_to(self.output).with_suffix("").as_posix()
                self.logger.figure(tag, path, progress.step)
        table = self.format_metrics(metrics)
        self.logger.info(f"best epoch {progress.best_epoch}\n{table}\nresults are in {self.output}")
        return metrics

    def _log_steps(self) -> None:
        """One line of the log: the means over the steps since the last one."""
        self._read_pending()
        progress, now = self.progress, time.perf_counter()
        (start, first), self._clock = self._clock, (now, progress.step)
        progress.train_seconds += now - start
        self.logger.log(
            "train",
            progress.step,
            epoch=progress.step / self.steps_per_epoch,
            **dict(zip(("loss", *self.losses, "grad_norm"), progress.take_means(), strict=True)),
            lr=self._current_lr(),
            images_per_second=(progress.step - first) * self.sampler.images / (now - start),
            eta_seconds=progress.seconds_left(self.total_steps),
            memory_gib=peak_memory(self.device),
        )

    def _current_lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _status(self) -> str:
        """The text at the end of the progress bar."""
        loss = f"loss {self.latest[0]:.3f}, " if self.latest else ""
        left = format_seconds(self.progress.seconds_left(self.total_steps)) if self.progress.train_seconds else "?"
        return f"{loss}lr {self._current_lr():.1e}, {peak_memory(self.device):.1f} GiB, run ends in {left}"

    def _describe(self) -> str:
        progress, lines = self.progress, [self._describe_run(), self.describe_classes()]
        if self.resume is not None:
            lines.append(f"resumed from {self.resume}: step {progress.step}, epoch {progress.epoch + 1}/{self.epochs}")
            lines += [f"changed since: {text}" for text in self.changes]
        if progress.closed >= self.total_steps:
            key = "steps" if self.config.train.steps else "least_steps" if self._is_raised() else "epochs"
            lines.append(f"nothing left to train; raise train.{key} to go on")
        return "\n".join(filter(None, lines))

    def _describe_run(self) -> str:
        train, parameters = self.config.train, sum(p.numel() for p in self.model.parameters()) / 1e6
        scaled = f", {train.lr:.3g} for {train.lr_batch_size} images" if train.lr_batch_size else ""
        model = self.config.model
        why = f" (train.least_steps; {train.epochs} epochs would be fewer)" if self._is_raised() else ""
        start = "" if self.resume or starts_from_weights(model) else " from random weights"
        return (
            f"{model.backbone['name']}{start}, {parameters:.2f} M parameters, {self.device}: "
            f"{self.describe_data()}; {self.steps_per_epoch} steps an epoch, {self.total_steps} in all{why}\n"
            f"{self._describe_step('images a step ')}, learning rate {self.lr:.3g}{scaled}"
        )

    def _is_raised(self) -> bool:
        """Whether train.least_steps gives the length of the run."""
        epochs = self.config.train.epochs
        return bool(epochs) and epochs * self.steps_per_epoch < self.total_steps

    def _describe_step(self, unit: str = "") -> str:
        train, processes = self.config.train, self.distributed.world_size
        split = f"({train.batch_size} x {train.accumulate} accumulated x {processes} processes)"
        return f"{self.sampler.images} {unit}{split}"


def _checkpoint_gradients(model: Any) -> None:
    try:
        model.set_grad_checkpointing()
    # timm's models raise an AssertionError or lack the method.
    except (AssertionError, AttributeError) as error:
        name = type(model).__name__
        raise ConfigError(f"train.grad_checkpointing=true is not supported by {name}; set it to false") from error
