"""DAT as the official code computes it, in plain PyTorch: the peer of the models and of the attention.

Maps are NCHW, projections are 1x1 convolutions, and a deformable block has displacements, bias and scores in memory.
It imports only torch, so that it also runs with the old torch that NATTEN 0.14.6 needs.

DAT: https://arxiv.org/abs/2201.00520, section 3; DAT++: https://arxiv.org/abs/2309.01430, section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (query, key, value [B, h, H * W, c], bias [h, 2k-1, 2k-1], (H, W), scale) to [B, h, H * W, c]
Neighborhood = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[int, int], float], Tensor]


def deformable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    size: tuple[int, int],
    scale: float,
    align_corners: bool = True,
) -> Tensor:
    """DAT's attention with all tensors in memory; arguments and result as in `dat.ops.deform_attn`."""
    B, h, HW, c = query.shape
    groups, N = positions.shape[1:3]
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (query, key, value))
    attention = torch.einsum("b c m, b c n -> b m n", q, k).mul(scale)
    y, x = torch.meshgrid(*(query_grid(length, align_corners, positions) for length in size), indexing="ij")
    grid = torch.stack((y, x), -1)
    grid = grid[None].expand(B * groups, -1, -1, -1).reshape(B * groups, HW, 2)
    displacement = (grid[:, :, None] - positions.flip(-1).reshape(B * groups, N, 2)[:, None]).mul(0.5)
    tables = table[None].expand(B, -1, -1, -1).reshape(B * groups, h // groups, *table.shape[1:])
    bias = F.grid_sample(tables, displacement[..., (1, 0)], mode="bilinear", align_corners=True)
    attention = attention + bias.reshape(B * h, HW, N)
    out = torch.einsum("b m n, b c n -> b c m", F.softmax(attention, dim=2), v)
    return out.reshape(B, h, c, HW).transpose(2, 3)


def query_grid(length: int, align_corners: bool, like: Tensor) -> Tensor:
    """Positions of the queries along a side: pixel centres (2022), or from -1 to 1 (2023, align_corners)."""
    pixels = torch.arange(length, dtype=like.dtype, device=like.device)
    return pixels / (length - 1.0) * 2 - 1 if align_corners else (pixels + 0.5) / length * 2 - 1


class OfficialForm(nn.Module):
    """A DAT of this package in the official formulation: images [B, 3, H, W] to logits [B, num_classes].

    Args:
        stages: for each stage "blocks" (letters L, S, D, N), "heads", "groups", "kernel_size", "stride",
            "offset_range_factor", "window_size" and "release", as in `dat.models.StageConfig`.
        state: the model's state dict; its names decide which parts exist.
        neighborhood: the attention of N blocks.
    """

    def __init__(
        self, stages: Sequence[Mapping[str, Any]], state: Mapping[str, Tensor], neighborhood: Neighborhood
    ) -> None:
        super().__init__()
        self.stage_configs, self.neighborhood = list(stages), neighborhood
        # Parameter names must not contain dots.
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in state.items()})

    def has(self, name: str) -> bool:
        return name.replace(".", "/") in self.weights

    def get(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for i, config in enumerate(self.stage_configs):
            if i:
                x = self.downsample(f"stages.{i}.downsample", x)
            for j, letter in enumerate(config["blocks"]):
                x = self.block(f"stages.{i}.blocks.{j}", letter, config, x)
        x = F.adaptive_avg_pool2d(self.norm("norm", x), 1).flatten(1)
        return F.linear(x, self.get("head.fc.weight"), self.get("head.fc.bias"))

    def stem(self, x: Tensor) -> Tensor:
        if self.has("patch_embed.proj.weight"):
            return self.norm("patch_embed.norm", self.conv("patch_embed.proj", x, stride=4))
        x = F.gelu(self.norm("patch_embed.norm1", self.conv("patch_embed.conv1", x, stride=2, padding=1)))
        return self.norm("patch_embed.norm2", self.conv("patch_embed.conv2", x, stride=2, padding=1))

    def downsample(self, name: str, x: Tensor) -> Tensor:
        padding = self.get(f"{name}.conv.weight").shape[-1] // 3
        return self.norm(f"{name}.norm", self.conv(f"{name}.conv", x, stride=2, padding=padding))

    def block(self, name: str, letter: str, config: Mapping[str, Any], x: Tensor) -> Tensor:
        if self.has(f"{name}.lpu.conv.weight"):
            x = self.depthwise(f"{name}.lpu.conv", x) + x
        attend = {"D": self.deformable, "N": self.neighbors, "L": self.window, "S": self.window}[letter]
        x = attend(f"{name}.attn", config, self.norm(f"{name}.norm1", x), letter == "S") + x
        return self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x)) + x

    def mlp(self, name: str, x: Tensor) -> Tensor:
        if self.has(f"{name}.dwconv.weight"):
            x = self.conv(f"{name}.fc1", x)
            x = F.gelu(x + self.depthwise(f"{name}.dwconv", x))
            return self.conv(f"{name}.fc2", x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", tokens)))
        return tokens.transpose(1, 2).reshape(x.shape)

    def deformable(self, name: str, config: Mapping[str, Any], x: Tensor, shift: bool) -> Tensor:
        B, C, H, W = x.shape
        heads, groups = config["heads"], config["groups"]
        query = self.conv(f"{name}.q", x)
        positions = self.positions(name, config, query)
        n = positions.shape[1] * positions.shape[2]
        sampled = F.grid_sample(
            x.reshape(B * groups, C // groups, H, W), positions[..., (1, 0)], mode="bilinear", align_corners=True
        ).reshape(B, C, 1, n)
        q, k, v = (
            t.reshape(B, heads, C // heads, -1).transpose(2, 3)
            for t in (query, self.conv(f"{name}.k", sampled), self.conv(f"{name}.v", sampled))
        )
        out = deformable_attention(
            q, k, v, positions.flip(-1).reshape(B, groups, n, 2), self.get(f"{name}.rpe_table"),
            size=(H, W), scale=(C // heads) ** -0.5, align_corners=config["release"] == "2023",
        )  # fmt: skip
        return self.conv(f"{name}.proj", out.transpose(2, 3).reshape(B, C, H, W))

    def positions(self, name: str, config: Mapping[str, Any], query: Tensor) -> Tensor:
        """Positions of the keys: [B * groups, Hk, Wk, 2], (y, x)."""
        B, C, H, W = query.shape
        groups, kernel_size = config["groups"], config["kernel_size"]
        offset = self.depthwise(
            f"{name}.offset_conv", query.reshape(B * groups, C // groups, H, W), config["stride"],
            0 if kernel_size == config["stride"] else kernel_size // 2,
        )  # fmt: skip
        offset = self.conv(f"{name}.offset_proj", F.gelu(self.norm(f"{name}.offset_norm", offset)))
        sides = offset.shape[2:]
        new = config["release"] == "2023"
        lengths = [side - 1.0 if new else side for side in sides]
        centres = [torch.arange(side, device=offset.device) + 0.5 for side in sides]
        y, x = torch.meshgrid(*(c / n * 2 - 1 for c, n in zip(centres, lengths, strict=True)), indexing="ij")
        reference = torch.stack((y, x), -1).to(offset)
        factor = config["offset_range_factor"]
        if factor > 0:
            reach = torch.tensor([1.0 / n for n in lengths], device=offset.device).reshape(1, 2, 1, 1)
            offset = offset.tanh() * reach * factor
        positions = offset.permute(0, 2, 3, 1) + reference
        if factor > 0:
            return positions
        return positions.clamp(-1, 1) if new else positions.tanh()

    def neighbors(self, name: str, config: Mapping[str, Any], x: Tensor, shift: bool) -> Tensor:
        B, C, H, W = x.shape
        heads, bias = config["heads"], self.get(f"{name}.rpb")
        side = (bias.shape[-1] + 1) // 2
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, max(side - W, 0), 0, max(side - H, 0)))
        size = (x.shape[1], x.shape[2])
        qkv = self.linear(f"{name}.qkv", x).reshape(B, size[0] * size[1], 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        out = self.neighborhood(qkv[0], qkv[1], qkv[2], bias, size, (C // heads) ** -0.5)
        out = out.transpose(1, 2).reshape(B, *size, C)[:, :H, :W]
        return self.linear(f"{name}.proj", out).permute(0, 3, 1, 2)

    def window(self, name: str, config: Mapping[str, Any], x: Tensor, shift: bool) -> Tensor:
        """Attention in windows. The official code does not pad, so sides must be multiples of the window size."""
        B, C, H, W = x.shape
        heads, side = config["heads"], config["window_size"]
        roll = -(-side // 2) if shift else 0
        if shift:
            x = x.roll((-roll, -roll), (2, 3))
        x = x.reshape(B, C, H // side, side, W // side, side).permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, C)
        qkv = self.linear(f"{name}.qkv", x).reshape(-1, side * side, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        attention = torch.einsum("b h m c, b h n c -> b h m n", qkv[0] * (C // heads) ** -0.5, qkv[1])
        pixels = torch.arange(side, device=x.device)
        steps = pixels[:, None] - pixels + side - 1
        index = steps[:, None, :, None] * (2 * side - 1) + steps[None, :, None, :]
        bias = self.get(f"{name}.relative_position_bias_table")[index.reshape(side * side, side * side)]
        attention = attention + bias.permute(2, 0, 1)
        if shift:
            mask = shift_mask((H, W), side, roll, x)
            attention = (attention.reshape(B, len(mask), heads, *mask.shape[1:]) + mask[:, None]).flatten(0, 1)
        out = torch.einsum("b h m n, b h n c -> b h m c", attention.softmax(3), qkv[2])
        out = self.linear(f"{name}.proj", out.transpose(1, 2).reshape(-1, side * side, C))
        out = out.reshape(B, H // side, W // side, side, side, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return out.roll((roll, roll), (2, 3)) if shift else out

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.get(f"{name}.weight")
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, self.get(f"{name}.bias")).permute(0, 3, 1, 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        """A convolution; the weights of a linear layer are those of a 1x1 convolution."""
        weight = self.get(f"{name}.weight")
        bias = self.get(f"{name}.bias") if self.has(f"{name}.bias") else None
        return F.conv2d(x, weight if weight.ndim == 4 else weight[:, :, None, None], bias, **options)

    def depthwise(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def shift_mask(size: tuple[int, int], side: int, roll: int, like: Tensor) -> Tensor:
    """A mask [windows, side**2, side**2] of 0 and -1000 that separates pixels which only the roll made neighbours."""
    regions = []
    for length in size:
        region = torch.zeros(length, device=like.device)
        region[-side:-roll], region[-roll:] = 1, 2
        regions.append(region)
    region = regions[0][:, None] * 3 + regions[1]
    region = region.reshape(size[0] // side, side, -1, side).transpose(1, 2).reshape(-1, side * side)
    return (region[:, :, None] != region[:, None]).to(like) * -1000.0
