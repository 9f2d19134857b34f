"""Finds the first tensor that is not finite."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dat.utils.errors import NonFiniteError


def check_finite(named: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises NonFiniteError naming the first tensor of `named` that holds NaN or infinity.

    Args:
        named: (name, tensor) pairs in the order of their computation; integer tensors always pass.
        where: beginning of the message, such as "step 120, images [7, 9]".
    """
    for name, tensor in named:
        if not torch.isfinite(tensor).all():
            nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
            raise NonFiniteError(
                f"{where}: first non-finite tensor is {name} {tuple(tensor.shape)}: "
                f"{nan} NaN and {inf} infinite of {tensor.numel()} values"
            )


def trace_non_finite(model: nn.Module, forward: Callable[[], Any], where: str) -> None:
    """Runs `forward` and raises NonFiniteError for the first parameter, or else module output, that is not finite.

    Too slow for every step: call it after a loss or gradient was not finite. `model` and `forward` must not use
    DistributedDataParallel, which would wait for the other processes.
    """
    check_finite(model.named_parameters(), f"{where}, parameters")

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: check_finite(_tensors(f"output of {name}", output), where)

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    check_finite(_tensors("the result", result), where)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)
