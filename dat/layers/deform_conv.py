"""Deformable convolution, versions 1 and 2, on the sampling op."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

# torch has no public way to distinguish a size that a graph fixes from a symbolic one.
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dat.ops import deform_sample
from dat.ops._common import autocast_dtype, full_precision
from dat.ops.sizes import is_exporting

Pair = int | tuple[int, int]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolution that samples at offsets from its grid (DCN v1, https://arxiv.org/abs/1703.06211, equation 2).

    With a mask it is version 2 (https://arxiv.org/abs/1811.11168, equation 1). Arguments, layouts and results are those
    of `torchvision.ops.deform_conv2d`.

    Args:
        input: [B, C, H, W]; float32, float64, bfloat16 or float16. It counts as zero outside the map.
        offset: [B, 2 * G * kh * kw, Ho, Wo], in pixels: (dy, dx) of each kernel position, row by row, for each of G
            groups of channels with the same offsets; G divides C. Any floating dtype; computed in at least float32.
        weight: [O, C / groups, kh, kw]; its shape determines the number of groups.
        bias: [O], or None.
        stride, padding, dilation: as a convolution's, one for both axes or (vertical, horizontal).
        mask: [B, G * kh * kw, Ho, Wo], factors of the samples (version 2), or None.

    Returns:
        [B, O, Ho, Wo] in the dtype of `input`, channels last where `input` is. Twice differentiable in all tensors; the
        samples, kh * kw times as large as the input, are recomputed in the backward pass. Under autocast it computes in
        float32, as torchvision does.

    Raises:
        ValueError: shapes that do not fit together; the message names the argument.
    """
    if autocast_dtype(input) is not None:
        wide: Any = [
            None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))
            for t in (input, offset, weight, bias, mask)
        ]
        x, moves, kernel, shift, factors = wide
        with full_precision(input):
            return deform_conv2d(x, moves, kernel, shift, stride, padding, dilation, factors).to(input.dtype)
    steps = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    groups = _check(input, offset, weight, bias, *steps, mask)
    tensors = (input, offset, weight, mask)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # Exported graphs have no backward pass, and torch.export refuses some that contain a checkpoint.
    if differentiated and not is_exporting():
        out = checkpoint(_convolve, *tensors, groups, *steps, use_reentrant=False, preserve_rng_state=False)
    else:
        out = _convolve(*tensors, groups, *steps)
    out = out if bias is None else out + bias.to(out.dtype)[:, None, None]
    return out.contiguous(memory_format=torch.channels_last if input.stride(1) == 1 else torch.contiguous_format)


class DeformConv2d(nn.Module):
    """Deformable convolution as a layer: `torchvision.ops.DeformConv2d` with the same parameters and initial values.

    Args:
        in_channels: channels C of the input; a multiple of groups.
        out_channels: channels O of the output; a multiple of groups.
        kernel_size, stride, padding, dilation: as a convolution's, one for both axes or (vertical, horizontal).
        groups: groups of channels that are convolved separately, as a convolution's.
        bias: whether a learned bias [O] is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels < 1 or channels % groups:
                raise ValueError(f"{name} must be a multiple of groups, got {channels} with groups = {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1)
        self.padding, self.dilation = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(fan in), torch's default for convolutions."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `deform_conv2d`."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


def _convolve(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    groups: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Samples at every kernel position of every output pixel, then multiplies by the weights: [B, O, Ho, Wo]."""
    B, C = input.shape[:2]
    kh, kw = weight.shape[2:]
    Ho, Wo = offset.shape[2:]
    G = offset.shape[1] // (2 * kh * kw)
    H, W = (_padded(size, input.dtype) for size in input.shape[2:])
    value = F.pad(input.permute(0, 2, 3, 1), (0, 0, 0, W - input.shape[3], 0, H - input.shape[2]))
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    moves = rearrange(offset.to(dtype), "b (g i j yx) y x -> yx b y x i j g", g=G, i=kh, j=kw)
    y = moves[0] + _grid(moves, 2, stride[0], padding[0], dilation[0])[:, None, :, None, None]
    x = moves[1] + _grid(moves, 3, stride[1], padding[1], dilation[1])[:, None, :, None]
    locations = torch.stack((_location(x, W), _location(y, H)), -1)
    # Kernel positions are queries of the op, not points: each keeps its own sample, beside those of its neighbours.
    locations = locations.view(B, Ho * Wo * kh * kw, G, 1, 1, 2)
    weights = None
    if mask is not None:
        weights = rearrange(mask, "b (g k) y x -> b (y x k) g 1 1", g=G)
    value = value.flatten(1, 2).unflatten(2, (G, C // G))
    columns = deform_sample(value, ((H, W),), locations, weights, align_corners=True)
    columns = columns.reshape(B * Ho * Wo, kh * kw, groups, C // groups).permute(2, 0, 1, 3).flatten(2)
    kernel = rearrange(weight, "(g o) c i j -> g (i j c) o", g=groups)
    out = torch.bmm(columns, kernel)
    return rearrange(out, "g (b y x) o -> b (g o) y x", b=B, y=Ho, x=Wo)


def _padded(size: int, dtype: torch.dtype) -> int:
    """Pixels to which a side of `size` is padded with zeros, for the accuracy of its locations.

    Locations are fractions of the way from the first pixel to the last, of which there must be two. In float32,
    dividing by a power of two and multiplying again is exact; otherwise rounding would move samples by up to 3e-5
    pixels on a map of 300. float64 and half precision do not need it. A symbolic size is not padded: its graph serves
    any other.
    """
    if dtype != torch.float32 or not has_static_value(size):
        return max(size, 2)
    return 1 + (1 << max(size - 2, 0).bit_length())


def _grid(moves: Tensor, axis: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Positions sampled without offsets, in pixels of the input: [outputs, kernel size] of an axis.

    `moves` is [2, B, Ho, Wo, kh, kw, G]; `axis` is that of its outputs, and the kernel's is two further on.
    """
    outputs, steps = (torch.arange(moves.shape[a], dtype=moves.dtype, device=moves.device) for a in (axis, axis + 2))
    return (outputs * stride - padding)[:, None] + steps * dilation


def _location(pixel: Tensor, size: int) -> Tensor:
    """The fraction of the way from the first to the last of `size` pixels."""
    last = size - 1
    location = pixel / last
    # Rounding must not move a sample from a pixel's centre to just before it, where the gradient differs: with offsets
    # of zero many samples are at centres. The factor 1.5 makes up for compilers that divide inexactly.
    short = (pixel - location * last).clamp(min=0).detach()
    return location + short * (1.5 / last)


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name} must be one or two ints of at least {least}, got {value}")
    return pair


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> int:
    """Raises where arguments do not fit together; returns the number of groups."""
    for name, tensor in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask)):
        if tensor is not None and tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
    B, C, *size = input.shape
    out_channels, width, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    if 0 in (C, width, taps) or C % width or out_channels % (C // width):
        raise ValueError(f"weight must be [O, {C} / groups, kh, kw], O a multiple of groups, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must be [{out_channels}] to fit weight, got {tuple(bias.shape)}")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    out = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]
    if min(out) < 1:
        raise ValueError(f"input must be at least {tuple(reach)} with its padding {padding}, got {tuple(input.shape)}")
    G = offset.shape[1] // (2 * taps)
    if offset.shape != (B, 2 * G * taps, *out) or not G or C % G:
        raise ValueError(
            f"offset must be [{B}, {2 * taps} * G, {out[0]}, {out[1]}] with G a divisor of {C} channels, "
            f"got {tuple(offset.shape)}"
        )
    if mask is not None and mask.shape != (B, G * taps, *out):
        raise ValueError(f"mask must be [{B}, {G * taps}, {out[0]}, {out[1]}], got {tuple(mask.shape)}")
    return C // width
