"""Deformable sampling: bilinear samples of feature levels at learned locations, and their weighted sums."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dat.ops import reference
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
    "deform_sample(Tensor value, Tensor locations, Tensor? weights, SymInt[] shapes, bool align_corners) -> Tensor"
)
LIBRARY.define(
    "deform_sample_backward(Tensor grad, Tensor value, Tensor locations, Tensor? weights, SymInt[] shapes, "
    "bool align_corners, bool deterministic) -> (Tensor, Tensor, Tensor)"
)


def deform_sample(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor | None = None, *, align_corners: bool = False
) -> Tensor:
    """Bilinear samples of L feature levels at given locations, summed with weights (Deformable DETR, equation 3).

    Args:
        value: [B, S, H, D]: L levels flattened row by row and laid end to end, H heads (or groups) of D channels;
            float32, float64, bfloat16 or float16. Under autocast float32 values are cast to its dtype.
        shapes: ((h_0, w_0), ..., (h_{L-1}, w_{L-1})), ints, S = sum of h_l * w_l.
        locations: [B, Q, H, L, P, 2], (x, y), 0 to 1 across the level; float32 or float64. The pixel coordinate is
            location * size - 0.5, or location * (size - 1) with align_corners. Outside the map is zero; NaN and
            infinite locations sample zero and get zero gradient.
        weights: [B, Q, H, L, P], any floating dtype, or None.
        align_corners: whether 0 and 1 are the centres of the first and last pixels, or their outer edges.

    Returns:
        The weighted sum over levels and points [B, Q, H, D] or, where weights is None, every sample [B, Q, H, L, P, D],
        in the dtype of `value`. Sums are taken in float32 (float64 for float64 values). Differentiable in value,
        locations and weights, any number of times, in reverse mode. NaN and infinity in values and weights reach only
        what is made of the samples that read them, where infinity may come out as NaN; samples outside count for
        nothing and get zero gradients, whatever their weight.

    Raises:
        TypeError: a dtype that is not supported; locations in half precision.
        NotImplementedError: forward-mode differentiation.
        ValueError: shapes or devices that do not fit together. Messages name the argument.
    """
    shapes = untraced(shapes)
    check_value(value, shapes)
    check_samples(value, shapes, locations, weights)
    refuse_forward_mode("deform_sample", value, locations, weights)
    value = autocast(value)
    # Kernels see locations and weights in the dtype of their sums.
    dtype = sum_dtype(value)
    weights = None if weights is None else cast(weights, dtype)
    return _sample(value, cast(locations, dtype), weights, flatten(shapes), align_corners)


def check_samples(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor | None) -> None:
    """Raise TypeError or ValueError unless locations and weights fit value and shapes."""
    B, _, H, _ = value.shape
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(f"locations must be [B, Q, H, L, P, 2], got shape {tuple(locations.shape)}")
    if locations.shape[0] != B or locations.shape[2] != H or locations.shape[3] != len(shapes):
        raise ValueError(
            f"locations must be [{B}, Q, {H}, {len(shapes)}, P, 2] to fit value and shapes, "
            f"got {tuple(locations.shape)}"
        )
    if locations.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"locations must be float32 or float64 (half precision moves samples by up to 0.06 pixel), "
            f"got {locations.dtype}"
        )
    check_device(value, locations, "locations")
    if weights is not None:
        if weights.shape != locations.shape[:-1]:
            raise ValueError(
                f"weights must be {tuple(locations.shape[:-1])} to fit locations, got {tuple(weights.shape)}"
            )
        if not weights.is_floating_point():
            raise TypeError(f"weights must be floating point, got {weights.dtype}")
        check_device(value, weights, "weights")


@torch.library.impl(LIBRARY, "deform_sample", "CompositeExplicitAutograd")
def _forward(
    value: Tensor, locations: Tensor, weights: Tensor | None, shapes: list[int], align_corners: bool
) -> Tensor:
    return reference.deform_sample(value, pairs(shapes), locations, weights, align_corners=align_corners)


@torch.library.impl(LIBRARY, "deform_sample_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor | None,
    shapes: list[int],
    align_corners: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.deform_sample_backward(grad, value, pairs(shapes), locations, weights, align_corners=align_corners)


@torch.library.register_fake("dat::deform_sample", lib=LIBRARY)
def _fake_forward(
    value: Tensor, locations: Tensor, weights: Tensor | None, shapes: list[int], align_corners: bool
) -> Tensor:
    samples = locations.shape[:3] if weights is not None else locations.shape[:5]
    return value.new_empty(*samples, value.shape[3])


@torch.library.register_fake("dat::deform_sample_backward", lib=LIBRARY)
def _fake_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weights = locations.new_empty(0 if weights is None else weights.shape)
    return value.new_empty(value.shape), locations.new_empty(locations.shape), grad_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, ctx.shapes, ctx.align_corners = inputs
    ctx.save_for_backward(value, locations, weights)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _sample_backward(
        grad,
        value,
        locations,
        weights,
        ctx.shapes,
        ctx.align_corners,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_value, grad_locations, None if weights is None else grad_weights, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.shapes, ctx.align_corners, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    def backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
        return reference.deform_sample_backward(
            grad, value, pairs(ctx.shapes), locations, weights, align_corners=ctx.align_corners
        )

    return *second_derivatives(backward, ctx.saved_tensors, cotangents), None, None, None


_sample = differentiable("deform_sample", _setup_context, _autograd)
_sample_backward = differentiable("deform_sample_backward", _setup_second, _second_autograd)
register_batching("deform_sample", dims=(0,) * 3, outputs=(0,))
register_batching("deform_sample_backward", dims=(0,) * 4, outputs=(1, 2, 3))


@register_flop_formula(torch.ops.dat.deform_sample)
def _flops(value: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return sampling_flops(locations[:-1], value)


@register_flop_formula(torch.ops.dat.deform_sample_backward)
def _backward_flops(grad: Any, value: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * sampling_flops(locations[:-1], value)
