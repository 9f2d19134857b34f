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

# The parameters that autocast casts, by the type of layer. Subclasses are left out, as they may use their parameters in
# another way (parametrized, adapted, quantized). So are convolutions in groups, whose weights are used in float32: they
# are repeated, or read by our own kernels.
CAST = {
    nn.Linear: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias"),
    nn.modules.linear.NonDynamicallyQuantizableLinear: ("weight", "bias"),
}

# Where the classes of modules are defined whose layers are looked for. Blocks are not among them: each casts its own
# parameters, that DistributedDataParallel can reduce their gradients while those of other blocks are worked out.
OWN = ("dat.layers.", "torch.nn.", "timm.layers.", "timm.models._features", "timm.models.resnet")


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
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies


def casts_parameters_together(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's `forward`, of a tensor and more, that finds the weights and biases of its layers in autocast's dtype.

    They are what autocast would make of them, to the bit, and so are the gradients, except that those of parameters
    which are used twice are summed in float32. While `forward` runs, the layers hold the copies. Threads that share a
    model for prediction must not see them come and go: prediction casts together only in a process of one thread. No
    other thread may save the model meanwhile.
    """

    @functools.wraps(forward)
    def wrapped(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # First, as compilers trace no threads and tensors of torch.fx have no device.
        if is_traced((x,)):
            return forward(self, x, *args, **kwargs)
        if not torch.is_grad_enabled() and threading.active_count() > 1:
            return forward(self, x, *args, **kwargs)
        dtype = autocast_dtype(x)
        parameters = _parameters_to_cast(self, x.device) if dtype else []
        if not parameters:
            return forward(self, x, *args, **kwargs)
        copies = _Cast.apply(dtype, *(parameter for _, _, parameter in parameters))
        try:
            for (layer, name, _), copy in zip(parameters, copies, strict=True):
                layer._parameters[name] = copy
            return forward(self, x, *args, **kwargs)
        finally:
            for layer, name, parameter in parameters:
                layer._parameters[name] = parameter

    return wrapped


def calls_forward_only(module: nn.Module) -> bool:
    """Whether a call of the module is one of its class's `forward` and nothing else, as hooks would be."""
    return (
        "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def _parameters_to_cast(module: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Layers with the names and values of their parameters on `device` that autocast casts."""
    found: list[tuple[nn.Module, str, nn.Parameter]] = []
    # Several times as fast as `modules()`, which counts here: this runs in every step.
    layers = [module]
    for layer in layers:
        layers.extend(part for part in layer._modules.values() if part is not None and is_ours(part))
        names = CAST.get(type(layer), ())
        if names and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            for name in names:
                parameter = layer._parameters.get(name)
                if (
                    parameter is not None
                    and parameter.dtype == torch.float32
                    and parameter.device == device
                    and _is_plain(parameter)
                ):
                    found.append((layer, name, parameter))
    return found


def is_ours(part: nn.Module) -> bool:
    """Whether we know what a call of the part does.

    Others may turn autocast off, keep the weights' addresses or need their input in float32.
    """
    return type(part).__module__.startswith(OWN) and part._compiled_call_impl is None and calls_forward_only(part)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether nobody else has to do with a parameter: sharded ones have a type or attributes of their own."""
    return (
        type(parameter) is nn.Parameter
        and not parameter.__dict__
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )
