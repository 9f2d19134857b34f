"""The processes that torchrun started: where this one stands, how they agree, how they stop."""

import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn

from dat.engine.peers import start_watch
from dat.utils.errors import ConfigError

T = TypeVar("T")


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

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Inside it the backward passes of a wrapped model only add to the gradients of this process."""
        return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else nullcontext()


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, on each of them: anything that can be pickled."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def setup_distributed(device: str = "auto") -> Distributed:
    """Reads torchrun's environment, if any, and picks the device: "auto" or "" is a GPU if there is one, else the CPU.

    From here on, the failure of one process ends all.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    if device in ("auto", ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device.split(":")[0] not in allowed:
        raise ConfigError(f"train.device is {device!r}, should be auto or, on this machine, {' or '.join(allowed)}")
    found = init_distributed_device_so(device)
    distributed = Distributed(found["global_rank"], found["world_size"], torch.device(found["device"]))
    if distributed.world_size > 1:
        start_watch(distributed.rank, distributed.world_size, distributed.device)
    return distributed


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
    def exit(distributed: Distributed) -> None:
        """Ends the command with SIGTERM's exit code, 143, and one line.

        Processes end together: what started them may kill the others as soon as one has ended, while it still saves.
        """
        distributed.barrier()
        print("stopped by SIGTERM; go on with train.resume=true", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """Inside the block SIGTERM only sets the signal: `if stop.requested(distributed): save; stop.exit(distributed)`."""
    stop = StopSignal()

    def receive(number: int, frame: object) -> None:
        stop.received = True

    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
