"""Call signatures of other libraries' multi-scale deformable attention, on `dat.ops`.

`switch(model)` makes a model of transformers, of mmcv or of the official Deformable DETR repository and its copies use
this op. The official code runs without its CUDA extension where this module has the extension's name:

    sys.modules["MultiScaleDeformableAttention"] = dat.ops.compat

In all signatures `value` is [B, S, H, D], `sampling_locations` [B, Q, H, L, P, 2] and `attention_weights`
[B, Q, H, L, P], as in `deform_sample`; the result is [B, Q, H * D] in the dtype of `value`. `value_spatial_shapes` may
be the other libraries' integer tensor [L, 2] of (h, w) or a list of pairs. Reading a tensor on a GPU synchronises: once
while it does not change, and at every call in inference mode and in compiled code. A list never does.
`value_level_start_index` and `im2col_step` are ignored: levels lie end to end, and any batch is one launch.
Locations in half precision are converted to float32, which does not undo their rounding.
"""

import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from dat.ops._common import Shapes, autocast, check_value, flatten, full_precision, sum_dtype
from dat.ops.deform_sample import check_samples, deform_sample

# Shapes copied from a device, with the version of the tensor that they were read from: torch has no public way to see
# whether a tensor has changed in place.
_SIZES = WeakTensorKeyDictionary()


def _sizes(shapes: Tensor | Shapes) -> Shapes:
    if not isinstance(shapes, Tensor):
        return shapes
    # numpy may change host memory without torch noticing, and inference tensors have no version.
    if shapes.is_cpu or shapes.is_inference():
        return shapes.tolist()
    version, sizes = _SIZES.get(shapes, (None, None))
    if version != shapes._version:
        sizes = shapes.tolist()
        _SIZES[shapes] = (shapes._version, sizes)
    return sizes


def _widen(locations: Tensor) -> Tensor:
    return locations if locations.dtype in (torch.float32, torch.float64) else locations.float()


def multi_scale_deformable_attention(
    value: Tensor, value_spatial_shapes: Tensor | Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """transformers' function (Mask2Former, OneFormer) and mmcv's `multi_scale_deformable_attn_pytorch`.

    See the top of this module for the arguments, `deform_sample` for errors and derivatives.
    """
    if isinstance(value_spatial_shapes, Tensor) and torch.compiler.is_compiling():
        return _sample(autocast(value), value_spatial_shapes, sampling_locations, attention_weights)
    shapes = _sizes(value_spatial_shapes)
    return deform_sample(value, shapes, _widen(sampling_locations), attention_weights).flatten(2)


multi_scale_deformable_attn_pytorch = multi_scale_deformable_attention


def ms_deform_attn_core_pytorch(
    value: Tensor,
    value_spatial_shapes: Tensor | Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Shapes | None = None,
) -> Tensor:
    """The official repository's function, and that of LW-DETR and RF-DETR, which has another layout.

    Theirs takes `value` [B, H, D, S] and `attention_weights` [B, Q, H, L * P], and is recognised by the weights' four
    dimensions. RF-DETR passes the shapes a second time as integers, `value_spatial_shapes_hw`.
    """
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    if attention_weights.ndim == 4:
        value = value.permute(0, 3, 1, 2)
        attention_weights = attention_weights.view(sampling_locations.shape[:-1])
    return multi_scale_deformable_attention(value, shapes, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: Tensor | Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """transformers' function for RT-DETR v2, D-FINE and DEIMv2, whose levels may have different numbers of points.

    Args:
        sampling_locations: [B, Q, H, sum of num_points_list, 2], level by level.
        attention_weights: [B, Q, H, sum of num_points_list].
        num_points_list: points of each level.
        method: "default", bilinear sampling; "discrete", the nearest pixel, is not supported.

    Raises:
        ValueError: another method.
    """
    if method != "default":
        raise ValueError(f"method must be 'default', bilinear sampling, got {method!r}")
    points = max(num_points_list)

    def padded(tensor: Tensor, pad: tuple[int, ...], fill: float) -> Tensor:
        levels = tensor.split(list(num_points_list), 3)
        sides = [(*pad, points - n) for n in num_points_list]
        return torch.stack([F.pad(t, side, value=fill) for t, side in zip(levels, sides, strict=True)], 3)

    # Pad with points outside their level that have no weight.
    locations, weights = padded(sampling_locations, (0, 0, 0), -1.0), padded(attention_weights, (0,), 0.0)
    return multi_scale_deformable_attention(value, value_spatial_shapes, locations, weights)


class MSDeformAttnFunction:
    """The official repository's autograd function, and mmcv's; called by `apply`, differentiable twice."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor | Shapes,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights)


MultiScaleDeformableAttnFunction = MSDeformAttnFunction


class MultiScaleDeformableAttention(nn.Module):
    """transformers' kernel layer of that name, without parameters."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Shapes,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return multi_scale_deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor | Shapes,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Forward function of the official extension `MultiScaleDeformableAttention`; autocast does not affect it."""
    with full_precision(value):
        return multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor | Shapes,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward function of the official extension: gradients with respect to value, locations and weights."""
    if isinstance(value_spatial_shapes, Tensor) and torch.compiler.is_compiling():
        return _sample_backward(grad_output, value, value_spatial_shapes, sampling_locations, attention_weights)
    return _gradients(grad_output, value, _sizes(value_spatial_shapes), sampling_locations, attention_weights)


def _gradients(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_value(value, shapes)
    check_samples(value, shapes, _widen(locations), weights)
    grad_value, grad_locations, grad_weights = torch.ops.dat.deform_sample_backward(
        grad.reshape(*locations.shape[:3], value.shape[3]).to(value.dtype),
        value,
        locations.to(sum_dtype(value)),
        weights.to(sum_dtype(value)),
        flatten(shapes),
        False,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_value, grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


# Compilers see one op that reads the tensor of shapes at run time, so that nothing they plan depends on the sizes.
@torch.library.custom_op("dat::compat_sample", mutates_args=())
def _sample(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    with full_precision(value):
        return multi_scale_deformable_attention(value, shapes.tolist(), locations, weights)


@torch.library.custom_op("dat::compat_sample_backward", mutates_args=())
def _sample_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad, value, shapes.tolist(), locations, weights)


@_sample.register_fake
def _fake_sample(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    B, Q, H = locations.shape[:3]
    return value.new_empty(B, Q, H * value.shape[3])


@_sample_backward.register_fake
def _fake_sample_backward(
    grad: Tensor, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_value, grad_locations, grad_weights = _sample_backward(grad, *ctx.saved_tensors)
    return grad_value, None, grad_locations, grad_weights


_sample.register_autograd(_autograd, setup_context=_setup_context)


# Functions and autograd functions of other libraries by name, with their replacements.
_REPLACEMENTS: dict[str, Any] = {
    "multi_scale_deformable_attention": multi_scale_deformable_attention,
    "multi_scale_deformable_attention_v2": multi_scale_deformable_attention_v2,
    "multi_scale_deformable_attn_pytorch": multi_scale_deformable_attention,
    "ms_deform_attn_core_pytorch": ms_deform_attn_core_pytorch,
    "MSDeformAttnFunction": MSDeformAttnFunction,
    "MultiScaleDeformableAttnFunction": MSDeformAttnFunction,
    "MultiScaleDeformableAttnFunction_fp32": MSDeformAttnFunction,
    "MultiScaleDeformableAttnFunction_fp16": MSDeformAttnFunction,
}
_LAYER_ARGUMENTS = list(inspect.signature(MultiScaleDeformableAttention.forward).parameters)
_ABSENT = object()


class Switch(NamedTuple):
    """The attributes that `switch` replaced: (owner, name, original)."""

    replaced: list[tuple[Any, str, Any]]

    def remove(self) -> None:
        """Restore the originals."""
        while self.replaced:
            owner, name, before = self.replaced.pop()
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def switch(model: nn.Module) -> Switch:
    """Make the multi-scale deformable attention inside `model` sample with `dat.ops`.

    transformers' kernel layer `MultiScaleDeformableAttention` (Deformable DETR, Grounding DINO, RT-DETR and others) is
    replaced in this model only. Other modules call a function or an autograd function by one of the names that
    transformers (Mask2Former, OneFormer, RT-DETR v2, D-FINE, DEIMv2), mmcv, LW-DETR, RF-DETR and the official
    repository gave it: there the name is replaced in the module's file, for every model of that file.

    Returns:
        A handle whose `remove()` restores the originals.

    Raises:
        ValueError: nothing to replace, a function of a known name with other arguments, or a model that does not sample
            bilinearly (decoder_method "discrete").
    """
    sites = {(id(owner), name): (owner, name, new) for module in model.modules() for owner, name, new in _sites(module)}
    if not sites:
        raise ValueError(
            f"model must hold multi-scale deformable attention that dat.ops.compat supports, got {type(model).__name__}"
        )
    replaced = []
    for owner, name, new in sites.values():
        replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, new)
    return Switch(replaced)


def _sites(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, replacement) of every attribute through which `module` samples."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, types.FunctionType):
        return
    if list(inspect.signature(forward).parameters) == _LAYER_ARGUMENTS:
        yield module, "forward", types.MethodType(MultiScaleDeformableAttention.forward, module)
    home = sys.modules.get(forward.__module__)
    called = [name for name in forward.__code__.co_names if name in _REPLACEMENTS and hasattr(home, name)]
    # D-FINE keeps its function as an attribute.
    kept = {name: getattr(value, "__name__", None) for name, value in vars(module).items() if callable(value)}
    found: list[tuple[Any, str, str]] = [(home, name, name) for name in called]
    found += [(module, name, known) for name, known in kept.items() if known in _REPLACEMENTS]
    if found and "discrete" in (getattr(module, "method", None), getattr(module, "decoder_method", None)):
        raise ValueError(f"model must sample bilinearly, got {type(module).__name__} with method 'discrete'")
    for owner, name, known in found:
        theirs, ours = _arguments(getattr(owner, name)), _arguments(_REPLACEMENTS[known])
        if len(theirs) > len(ours):
            raise ValueError(
                f"model must call {known} with the arguments ({', '.join(ours)}), "
                f"got {type(module).__name__}, whose {known} takes ({', '.join(theirs)})"
            )
        yield owner, name, _REPLACEMENTS[known]


def _arguments(function: Any) -> list[str]:
    """Names of the arguments of a function or, without its context, of an autograd function."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return list(inspect.signature(function.forward).parameters)[1:]
    return list(inspect.signature(getattr(function, "apply", function)).parameters)
