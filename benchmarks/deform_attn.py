"""DAT's deformable attention in `benchmarks.attention`: the workloads, and the formulation of the official code.

The workloads are DAT++'s deformable blocks, with a table made for the map's own size, and with the table of 224 pixels,
which official detectors use at any size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.official_form import deformable_attention
from dat.ops import deform_attn


@dataclass(frozen=True)
class Work:
    """The attention of a deformable block.

    Attributes:
        B, heads, groups: batch, attention heads, groups of keys.
        size: rows and columns of queries.
        keys: rows and columns of keys.
        side: side of the square query map that the table was made for; None: `size`.
        channels: of a head.
    """

    B: int
    heads: int
    groups: int
    size: tuple[int, int]
    keys: tuple[int, int]
    side: int | None = None
    channels: int = 32


WORKS = {
    "DAT++-T stage 1, 224, B 8": Work(8, 2, 1, (56, 56), (7, 7)),
    "DAT++-T stage 1, 224, B 8, table of 224": Work(8, 2, 1, (56, 56), (7, 7), 56),
    "DAT++-B stage 2, 384, B 2": Work(2, 8, 4, (48, 48), (12, 12)),
    "DAT++-B stage 2, 384, B 2, table of 224": Work(2, 8, 4, (48, 48), (12, 12), 28),
    "DAT++-T stage 1, 512x672": Work(1, 2, 1, (128, 168), (16, 21)),
    "DAT++-T stage 1, 512x672, table of 224": Work(1, 2, 1, (128, 168), (16, 21), 56),
    "DAT++-T stage 3, 800x1088": Work(1, 8, 4, (50, 68), (25, 34)),
    "DAT++-T stage 3, 800x1088, table of 224": Work(1, 8, 4, (50, 68), (25, 34), 14),
}
MEMORY_WORKS = {"DAT++-T stage 1, 800x1333, table of 224": Work(1, 2, 1, (200, 334), (25, 42), 56)}


def inputs(work: Work, device: torch.device) -> list[Tensor]:
    """Query, key, value, positions and table of one call, with keys moved by about one pixel of their map."""
    (H, W), (Hk, Wk) = work.size, work.keys
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(Hk), torch.arange(Wk), indexing="ij")
    centres = torch.stack(((x + 0.5) / max(Wk - 1, 1) * 2 - 1, (y + 0.5) / max(Hk - 1, 1) * 2 - 1), -1).flatten(0, 1)
    moves = torch.randn(work.B, work.groups, Hk * Wk, 2, generator=generator) / torch.tensor([Wk, Hk])
    T_h, T_w = (2 * H - 1, 2 * W - 1) if work.side is None else (2 * work.side - 1, 2 * work.side - 1)
    lengths = (H * W, Hk * Wk, Hk * Wk)
    tensors = [torch.randn(work.B, work.heads, n, work.channels, generator=generator) for n in lengths]
    tensors += [(centres + moves).clamp(-1, 1), torch.randn(work.heads, T_h, T_w, generator=generator)]
    return [t.to(device) for t in tensors]


def forms(work: Work) -> dict[str, Callable[..., Tensor]]:
    """Functions of the tensors of `inputs`, by name."""
    options = {"size": work.size, "scale": work.channels**-0.5}
    return {"ours": partial(deform_attn, **options), "official": partial(deformable_attention, **options)}
