"""Deformable attention of DAT: every query attends to keys sampled where a small network moved them."""

from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from dat.ops import deform_attn, deform_sample


class DeformableAttention(nn.Module):
    """Deformable multi-head attention (DAT, https://arxiv.org/abs/2201.00520, section 3.2, equations 6 to 9).

    Coordinates are those of release 2022: key (i, j) of a map of Hk x Wk keys starts at its cell's centre
    ((j + .5) / Wk, (i + .5) / Hk), drawn to -1..1, and values there are sampled with -1 and 1 on the corner cells.

    Args:
        embed_dims: channels C; a multiple of num_heads and of num_groups.
        num_heads: attention heads; a multiple of num_groups.
        num_groups: groups of channels, each of which moves its keys on its own.
        kernel_size: of the depth-wise convolution that looks at the queries to move the keys; odd.
        stride: queries per key along each side.
        offset_range_factor: above 0, a key moves by at most half as many cells of the key map; at 0 freely; below 0 the
            moved position goes through tanh.
        table_size: (H, W) of the query map that the position-bias table [num_heads, 2H-1, 2W-1] is made for; other
            maps look the same table up at their own displacements. None: no position bias.
        proj_drop: dropout after the output projection, 0..1.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_groups: int = 1,
        kernel_size: int = 5,
        stride: int = 1,
        offset_range_factor: float = 2.0,
        table_size: tuple[int, int] | None = None,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f"embed_dims must be a multiple of num_heads = {num_heads}, got {embed_dims}")
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(f"num_groups must be a divisor of num_heads = {num_heads}, got {num_groups}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.num_groups = num_heads, num_groups
        self.offset_range_factor = offset_range_factor
        self.scale = (embed_dims // num_heads) ** -0.5
        width = embed_dims // num_groups
        self.offset_conv = nn.Conv2d(width, width, kernel_size, stride, kernel_size // 2, groups=width, **dd)
        self.offset_norm = nn.LayerNorm(width, **dd)
        self.offset_proj = nn.Linear(width, 2, bias=False, **dd)
        self.q = nn.Linear(embed_dims, embed_dims, **dd)
        self.k = nn.Linear(embed_dims, embed_dims, **dd)
        self.v = nn.Linear(embed_dims, embed_dims, **dd)
        self.proj = nn.Linear(embed_dims, embed_dims, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_table = None
        if table_size is not None:
            H, W = table_size
            self.rpe_table = nn.Parameter(torch.empty(num_heads, 2 * H - 1, 2 * W - 1, **dd))
            trunc_normal_(self.rpe_table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] of any size to [B, H, W, C]."""
        B, H, W, C = x.shape
        query = self.q(x)
        positions = self.positions(query)
        sampled = deform_sample(
            x.reshape(B, H * W, self.num_groups, C // self.num_groups),
            ((H, W),),
            (positions.transpose(1, 2)[:, :, :, None, None] + 1) / 2,
            align_corners=True,
        )
        sampled = sampled.reshape(B, positions.shape[2], C)
        q, k, v = (
            tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (query.flatten(1, 2), self.k(sampled), self.v(sampled))
        )
        out = deform_attn(q, k, v, positions, self.rpe_table, size=(H, W), scale=self.scale, align_corners=False)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, H, W, C)))

    def positions(self, query: Tensor) -> Tensor:
        """Where the keys are sampled: [B, num_groups, N, 2], (x, y), -1..1 across the map, in at least float32.

        Args:
            query: [B, H, W, C], the projected queries.
        """
        groups, conv = self.num_groups, self.offset_conv
        # All groups share their weights; repeating those spares a copy of the queries with groups in the batch.
        x = F.conv2d(
            query.permute(0, 3, 1, 2),
            conv.weight.repeat(groups, 1, 1, 1),
            None if conv.bias is None else conv.bias.repeat(groups),
            conv.stride,
            conv.padding,
            groups=query.shape[-1],
        )
        x = x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))
        offset = self.offset_proj(F.gelu(self.offset_norm(x)))
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        # The network gives (y, x), as in the official checkpoints.
        y, x = offset.unbind(-1)
        y = self._move(_centres(y.shape[1], y)[:, None, None], y, y.shape[1])
        x = self._move(_centres(x.shape[2], x)[:, None], x, x.shape[2])
        return torch.stack((x, y), -1).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _move(self, reference: Tensor, offset: Tensor, length: int) -> Tensor:
        if self.offset_range_factor > 0:
            return reference + offset.tanh() * (self.offset_range_factor / length)
        return (reference + offset).tanh() if self.offset_range_factor < 0 else reference + offset


def _centres(length: int, like: Tensor) -> Tensor:
    """Centres of `length` cells that share -1..1."""
    return (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / length * 2 - 1
