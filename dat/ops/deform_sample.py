"""Deformable sampling: bilinear samples of feature levels at learned locations, and their weighted sums."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dat.ops import reference
from dat.ops._library import LIBRARY, refuse_forward_mode, register_batching, sampling_flops, second_derivatives

Shapes = Sequence[tuple[int, int]]

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
        align_corners: whether 0 and 1 are the centres of the first and last cells, or their outer edges.

    Returns:
        The weighted sum over levels and points [B, Q, H, D] or, where weights is None, every sample [B, Q, H, L, P, D],
        in the dtype of `value`. Sums are taken in float32 (float64 for float64 values). Differentiable in value,
        locations and weights, any number of times, in reverse mode. Infinite values and weights may come out as NaN
        where a sample reaches over the edge of the map; samples outside count for nothing whatever their weight.

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
    weights = None if weights is None else weights.to(dtype)
    return torch.ops.dat.deform_sample(value, locations.to(dtype), weights, flatten(shapes), align_corners)


def check_value(value: Tensor, shapes: Shapes) -> None:
    """Raise TypeError or ValueError unless `value` is [B, S, H, D] with the cells of `shapes`."""
    if value.ndim != 4:
        raise ValueError(f"value must be [B, S, H, D], got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"value must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if isinstance(shapes, Tensor):
        raise TypeError("shapes must be ((h_0, w_0), ...) of ints, got a tensor (use shapes.tolist())")
    if (
        not isinstance(shapes, Sequence)
        or not shapes
        or not all(isinstance(shape, Sequence) and _is_size(shape) for shape in shapes)
    ):
        raise ValueError(f"shapes must be ((h_0, w_0), ...) of non-negative ints, got {shapes}")
    S = value.shape[1]
    if sum(h * w for h, w in shapes) != S:
        raise ValueError(f"shapes {tuple(map(tuple, shapes))} must have as many cells as value has rows, S = {S}")


def _is_size(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and all(isinstance(size, (int, torch.SymInt)) and size >= 0 for size in shape)


def check_device(value: Tensor, tensor: Tensor, name: str) -> None:
    """Raise ValueError unless `tensor`, an argument called `name`, is on the device of `value`."""
    if tensor.device != value.device:
        raise ValueError(f"{name} must be on the device of value, {value.device}, got {tensor.device}")


def autocast(value: Tensor) -> Tensor:
    """`value`, where it is float32 and autocast is on, in autocast's dtype."""
    device = value.device.type
    # The meta device has no autocast, and torch refuses to say that it is off.
    if value.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        return value.to(torch.get_autocast_dtype(device))
    return value


def sum_dtype(value: Tensor) -> torch.dtype:
    """The dtype that kernels sum `value` in: float64 for float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


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


def untraced(shapes: Shapes) -> Shapes:
    """`shapes` of ints: while torch.jit.trace runs, sizes taken from a tensor's shape are tensors."""
    if torch.jit.is_tracing() and not isinstance(shapes, Tensor):
        return [(int(h), int(w)) for h, w in shapes]
    return shapes


def flatten(shapes: Shapes) -> list[int]:
    """(h_0, w_0, h_1, ...), as the ops' schemas take them."""
    return [size for shape in shapes for size in shape]


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """((h_0, w_0), ...) of `flatten`'s list."""
    return list(zip(flat[::2], flat[1::2], strict=True))


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
    by_weights = locations.new_empty(0 if weights is None else weights.shape)
    return value.new_empty(value.shape), locations.new_empty(locations.shape), by_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, ctx.shapes, ctx.align_corners = inputs
    ctx.save_for_backward(value, locations, weights)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    by_value, by_locations, by_weights = torch.ops.dat.deform_sample_backward(
        grad,
        value,
        locations,
        weights,
        ctx.shapes,
        ctx.align_corners,
        torch.are_deterministic_algorithms_enabled(),
    )
    return by_value, by_locations, None if weights is None else by_weights, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.shapes, ctx.align_corners, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    def backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
        return reference.deform_sample_backward(
            grad, value, pairs(ctx.shapes), locations, weights, align_corners=ctx.align_corners
        )

    return *second_derivatives(backward, ctx.saved_tensors, cotangents), None, None, None


torch.library.register_autograd("dat::deform_sample", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "dat::deform_sample_backward", _second_autograd, setup_context=_setup_second, lib=LIBRARY
)
register_batching("deform_sample", dims=(0,) * 3, outputs=(0,))
register_batching("deform_sample_backward", dims=(0,) * 4, outputs=(1, 2, 3))


@register_flop_formula(torch.ops.dat.deform_sample)
def _flops(value: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return sampling_flops(locations[:-1], value)


@register_flop_formula(torch.ops.dat.deform_sample_backward)
def _backward_flops(grad: Any, value: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * sampling_flops(locations[:-1], value)
