"""A map plus its 3x3 depth-wise convolution in one CUDA kernel, and in three its gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops._common import differentiable, fits_kernels, is_traced, second_derivatives
from dat.ops._library import LIBRARY
from dat.ops.sizes import is_exporting

# CUDA kernels only: other devices, and whatever traces except torch.compile, take torch's convolution.
LIBRARY.define("residual_depthwise(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
LIBRARY.define(
    "residual_depthwise_backward(Tensor grad, Tensor x, Tensor weight, bool with_weight) -> (Tensor, Tensor, Tensor)"
)
DEVICE = "cuda"
# `dat.ops` has loaded the libraries before anybody imports this module.
BUILT = torch._C._dispatch_has_kernel_for_dispatch_key("dat::residual_depthwise", "CUDA")


def has_residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `residual_depthwise` takes this call: on a GPU, eager or compiled, of its kernels' shapes and dtypes."""
    return (
        x.device.type == DEVICE
        and BUILT
        and (_is_compiled() or not is_traced((x, weight, bias)))
        and fits_kernels(x, weight, bias)
        and weight.shape[0] % 4 == 0
        and weight.shape[1:] == (1, 3, 3)
    )


def _is_compiled() -> bool:
    """Whether torch.compile traces, without torch.func inside; exported graphs are to run without this package."""
    return torch.compiler.is_compiling() and not is_exporting() and not torch._C._are_functorch_transforms_active()


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
    return _convolve(x.contiguous(), weight, bias)


@torch.library.register_fake("dat::residual_depthwise", lib=LIBRARY)
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dat::residual_depthwise_backward", lib=LIBRARY)
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, with_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (weight.shape, weight.shape[0]) if with_weight else (0, 0)
    return x.new_empty(x.shape), weight.new_empty(sizes[0]), weight.new_empty(sizes[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        # Gradients of these gradients are wanted.
        return tuple(second_derivatives(_formula, (x, weight, bias), (grad,)))
    with_weight = any(ctx.needs_input_grad[1:])
    grad_x, *grads = torch.ops.dat.residual_depthwise_backward.default(grad, x, weight, with_weight)
    if not with_weight:
        return grad_x, None, None
    return grad_x, grads[0], None if bias is None else grads[1]


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    """`residual_depthwise` in torch's own operators."""
    wide = x.permute(0, 3, 1, 2).float()
    wide = wide + F.conv2d(wide, weight, bias, padding=1, groups=weight.shape[0])
    return (wide.permute(0, 2, 3, 1).to(x.dtype),)


_convolve = differentiable("residual_depthwise", _setup_context, _autograd)
