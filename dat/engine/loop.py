"""Parts of a training loop: seeds, order of samples, timm models, loaders, commands.

Every random number of a run is a function of the seed and of counters (epoch, step, sample), never of what happened
before. That makes a resumed run equal to an uninterrupted one, whatever the number of workers.
"""

import atexit
import ctypes
import difflib
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import Sampler

from dat.engine.peers import current_watch
from dat.utils.errors import ConfigError, UserError, brief


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

    An optimizer step takes `batch_size` samples for each of its `accumulate` batches and each process. Which samples it
    takes depends on the product of the three alone. Whole steps only; a data set smaller than one step gives one that
    repeats samples. Every process gets the same number of batches.

    Args:
        length: samples of the data set.
        batch_size: samples of a batch of one process.
        seed: of the run.
        rank, world_size: this process and their number.
        accumulate: batches of a step, of one process.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, accumulate: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch, self.first_step = 0, 0

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from those of `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def images(self) -> int:
        """Samples of a step, over all its batches and processes."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return max(1, self.length // self.images)

    def __len__(self) -> int:
        """Batches, of one process, that the next iteration gives."""
        return max(0, self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        epoch = self.epoch
        order = order.repeat(-(-self.images // self.length))[: self.steps * self.images]
        batches = order.view(self.steps, self.accumulate, self.world_size, self.batch_size)
        for batch in batches[self.first_step :, :, self.rank].flatten(0, 1):
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
        reason = brief(error)
        raise ConfigError(f"{key}: timm cannot make {name!r} with {rest}: {reason}") from error


def amp_context(device: torch.device, amp: str) -> torch.autocast:
    """Autocast to bfloat16 when amp is "bf16"; does nothing when it is "none". bfloat16 needs no loss scaler."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == "bf16")


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

    Any other exception is a defect of the program and keeps its traceback. Under torchrun the other processes are told
    and end with this error too; a process that fails because another one did says what that one said.
    """
    try:
        main()
    except (UserError, OSError) as error:
        if os.environ.get("DAT_TRACEBACK"):
            traceback.print_exc()
        _fail(f"error: {one_line(error)}", 1, tell=one_line(error))
    except KeyboardInterrupt:
        _fail("interrupted; train.resume=true goes on from the last checkpoint", 130, tell="interrupted")
    except Exception as error:
        watch = current_watch()
        if watch is None:
            raise
        reason = watch.reason()
        if reason is not None:
            _fail(f"error: {reason}", 1)
        _fail(traceback.format_exc(), 1, tell=f"{type(error).__name__}: {one_line(error)}")
    finally:
        # also where a command ends by sys.exit
        watch = current_watch()
        if watch is not None:
            watch.done()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _fail(message: str, code: int, tell: str = "") -> NoReturn:
    """Prints a message and ends with an exit code; the other processes, if there are any, are told the error."""
    print(message, file=sys.stderr)
    watch = current_watch()
    if watch is None:
        sys.exit(code)
    watch.failed(tell)
    sys.stdout.flush()
    sys.stderr.flush()
    # taking down a process group in which others have failed may never return
    os._exit(code)


def one_line(error: BaseException) -> str:
    """What main_guard says of an error, without line breaks and not longer than a person reads."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error).strip()
    # a loader's worker passes its error on as the text of a whole traceback
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:1000]} ..."
