"""Multi-scale deformable attention of Deformable DETR: softmax, location arithmetic and sampling in one op."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dat.ops import reference as references
from dat.ops._common import (
    Shapes,
    autocast,
    cast,
    check_device,
    check_value,
    differentiable,
    flatten,
    pairs,
    refuse_forward_mode,
    register_batching,
    sampling_flops,
    second_derivatives,
    sum_dtype,
    untraced,
)
from dat.ops._library import LIBRARY

LIBRARY.define(
    "ms_deform_attn(Tensor value, Tensor reference, Tensor offsets, Tensor logits, SymInt[] shapes) -> Tensor"
)
LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad, Tensor value, Tensor reference, Tensor offsets, Tensor logits, "
    "SymInt[] shapes, bool with_reference, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)"
)


def ms_deform_attn(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Multi-scale deformable attention, from linear outputs to the weighted sum (Deformable DETR, equation 3).

    Args:
        value: [B, S, H, D], L levels flattened row by row and laid end to end; float32, float64, bfloat16 or float16.
            Under autocast float32 values are cast to its dtype.
        shapes: ((h_0, w_0), ..., (h_{L-1}, w_{L-1})), ints, S = sum of h_l * w_l.
        reference: [B, Q, L, 2] points (x, y) or [B, Q, L, 4] boxes (cx, cy, w, h), 0 to 1 across the level; float32 or
            float64.
        offsets: [B, Q, H, L, P, 2], in pixels of the level (points) or in w/(2P), h/(2P) (boxes); any floating dtype.
            Locations are worked out in float32 (float64 for float64 values) all the same.
        logits: [B, Q, H, L, P], turned into attention by a softmax over the L*P samples of a head; any floating dtype.

    Returns:
        [B, Q, H, D] in the dtype of `value`: `deform_sample` at the locations and with the attention that
        `dat.ops.reference.sampling_points` spells out. Differentiable in every tensor, any number of times, in reverse
        mode.

    Raises:
        TypeError: a dtype that is not supported; reference points in half precision.
        NotImplementedError: forward-mode differentiation.
        ValueError: shapes or devices that do not fit together. Messages name the argument.
    """
    shapes = untraced(shapes)
    check_value(value, shapes)
    _check(value, shapes, reference, offsets, logits)
    refuse_forward_mode("ms_deform_attn", value, reference, offsets, logits)
    value = autocast(value)
    dtype = sum_dtype(value)
    # Kernels read offsets and logits in the dtype of values or of sums.
    narrow = value.dtype if offsets.dtype == logits.dtype == value.dtype else dtype
    return _attend(value, cast(reference, dtype), cast(offsets, narrow), cast(logits, narrow), flatten(shapes))


def _check(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> None:
    B, _, H, _ = value.shape
    L = len(shapes)
    if reference.ndim != 4 or reference.shape[0] != B or reference.shape[2] != L or reference.shape[3] not in (2, 4):
        raise ValueError(
            f"reference must be [{B}, Q, {L}, 2 or 4] to fit value and shapes, got {tuple(reference.shape)}"
        )
    if reference.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"reference must be float32 or float64 (half precision moves samples by up to 0.06 pixel), "
            f"got {reference.dtype}"
        )
    Q = reference.shape[1]
    if offsets.ndim != 6 or offsets.shape[:4] != (B, Q, H, L) or offsets.shape[5] != 2:
        raise ValueError(
            f"offsets must be [{B}, {Q}, {H}, {L}, P, 2] to fit value, shapes and reference, got {tuple(offsets.shape)}"
        )
    if logits.shape != offsets.shape[:-1]:
        raise ValueError(f"logits must be {tuple(offsets.shape[:-1])} to fit offsets, got {tuple(logits.shape)}")
    for name, tensor in (("reference", reference), ("offsets", offsets), ("logits", logits)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        check_device(value, tensor, name)


@torch.library.impl(LIBRARY, "ms_deform_attn", "CompositeExplicitAutograd")
def _forward(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, shapes: list[int]) -> Tensor:
    return references.ms_deform_attn(value, pairs(shapes), reference, offsets, logits)


@torch.library.impl(LIBRARY, "ms_deform_attn_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    value: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    shapes: list[int],
    with_reference: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_value, grad_reference, grad_offsets, grad_logits = references.ms_deform_attn_backward(
        grad, value, pairs(shapes), reference, offsets, logits
    )
    return grad_value, grad_reference if with_reference else reference.new_empty(0), grad_offsets, grad_logits


@torch.library.register_fake("dat::ms_deform_attn", lib=LIBRARY)
def _fake_forward(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, shapes: list[int]) -> Tensor:
    return value.new_empty(*offsets.shape[:3], value.shape[3])


@torch.library.register_fake("dat::ms_deform_attn_backward", lib=LIBRARY)
def _fake_backward(
    grad: Tensor,
    value: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    shapes: list[int],
    with_reference: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_reference = reference.new_empty(reference.shape if with_reference else 0)
    grad_offsets, grad_logits = offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)
    return value.new_empty(value.shape), grad_reference, grad_offsets, grad_logits


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with_reference = ctx.needs_input_grad[1]
    grad_value, grad_reference, grad_offsets, grad_logits = _attend_backward(
        grad, *ctx.saved_tensors, ctx.shapes, with_reference, torch.are_deterministic_algorithms_enabled()
    )
    return grad_value, grad_reference if with_reference else None, grad_offsets, grad_logits, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.shapes, ctx.with_reference, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    def backward(grad: Tensor, value: Tensor, *points: Tensor) -> tuple[Tensor, ...]:
        grad_value, grad_reference, *others = references.ms_deform_attn_backward(
            grad, value, pairs(ctx.shapes), *points
        )
        return grad_value, grad_reference if ctx.with_reference else grad_reference.new_empty(0), *others

    return *second_derivatives(backward, ctx.saved_tensors, cotangents), None, None, None


_attend = differentiable("ms_deform_attn", _setup_context, _autograd)
_attend_backward = differentiable("ms_deform_attn_backward", _setup_second, _second_autograd)
register_batching("ms_deform_attn", dims=(0,) * 4, outputs=(0,))
register_batching("ms_deform_attn_backward", dims=(0,) * 5, outputs=(1, 2, 3, 4))


@register_flop_formula(torch.ops.dat.ms_deform_attn)
def _flops(value: Any, reference: Any, offsets: Any, logits: Any, *args: Any, **kwargs: Any) -> int:
    return sampling_flops(logits, value)


@register_flop_formula(torch.ops.dat.ms_deform_attn_backward)
def _backward_flops(grad: Any, value: Any, reference: Any, offsets: Any, logits: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * sampling_flops(logits, value)
