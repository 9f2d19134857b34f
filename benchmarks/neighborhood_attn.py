"""DAT++'s neighbourhood attention in `benchmarks.attention`: the workloads, and other ways to compute it in PyTorch.

The workloads are DAT++'s: windows of 7 x 7, heads of 32 channels, the maps of the stages at 224 and one of a detector.
NATTEN, which the official code is built on, dropped the position bias in 0.20: `benchmarks.natten_peer`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops import neighborhood_attn
from dat.ops.reference import neighbors

KERNEL, CHANNELS = 7, 32


class Work(NamedTuple):
    """Neighbourhood attention to a map of `size`."""

    B: int
    heads: int
    size: tuple[int, int]


WORKS = {
    "56x56, B 8, 2 heads": Work(8, 2, (56, 56)),
    "28x28, B 8, 4 heads": Work(8, 4, (28, 28)),
    "16x16, B 8, 8 heads": Work(8, 8, (16, 16)),
    "14x14, B 8, 8 heads": Work(8, 8, (14, 14)),
    "200x272, B 1, 2 heads": Work(1, 2, (200, 272)),
}
# Dense attention to the last map would take 24 GB.
DENSE_CELLS = 56 * 56


def unfolded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Attention with every window in memory; pixels near the border use the nearest window inside the map."""
    rows, columns = (torch.arange(length).sub(KERNEL // 2).clamp(0, length - KERNEL) for length in size)

    def windows(x: Tensor) -> Tensor:
        inside = x.unflatten(2, size).unfold(2, KERNEL, 1).unfold(3, KERNEL, 1)
        return inside[:, :, rows][:, :, :, columns].flatten(2, 3).flatten(-2)

    _, displacement = neighbors(size, KERNEL, 1, query.device)
    scores = (query.unsqueeze(-2) @ windows(key)).squeeze(-2) * scale + bias.flatten(1)[:, displacement]
    return (windows(value) @ scores.softmax(-1).unsqueeze(-1)).squeeze(-1)


def dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Attention to every pixel of the map, with a bias of minus infinity for pixels outside of the neighbourhood."""
    pixel, displacement = neighbors(size, KERNEL, 1, query.device)
    mask = bias.new_full((bias.shape[0], len(pixel), len(pixel)), -torch.inf)
    mask = mask.scatter(2, pixel.expand(bias.shape[0], -1, -1), bias.flatten(1)[:, displacement])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), scale=scale)


def inputs(work: Work, device: torch.device) -> list[Tensor]:
    """Query, key and value in the layout of a layer's projections, and the bias."""
    generator = torch.Generator().manual_seed(0)
    H, W = work.size
    qkv = torch.randn(work.B, H * W, 3, work.heads, CHANNELS, generator=generator).to(device)
    bias = torch.randn(work.heads, 2 * KERNEL - 1, 2 * KERNEL - 1, generator=generator).to(device)
    return [*qkv.permute(2, 0, 3, 1, 4).unbind(0), bias]


def options(work: Work) -> dict[str, Any]:
    """The keyword arguments of a call."""
    return {"size": work.size, "kernel_size": KERNEL, "scale": CHANNELS**-0.5}


def forms(work: Work) -> dict[str, Callable[..., Tensor]]:
    """Functions of the tensors of `inputs`, by name."""
    peers = {"unfold": unfolded, **({"dense": dense} if math.prod(work.size) <= DENSE_CELLS else {})}
    by_name = {key: partial(peer, size=work.size, scale=CHANNELS**-0.5) for key, peer in peers.items()}
    return {"ours": partial(neighborhood_attn, **options(work)), **by_name}
