"""Positions of DAT's keys: the layers of the offset network behind its convolution, and where offsets move the keys.

On a GPU it is one kernel, and two for gradients. In PyTorch these are some 25 small ones, which take the host longer
than the GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops._common import fits_kernels, has_triton, is_traced, second_derivatives
from dat.ops.sizes import sym_max

# Kernels of Triton only: other devices, and whatever traces, take PyTorch. Compilers write such kernels themselves.
DEVICE = "cuda"


@dataclass(frozen=True)
class Placement:
    """Where offsets move keys, after a release of the official code; see `dat.layers.DeformableAttention`."""

    offset_range_factor: float
    release: str

    @property
    def limited(self) -> bool:
        """Whether offsets are limited to a range."""
        return self.offset_range_factor > 0 or (self.offset_range_factor == 0 and self.release == "2023")

    def steps(self, length: int) -> int:
        """Pixels, of a side of `length` keys, that the official code takes its positions -1..1 for."""
        if self.release == "2022":
            return length
        # A single key's position is infinite, and the clamp moves it to 1, as in the official code.
        return length - 1 if self.offset_range_factor < 0 else sym_max(length - 1, 1)

    def __call__(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and locations of `key_positions` for offsets [B, Hk, Wk, g, 2], (y, x), in at least float32."""
        Hk, Wk = offset.shape[1:3]
        # The network predicts (y, x), as in the official checkpoints.
        y, x = (offset.tanh() if self.limited else offset).unbind(-1)
        if self.limited:
            y, x = (
                y * (self.offset_range_factor / self.steps(Hk)),
                x * (self.offset_range_factor / self.steps(Wk)),
            )
        positions = torch.stack((x + self._grid(Wk, x)[:, None], y + self._grid(Hk, y)[:, None, None]), -1)
        if self.offset_range_factor < 0:
            # A clamp whose gradient is one kernel instead of five.
            positions = positions.tanh() if self.release == "2022" else F.hardtanh(positions)
        positions = positions.flatten(1, 2)
        return positions.transpose(1, 2), (positions[:, :, :, None, None] + 1) / 2

    def _grid(self, length: int, like: Tensor) -> Tensor:
        """Positions of keys that are not moved, along a side of `length`."""
        steps = self.steps(length)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or length == 1:
            return (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / steps * 2 - 1
        # The same in one kernel, as small kernels take a GPU's host longer than the GPU.
        return torch.arange(1 / steps - 1, 2 * length / steps - 1, 2 / steps, dtype=like.dtype, device=like.device)


def has_key_positions(x: Tensor, *parameters: Tensor) -> bool:
    """Whether `key_positions` takes such a map and parameters: on a GPU, eager, of its kernels' shapes and dtypes."""
    return (
        fits_kernels(x, *parameters)
        and x.device.type == DEVICE
        and not is_traced((x, *parameters))
        and x.numel() > 0
        and has_triton()
    )


def key_positions(
    x: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    *,
    eps: float,
    placement: Placement,
) -> tuple[Tensor, Tensor]:
    """`placement` of the offsets linear(gelu(layer_norm(x + conv_bias))), where `has_key_positions`.

    Args:
        x: [B, Hk, Wk, g, c], the convolution of g groups of c channels without its bias; float32, bfloat16 or
            float16.
        conv_bias, norm_weight, norm_bias: [c], float32.
        proj: [2, c], the weight of the linear layer that predicts (y, x); float32.
        eps: added to the norm's variance.
        placement: how offsets move keys.

    Returns:
        positions [B, g, Hk*Wk, 2], (x, y) in -1..1, and locations [B, Hk*Wk, g, 1, 1, 2], the same in 0..1 as
        `deform_sample` takes them; float32, from sums in float32. Differentiable any number of times, in reverse mode;
        sums are taken in the same order every time.
    """
    return _KeyPositions.apply(x.contiguous(), conv_bias, norm_weight, norm_bias, proj, eps, placement)


class _KeyPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        from dat.ops import key_positions_triton

        *tensors, ctx.eps, ctx.placement = inputs
        ctx.save_for_backward(*tensors)
        with torch.cuda.device_of(tensors[0]):
            return key_positions_triton.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        from dat.ops import key_positions_triton

        if torch.is_grad_enabled():
            # Gradients of these gradients are wanted.
            def reference(
                x: Tensor, conv_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, proj: Tensor
            ) -> tuple[Tensor, ...]:
                x = F.layer_norm(x.float() + conv_bias, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
                return ctx.placement(F.linear(F.gelu(x), proj))

            return *second_derivatives(reference, ctx.saved_tensors, grads), None, None
        inputs = *grads, *ctx.saved_tensors, ctx.eps, ctx.placement
        with torch.cuda.device_of(grads[0]):
            return *key_positions_triton.backward(*inputs), None, None
