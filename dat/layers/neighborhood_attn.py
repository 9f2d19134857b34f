"""Self-attention within the neighbourhood of every pixel, as in the N blocks of DAT++."""

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from dat.ops import neighborhood_attn
from dat.ops.sizes import is_exporting, sym_max


class NeighborhoodAttention(nn.Module):
    """Neighbourhood attention with relative position bias (https://arxiv.org/abs/2204.07143, equations 2 and 3).

    Parameters are named as those of NATTEN's `NeighborhoodAttention2D`, so that its weights load. A map with a side
    shorter than kernel_size * dilation is padded with zeros before the projection, as in the official DAT++: padding
    takes part in the attention, with the projection's bias as key and value, and is cropped from the output.

    Args:
        embed_dims: channels C; a multiple of num_heads.
        num_heads: attention heads.
        kernel_size: odd side of the neighbourhoods, in pixels.
        dilation: distance between neighbours, in pixels.
        qkv_bias: whether the projection to query, key and value has a bias.
        proj_drop: dropout after the output projection, 0..1.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f"embed_dims must be a multiple of num_heads = {num_heads}, got {embed_dims}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.scale = (embed_dims // num_heads) ** -0.5
        side = 2 * kernel_size - 1
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias, device=device, dtype=dtype)
        self.rpb = nn.Parameter(torch.empty(num_heads, side, side, device=device, dtype=dtype))
        self.proj = nn.Linear(embed_dims, embed_dims, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] of any size to [B, H, W, C]."""
        _, H, W, _ = x.shape
        reach = self.kernel_size * self.dilation
        down, right = (sym_max(length, reach) - length for length in (H, W))
        # An exported graph serves maps of every size, so it always pads.
        if is_exporting() or down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        return self.proj_drop(self.proj(self._attend(x)[:, :H, :W]))

    def _attend(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        # Gradients of chunks come together in one copy, those of a dimension of three in two.
        q, k, v = (rearrange(part, "b y x (h c) -> b h (y x) c", h=self.num_heads) for part in self.qkv(x).chunk(3, -1))
        out = neighborhood_attn(
            q, k, v, self.rpb, size=(H, W), kernel_size=self.kernel_size, scale=self.scale, dilation=self.dilation
        )
        return rearrange(out, "b h (y x) c -> b y x (h c)", y=H, x=W)
