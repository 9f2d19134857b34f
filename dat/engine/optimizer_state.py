"""The state of an optimizer in a checkpoint: checked before and after it is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import NvNovoGrad
from torch import Tensor

from dat.engine.checkpoint import describe, is_finite, is_plain
from dat.utils.errors import CheckpointError, one_line

# State of torch's and timm's optimizers with the shape of the parameter.
MOMENTS = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var", "exp_avg_diff", "exp_inf",
    "momentum", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "grad_sum_sq", "sum", "last_grad",
    "neg_pre_grad",
)  # fmt: skip
# Numbers of steps, of a parameter or of a group (Lamb, Adan and Lookahead).
STEPS = ("step", "lookahead_step")
# Beginnings of names of state that is never negative: numbers of steps, means of squares and their factors.
NEVER_NEGATIVE = (
    *STEPS, "exp_avg_sq", "max_exp_avg", "exp_avg_var", "exp_inf", "square_avg", "acc_delta", "grad_sum_sq", "sum",
)  # fmt: skip


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    path: str | Path,
    shard: Callable[[dict[str, Any], torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> None:
    """Restores the optimizer from a checkpoint's `state`, which check_training_state took; `shard` splits its tensors.

    Raises:
        CheckpointError: it has no state of an optimizer, or one unlike it.
    """
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: has no optimizer state, as best.pth has none; resuming needs a last.pth")
    saved = state["optimizer"]
    # Before it is loaded, as loading casts.
    wrong = _find_unsound(saved)
    if wrong:
        raise CheckpointError(f"{path}: its optimizer state is unsound: {wrong}")
    groups = [{name: group[name] for name in group.keys() - {*STEPS}} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved if shard is None else shard(saved, optimizer))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its optimizer state does not fit this configuration: {one_line(error)}"
        ) from error
    wrong = _find_wrong(optimizer)
    if wrong:
        raise CheckpointError(f"{path}: its optimizer state does not fit this configuration: {wrong}")
    # Options are those of the configuration.
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group.update(new)


def _find_unsound(saved: dict[str, Any]) -> str:
    """The first value of an optimizer's saved state that no optimizer could have left."""
    states = saved["state"]
    layouts = {frozenset(values) for values in states.values()}
    # Names that are tensors for one parameter are so for all.
    tensors = {
        name
        for values in states.values()
        for name, value in values.items()
        if isinstance(value, (Tensor, list)) or (name in MOMENTS and (name, value) != ("momentum_buffer", None))
    }
    for number, values in states.items():
        # Muon and Adafactor have other values for matrices, but never only a part of the others'.
        lacking = next((names - values.keys() for names in layouts if values.keys() < names), None)
        if lacking:
            return f"{min(lacking)} of parameter {number} is missing, should be there as for others"
    places = [(f"parameter {number}", values) for number, values in states.items()]
    for number, group in enumerate(saved["param_groups"]):
        places.append((f"group {number}", {name: group[name] for name in STEPS if name in group}))
    for place, values in places:
        for name, value in values.items():
            wrong = _find_wrong_value(name, value, name in tensors)
            if wrong:
                return f"{name} of {place} is {describe(value)}{wrong}"
    return ""


def _find_wrong_value(name: str, value: Any, tensor: bool) -> str:
    """Describes what is wrong with a value of an optimizer's state; "" where it is sound.

    Args:
        name: its key, such as "exp_avg".
        value: as the checkpoint holds it.
        tensor: whether it should be a tensor.
    """
    if name == "Q" and isinstance(value, list):
        # Kron has several.
        return next(filter(None, (_find_wrong_value(name, part, True) for part in value)), "")
    if isinstance(value, Tensor):
        if not is_plain(value):
            return f" on {value.device} of {value.layout} and {value.dtype}, should be dense and real"
        if not value.isfinite().all():
            return " that holds NaN or infinity"
        if name in STEPS and value.numel() != 1:
            return ", should be one number"
    elif tensor:
        return ", should be a tensor"
    elif name in STEPS:
        return "" if is_finite(value) and value >= 0 else ", should be a number of at least 0"
    else:
        # Muon has a flag, SGD without momentum None.
        sound = isinstance(value, bool) or is_finite(value) or (name, value) == ("momentum_buffer", None)
        return "" if sound else ", should be a finite number"
    if name.startswith(NEVER_NEGATIVE) and (value < 0).any():
        return f" that holds {value.min():g}, should be 0 or more"
    return ""


def _find_wrong(optimizer: torch.optim.Optimizer) -> str:
    """The first entry that load_state_dict took but a step cannot use."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(optimizer.state.keys() & set(parameters)) < len(optimizer.state):
        return "it has a state of parameters that its groups lack"
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            # NovoGrad has one second moment for all numbers of a parameter.
            single = name == "exp_avg_sq" and isinstance(optimizer, NvNovoGrad)
            shape = () if single else tuple(parameter.shape)
            if name in MOMENTS and value is not None and tuple(value.shape) != shape:
                return f"{name} of parameter {number} is {describe(value)}, should be a tensor {shape}"
    return ""
