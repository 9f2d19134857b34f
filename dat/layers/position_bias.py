"""Position biases of DAT's ablations, and resampling of bias tables."""

import math
from typing import Any

import torch
from einops import rearrange
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F


def resize_table(table: Tensor, size: tuple[int, ...]) -> Tensor:
    """A bias table [num_heads, h, w] resampled to `size`, as the official fine-tuning does."""
    return F.interpolate(table.unsqueeze(0), size, mode="bicubic").squeeze(0)


class FixedBias(nn.Module):
    """A bias for each pair of a query and a key, whatever the key's offset ("fixed_pe" of the official code).

    Args:
        num_heads: attention heads.
        query_size: (H, W) of the query map that the table [num_heads, H*W, Hk*Wk] is made for.
        key_size: (Hk, Wk) of the key map.
    """

    def __init__(
        self,
        num_heads: int,
        query_size: tuple[int, int],
        key_size: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size = query_size, key_size
        shape = num_heads, math.prod(query_size), math.prod(key_size)
        self.rpe_table = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        trunc_normal_(self.rpe_table, std=0.01)

    def forward(self, query_size: tuple[int, int], key_size: tuple[int, int]) -> Tensor:
        """The bias [num_heads, H*W, Hk*Wk] for maps of these sizes, resampled if the table is for others."""
        if (query_size, key_size) == (self.query_size, self.key_size):
            return self.rpe_table
        return resize_pairs(self.rpe_table, self.query_size, self.key_size, query_size, key_size)

    def set_sizes(self, query_size: tuple[int, int], key_size: tuple[int, int]) -> None:
        """Resample the table for maps of other sizes."""
        table = self(query_size, key_size).detach()
        self.rpe_table = nn.Parameter(table, self.rpe_table.requires_grad)
        self.query_size, self.key_size = query_size, key_size

    def fit(self, table: Tensor) -> Tensor:
        """The table of a checkpoint, which was made for square maps, resampled to this one's sizes."""
        query_side, key_side = (math.isqrt(length) for length in table.shape[1:])
        sides = (query_side, query_side), (key_side, key_side)
        return resize_pairs(table, *sides, self.query_size, self.key_size)


def resize_pairs(
    table: Tensor,
    query_size: tuple[int, int],
    key_size: tuple[int, int],
    new_query_size: tuple[int, int],
    new_key_size: tuple[int, int],
) -> Tensor:
    """A table [num_heads, H*W, Hk*Wk] resampled first over the map of the queries, then over that of the keys."""
    (H, W), (Hk, Wk), keys, queries = new_query_size, new_key_size, math.prod(key_size), math.prod(new_query_size)
    table = rearrange(table, "h (y x) k -> (h k) y x", y=query_size[0], x=query_size[1])
    table = rearrange(resize_table(table, (H, W)), "(h k) y x -> h (y x) k", k=keys)
    table = rearrange(table, "h q (y x) -> (h q) y x", y=key_size[0], x=key_size[1])
    return rearrange(resize_table(table, (Hk, Wk)), "(h q) y x -> h q (y x)", q=queries)


class LogSpacedBias(nn.Module):
    """An MLP of log-spaced displacements (Swin V2, https://arxiv.org/abs/2111.09883, section 3.3; here continuous).

    Args:
        group_heads: heads of each group of keys; all groups use the same MLP.
        hidden_dim: width of the MLP.
    """

    def __init__(
        self,
        group_heads: int,
        hidden_dim: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp = Mlp(2, hidden_dim, group_heads, act_layer=nn.ReLU, bias=(True, False), **dd)

    def forward(self, grid: Tensor, positions: Tensor) -> Tensor:
        """Bias [B, g * group_heads, Q, N] of queries at `grid` [Q, 2] and keys at `positions` [B, g, N, 2].

        Both are (x, y), -1..1 across the map; the logarithm is 1 for a displacement of seven eighths of the map's side.
        """
        # The official MLP takes (y, x).
        displacement = (grid[:, None] - positions[:, :, None]).flip(-1) * 4
        displacement = displacement.sign() * torch.log2(displacement.abs() + 1) / math.log2(8)
        bias = self.mlp(displacement.to(self.mlp.fc1.weight.dtype))
        return rearrange(bias, "b g q n h -> b (g h) q n")
