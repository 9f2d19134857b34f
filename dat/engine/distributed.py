"""The processes that torchrun starts: rank and device, collectives, sharding (FSDP2) and stopping together.

Checkpoints hold whole tensors with and without FSDP, so that a run may be resumed either way.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dat.engine.checkpoint import latest_checkpoint
from dat.utils.errors import ConfigError, one_line
from dat.utils.files import check_folder

T = TypeVar("T")

# Blocks with at least this many parameters are gathered one by one when they run, smaller ones with the whole model.
SHARD_PARAMETERS = 100_000


@dataclass(frozen=True)
class Distributed:
    """Rank and device of this process, and the number of processes."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over the processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits for every process."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, under DistributedDataParallel if there are several processes."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which backward passes accumulate gradients without averaging over processes."""
        return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else nullcontext()


def setup_distributed(device: str | torch.device = "auto") -> Distributed:
    """Joins the process group of torchrun, if there is one, and picks the device; "auto" is cuda or else cpu.

    Further calls return the same process group.

    Raises:
        ConfigError: a device that this machine does not have, or a job of several processes that lacks its variables.
    """
    device = str(device)
    if device in ("auto", ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    allowed = [name for name, available in known.items() if available]
    if device.split(":")[0] not in allowed:
        raise ConfigError(f"train.device is {device!r}, should be auto or, on this machine, {' or '.join(allowed)}")
    if torch.distributed.is_initialized():
        # Detector.train sets up twice, but a process can join only one group.
        return Distributed(
            torch.distributed.get_rank(), torch.distributed.get_world_size(), _with_index(device.split(":")[0])
        )
    try:
        found = init_distributed_device_so(device)
    # SLURM gives the number of tasks, but no address.
    except ValueError as error:
        raise ConfigError(
            f"the environment (WORLD_SIZE or SLURM_NTASKS) asks for several processes, but {one_line(error)}; "
            "start them with torchrun, or as examples/slurm/train.sbatch does, or unset the variable"
        ) from error
    return Distributed(found["global_rank"], found["world_size"], _with_index(found["device"]))


def _with_index(device: str) -> torch.device:
    """The device; "cuda" is the current one from now on, whichever is current later or in another thread."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def gather(value: T) -> list[T]:
    """The values of all processes in the order of ranks, on each process: anything that can be pickled."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def prepare_output(output: str | Path, resume: bool, distributed: Distributed) -> Path | None:
    """Checks the folder of a run, without creating it; returns the checkpoint to resume from, None if there is none.

    The main process decides for all. The checkpoint is last.pth, or previous.pth if that is missing or damaged.

    Raises:
        ConfigError: the folder holds another run's checkpoint and resume is false, it is a file, or a process does not
            find the checkpoint that the main process found.
    """
    folder, found, error = Path(output), None, ""
    try:
        if not str(output):
            raise ConfigError("output is empty, should be the folder of this run")
        check_folder(folder, "output")
        found = latest_checkpoint(folder)
        if found is not None and not resume:
            raise ConfigError(f"output: {output} holds a run; go on with train.resume=true, or choose another folder")
    except ConfigError as failure:
        error = str(failure)
    # Every process raises the error of the main one, which would otherwise leave the others waiting.
    if distributed.world_size > 1:
        found, error = gather((found, error))[0]
    if error:
        raise ConfigError(error)
    if distributed.world_size > 1 and not all(gather(found is None or found.exists())):
        raise ConfigError(f"output: not every machine has {found}; it should be in a folder that all machines see")
    return found


def shard(model: nn.Module, device: torch.device) -> None:
    """Splits the parameters, equal on all processes, among them (FSDP2), one unit per large block or layer."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in list(_units(model)):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole_tensors(value: Any) -> Any:
    """A copy of nested dictionaries and lists with sharded tensors gathered to the CPU, called by every process."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, whole_tensors(item)) for key, item in value.items())
    return [whole_tensors(item) for item in value] if isinstance(value, list) else value


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Splits an optimizer's state of whole tensors as its parameters are split; every process has to call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def split(value: Any, parameter: Tensor) -> Any:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    # The state of another model is left to load_state_dict, which reports it.
    sharded = {
        index: {key: split(item, parameters[index]) for key, item in values.items()}
        for index, values in state["state"].items()
        if index < len(parameters)
    }
    return {**state, "state": sharded}


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost large modules in lists and sequences."""
    for child in module.children():
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(child, nn.ModuleList)
        if listed and sum(parameter.numel() for parameter in child.parameters()) >= SHARD_PARAMETERS:
            yield child
        else:
            yield from _units(child)


class StopSignal:
    """Whether SIGTERM arrived; a training run asks at each step and stops between two of them."""

    def __init__(self) -> None:
        self.received = False

    @staticmethod
    def exit(distributed: Distributed) -> None:
        """Ends the command with one line and SIGTERM's exit code, 143.

        Processes end together: torchrun may kill the others, which still save, as soon as one has ended.
        """
        distributed.barrier()
        print("stopped by SIGTERM; go on with train.resume=true", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """A context in which SIGTERM only sets the signal's `received`."""
    stop = StopSignal()
    # Python handles signals in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def receive(number: int, frame: object) -> None:
        stop.received = True

    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
