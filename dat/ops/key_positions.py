"""Positions of DAT's keys, from the convolution of the offset network on.

On a GPU it is one kernel, and two for gradients. In PyTorch these are some 25 small ones, which take the host longer
than the GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops._common import differentiable, fits_kernels, has_triton, is_traced, second_derivatives
from dat.ops._library import LIBRARY
from dat.ops.placement import Placement

# Kernels of Triton only: other devices, and whatever traces, take PyTorch. Compilers write such kernels themselves.
LIBRARY.define(
    "key_positions(Tensor x, Tensor conv_bias, Tensor norm_weight, Tensor norm_bias, Tensor proj, float eps, "
    "float offset_range_factor, str release) -> (Tensor, Tensor)"
)
# The gradients by the parameters are five rows of one tensor.
LIBRARY.define(
    "key_positions_backward(Tensor grad_positions, Tensor grad_locations, Tensor x, Tensor conv_bias, "
    "Tensor norm_weight, Tensor norm_bias, Tensor proj, float eps, float offset_range_factor, str release) "
    "-> (Tensor, Tensor)"
)
DEVICE = "cuda"


def has_key_positions(
    x: Tensor, conv_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, proj: Tensor, groups: int
) -> bool:
    """Whether `key_positions` takes these, with a map of as many channels as x: on a GPU, eager, of its dtypes."""
    parameters = conv_bias, norm_weight, norm_bias, proj
    return (
        fits_kernels(x, *parameters)
        and x.device.type == DEVICE
        and not is_traced((x, *parameters))
        and x.numel() > 0
        and conv_bias.shape == norm_weight.shape == norm_bias.shape == (x.shape[-1] // groups,)
        and proj.shape == (2, *conv_bias.shape)
        and all(parameter.device == x.device for parameter in parameters)
        and has_triton()
    )


def key_positions(
    x: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    *,
    eps: float,
    placement: Placement,
) -> tuple[Tensor, Tensor]:
    """`placement` of the offsets linear(gelu(layer_norm(x + conv_bias))), where `has_key_positions`.

    Args:
        x: [B, Hk, Wk, g, c], the convolution of g groups of c channels without its bias; float32, bfloat16 or
            float16.
        conv_bias, norm_weight, norm_bias: [c], float32.
        proj: [2, c], the weight of the linear layer that predicts (y, x); float32.
        eps: added to the norm's variance.
        placement: how offsets move keys.

    Returns:
        positions [B, g, Hk*Wk, 2], (x, y) in -1..1, and locations [B, Hk*Wk, g, 1, 1, 2], the same in 0..1 as
        `deform_sample` takes them; float32, from sums in float32. Differentiable any number of times, in reverse mode;
        sums are taken in the same order every time.
    """
    numbers = float(eps), float(placement.offset_range_factor), placement.release
    return _place(x.contiguous(), conv_bias, norm_weight, norm_bias, proj, *numbers)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.factor, ctx.release = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # Gradients of these gradients are wanted.
        placement = Placement(ctx.factor, ctx.release)

        def place(x: Tensor, conv_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, proj: Tensor) -> Any:
            x = F.layer_norm(x.float() + conv_bias, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
            return placement(F.linear(F.gelu(x), proj))

        return *second_derivatives(place, ctx.saved_tensors, grads), None, None, None
    grad_x, rows = torch.ops.dat.key_positions_backward.default(
        *grads, *ctx.saved_tensors, ctx.eps, ctx.factor, ctx.release
    )
    return grad_x, *rows[:3], rows[3:], None, None, None


_place = differentiable("key_positions", _setup_context, _autograd)


@torch.library.impl(LIBRARY, "key_positions", "CUDA")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from dat.ops import key_positions_triton

    *tensors, eps, factor, release = args
    with torch.cuda.device_of(tensors[0]):
        return key_positions_triton.forward(tensors, eps, Placement(factor, release))


@torch.library.impl(LIBRARY, "key_positions_backward", "CUDA")
def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    from dat.ops import key_positions_triton

    *tensors, eps, factor, release = args
    with torch.cuda.device_of(tensors[0]):
        return key_positions_triton.backward(tensors[:2], tensors[2:], eps, Placement(factor, release))
