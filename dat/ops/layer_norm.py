"""Layer normalisation on a GPU, of a sum if wanted, in the dtype that is wanted: one kernel, and two for gradients.

torch's kernels give a block of threads to each row of channels, which few channels leave idle, and under autocast their
results are cast in a launch of their own, as are their gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops._common import differentiable, fits_kernels, is_traced, second_derivatives
from dat.ops._library import LIBRARY

# CUDA kernels only: other devices, and whatever traces, take torch's. Compilers write such kernels themselves.
LIBRARY.define(
    "layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, float eps, "
    "ScalarType? branch, bool with_weight) -> (Tensor, Tensor, Tensor, Tensor)"
)
DEVICE = "cuda"
# `dat.ops` has loaded the libraries before anybody imports this module.
BUILT = torch._C._dispatch_has_kernel_for_dispatch_key("dat::layer_norm", "CUDA")
MOST_CHANNELS = 512


def has_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `layer_norm` takes this call: on a GPU, eager, of its kernels' shapes and dtypes."""
    return (
        weight is not None
        and bias is not None
        and fits_kernels(x, weight, bias)
        and x.device.type == DEVICE
        and BUILT
        and not is_traced((x, weight, bias))
        and weight.shape == x.shape[-1:]
        and weight.shape[0] % 4 == 0
        and 0 < weight.shape[0] <= MOST_CHANNELS
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """F.layer_norm over the last dimension, where `has_layer_norm`.

    Args:
        x: [..., C], C a multiple of 4 up to 512; float32, bfloat16 or float16.
        weight, bias: [C], float32.
        eps: added to the variance.
        dtype: of the result: float32 or, for float32 `x`, also bfloat16 or float16.

    Returns:
        [..., C] in `dtype`, rounded once, from sums in float32. Differentiable any number of times, in reverse mode;
        sums are taken in the same order every time.
    """
    return _norm(x.contiguous(), None, weight, bias, eps, dtype)[0]


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + branch and its `layer_norm`, where x is float32, and `dtype` float32 or that of the branch."""
    normed, total = _norm(x.contiguous(), branch.contiguous(), weight, bias, eps, dtype)
    return total, normed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, weight, bias, ctx.eps, ctx.dtype = inputs
    ctx.branch = None if branch is None else branch.dtype
    ctx.set_materialize_grads(False)
    if branch is None:
        ctx.mark_non_differentiable(output[1])
    # In the place of two parts their sum, whose gradient is theirs.
    ctx.save_for_backward(x if branch is None else output[1], weight, bias)


def _autograd(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grads: Any = (None, None)
    grad_branch = None
    if grad is None:
        # Nobody uses the norm.
        grad_x: Any = grad_sum
    elif torch.is_grad_enabled():
        # Gradients of these gradients are wanted.
        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
            return (F.layer_norm(x.float(), weight.shape, weight, bias, ctx.eps).to(ctx.dtype),)

        grad_x, *grads = second_derivatives(norm, (x, weight, bias), (grad,))
        grad_x = grad_x if grad_sum is None else grad_x + grad_sum
    else:
        # A branch in the dtype of the sum has the sum's gradient itself.
        other = ctx.branch if ctx.branch != x.dtype else None
        with_weight = any(ctx.needs_input_grad[2:4])
        grad_x, grad_branch, *found = torch.ops.dat.layer_norm_backward.default(
            grad, grad_sum, x, weight, ctx.eps, other, with_weight
        )
        grads = found if with_weight else grads
        grad_branch = None if other is None else grad_branch
    if grad_branch is None and ctx.branch is not None and grad_x is not None:
        grad_branch = grad_x.to(ctx.branch)
    return grad_x, grad_branch, *grads, None, None


_norm = differentiable("layer_norm", _setup_context, _autograd)
