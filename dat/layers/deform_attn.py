"""Deformable attention of DAT: every query attends to keys sampled where a small network moved them."""

import math
from typing import Any

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dat.layers.autocast import calls_forward_only
from dat.layers.position_bias import FixedBias, LogSpacedBias, resize_table
from dat.ops import deform_attn, deform_sample
from dat.ops._common import autocast, full_precision
from dat.ops.key_positions import has_key_positions, key_positions
from dat.ops.placement import Placement
from dat.ops.reference import grid_coordinates
from dat.ops.sizes import is_exporting, sym_max

POSITION_BIASES = ("table", "fixed_pe", "dwc_pe", "log_cpb", "none")
# Pairs of a query and a key, over all images and groups, for which the MLP of "log_cpb" runs at a time.
LOG_CPB_PAIRS = 2**21
# Above this many elements of the key map per image, recompute the offset network in the backward pass on a CPU. On a
# GPU, its few kernels take longer than its maps are worth.
LARGE_MAP = 2**19


class Float32Linear(nn.Linear):
    """A linear layer that works in float32 under autocast: its type keeps it from `casts_parameters_together`."""


class DeformableAttention(nn.Module):
    """Deformable multi-head attention (DAT, https://arxiv.org/abs/2201.00520, section 3.2, equations 6 to 9).

    Values are sampled with -1 and 1 at the centres of the map's corner pixels. The two official releases use different
    coordinates for keys and queries, so their weights are not interchangeable:

    - 2022: key (i, j) of a map of Hk x Wk keys starts at its pixel's centre ((j + .5) / Wk, (i + .5) / Hk), scaled to
      -1..1; positions without a limited range go through tanh. Queries are at the centres of their pixels.
    - 2023 (DAT++, https://arxiv.org/abs/2309.01430): it starts at ((j + .5) / (Wk - 1), (i + .5) / (Hk - 1)), which
      scales to half a pixel beyond -1..1; positions without a limited range are clamped. Queries run from -1 to 1.

    Args:
        embed_dims: channels C; a multiple of num_heads and of num_groups.
        num_heads: attention heads; a multiple of num_groups.
        num_groups: groups of channels, each with offsets of its own.
        kernel_size: kernel of the depth-wise convolution in the offset network; odd, or, in 2023, equal to the stride,
            in which case pixels beyond the last whole stride are ignored.
        stride: queries per key along each side.
        offset_range_factor: above 0 (2022) or from 0 (2023), offsets are at most half as many pixels of the key map;
            at 0 (2022) they are unlimited; below 0 they are limited only by the tanh or clamp of the positions.
        table_size: (H, W) of the query map that "table" and "fixed_pe" are made for.
        position_bias: how the attention is informed of positions.
            "table": a table [num_heads, 2H-1, 2W-1] interpolated at the displacements, for maps of any size.
                With table_size None there is none.
            "fixed_pe": a bias for each pair of a query and a key, whatever the offset; resampled for other sizes.
            "dwc_pe": no bias; a 3x3 depth-wise convolution of the queries is added to the output (LePE).
            "log_cpb": an MLP of the logarithms of the displacements (Swin V2).
            "none": no position information.
        no_off: no offsets: keys are averages over stride x stride pixels.
        release: "2022" or "2023".
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
        position_bias: str = "table",
        no_off: bool = False,
        release: str = "2022",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(embed_dims, num_heads, num_groups, stride, position_bias, table_size, release)
        # The official code of 2023 does not pad such a convolution: it ignores pixels beyond the last whole stride.
        self.unpadded = release == "2023" and kernel_size == stride and not no_off
        if kernel_size % 2 == 0 and not self.unpadded and not no_off:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.num_groups, self.stride = num_heads, num_groups, stride
        self.offset_range_factor, self.no_off, self.release = offset_range_factor, no_off, release
        self.scale = (embed_dims // num_heads) ** -0.5
        if not no_off:
            width = embed_dims // num_groups
            padding = 0 if self.unpadded else kernel_size // 2
            self.offset_conv = nn.Conv2d(width, width, kernel_size, stride, padding, groups=width, **dd)
            self.offset_norm = nn.LayerNorm(width, **dd)
            self.offset_proj = Float32Linear(width, 2, bias=False, **dd)
        self.q = nn.Linear(embed_dims, embed_dims, **dd)
        self.k = nn.Linear(embed_dims, embed_dims, **dd)
        self.v = nn.Linear(embed_dims, embed_dims, **dd)
        self.proj = nn.Linear(embed_dims, embed_dims, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self._create_position_bias(position_bias, table_size, dd)

    def _create_position_bias(self, position_bias: str, table_size: tuple[int, int] | None, dd: dict[str, Any]) -> None:
        num_heads, embed_dims = self.num_heads, self.q.in_features
        self.rpe_table: nn.Parameter | None = None
        self.fixed_bias: FixedBias | None = None
        self.log_cpb: LogSpacedBias | None = None
        self.lepe: nn.Conv2d | None = None
        if position_bias == "table" and table_size is not None:
            H, W = table_size
            self.rpe_table = nn.Parameter(torch.empty(num_heads, 2 * H - 1, 2 * W - 1, **dd))
            trunc_normal_(self.rpe_table, std=0.01)
        elif position_bias == "fixed_pe" and table_size is not None:
            self.fixed_bias = FixedBias(num_heads, table_size, self._fixed_keys(table_size), **dd)
        elif position_bias == "log_cpb":
            self.log_cpb = LogSpacedBias(num_heads // self.num_groups, **dd)
        elif position_bias == "dwc_pe":
            self.lepe = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] of any size to [B, H, W, C]."""
        B, H, W, _ = x.shape
        # Once, for the projection and for the samples.
        x = autocast(x)
        query = self.q(x)
        positions, locations = self._place_keys(query)
        sampled = self._sample(x, locations)
        q = rearrange(query, "b y x (h c) -> b h (y x) c", h=self.num_heads)
        k, v = (rearrange(proj(sampled), "b n (h c) -> b h n c", h=self.num_heads) for proj in (self.k, self.v))
        if self.fixed_bias is not None:
            bias = self.fixed_bias((H, W), self.key_size((H, W))).to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, bias.expand(B, -1, -1, -1), scale=self.scale)
        elif self.log_cpb is not None:
            out = self._attend_log_cpb(self.log_cpb, q, k, v, positions, (H, W))
        else:
            table, corners = self.rpe_table, self.release == "2023"
            out = deform_attn(q, k, v, positions, table, size=(H, W), scale=self.scale, align_corners=corners)
        out = rearrange(out, "b h (y x) c -> b y x (h c)", y=H, x=W)
        if self.lepe is not None:
            out = out + self.lepe(query.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(out))

    @property
    def placement(self) -> Placement:
        """Where offsets move the keys."""
        return Placement(self.offset_range_factor, self.release)

    def positions(self, query: Tensor) -> Tensor:
        """Positions of the keys: [B, num_groups, N, 2], (x, y), -1..1 across the map, in at least float32.

        Args:
            query: [B, H, W, C], the projected queries.
        """
        return self._place_keys(query)[0]

    def _place_keys(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The keys' positions, and their locations [B, N, num_groups, 1, 1, 2] for `deform_sample`."""
        H, W, C = query.shape[1:]
        parameters = self._kernel_parameters(query)
        if parameters:
            x, eps = self._convolve(query, None), self.offset_norm.eps
            return key_positions(x, *parameters, eps=eps, placement=self.placement)
        # Compilers choose which values to recompute themselves.
        small = query.device.type != "cpu" or math.prod(self.key_size((H, W))) * C <= LARGE_MAP
        if torch.compiler.is_compiling() or small:
            offset = self._offsets(query)
        else:
            offset = checkpoint(self._offsets, query, use_reentrant=False, preserve_rng_state=False)
        return self.placement(offset.to(torch.promote_types(offset.dtype, torch.float32)))

    def _kernel_parameters(self, query: Tensor) -> tuple[Tensor, ...]:
        """The parameters that `key_positions` takes; empty where the layers behind the convolution must be called."""
        if self.no_off:
            return ()
        conv, norm, proj = self.offset_conv, self.offset_norm, self.offset_proj
        plain = type(conv) is nn.Conv2d and type(norm) is nn.LayerNorm and type(proj) is Float32Linear
        if not plain or not all(map(calls_forward_only, (conv, norm, proj))):
            return ()
        if conv.bias is None or norm.weight is None or norm.bias is None or proj.bias is not None:
            return ()
        parameters = conv.bias, norm.weight, norm.bias, proj.weight
        return parameters if has_key_positions(query, *parameters, self.num_groups) else ()

    def key_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (Hk, Wk) of the key map for a query map of `size`."""
        H, W = (max(side // self.stride, 1) if self.unpadded else -(-side // self.stride) for side in size)
        return H, W

    def set_table_size(self, size: tuple[int, int]) -> None:
        """Resample the table, where there is one, for query maps of `size`."""
        if self.rpe_table is not None:
            table = resize_table(self.rpe_table.detach(), (2 * size[0] - 1, 2 * size[1] - 1))
            self.rpe_table = nn.Parameter(table, self.rpe_table.requires_grad)
        if self.fixed_bias is not None:
            self.fixed_bias.set_sizes(size, self._fixed_keys(size))

    def _fixed_keys(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size of the key map for which the official code makes "fixed_pe": whole strides only."""
        return max(size[0] // self.stride, 1), max(size[1] // self.stride, 1)

    def _offsets(self, query: Tensor) -> Tensor:
        """Output of the offset network: [B, Hk, Wk, num_groups, 2]."""
        if self.no_off:
            size = self.key_size((query.shape[1], query.shape[2]))
            return query.new_zeros(query.shape[0], *size, self.num_groups, 2)
        norm = self.offset_norm
        x = self._convolve(query, self.offset_conv.bias)
        # Autocast would cast between these layers and round positions.
        x = norm(x.to(norm.weight.dtype))
        with full_precision(x):
            # Autocast of GPUs makes the norm float32 for weights in half precision too.
            return self.offset_proj(F.gelu(x).to(norm.weight.dtype))

    def _convolve(self, query: Tensor, bias: Tensor | None) -> Tensor:
        """The offset network's convolution with its bias or without: [B, Hk, Wk, num_groups, C / num_groups]."""
        B, H, W, C = query.shape
        groups, conv = self.num_groups, self.offset_conv
        x = query.permute(0, 3, 1, 2)
        if self.unpadded:
            x = F.pad(x, (0, sym_max(self.stride - W, 0), 0, sym_max(self.stride - H, 0)))
        if type(conv) is nn.Conv2d and calls_forward_only(conv):
            weight = self._for_groups(conv.weight, query.dtype)
            bias = None if bias is None else self._for_groups(bias, query.dtype)
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=C)
        else:
            x = conv(x.reshape(B * groups, C // groups, *x.shape[2:])).unflatten(0, (B, groups)).flatten(1, 2)
        return x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))

    def _for_groups(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter of the convolution, which all groups share, repeated for each of them and cast in one copy.

        With the groups in the batch instead, the queries would have to be copied.
        """
        return parameter.expand(self.num_groups, *parameter.shape).to(dtype).flatten(0, 1)

    def _sample(self, x: Tensor, locations: Tensor) -> Tensor:
        """Values of the map [B, H, W, C] at the keys' `locations`: [B, N, C]."""
        B, H, W, C = x.shape
        if self.no_off:
            return F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, ceil_mode=True).flatten(2).mT
        value = x.reshape(B, H * W, self.num_groups, C // self.num_groups)
        return deform_sample(value, ((H, W),), locations, align_corners=True).reshape(B, locations.shape[1], C)

    def _attend_log_cpb(
        self, mlp: LogSpacedBias, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Attention with the bias of an MLP, for a chunk of the queries at a time: its layers exceed the scores."""
        y, x = (self.query_grid(length, positions) for length in size)
        grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), -1).flatten(0, 1)

        def attend(chunk: Tensor, grid_chunk: Tensor) -> Tensor:
            bias = mlp(grid_chunk, positions).to(chunk.dtype)
            return F.scaled_dot_product_attention(chunk, k, v, bias, scale=self.scale)

        # An exported graph serves maps of every size, but would fix the number of chunks.
        if is_exporting():
            return attend(q, grid)
        step = max(LOG_CPB_PAIRS // max(positions[..., 0].numel(), 1), 1)
        if step >= len(grid):
            return attend(q, grid)
        chunks = zip(q.split(step, 2), grid.split(step), strict=True)
        # Recompute in the backward pass: the activations of all chunks together would take as much memory as without.
        return torch.cat([checkpoint(attend, *chunk, use_reentrant=False) for chunk in chunks], 2)

    def query_grid(self, length: int, like: Tensor) -> Tensor:
        """Positions of the queries along a side of `length`."""
        return grid_coordinates(length, like, self.release == "2023")


def _check(
    embed_dims: int,
    num_heads: int,
    num_groups: int,
    stride: int,
    position_bias: str,
    table_size: tuple[int, int] | None,
    release: str,
) -> None:
    if embed_dims % num_heads:
        raise ValueError(f"embed_dims must be a multiple of num_heads = {num_heads}, got {embed_dims}")
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(f"num_groups must be a divisor of num_heads = {num_heads}, got {num_groups}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if release not in ("2022", "2023"):
        raise ValueError(f"release must be '2022' or '2023', got {release!r}")
    if position_bias not in POSITION_BIASES:
        raise ValueError(f"position_bias must be one of {POSITION_BIASES}, got {position_bias!r}")
    if position_bias == "fixed_pe" and table_size is None:
        raise ValueError("table_size must be (H, W) for position_bias 'fixed_pe', got None")
