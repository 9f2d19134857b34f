"""Casts of parameters under autocast, for all layers of a block at once.

Autocast casts every weight and every bias by itself, and every gradient back: in a training step of a small model on a
GPU a quarter of all launches.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dat.ops._common import autocast_dtype, is_traced

# What autocast casts of each type of layer. Subclasses (parametrized, adapted, quantized) have ways of their own. So do
# convolutions in groups, which use their weights in float32: to repeat them, or in kernels of our own.
CAST = {
    nn.Linear: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias"),
    nn.modules.linear.NonDynamicallyQuantizableLinear: ("weight", "bias"),
}


class _Cast(torch.autograd.Function):
    """Copies of tensors in another dtype, in one launch for all; likewise their gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = _copies(tensors, dtype)
        # Frozen parameters stay so: nobody is to work out their gradients.
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(copy for copy, wants in zip(copies, wanted, strict=True) if not wants))
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = tuple(grad for grad in grads if grad is not None)
        # The copies of a list at once have no derivatives of their own.
        copies = iter([grad.float() for grad in used] if torch.is_grad_enabled() else _copies(used, torch.float32))
        return None, *(None if grad is None else next(copies) for grad in grads)


def _copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


def casts_parameters_together(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's `forward`, of a tensor and more, that finds the weights and biases of its layers in autocast's dtype.

    They are what autocast would make of them, to the bit, and so are the gradients. While `forward` runs, the layers
    hold the copies. Threads that share a model for prediction must not see them come and go: prediction casts together
    only in a process of one thread.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        alone = torch.is_grad_enabled() or threading.active_count() == 1
        # The order matters to torch.fx, whose tensors have no device.
        if is_traced((x,)) or not alone or not torch.is_autocast_cache_enabled():
            return forward(self, x, *args, **kwargs)
        dtype = autocast_dtype(x)
        parameters = _parameters_to_cast(self, x.device) if dtype else []
        if not parameters:
            return forward(self, x, *args, **kwargs)
        copies = _Cast.apply(dtype, *(parameter for _, _, parameter in parameters))
        for (layer, name, _), copy in zip(parameters, copies, strict=True):
            layer._parameters[name] = copy
        try:
            return forward(self, x, *args, **kwargs)
        finally:
            for layer, name, parameter in parameters:
                layer._parameters[name] = parameter

    return wrapped


def _parameters_to_cast(module: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Layers with the names and values of their parameters on `device` that autocast casts."""
    found: list[tuple[nn.Module, str, nn.Parameter]] = []
    # Several times as fast as `modules()`, which counts here: this runs for every block in every step.
    layers: list[nn.Module | None] = [module]
    for layer in layers:
        if layer is None:
            continue
        layers.extend(layer._modules.values())
        names = CAST.get(type(layer), ())
        if names and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            for name in names:
                parameter = layer._parameters.get(name)
                # The types of sharded ones are their own.
                if type(parameter) is nn.Parameter and parameter.dtype == torch.float32 and parameter.device == device:
                    found.append((layer, name, parameter))
    return found
