"""Fully sharded training (FSDP2): each process keeps a share of the weights, gradients and optimizer state.

Checkpoints are the same as without: whole tensors, so that a run may go on either way.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dat.engine.checkpoint import load_optimizer, save_checkpoint, training_state
from dat.engine.distributed import Distributed
from dat.utils.errors import ConfigError
from dat.utils.finite import check_weights_finite

# parameters from which a module of a list is gathered on its own; smaller ones are gathered with the rest
LEAST = 100_000


def shard(model: nn.Module, device: torch.device) -> None:
    """Replaces the parameters, the same on every process, by shares of them.

    The blocks or layers of the model (modules of its lists and sequences) are gathered one by one when they run.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in list(_units(model)):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrap_model(model: nn.Module, ema: ModelEmaV3 | None, distributed: Distributed, fsdp: bool) -> nn.Module:
    """The model as it is trained: a copy on each process or, with `fsdp`, shared among them, as its average then is.

    To be called before the optimizer is made, with whole weights in both. Raises ConfigError.
    """
    if not fsdp:
        return distributed.wrap(model)
    if distributed.world_size == 1:
        raise ConfigError("train.fsdp is true, but there is only one process, should be several: see torchrun")
    shard(model, distributed.device)
    if ema is not None:
        shard(ema.module, distributed.device)
        # buffers stay whole, and torch does not take both in one call
        ema.foreach = False
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called for a model."""
    return isinstance(model, FSDPModule)


def whole(value: Any) -> Any:
    """A copy of nested dictionaries and lists with whole tensors in place of shares; every process has to call it.

    Such tensors are moved to the CPU, one by one.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, whole(item)) for key, item in value.items())
    return [whole(item) for item in value] if isinstance(value, list) else value


def whole_model(model: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The model, or a whole copy, made by `build`, of one that is shared.

    Processes can run it alone, as often as their share of the data needs; every process has to call this.
    """
    if not is_sharded(model):
        return model
    copy = build()
    copy.load_state_dict(whole(model.state_dict()))
    return copy.to(device)


def save_state(
    path: Path,
    state: dict[str, Any],
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer | None,
    distributed: Distributed,
    where: str,
) -> None:
    """Writes `state` and the tensors of training_state, on the main process; every process has to call it.

    Raises NonFiniteError, which says `where`, rather than replace a good checkpoint by NaN, and CheckpointError.
    """
    # shares are gathered by all processes
    if not distributed.main and not is_sharded(model):
        return
    tensors = whole(training_state(model, ema, optimizer))
    if not distributed.main:
        return
    check_weights_finite(tensors["state_dict"], tensors.get("state_dict_ema"), where)
    save_checkpoint(path, {**state, **tensors})


def restore_optimizer(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, path: str | Path
) -> None:
    """load_optimizer for a model that may be shared; every process has to call it."""
    if is_sharded(model) and "optimizer" in state:
        state = {**state, "optimizer": share_optimizer_state(state["optimizer"], optimizer)}
    load_optimizer(optimizer, state, path)


def share_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state of whole tensors as that of a sharded model; every process has to call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # a state of another model is left to load_state_dict, which says so
    shared = {
        index: {key: _share(item, parameters[index]) for key, item in values.items()}
        for index, values in state["state"].items()
        if index < len(parameters)
    }
    return {**state, "state": shared}


def _share(value: Any, parameter: Tensor) -> Any:
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in lists and sequences that are large enough."""
    for child in module.children():
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(child, nn.ModuleList)
        if listed and sum(parameter.numel() for parameter in child.parameters()) >= LEAST:
            yield child
        else:
            yield from _units(child)
