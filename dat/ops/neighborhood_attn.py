"""Neighbourhood attention with relative position bias, the local attention of DAT++."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from dat.ops import reference
from dat.ops._common import (
    autocast,
    cast,
    check_device,
    differentiable,
    full_precision,
    has_triton,
    refuse_forward_mode,
    register_batching,
    run_triton,
    second_derivatives,
    sum_dtype,
    untraced,
)
from dat.ops._library import LIBRARY
from dat.ops.sizes import is_exporting, sym_max

LIBRARY.define(
    "neighborhood_attn(Tensor query, Tensor key, Tensor value, Tensor? bias, SymInt height, SymInt width, "
    "int kernel_size, int dilation, float scale) -> Tensor"
)
LIBRARY.define(
    "neighborhood_attn_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, SymInt height, "
    "SymInt width, int kernel_size, int dilation, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)


def neighborhood_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    size: tuple[int, int],
    kernel_size: int,
    scale: float,
    dilation: int = 1,
) -> Tensor:
    """Attention of every pixel of a map to the kernel_size x kernel_size pixels around it.

    Neighborhood Attention Transformer (https://arxiv.org/abs/2204.07143, equations 2 and 3) as NATTEN 0.14 computes it:
    at a border the window is moved inwards, so that every pixel has as many neighbours. With a dilation, the pixels
    whose rows and columns have the same remainders by it are a map of their own (https://arxiv.org/abs/2209.15001).

    Args:
        query, key, value: [B, h, H*W, c] of a map of `size`, row by row; float32, float64, bfloat16 or float16. Under
            autocast float32 is cast to its dtype.
        bias: [h, 2*kernel_size-1, 2*kernel_size-1], any floating dtype: the bias of the score of a neighbour that
            is (dy, dx) * dilation pixels away, at [kernel_size-1+dy, kernel_size-1+dx]. None: nothing.
        size: (H, W). A side shorter than kernel_size * dilation is filled up, below and to the right, with pixels of
            zero query, key and value; they are attended to, and not returned.
        kernel_size: odd side of the windows, in pixels.
        scale: factor of the products of queries and keys.
        dilation: pixels from a neighbour to the next.

    Returns:
        [B, h, H*W, c] in the dtype of `query`. Sums are taken in float32 (float64 for float64); on a GPU the products
        of float32 take TF32 where torch allows it for matrix products. Differentiable in every tensor, any number of
        times, in reverse mode. NaN and infinity in a pixel of `query`, or of the output's gradient, reach that query
        alone, in a pixel of `key` or `value` the queries whose windows hold it, and the gradients of pixels that share
        a window with one of these queries; which channels of a pixel depends on the device. In the gradient of the bias
        they may reach all of a head. A bias of minus infinity is no attention.

    Raises:
        TypeError: a dtype that is not supported, or different dtypes.
        NotImplementedError: forward-mode differentiation.
        ValueError: shapes, sizes or devices that do not fit together. Messages name the argument.
    """
    ((H, W),) = untraced((size,))
    refuse_forward_mode("neighborhood_attn", query, key, value, bias)
    query, key, value = autocast(query), autocast(key), autocast(value)
    _check(query, key, value, bias, (H, W), kernel_size, dilation)
    bias = None if bias is None else cast(bias, sum_dtype(query))
    padded_H, padded_W = (sym_max(length, kernel_size * dilation) for length in (H, W))
    down, right = padded_H - H, padded_W - W
    if down or right:
        query, key, value = (_pad(tensor, (H, W), down, right) for tensor in (query, key, value))
    # An exported graph serves maps of every size.
    if not is_exporting() and (padded_H, padded_W, dilation) == (kernel_size, kernel_size, 1):
        with full_precision(query):
            out = _one_window(query, key, value, bias, kernel_size, scale)
    else:
        out = _attend(query, key, value, bias, padded_H, padded_W, kernel_size, dilation, scale)
    if down or right:
        out = out.unflatten(2, (padded_H, padded_W))[:, :, :H, :W].flatten(2, 3)
    return out


def _pad(tensor: Tensor, size: tuple[int, int], down: int, right: int) -> Tensor:
    return F.pad(tensor.unflatten(2, size), (0, 0, 0, right, 0, down)).flatten(2, 3)


def _one_window(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kernel_size: int, scale: float
) -> Tensor:
    """Attention in a map as large as a window: two matrix products are faster than a kernel for windows."""
    wide_query, wide_key, wide_value = (tensor.to(sum_dtype(tensor)) for tensor in (query, key, value))
    scores = wide_query @ wide_key.mT * scale
    if bias is not None:
        _, displacement = reference.neighbors((kernel_size, kernel_size), kernel_size, 1, bias.device)
        scores = scores + bias.flatten(1)[:, displacement]
    return (scores.softmax(-1) @ wide_value).to(query.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    kernel_size: int,
    dilation: int,
) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"query must be float32, float64, bfloat16 or float16, got {query.dtype}")
    if query.ndim != 4 or query.shape[2] != size[0] * size[1]:
        raise ValueError(f"query must be [B, h, {size[0] * size[1]}, c] for size {size}, got {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must be {tuple(query.shape)} as query is, got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} as query is, got {tensor.dtype}")
    h, side = query.shape[1], 2 * kernel_size - 1
    if bias is not None and bias.shape != (h, side, side):
        raise ValueError(
            f"bias must be [{h}, {side}, {side}] for kernel_size {kernel_size} and the heads of query, "
            f"got {tuple(bias.shape)}"
        )
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    for name, other in (("key", key), ("value", value), ("bias", bias)):
        if other is not None:
            check_device(query, other, name, "query")


def _options(height: int, width: int, kernel_size: int, dilation: int, scale: float) -> dict[str, Any]:
    """The ops' numbers as keyword arguments of the reference."""
    return {"size": (height, width), "kernel_size": kernel_size, "dilation": dilation, "scale": scale}


def _heads_last(tensor: Tensor) -> Tensor:
    """A new tensor of the shape [B, h, N, c] of `tensor` that lies in memory as [B, N, h, c]."""
    B, h, N, c = tensor.shape
    return tensor.new_empty(B, N, h, c).transpose(1, 2)


@torch.library.impl(LIBRARY, "neighborhood_attn", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *numbers: Any) -> Tensor:
    with full_precision(query):
        out = reference.neighborhood_attn(query, key, value, bias, **_options(*numbers))
    return _heads_last(query).copy_(out)


@torch.library.impl(LIBRARY, "neighborhood_attn_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *numbers: Any
) -> tuple[Tensor, ...]:
    with full_precision(query):
        *firsts, grad_bias = reference.neighborhood_attn_backward(grad, query, key, value, bias, **_options(*numbers))
    return *(_heads_last(query).copy_(first) for first in firsts), grad_bias


def _has_triton_kernels(query: Tensor, biased: bool, kernel_size: int) -> bool:
    """Whether the kernels for GPUs take such a query.

    All channels of a tile are in the 99 KiB of shared memory that any GPU since Ampere has, and so are the bias's
    gradients by a block of windows up to 25 pixels wide.
    """
    bytes_per_pixel = query.shape[3] * query.element_size()
    fits = bytes_per_pixel <= (256 if kernel_size <= 9 else 128) and (kernel_size <= 25 or not biased)
    return fits and query.dtype != torch.float64 and has_triton()


@torch.library.impl(LIBRARY, "neighborhood_attn", "CUDA")
def _cuda_forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *numbers: Any) -> Tensor:
    if not _has_triton_kernels(query, bias is not None, numbers[2]):
        return _forward(query, key, value, bias, *numbers)
    from dat.ops import neighborhood_attn_triton

    return run_triton(neighborhood_attn_triton.forward, _forward, query, query, key, value, bias, *numbers)


@torch.library.impl(LIBRARY, "neighborhood_attn_backward", "CUDA")
def _cuda_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *numbers: Any
) -> tuple[Tensor, ...]:
    if not _has_triton_kernels(query, bias is not None, numbers[2]):
        return _backward(grad, query, key, value, bias, *numbers)
    from dat.ops import neighborhood_attn_triton

    # Their sums are always taken in the same order, so there is no deterministic mode to ask for.
    return run_triton(neighborhood_attn_triton.backward, _backward, query, grad, query, key, value, bias, *numbers)


@torch.library.register_fake("dat::neighborhood_attn", lib=LIBRARY)
def _fake_forward(query: Tensor, *args: Any) -> Tensor:
    return _heads_last(query)


@torch.library.register_fake("dat::neighborhood_attn_backward", lib=LIBRARY)
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    grad_bias = query.new_empty(0 if bias is None else bias.shape, dtype=sum_dtype(query))
    return _heads_last(query), _heads_last(key), _heads_last(value), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Under gradient checkpointing they can be had only once.
    tensors = ctx.saved_tensors
    *firsts, grad_bias = _attend_backward(grad, *tensors, *ctx.numbers)
    return *firsts, None if tensors[3] is None else grad_bias, *(None for _ in ctx.numbers)


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _second_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    def backward(*tensors: Any) -> tuple[Tensor, ...]:
        return reference.neighborhood_attn_backward(*tensors, **_options(*ctx.numbers))

    seconds = second_derivatives(backward, ctx.saved_tensors, cotangents)
    return *seconds, *(None for _ in ctx.numbers)


_attend = differentiable("neighborhood_attn", _setup_context, _autograd)
_attend_backward = differentiable("neighborhood_attn_backward", _setup_second, _second_autograd)
# The bias has no batch dimension, so batches are merged into the heads, which all tensors have.
register_batching("neighborhood_attn", dims=(1, 1, 1, 0), outputs=(0,))
register_batching("neighborhood_attn_backward", dims=(1, 1, 1, 1, 0), outputs=(1, 2, 3, 4))


def _product_flops(query: Any, kernel_size: int) -> int:
    """FLOPs of one product of queries and neighbours, two for each multiply-add."""
    B, h, pixels, c = query
    return 2 * B * h * pixels * kernel_size**2 * c


@register_flop_formula(torch.ops.dat.neighborhood_attn)
def _flops(
    query: Any, key: Any, value: Any, bias: Any, height: int, width: int, kernel_size: int, *args: Any, **kwargs: Any
) -> int:
    return 2 * _product_flops(query, kernel_size)


@register_flop_formula(torch.ops.dat.neighborhood_attn_backward)
def _backward_flops(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    height: int,
    width: int,
    kernel_size: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    # The scores once more, and the gradients of attention, query, key and value.
    return 5 * _product_flops(query, kernel_size)
