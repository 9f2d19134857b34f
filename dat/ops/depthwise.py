"""A map plus its 3x3 depth-wise convolution in one CUDA kernel, for eager calls: those spend their time on launches."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from dat.ops._common import autocast_dtype, is_traced, second_derivatives
from dat.ops._library import LIBRARY

# CUDA kernels only: whatever traces, and any other device, takes torch's convolution.
LIBRARY.define("residual_depthwise(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define("residual_depthwise_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)")
DEVICE = "cuda"
# `dat.ops` has loaded the libraries before anybody imports this module.
BUILT = torch._C._dispatch_has_kernel_for_dispatch_key("dat::residual_depthwise", "CUDA")


def has_residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `residual_depthwise` takes this call: an eager one on a GPU, of the shapes and dtypes of its kernels."""
    return (
        x.device.type == DEVICE
        and BUILT
        # Compilers trace none of what follows.
        and not is_traced((x, weight, bias))
        # Subclasses that only dispatch, as DTensor, have no mode and no __torch_function__ that would show them.
        and {type(x), type(weight)} <= {Tensor, torch.nn.Parameter}
        and forward_ad._current_level < 0
        # Without autocast, torch refuses a map in half precision with weights in float32.
        and x.dtype in (torch.float32, autocast_dtype(x))
        and weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and weight.shape[0] % 4 == 0
        and weight.shape[1:] == (1, 3, 3)
    )


def residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A map plus its 3x3 depth-wise convolution with padding 1, where `has_residual_depthwise`.

    Args:
        x: [B, H, W, C], C a multiple of 4; float32, bfloat16 or float16.
        weight: [C, 1, 3, 3], float32.
        bias: [C], float32, or None.

    Returns:
        [B, H, W, C] in the dtype of `x`, from sums in float32. Differentiable any number of times, in reverse mode;
        sums are taken in the same order every time.
    """
    return _ResidualDepthwise.apply(x.contiguous(), weight, bias)


class _ResidualDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dat.residual_depthwise.default(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Gradients of these gradients are wanted.
            return tuple(second_derivatives(_formula, (x, weight, bias), (grad,)))
        with torch._C._AutoDispatchBelowAutograd():
            grads = torch.ops.dat.residual_depthwise_backward.default(grad, x, weight)
        return *grads[:2], None if bias is None else grads[2]


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    """`residual_depthwise` in torch's own operators."""
    wide = x.permute(0, 3, 1, 2).float()
    wide = wide + F.conv2d(wide, weight, bias, padding=1, groups=weight.shape[0])
    return (wide.permute(0, 2, 3, 1).to(x.dtype),)
