"""Deformable sampling: bilinear samples of feature levels at learned locations, and their weighted sums."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dat.ops import reference
from dat.ops._library import LIBRARY

Shapes = Sequence[tuple[int, int]]

LIBRARY.define(
    "deform_sample(Tensor value, Tensor locations, Tensor? weights, SymInt[] shapes, bool align_corners) -> Tensor"
)
LIBRARY.define(
    "deform_sample_backward(Tensor grad, Tensor value, Tensor locations, Tensor? weights, SymInt[] shapes, "
    "bool align_corners) -> (Tensor, Tensor, Tensor)"
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
        locations and weights, twice.

    Raises:
        TypeError: a dtype that is not supported; locations in half precision.
        ValueError: shapes or devices that do not fit together. Messages name the argument.
    """
    shapes = _check(value, shapes, locations, weights)
    device = value.device.type
    # The meta device has no autocast, and torch refuses to say that it is off.
    if value.dtype == torch.float32 and device != "meta" and torch.is_autocast_enabled(device):
        value = value.to(torch.get_autocast_dtype(device))
    # Kernels see locations and weights in the dtype of their sums.
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    weights = None if weights is None else weights.to(dtype)
    flat = [size for shape in shapes for size in shape]
    return torch.ops.dat.deform_sample(value, locations.to(dtype), weights, flat, align_corners)


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor | None) -> Shapes:
    if value.ndim != 4:
        raise ValueError(f"value must be [B, S, H, D], got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"value must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if isinstance(shapes, Tensor):
        raise TypeError("shapes must be ((h_0, w_0), ...) of ints, got a tensor (use shapes.tolist())")
    if not shapes or not all(isinstance(shape, Sequence) and _is_size(shape) for shape in shapes):
        raise ValueError(f"shapes must be ((h_0, w_0), ...) of non-negative ints, got {shapes}")
    B, S, H, _ = value.shape
    if sum(h * w for h, w in shapes) != S:
        raise ValueError(f"shapes {tuple(map(tuple, shapes))} must have as many cells as value has rows, S = {S}")
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
    if locations.device != value.device:
        raise ValueError(f"locations must be on the device of value, {value.device}, got {locations.device}")
    if weights is not None:
        if weights.shape != locations.shape[:-1]:
            raise ValueError(
                f"weights must be {tuple(locations.shape[:-1])} to fit locations, got {tuple(weights.shape)}"
            )
        if not weights.is_floating_point():
            raise TypeError(f"weights must be floating point, got {weights.dtype}")
        if weights.device != value.device:
            raise ValueError(f"weights must be on the device of value, {value.device}, got {weights.device}")
    return shapes


def _is_size(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and all(isinstance(size, (int, torch.SymInt)) and size >= 0 for size in shape)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@torch.library.impl(LIBRARY, "deform_sample", "CompositeExplicitAutograd")
def _forward(
    value: Tensor, locations: Tensor, weights: Tensor | None, shapes: list[int], align_corners: bool
) -> Tensor:
    return reference.deform_sample(value, _pairs(shapes), locations, weights, align_corners=align_corners)


@torch.library.impl(LIBRARY, "deform_sample_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor | None, shapes: list[int], align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.deform_sample_backward(
        grad, value, _pairs(shapes), locations, weights, align_corners=align_corners
    )


@torch.library.register_fake("dat::deform_sample", lib=LIBRARY)
def _fake_forward(
    value: Tensor, locations: Tensor, weights: Tensor | None, shapes: list[int], align_corners: bool
) -> Tensor:
    samples = locations.shape[:3] if weights is not None else locations.shape[:5]
    return value.new_empty(*samples, value.shape[3])


@torch.library.register_fake("dat::deform_sample_backward", lib=LIBRARY)
def _fake_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor | None, shapes: list[int], align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    by_weights = locations.new_empty(0 if weights is None else weights.shape)
    return value.new_empty(value.shape), locations.new_empty(locations.shape), by_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, ctx.shapes, ctx.align_corners = inputs
    ctx.save_for_backward(value, locations, weights)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    # The CUDA kernel adds by atomics, in any order; the reference's scatter_add is deterministic when asked to be.
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    backward = _backward if strict and value.is_cuda else torch.ops.dat.deform_sample_backward
    by_value, by_locations, by_weights = backward(grad, value, locations, weights, ctx.shapes, ctx.align_corners)
    return by_value, by_locations, None if weights is None else by_weights, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, value, locations, weights, ctx.shapes, ctx.align_corners = inputs
    ctx.save_for_backward(grad, value, locations, weights)


def _second_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, rarely needed and so not fast: torch differentiates the reference's backward."""
    higher = torch.is_grad_enabled()

    def input_of(tensor: Tensor) -> Tensor:
        # A view stands for the tensor alone, without the others that it may have been computed from or into.
        return tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        grad, value, locations = (input_of(t) for t in ctx.saved_tensors[:3])
        weights = None if ctx.saved_tensors[3] is None else input_of(ctx.saved_tensors[3])
        firsts = reference.deform_sample_backward(
            grad, value, _pairs(ctx.shapes), locations, weights, align_corners=ctx.align_corners
        )
        used = [(first, g) for first, g in zip(firsts, cotangents, strict=True) if first.requires_grad]
        present = [t for t in (grad, value, locations, weights) if t is not None]
        seconds = torch.autograd.grad(
            [first for first, _ in used],
            present,
            [g for _, g in used],
            create_graph=higher,
            allow_unused=True,
            materialize_grads=True,
        )
    return *seconds, *(() if weights is not None else (None,)), None, None


torch.library.register_autograd("dat::deform_sample", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "dat::deform_sample_backward", _second_autograd, setup_context=_setup_second, lib=LIBRARY
)


@torch.library.register_vmap("dat::deform_sample", lib=LIBRARY)
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    value: Tensor,
    locations: Tensor,
    weights: Tensor | None,
    shapes: list[int],
    align_corners: bool,
) -> tuple[Tensor, int]:
    def merge(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        moved = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
        return moved.flatten(0, 1)

    merged = (merge(tensor, dim) for tensor, dim in zip((value, locations, weights), in_dims, strict=False))
    out = torch.ops.dat.deform_sample(*merged, shapes, align_corners)
    return out.unflatten(0, (info.batch_size, -1)), 0


@register_flop_formula(torch.ops.dat.deform_sample)
def _flops(value: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Four multiply-adds for each sample and channel."""
    B, Q, H, L, P, _ = locations
    return 8 * B * Q * H * L * P * value[3]


@register_flop_formula(torch.ops.dat.deform_sample_backward)
def _backward_flops(grad: Any, value: Any, locations: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Four multiply-adds for the value's gradient and four for the corners' products with the output's gradient."""
    return 2 * _flops(value, locations, weights)
