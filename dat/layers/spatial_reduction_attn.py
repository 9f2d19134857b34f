"""Attention to a map of lower resolution, as in PVT and in the P blocks of DAT's ablations."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dat.layers.norm import layer_norm


class SpatialReductionAttention(nn.Module):
    """Attention of pixels to a strided convolution of the map (PVT, https://arxiv.org/abs/2102.12122, section 3.3).

    Args:
        embed_dims: channels C; a multiple of num_heads.
        num_heads: attention heads.
        sr_ratio: side and stride of the convolution's kernel; 1: attention to the map itself. Pixels beyond the last
            whole stride are not attended to; a map smaller than the kernel is padded with zeros.
        proj_drop: dropout after the output projection, 0..1.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        sr_ratio: int = 1,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f"embed_dims must be a multiple of num_heads = {num_heads}, got {embed_dims}")
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio must be at least 1, got {sr_ratio}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(embed_dims, embed_dims, **dd)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims, **dd)
        self.proj = nn.Linear(embed_dims, embed_dims, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, sr_ratio, **dd)
            self.norm = nn.LayerNorm(embed_dims, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] of any size to [B, H, W, C]."""
        _, H, W, _ = x.shape
        q = rearrange(self.q(x), "b y x (h c) -> b h (y x) c", h=self.num_heads)
        k, v = rearrange(self.kv(self._reduce(x)), "b y x (kv h c) -> kv b h (y x) c", kv=2, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(rearrange(out, "b h (y x) c -> b y x (h c)", y=H, x=W)))

    def _reduce(self, x: Tensor) -> Tensor:
        if self.sr_ratio == 1:
            return x
        missing = [max(self.sr_ratio - side, 0) for side in x.shape[1:3]]
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
        return layer_norm(self.norm, self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), before=self.kv)
