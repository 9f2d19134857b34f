"""Parts of a training loop: seeds, order of samples, optimizer groups, schedule, EMA, processes, commands.

Every random number of a run is a function of the seed and of counters (epoch, step, sample), never of what happened
before. That makes a resumed run equal to an uninterrupted one, whatever the number of workers.
"""

import atexit
import ctypes
import difflib
import fnmatch
import multiprocessing
import os
import random
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.utils.data import Sampler

from dat.training.errors import ConfigError, UserError
from dat.training.finite import check_finite


def seed_everything(seed: int, *counters: int) -> None:
    """Seeds torch, CUDA, numpy and Python from a seed and counters, such as the step and the process."""
    torch.manual_seed(_seed_host(seed, *counters))


@contextmanager
def isolated_rng(seed: int, *counters: int) -> Iterator[None]:
    """Seeds the CPU generators inside the block and puts them back after it: for the augmentation of one sample."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # not torch.manual_seed: that would reach the CUDA generators too
    torch.random.default_generator.manual_seed(_seed_host(seed, *counters))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def derive_seed(seed: int, *counters: int) -> int:
    """A seed in 0 .. 2**63 - 1 for one purpose among many of the same run, such as the order of one epoch."""
    # the count: numpy pads with zeros, so that (seed, 5) and (seed, 5, 0) would be the same
    sequence = np.random.SeedSequence([seed, len(counters), *counters])
    return int(sequence.generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))


def _seed_host(seed: int, *counters: int) -> int:
    derived = derive_seed(seed, *counters)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    return derived


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), shuffled by (seed, epoch) alone and dealt to the processes.

    Whole batches only; a data set smaller than one batch gives one batch that repeats samples. Every process gets the
    same number of batches.

    Args:
        length: samples of the data set.
        batch_size: samples of a batch of one process.
        seed: of the run.
        rank, world_size: this process and their number.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.first_batch = 0, 0

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch

    @property
    def batches(self) -> int:
        """Batches of a whole epoch, of one process."""
        return max(1, self.length // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return max(0, self.batches - self.first_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        epoch, size = self.epoch, self.batch_size * self.world_size
        order = order.repeat(-(-size // self.length))[: self.batches * size]
        for batch in order.view(self.batches, self.world_size, self.batch_size)[self.first_batch :, self.rank]:
            yield [(epoch, index) for index in batch.tolist()]


def create_timm_model(arguments: dict[str, Any], key: str = "model.backbone", **fixed: Any) -> nn.Module:
    """timm.create_model(**arguments, **fixed) with errors that name the configuration's key.

    Args:
        arguments: {"name": any timm model, ...} and that model's arguments, as the configuration has them.
        key: of these arguments in the configuration.
        fixed: arguments that the caller decides, such as num_classes or features_only.
    Raises:
        ConfigError: no such model, or arguments that it does not take.
    """
    rest = dict(arguments)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{key}.name is {name!r}, should be the name of a timm model, such as 'dat_tiny'")
    clash = sorted(set(rest) & set(fixed))
    if clash:
        raise ConfigError(f"{key}.{clash[0]} is set by this command, should be left out")
    plain = name.split(".")[0]
    if ":" not in name and not timm.is_model(plain):
        near = difflib.get_close_matches(plain, timm.list_models(), n=1)
        raise ConfigError(f"{key}.name: no timm model {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return timm.create_model(name, **rest, **fixed)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{key}: timm cannot make {name!r} with {rest}: {reason}") from error


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, multipliers: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups by learning rate factor and weight decay.

    Biases, one-dimensional parameters and those that a (sub)module's no_weight_decay() names are not decayed.

    Args:
        model: its parameters that require gradients are grouped.
        lr: base learning rate.
        weight_decay: of the other parameters.
        multipliers: {regular expression: factor on the learning rate}; the first that is found in a name counts.
    Raises:
        ConfigError: an expression matches no parameter.
    """
    multipliers = multipliers or {}
    patterns = [
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for pattern in module.no_weight_decay()
    ]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        match = next((pattern for pattern in multipliers if re.search(pattern, name)), None)
        used.add(match)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch.fnmatch(name, p) for p in patterns)
        scale = 1.0 if match is None else multipliers[match]
        groups.setdefault((scale, 0.0 if plain else weight_decay), []).append(parameter)
    for pattern in multipliers:
        if pattern not in used:
            raise ConfigError(f"learning rate multiplier {pattern!r} matches no parameter that is trained")
    return [
        {"params": parameters, "lr": lr, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    kind: str = "cosine",
    decay_steps: Sequence[int] = (),
    decay_rate: float = 0.1,
    min_lr: float = 0.0,
) -> Scheduler:
    """Schedule in optimizer steps, without state: call scheduler.step_update(finished steps) before each step.

    Args:
        optimizer: its groups' "lr_scale" multiplies their rate.
        total_steps: steps of the whole run.
        warmup_steps: linear from 0 (excluded) to the base rate; counted in total_steps.
        kind: "cosine" down to min_lr, or "step": x decay_rate after each of decay_steps steps.
    """
    warmup_steps = min(warmup_steps, total_steps)
    base = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    # the first step already moves: a rate of 0 would waste it
    warmup = {"warmup_t": warmup_steps, "warmup_lr_init": base / (warmup_steps + 1), "warmup_prefix": False}
    if kind == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total_steps, lr_min=min_lr, t_in_epochs=False, **warmup)
    if kind != "step":
        raise ConfigError(f"schedule is {kind!r}, should be 'cosine' or 'step'")
    # timm applies a milestone one count early
    milestones = [step + 1 for step in sorted(decay_steps)]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=decay_rate, t_in_epochs=False, **warmup)


def amp_context(device: torch.device, amp: str) -> torch.autocast:
    """Autocast to bfloat16 when amp is "bf16"; does nothing when it is "none". bfloat16 needs no loss scaler."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """Moving average of the weights, timm's, with its decay warmed up so that short runs use it too; None at decay 0.

    Call ema.update(model, step=finished steps) after each step.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True) if decay > 0 else None


def clip_gradients(model: nn.Module, limit: float, where: str) -> Tensor:
    """Clips the total norm of the gradients to `limit` (0: not at all); returns the norm before clipping.

    Raises:
        NonFiniteError: names the first gradient that holds NaN or infinity; the weights are untouched.
    """
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([gradient for _, gradient in gradients])
    if not torch.isfinite(norm):
        check_finite(((f"the gradient of {name}", gradient) for name, gradient in gradients), where)
        check_finite([("the norm of the gradients", norm)], where)
    if limit > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


@dataclass(frozen=True)
class Distributed:
    """Where this process stands among those that torchrun started."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits for every process."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, under DistributedDataParallel when there are several processes."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def setup_distributed(device: str = "auto") -> Distributed:
    """Reads torchrun's environment, if any, and picks the device: "auto" or "" is a GPU if there is one, else the CPU.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    if device in ("auto", ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device.split(":")[0] not in allowed:
        raise ConfigError(f"train.device is {device!r}, should be auto or, on this machine, {' or '.join(allowed)}")
    found = init_distributed_device_so(device)
    return Distributed(found["global_rank"], found["world_size"], torch.device(found["device"]))


def prepare_output(output: str | Path, resume: bool, distributed: Distributed) -> Path | None:
    """Checks the folder of a run, without making it, and returns the checkpoint to go on from, None when there is none.

    The main process decides for all.

    Raises:
        ConfigError: the folder holds another run's checkpoint and resume is false, it is a file, or a process does not
            find the checkpoint that the main process found.
    """
    decision: list[Any] = [None]
    if distributed.main:
        try:
            decision = [_find_last(output, resume)]
        # raised on every process: the others would wait for this one
        except ConfigError as error:
            decision = [error]
    if distributed.world_size > 1:
        torch.distributed.broadcast_object_list(decision, device=distributed.device)
    (last,) = decision
    if isinstance(last, ConfigError):
        raise last
    lacking = last is not None and not last.exists()
    if distributed.sum(torch.tensor(int(lacking), device=distributed.device)):
        raise ConfigError(f"output: not every machine has {last}; it should be in a folder that they share")
    return last


def _find_last(output: str | Path, resume: bool) -> Path | None:
    if not str(output):
        raise ConfigError("output is empty, should be the folder of this run")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file, should be a folder")
    last = output / "last.pth"
    if last.exists() and not resume:
        raise ConfigError(f"output: {output} holds a run; go on with train.resume=true, or choose another folder")
    return last if last.exists() else None


class StopSignal:
    """Whether SIGTERM came: a question to ask at each step boundary, instead of a sudden death."""

    def __init__(self) -> None:
        self.received = False

    def requested(self, distributed: Distributed) -> bool:
        """Whether any process was asked to stop; every process gets the same answer."""
        if distributed.world_size == 1:
            return self.received
        return bool(distributed.sum(torch.tensor(int(self.received), device=distributed.device)))

    @staticmethod
    def exit() -> None:
        """Ends the command with SIGTERM's exit code, 143, and one line."""
        print("stopped by SIGTERM; go on with train.resume=true", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """Inside the block SIGTERM only sets the signal: `if stop.requested(distributed): save; stop.exit()`."""
    stop = StopSignal()

    def receive(number: int, frame: object) -> None:
        stop.received = True

    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def loader_options(workers: int, pin: bool) -> dict[str, Any]:
    """Arguments of every DataLoader: workers live on between epochs and leave SIGTERM to the main process.

    SIGTERM to the process group would otherwise end the workers before the main process could save. They end when the
    main process does, however it ends.

    Args:
        workers: processes that read samples, 0: the main process does.
        pin: whether batches go to a GPU.
    """
    if workers == 0:
        return {"num_workers": 0, "pin_memory": pin}
    leave_sigterm = partial(_ignore_sigterm, _exit_flag())
    return {
        "num_workers": workers, "pin_memory": pin, "persistent_workers": True, "worker_init_fn": leave_sigterm,
    }  # fmt: skip


@cache
def _exit_flag() -> Any:
    """Memory that workers share, whose .value becomes True when this process begins to exit."""
    flag = multiprocessing.RawValue(ctypes.c_bool, False)
    # runs before multiprocessing's own handler, which sends the workers SIGTERM and waits for them
    atexit.register(setattr, flag, "value", True)
    return flag


def _ignore_sigterm(exiting: Any, worker: int) -> None:
    def receive(number: int, frame: object) -> None:
        if exiting.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, receive)


def main_guard(main: Callable[[], None]) -> None:
    """Runs a command: UserError and OSError become one line and exit code 1, Ctrl-C exit code 130.

    Any other exception is a defect of the program and keeps its traceback.
    """
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        if os.environ.get("DAT_TRACEBACK"):
            traceback.print_exc()
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; train.resume=true goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error).strip()
    # a loader's worker passes its error on as the text of a whole traceback
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())
