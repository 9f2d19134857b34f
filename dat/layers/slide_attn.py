"""Slide attention: local attention by shifting convolutions, as in the E blocks of DAT's ablations."""

from typing import Any

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F


class SlideAttention(nn.Module):
    """Attention of every pixel to learned shifts of its map (Slide-Transformer, https://arxiv.org/abs/2304.04237).

    Keys and values of a pixel are those of its kernel_size x kernel_size neighbours, zero outside the map, each plus
    a learned depth-wise convolution, the same for all heads. The attention has fewer channels than the map.

    Args:
        embed_dims: channels C; a multiple of num_heads * reduction.
        num_heads: attention heads.
        kernel_size: odd side of the neighbourhoods, in pixels.
        reduction: channels of the map per channel of the attention; scores are scaled as for 1, as officially.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        kernel_size: int = 3,
        reduction: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dims % (num_heads * reduction):
            raise ValueError(
                f"embed_dims must be a multiple of num_heads * reduction = {num_heads * reduction}, got {embed_dims}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (embed_dims // num_heads) ** -0.5
        dim = embed_dims // reduction
        width, area = dim // num_heads, kernel_size**2
        self.qkv = nn.Linear(embed_dims, 3 * dim, **dd)
        self.shift, self.conv = (
            nn.Conv2d(width, area * width, kernel_size, padding=kernel_size // 2, groups=width, **dd) for _ in range(2)
        )
        # Output i of each channel is its i-th neighbour; only the bias is trained.
        shifts = torch.eye(area, **dd).view(area, 1, kernel_size, kernel_size)
        self.shift.weight = nn.Parameter(shifts.repeat(width, 1, 1, 1), requires_grad=False)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, area, **dd))
        self.proj = nn.Linear(dim, embed_dims, **dd)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] of any size to [B, H, W, C]."""
        q, k, v = rearrange(self.qkv(x), "b y x (h qkv c) -> qkv b h c y x", h=self.num_heads, qkv=3)
        k = self._neighbours(k) + self.relative_position_bias_table[:, None, :, None, None]
        attention = (q.unsqueeze(3) * k).sum(2, keepdim=True).mul(self.scale).softmax(3)
        out = (attention * self._neighbours(v)).sum(3)
        return self.proj(rearrange(out, "b h c y x -> b y x (h c)"))

    def _neighbours(self, x: Tensor) -> Tensor:
        """[B, h, c, H, W] to [B, h, c, kernel_size**2, H, W]."""
        conv, shift = self.conv, self.shift
        bias = None if conv.bias is None or shift.bias is None else conv.bias + shift.bias
        weight = conv.weight + shift.weight
        out = F.conv2d(x.flatten(0, 1), weight, bias, padding=conv.padding, groups=conv.groups)
        return out.unflatten(0, x.shape[:2]).unflatten(2, (x.shape[2], -1))
