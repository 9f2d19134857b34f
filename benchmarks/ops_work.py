"""The workloads of the ops: tensors with the sizes and the distribution of trained models."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]

# Images of Deformable DETR, whose levels have strides 8 to 64.
SIZES = ((480, 640), (800, 1066))
HEADS, CHANNELS, LEVELS, POINTS, QUERIES = 8, 32, 4, 4, 300
# Images and batches of DAT, in classification and detection.
DAT_SIZES = ((224, 224, 8), (800, 1333, 1))
# DAT-T (release 2022) and DAT++: (stage, stride of its map, groups, channels of a group, stride of its keys).
DAT_STAGES = (
    ("DAT-T stage 3", 16, 3, 128, 1),
    ("DAT-T stage 4", 32, 6, 128, 1),
    ("DAT++-T stage 1", 4, 1, 64, 8),
    ("DAT++-S stage 2", 8, 2, 96, 4),
)
# Stride 16 of a detector's image, with the width of ResNet-50's bottleneck there.
DCN_MAP, DCN_CHANNELS = (50, 68), 256


@dataclass(frozen=True)
class Work:
    """Arguments of one call; every implementation gets the same numbers.

    Attributes:
        op: "attention", from offsets and logits to the weighted sum; "sampling", from locations and weights; "dat",
            every sample by itself with align_corners; "dcn", deformable convolution, version 2.
        name: kind and size.
        batch: images.
        shapes: (h, w) of the levels.
        tensors: inputs that gradients are taken with respect to. attention: value [B, S, H, D], offsets
            [B, Q, H, L, P, 2] and logits [B, Q, H, L, P]. sampling: value, locations and weights. dat: value and
            locations. dcn: input [B, C, H, W], offset [B, 18, H, W], mask [B, 9, H, W] and weight [C, C, 3, 3].
        narrow: which of the tensors are in half precision if the model is.
        reference: attention: reference points [B, Q, L, 2].
        sizes: [L, 2], the shapes as other libraries take them.
        starts: [L], the first pixel of each level.
        keys: dat: (h, w) of the map of the samples.
    """

    op: str
    name: str
    batch: int
    shapes: Shapes
    tensors: tuple[Tensor, ...]
    narrow: tuple[bool, ...]
    reference: Tensor | None = None
    sizes: Tensor | None = None
    starts: Tensor | None = None
    keys: tuple[int, int] | None = None

    def to(self, dtype: torch.dtype) -> "Work":
        """The same workload in a model of another dtype; float64 applies to all tensors."""
        wide = dtype == torch.float64
        tensors = tuple(t.to(dtype) if n or wide else t for t, n in zip(self.tensors, self.narrow, strict=True))
        reference = self.reference.double() if wide and self.reference is not None else self.reference
        return replace(self, tensors=tensors, reference=reference)


def levels(size: tuple[int, int]) -> Shapes:
    """Deformable DETR's levels of an image of `size` (height, width)."""
    return tuple((-(-size[0] // stride), -(-size[1] // stride)) for stride in (8, 16, 32, 64)[:LEVELS])


def sampling_locations(work: Work, offsets: Tensor) -> Tensor:
    """Sampling locations, computed as in the models, by one torch operator after the other."""
    return work.reference[:, :, None, :, None] + offsets / work.sizes.flip(-1)[:, None]


def attention_weights(logits: Tensor) -> Tensor:
    """Softmax over the samples of a head."""
    return logits.flatten(3).softmax(-1).view(logits.shape)


def attention(
    name: str, shapes: Shapes, queries: int | None, device: torch.device, batch: int = 1, heads: int = HEADS
) -> Work:
    """Attention to `shapes` from every pixel of them (queries None: the encoder), or from points anywhere."""
    generator = torch.Generator().manual_seed(0)
    if queries is None:
        centres = [
            torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
            for h, w in shapes
        ]
        points = torch.cat([c.flatten(0, 1) for c in centres]).expand(batch, -1, -1)
    else:
        points = torch.rand(batch, queries, 2, generator=generator)
    layout = (*points.shape[:2], heads, len(shapes), POINTS)
    pixels = sum(h * w for h, w in shapes)
    tensors = (
        torch.randn(batch, pixels, heads, CHANNELS, generator=generator),
        # Offsets of trained models reach a few pixels.
        3 * torch.randn(*layout, 2, generator=generator),
        torch.randn(layout, generator=generator),
    )
    reference = points[:, :, None].repeat(1, 1, len(shapes), 1).to(device)
    sizes = torch.tensor(shapes, device=device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    tensors = tuple(t.to(device) for t in tensors)
    return Work("attention", name, batch, shapes, tensors, (True,) * 3, reference, sizes, starts)


def sampling(work: Work) -> Work:
    """The sampling part of an attention workload."""
    value, offsets, logits = work.tensors
    tensors = (value, sampling_locations(work, offsets), attention_weights(logits))
    return replace(work, op="sampling", tensors=tensors, narrow=(True, False, True))


def dat(
    stage: str, stride: int, groups: int, channels: int, keys: int, size: tuple[int, int, int], device: torch.device
) -> Work:
    """DAT's sampling of keys, each moved by up to a pixel and a half, in an image of `size` (height, width, batch)."""
    generator = torch.Generator().manual_seed(0)
    H, W, B = -(-size[0] // stride), -(-size[1] // stride), size[2]
    Hk, Wk = -(-H // keys), -(-W // keys)
    y, x = torch.meshgrid((torch.arange(Hk) + 0.5) / Hk, (torch.arange(Wk) + 0.5) / Wk, indexing="ij")
    moves = 3 * (torch.rand(B, Hk * Wk, groups, 2, generator=generator) - 0.5) / torch.tensor([Wk, Hk])
    locations = (torch.stack((x, y), -1).flatten(0, 1)[:, None] + moves)[:, :, :, None, None]
    tensors = (torch.randn(B, H * W, groups, channels, generator=generator).to(device), locations.to(device))
    return Work("dat", f"{stage}, {size[0]}x{size[1]}", B, ((H, W),), tensors, (True, False), keys=(Hk, Wk))


def dcn(device: torch.device) -> Work:
    """A 3x3 deformable convolution, version 2, whose samples move by a few pixels."""
    generator = torch.Generator().manual_seed(0)
    H, W = DCN_MAP
    tensors = (
        torch.randn(1, DCN_CHANNELS, H, W, generator=generator),
        2 * torch.randn(1, 18, H, W, generator=generator),
        torch.rand(1, 9, H, W, generator=generator),
        torch.randn(DCN_CHANNELS, DCN_CHANNELS, 3, 3, generator=generator) / (3 * DCN_CHANNELS**0.5),
    )
    name = f"3x3, {DCN_CHANNELS} channels, {H}x{W}"
    return Work("dcn", name, 1, (DCN_MAP,), tuple(t.to(device) for t in tensors), (True,) * 4)
