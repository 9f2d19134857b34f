"""Configuration of DAT's stages, and the blocks named by its letters: [B, H, W, C] to [B, H, W, C]."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn

from dat.layers import (
    ConvMlp,
    DeformableAttention,
    NeighborhoodAttention,
    SlideAttention,
    SpatialReductionAttention,
    WindowAttention,
)
from dat.layers.autocast import casts_parameters_together
from dat.layers.mlp import depthwise, residual_depthwise
from dat.layers.norm import add_layer_norm, layer_norm

# These branch on shapes, dtypes or whether gradients are enabled, which torch.fx cannot trace: keep them as leaves.
for _layer in (
    ConvMlp,
    DeformableAttention,
    NeighborhoodAttention,
    SlideAttention,
    SpatialReductionAttention,
    WindowAttention,
):
    register_notrace_module(_layer)


@dataclass(frozen=True)
class StageConfig:
    """One stage of DAT.

    Attributes:
        blocks: a letter for each block. Attention: L local windows, S shifted windows, D deformable, N neighbourhood,
            P spatial reduction (as in PVT), E slide attention; X: a depth-wise convolution instead of attention.
        embed_dims: channels, a multiple of num_heads.
        num_heads: attention heads.
        window_size: side of L's and S's windows and of X's kernels.
        neighborhood_size: side of N's neighbourhoods.
        sr_ratio: P: pixels per key along each side.
        num_groups: D: groups of heads, each with offsets of its own.
        kernel_size: D: kernel of the offset network's depth-wise convolution.
        stride: D: queries per key along each side.
        offset_range_factor: D: see `dat.layers.DeformableAttention`.
        position_bias: D: "table", "fixed_pe", "dwc_pe", "log_cpb" or "none"; see `dat.layers.DeformableAttention`.
        no_off: D: no offsets.
        release: "2022" or "2023", the official code that D blocks follow in coordinates and conv_mlp in its form.
        lpu: whether blocks begin with a local perception unit.
        conv_mlp: whether MLPs have a depth-wise convolution.
        layer_scale: initial scale of the residual branches (except in X blocks); None: no scale.
    """

    blocks: str
    embed_dims: int
    num_heads: int
    window_size: int = 7
    num_groups: int = 1
    kernel_size: int = 5
    stride: int = 1
    offset_range_factor: float = 2.0
    position_bias: str = "table"
    no_off: bool = False
    release: str = "2022"
    neighborhood_size: int = 7
    sr_ratio: int = 1
    lpu: bool = False
    conv_mlp: bool = False
    layer_scale: float | None = None


@register_notrace_module
class LocalPerception(nn.Module):
    """A 3x3 depth-wise convolution, added to its input: [B, H, W, C] to [B, H, W, C]."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return residual_depthwise(self.conv, x)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input: [B, H, W, C] to [B, H, W, C]."""

    def __init__(
        self,
        letter: str,
        config: StageConfig,
        map_size: tuple[int, int],
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim, scale = config.embed_dims, config.layer_scale
        self.lpu = LocalPerception(dim, **dd) if config.lpu else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = create_attention(letter, config, map_size, proj_drop, **dd)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = create_mlp(config, mlp_ratio, proj_drop, **dd)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @casts_parameters_together
    def forward(self, x: Tensor) -> Tensor:
        x = self.lpu(x)
        branch = self.drop_path1(self.ls1(self.attn(layer_norm(self.norm1, x, before=self.attn))))
        x, normed = add_layer_norm(self.norm2, x, branch, before=self.mlp)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


class ConvBlock(nn.Module):
    """Depth-wise convolution, norm and MLP, added to the input as in ConvNeXt: [B, H, W, C] to [B, H, W, C]."""

    def __init__(
        self,
        config: StageConfig,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.window_size % 2 == 0:
            raise ValueError(f"window_size must be odd for X blocks, got {config.window_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim, kernel_size = config.embed_dims, config.window_size
        self.lpu = LocalPerception(dim, **dd) if config.lpu else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = create_mlp(config, mlp_ratio, proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @casts_parameters_together
    def forward(self, x: Tensor) -> Tensor:
        x = self.lpu(x)
        return x + self.drop_path(self.mlp(layer_norm(self.norm, depthwise(self.conv, x), before=self.mlp)))


def create_mlp(config: StageConfig, mlp_ratio: float, drop: float, **dd: Any) -> nn.Module:
    """The MLP of a stage's blocks."""
    dim, hidden_dim = config.embed_dims, int(config.embed_dims * mlp_ratio)
    if config.conv_mlp:
        return ConvMlp(dim, hidden_dim, residual=config.release == "2023", drop=drop, **dd)
    return Mlp(dim, hidden_dim, drop=drop, **dd)


def create_attention(
    letter: str, config: StageConfig, map_size: tuple[int, int], proj_drop: float = 0.0, **dd: Any
) -> nn.Module:
    """The attention named by a letter of `StageConfig.blocks`."""
    dim, num_heads, window_size = config.embed_dims, config.num_heads, config.window_size
    if letter == "D":
        return DeformableAttention(
            dim,
            num_heads,
            num_groups=config.num_groups,
            kernel_size=config.kernel_size,
            stride=config.stride,
            offset_range_factor=config.offset_range_factor,
            table_size=map_size,
            proj_drop=proj_drop,
            position_bias=config.position_bias,
            no_off=config.no_off,
            release=config.release,
            **dd,
        )
    if letter == "N":
        return NeighborhoodAttention(dim, num_heads, config.neighborhood_size, proj_drop=proj_drop, **dd)
    if letter == "P":
        return SpatialReductionAttention(dim, num_heads, config.sr_ratio, proj_drop=proj_drop, **dd)
    if letter == "E":
        return SlideAttention(dim, num_heads, **dd)
    if letter not in ("L", "S"):
        raise ValueError(f"blocks must be letters of L, S, D, N, P, E and X, got {letter!r} in {config.blocks!r}")
    shift_size = math.ceil(window_size / 2) if letter == "S" else 0
    return WindowAttention(dim, num_heads, window_size, shift_size, proj_drop=proj_drop, **dd)
