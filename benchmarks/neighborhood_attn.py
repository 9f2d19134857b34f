"""DAT++'s neighbourhood attention in `benchmarks.attention`: the workloads, and other ways to compute it in PyTorch.

The workloads are DAT++'s: windows of 7 x 7, heads of 32 channels, the maps of the stages at 224 and one of a detector.
NATTEN, which the official code is built on, dropped the position bias in 0.20: `benchmarks.natten_peer`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

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


@cache
def flex_parts(size: tuple[int, int], device: torch.device) -> tuple[Callable[..., Tensor], BlockMask, Tensor]:
    """Parts of FlexAttention that a map needs once: the compiled function, its block mask, displacements of pairs.

    Displacements are looked up, because Inductor fails to compile index arithmetic in a score for CPUs.
    """
    (H, W), reach = size, KERNEL - 1
    row, column = torch.arange(H, device=device).repeat_interleave(W), torch.arange(W, device=device).repeat(H)
    first_row, first_column = (row - KERNEL // 2).clamp(0, H - KERNEL), (column - KERNEL // 2).clamp(0, W - KERNEL)

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        dy, dx = row[key] - first_row[query], column[key] - first_column[query]
        return (dy >= 0) & (dy < KERNEL) & (dx >= 0) & (dx < KERNEL)

    dy, dx = ((at - at[:, None]).clamp(-reach, reach) + reach for at in (row, column))
    mask = create_block_mask(near, None, None, H * W, H * W, device=device)
    return torch.compile(flex_attention, dynamic=False), mask, dy * (2 * KERNEL - 1) + dx


def flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """FlexAttention; on a CPU it has no gradients."""
    attention, mask, displacement = flex_parts(size, query.device)
    flat = bias.flatten(1)

    def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + flat[h, displacement[query, key]]

    return attention(query, key, value, score_mod=biased, block_mask=mask, scale=scale)


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
    peers = {"unfold": unfolded, **({"dense": dense} if fits(work) else {})}
    by_name = {key: partial(peer, size=work.size, scale=CHANNELS**-0.5) for key, peer in peers.items()}
    return {"ours": partial(neighborhood_attn, **options(work)), **by_name}


def forward_forms(work: Work) -> dict[str, Callable[..., Tensor]]:
    """Functions that have no gradients and take long to compile."""
    return {"flex": partial(flex, size=work.size, scale=CHANNELS**-0.5)} if fits(work) else {}


def fits(work: Work) -> bool:
    """Whether a tensor with an entry for each pair of pixels fits in memory."""
    return work.size[0] * work.size[1] <= DENSE_CELLS
