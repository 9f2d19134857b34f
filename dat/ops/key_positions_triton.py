"""Triton kernels of `key_positions`: a program works on some keys of all groups, whose channels lie side by side."""

# Triton finds out the types of its kernels' arguments when they are called.
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dat.ops.placement import Placement
from dat.ops.triton_launch import ceil_div, launch, power_of_2

# Elements that a program works on at a time, and programs that keep a large GPU busy.
ELEMENTS, PROGRAMS = 1024, 512

# Values that differ from stage to stage: kernels specialised on them would be compiled again for each.
SIZES = ["keys", "groups", "N", "Wk"]


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _offsets(x, conv_bias, norm_weight, norm_bias, proj, key, channel, keys, C, eps):
    """The offsets (y, x) of some keys, last, and what their gradients need: the layer norm before and after its weight
    and bias, the inverse deviations, the normal distribution's CDF (GELU is norm * cdf), and the parameters."""
    known = channel < C
    # Beyond the end the last key once more, as zeros might have no variance.
    at = x + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * C + channel[None, :]
    pixels = tl.load(at, mask=known[None, :], other=0.0)
    pixels = pixels.to(tl.float32) + tl.load(conv_bias + channel, mask=known, other=0.0)[None, :]
    mean = tl.sum(pixels, 1) / C
    centred = tl.where(known[None, :], pixels - mean[:, None], 0.0)
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    normalized = centred * inverse_std[:, None]
    weight = tl.load(norm_weight + channel, mask=known, other=0.0)
    norm = normalized * weight[None, :] + tl.load(norm_bias + channel, mask=known, other=0.0)[None, :]
    cdf = 0.5 + 0.5 * tl.math.erf(norm * 0.7071067811865476)
    proj_y, proj_x = tl.load(proj + channel, mask=known, other=0.0), tl.load(proj + C + channel, mask=known, other=0.0)
    y, x = tl.sum(norm * cdf * proj_y[None, :], 1), tl.sum(norm * cdf * proj_x[None, :], 1)
    return normalized, inverse_std, norm, cdf, weight, proj_y, proj_x, y, x


@triton.jit
def _place(offset, index, start, step, reach, LIMITED: tl.constexpr, BOUND: tl.constexpr):
    """Positions of keys moved by offsets along a side, and their slopes by the offsets."""
    slope = tl.full(offset.shape, 1.0, tl.float32)
    if LIMITED:
        offset = _tanh(offset)
        slope = (1.0 - offset * offset) * reach
        offset *= reach
    position = offset + (start + step * index.to(tl.float32))
    if BOUND == "tanh":
        position = _tanh(position)
        slope *= 1.0 - position * position
    if BOUND == "clamp":
        slope = tl.where((position <= -1.0) | (position >= 1.0), 0.0, slope)
        # NaN stays NaN.
        position = tl.where(position < -1.0, -1.0, tl.where(position > 1.0, 1.0, position))
    return position, slope


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x, conv_bias, norm_weight, norm_bias, proj, positions, locations,
    keys, groups, N, Wk, C, eps, start_x, step_x, reach_x, start_y, step_y, reach_y,
    LIMITED: tl.constexpr, BOUND: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    key, channel = tl.program_id(0) * K + tl.arange(0, K), tl.arange(0, D)
    _, _, _, _, _, _, _, offset_y, offset_x = _offsets(
        x, conv_bias, norm_weight, norm_bias, proj, key, channel, keys, C, eps
    )
    image, pixel, group = key // groups // N, key // groups % N, key % groups
    position_x, _ = _place(offset_x, pixel % Wk, start_x, step_x, reach_x, LIMITED, BOUND)
    position_y, _ = _place(offset_y, pixel // Wk, start_y, step_y, reach_y, LIMITED, BOUND)
    at = positions + ((image * groups + group) * N + pixel) * 2
    tl.store(at, position_x, mask=key < keys)
    tl.store(at + 1, position_y, mask=key < keys)
    tl.store(locations + key * 2, (position_x + 1.0) * 0.5, mask=key < keys)
    tl.store(locations + key * 2 + 1, (position_y + 1.0) * 0.5, mask=key < keys)


@triton.jit(do_not_specialize=[*SIZES, "length"])
def backward_kernel(
    grad_positions, grad_locations, x, conv_bias, norm_weight, norm_bias, proj, grad_x, sums,
    keys, groups, N, Wk, C, length, eps, start_x, step_x, reach_x, start_y, step_y, reach_y,
    LIMITED: tl.constexpr, BOUND: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients by the map, and `sums` [programs, 5, C] over `length` keys of those by the parameters."""
    channel = tl.arange(0, D)
    # By the biases of the convolution and of the norm, the norm's weight, and the projection's two rows.
    conv_sums, norm_sums = tl.zeros([K, D], tl.float32), tl.zeros([K, D], tl.float32)
    weight_sums, y_sums, x_sums = conv_sums, conv_sums, conv_sums
    begin = tl.program_id(0) * length
    for first in range(begin, tl.minimum(begin + length, keys), K):
        key = first + tl.arange(0, K)
        inside = key < keys
        normalized, inverse_std, norm, cdf, weight, proj_y, proj_x, offset_y, offset_x = _offsets(
            x, conv_bias, norm_weight, norm_bias, proj, key, channel, keys, C, eps
        )
        image, pixel, group = key // groups // N, key // groups % N, key % groups
        _, slope_x = _place(offset_x, pixel % Wk, start_x, step_x, reach_x, LIMITED, BOUND)
        _, slope_y = _place(offset_y, pixel // Wk, start_y, step_y, reach_y, LIMITED, BOUND)
        at = grad_positions + ((image * groups + group) * N + pixel) * 2
        grad_offset_x, grad_offset_y = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
        at = grad_locations + key * 2
        grad_offset_x += 0.5 * tl.load(at, mask=inside, other=0.0)
        grad_offset_y += 0.5 * tl.load(at + 1, mask=inside, other=0.0)
        grad_offset_x, grad_offset_y = (grad_offset_x * slope_x)[:, None], (grad_offset_y * slope_y)[:, None]
        activation = norm * cdf
        y_sums += grad_offset_y * activation
        x_sums += grad_offset_x * activation
        pdf = 0.3989422804014327 * tl.exp(-0.5 * norm * norm)
        grad_norm = (grad_offset_y * proj_y[None, :] + grad_offset_x * proj_x[None, :]) * (cdf + norm * pdf)
        norm_sums += grad_norm
        weight_sums += grad_norm * normalized
        grad_normalized = grad_norm * weight[None, :]
        mean, slope = tl.sum(grad_normalized, 1) / C, tl.sum(grad_normalized * normalized, 1) / C
        grad = (grad_normalized - mean[:, None] - normalized * slope[:, None]) * inverse_std[:, None]
        conv_sums += grad
        at = grad_x + key.to(tl.int64)[:, None] * C + channel[None, :]
        tl.store(at, grad.to(grad_x.dtype.element_ty), mask=inside[:, None] & (channel < C)[None, :])
    sums += tl.program_id(0) * 5 * C + channel
    tl.store(sums, tl.sum(conv_sums, 0), mask=channel < C)
    tl.store(sums + C, tl.sum(weight_sums, 0), mask=channel < C)
    tl.store(sums + 2 * C, tl.sum(norm_sums, 0), mask=channel < C)
    tl.store(sums + 3 * C, tl.sum(y_sums, 0), mask=channel < C)
    tl.store(sums + 4 * C, tl.sum(x_sums, 0), mask=channel < C)


def arguments(x: Tensor, eps: float, placement: Placement) -> tuple[tuple[int, ...], tuple[float, ...], dict[str, Any]]:
    """Sizes, other numbers and constants of both kernels."""
    B, Hk, Wk, g, C = x.shape
    numbers = [eps]
    for length in (Wk, Hk):
        steps = placement.steps(length)
        # Without a step the only key's position is infinite.
        grid = (1 / steps - 1, 2 / steps) if steps else (math.inf, 0.0)
        numbers += [*grid, placement.offset_range_factor / steps if placement.limited else 0.0]
    bound = "" if placement.offset_range_factor >= 0 else "tanh" if placement.release == "2022" else "clamp"
    channels = max(16, power_of_2(C))
    constants = {"LIMITED": placement.limited, "BOUND": bound, "K": max(ELEMENTS // channels, 1), "D": channels}
    return (B * Hk * Wk * g, g, Hk * Wk, Wk, C), tuple(numbers), constants


def forward(tensors: Sequence[Tensor], eps: float, placement: Placement) -> tuple[Tensor, Tensor]:
    """Positions and locations of a map [B, Hk, Wk, g, c] that is not empty, the first of the op's tensors."""
    x, *parameters = (tensor.contiguous() for tensor in tensors)
    B, Hk, Wk, g, _ = x.shape
    positions = x.new_empty(B, g, Hk * Wk, 2, dtype=torch.float32)
    locations = x.new_empty(B, Hk * Wk, g, 1, 1, 2, dtype=torch.float32)
    sizes, numbers, constants = arguments(x, eps, placement)
    programs = ceil_div(sizes[0], constants["K"])
    launch(forward_kernel, programs, (x, *parameters, positions, locations), (*sizes, *numbers), constants)
    return positions, locations


def backward(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], eps: float, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Gradients by the map, and by the parameters [5, C] in their order, the last of which has two rows."""
    x, *parameters = (tensor.contiguous() for tensor in tensors)
    sizes, numbers, constants = arguments(x, eps, placement)
    keys, C = sizes[0], sizes[-1]
    length = ceil_div(ceil_div(keys, constants["K"]), PROGRAMS) * constants["K"]
    programs = ceil_div(keys, length)
    grad_x, sums = torch.empty_like(x), x.new_empty(programs, 5, C, dtype=torch.float32)
    inputs = *(grad.contiguous() for grad in grads), x, *parameters
    launch(backward_kernel, programs, (*inputs, grad_x, sums), (*sizes, length, *numbers), constants)
    return grad_x, sums.sum(0)
