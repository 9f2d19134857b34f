"""Attention over deformed positions with DAT's continuous relative position bias."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

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
)
from dat.ops._library import LIBRARY

LIBRARY.define(
    "deform_attn(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor? table, SymInt[] size, float scale, "
    "bool align_corners) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "deform_attn_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor positions, Tensor? table, "
    "Tensor out, Tensor lse, SymInt[] size, float scale, bool align_corners) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def deform_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None = None,
    *,
    size: tuple[int, int],
    scale: float,
    align_corners: bool = True,
) -> Tensor:
    """DAT's attention (CVPR 2022, equations 4 and 5): softmax(scale * q k^T + bias) v.

    Neither scores nor displacements nor the bias are in memory, beyond a chunk of them in the backward pass.

    Args:
        query: [B, h, H*W, c], the queries of a map of `size`; float32, float64, bfloat16 or float16. Under autocast
            float32 queries, keys and values are cast to its dtype.
        key, value: [B, h, N, c], at N deformed positions, in the dtype of `query`.
        positions: [B, g, N, 2], (x, y) in -1..1, one set for each group of h/g heads; float32 or float64.
        table: [h, T_h, T_w], any floating dtype; the bias of (query q, key n) is its bilinear value, zero outside, at
            (grid(q) - positions[n]) / 2, where -1 and 1 are the centres of the table's corner entries. None: no bias.
        size: (H, W) of the query map.
        scale: factor of the scores.
        align_corners: grid(q) is i/(H-1)*2-1 (release 2023), else (i+.5)/H*2-1 (release 2022).

    Returns:
        [B, h, H*W, c] in the dtype of `query`; zeros where there are no keys. Bias and softmax are worked out in
        float32 (float64 for float64 queries); on a GPU the products of float32 take TF32 where torch allows it for
        matrix products. Differentiable in every tensor, any number of times, in reverse mode. NaN and infinity in the
        table reach only the queries of pairs that look them up. A bias of minus infinity is no attention, and NaN where
        a query has nothing else; it may be NaN too where the entry's weight is exactly zero. Gradients by the positions
        of such pairs may be NaN.

    Raises:
        TypeError: a dtype that is not supported; positions in half precision.
        NotImplementedError: forward-mode differentiation.
        ValueError: shapes or devices that do not fit together. Messages name the argument.
    """
    if torch.jit.is_tracing():
        # Sizes taken from a tensor's shape are tensors there.
        size = int(size[0]), int(size[1])
    _check_shapes(query, key, value, positions, table, size)
    query, key, value = autocast(query), autocast(key), autocast(value)
    _check_dtypes(query, key, value, positions, table)
    refuse_forward_mode("deform_attn", query, key, value, positions, table)
    # Kernels see positions and table in the dtype of their sums.
    dtype = sum_dtype(query)
    positions, table = cast(positions, dtype), None if table is None else cast(table, dtype)
    return _attend(query, key, value, positions, table, list(size), float(scale), align_corners)[0]


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor | None, size: tuple[int, int]
) -> None:
    if query.ndim != 4:
        raise ValueError(f"query must be [B, h, H*W, c], got {tuple(query.shape)}")
    B, h, queries, c = query.shape
    if queries != size[0] * size[1]:
        raise ValueError(
            f"query must have H*W = {size[0] * size[1]} entries for size {tuple(size)}, got {tuple(query.shape)}"
        )
    if key.ndim != 4 or key.shape[:2] != (B, h) or key.shape[-1] != c or value.shape != key.shape:
        raise ValueError(f"key and value must be [{B}, {h}, N, {c}], got {tuple(key.shape)} and {tuple(value.shape)}")
    N = key.shape[2]
    groups = positions.shape[1] if positions.ndim == 4 else 0
    if positions.shape != (B, groups, N, 2) or not groups or h % groups:
        raise ValueError(
            f"positions must be [{B}, g, {N}, 2] with g a divisor of {h} heads, got {tuple(positions.shape)}"
        )
    if table is not None and (table.ndim != 3 or table.shape[0] != h or not (table.shape[1] and table.shape[2])):
        raise ValueError(f"table must be [{h}, T_h, T_w] and not empty, got {tuple(table.shape)}")


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor | None) -> None:
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"query must be float32, float64, bfloat16 or float16, got {query.dtype}")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise TypeError(f"key and value must be {query.dtype} as query is, got {key.dtype} and {value.dtype}")
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"positions must be float32 or float64 (half precision moves keys by whole pixels), got {positions.dtype}"
        )
    for name, tensor in (("key", key), ("value", value), ("positions", positions), ("table", table)):
        if tensor is not None:
            if not tensor.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
            check_device(query, tensor, name, "query")


@torch.library.impl(LIBRARY, "deform_attn", "CompositeExplicitAutograd")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None,
    size: list[int],
    scale: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    H, W = size
    kwargs: Any = {"size": (H, W), "scale": scale, "align_corners": align_corners}
    with full_precision(query):
        out = reference.deform_attn(query, key, value, positions, table, **kwargs)
        return _laid_out(out, query), reference.deform_attn_lse(query, key, positions, table, **kwargs)


@torch.library.impl(LIBRARY, "deform_attn_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    size: list[int],
    scale: float,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    H, W = size
    with full_precision(query):
        grad_query, grad_key, grad_value, *others = reference.deform_attn_backward(
            grad, query, key, value, positions, table, size=(H, W), scale=scale, align_corners=align_corners
        )
    return _laid_out(grad_query, query), _laid_out(grad_key, key), _laid_out(grad_value, value), others[0], others[1]


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The same numbers, laid out in memory as `like`, as all results for queries, keys and values are."""
    if tensor.stride() == like.stride() or tensor.stride() == torch.empty_like(like, device="meta").stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def _has_kernels(query: Tensor, key: Tensor) -> bool:
    """Whether the Triton kernels take these: they sum in float32 and keep all channels of a tile on the chip."""
    return query.dtype != torch.float64 and query.shape[3] <= 128 and query.numel() * key.numel() > 0 and has_triton()


@torch.library.impl(LIBRARY, "deform_attn", "CUDA")
def _cuda_forward(query: Tensor, key: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if not _has_kernels(query, key):
        return _forward(query, key, *args)
    from dat.ops import deform_attn_triton

    out, lse = run_triton(deform_attn_triton.forward, _forward, query, query, key, *args)
    return _laid_out(out, query), lse


@torch.library.impl(LIBRARY, "deform_attn_backward", "CUDA")
def _cuda_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if not _has_kernels(query, key):
        return _backward(grad, query, key, value, *args)
    from dat.ops import deform_attn_triton

    # Their sums are always taken in the same order, so there is no deterministic mode to ask for.
    firsts = run_triton(deform_attn_triton.backward, _backward, query, grad, query, key, value, *args)
    return *(_laid_out(first, like) for first, like in zip(firsts, (query, key, value), strict=False)), *firsts[3:]


@torch.library.register_fake("dat::deform_attn", lib=LIBRARY)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), positions.new_empty(query.shape[:3])


@torch.library.register_fake("dat::deform_attn_backward", lib=LIBRARY)
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    grad_positions = positions.new_empty(0 if table is None else positions.shape)
    grad_table = positions.new_empty(0) if table is None else table.new_empty(table.shape)
    return *(torch.empty_like(tensor) for tensor in (query, key, value)), grad_positions, grad_table


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.size, ctx.scale, ctx.align_corners = inputs
    ctx.mark_non_differentiable(output[1])
    # Otherwise `lse` would get a gradient of zeros instead of None.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *tensors, out, lse = ctx.saved_tensors
    grad_query, grad_key, grad_value, grad_positions, grad_table = _attend_backward(
        grad, *tensors, out, lse, ctx.size, ctx.scale, ctx.align_corners
    )
    if tensors[4] is None:
        grad_positions = grad_table = None
    return grad_query, grad_key, grad_value, grad_positions, grad_table, None, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.size, ctx.scale, ctx.align_corners = inputs
    ctx.save_for_backward(*tensors)


def _second_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    H, W = ctx.size

    def backward(grad: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        return reference.deform_attn_backward(
            grad, *tensors, size=(H, W), scale=ctx.scale, align_corners=ctx.align_corners
        )

    # `out` and `lse` are functions of the other inputs, so their gradients are accounted for there.
    return *second_derivatives(backward, ctx.saved_tensors, cotangents), None, None, None, None, None


_attend = differentiable("deform_attn", _setup_context, _autograd)
_attend_backward = differentiable("deform_attn_backward", _setup_second, _second_autograd)
# The table has no batch dimension, so batches are merged into the heads, which all tensors have.
register_batching("deform_attn", dims=(1, 1, 1, 1, 0), outputs=(0, 0))
register_batching("deform_attn_backward", dims=(1, 1, 1, 1, 1, 0, 1, 1), outputs=(1, 2, 3, 4, 5))


@register_flop_formula(torch.ops.dat.deform_attn)
def _flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.dat.deform_attn_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
