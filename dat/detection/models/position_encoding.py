"""Sine position encodings (DETR, arXiv:2005.12872, appendix A.4)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sine_encoding(coordinates: Tensor, num_feats: int, temperature: float = 10000.0) -> Tensor:
    """Encodes each coordinate by sines and cosines of geometrically spaced frequencies, interleaved.

    Args:
        coordinates: [..., n], 0 to 1 is one turn of the highest frequency.
        num_feats: channels per coordinate, even.
        temperature: ratio of the highest to the (excluded) lowest frequency.

    Returns:
        [..., n * num_feats], coordinate by coordinate.
    """
    exponents = torch.arange(0, num_feats, 2, dtype=torch.float32, device=coordinates.device) / num_feats
    angles = coordinates[..., None] * (2 * math.pi) / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-3)


def sine_positions(
    masks: Sequence[Tensor] | None,
    shapes: Sequence[tuple[int, int]],
    embed_dim: int,
    like: Tensor,
    anchor: float = 0.5,
    temperature: float = 10000.0,
) -> Tensor:
    """Position encoding of every pixel of some maps: half of the channels for y, half for x.

    Coordinates are fractions of the unpadded part, so padding does not change them.

    Args:
        masks: [B, h, w] of each map, True on padding, or None where nothing is padded.
        shapes: (h, w) of each map, S pixels in all.
        embed_dim: channels, a multiple of 4.
        like: gives the device and the result's dtype; computed in float32, as the official implementation does.
        anchor: the point of a pixel that is encoded: 0.5, its centre (Deformable DETR), or 1, its far edge (DETR).
        temperature: as for sine_encoding.

    Returns:
        [B, S, embed_dim], map by map, or [1, S, embed_dim] without masks.
    """
    coordinates = []
    for i, (h, w) in enumerate(shapes):
        if masks is None:
            y = torch.arange(1, h + 1, dtype=torch.float32, device=like.device)[None, :, None]
            x = torch.arange(1, w + 1, dtype=torch.float32, device=like.device)[None, None, :]
        else:
            inside = ~masks[i]
            y, x = inside.cumsum(1, dtype=torch.float32), inside.cumsum(2, dtype=torch.float32)
        # A wholly padded row or column has 0 valid pixels: the small term keeps the quotient finite.
        coordinates.append((y - (1 - anchor)) / (y[:, -1, None] + 1e-6))
        coordinates.append((x - (1 - anchor)) / (x[:, :, -1, None] + 1e-6))
    # All at once, as each call of a small kernel takes a GPU's host longer than the GPU.
    flat = torch.cat([c.flatten(1) for c in coordinates], 1)
    encoded = sine_encoding(flat[..., None], embed_dim // 2, temperature)
    halves = [
        part.unflatten(1, c.shape[1:])
        for part, c in zip(encoded.split([c.shape[1] * c.shape[2] for c in coordinates], 1), coordinates, strict=True)
    ]
    maps = [
        torch.cat((y.expand(-1, h, w, -1), x.expand(-1, h, w, -1)), -1).flatten(1, 2)
        for (h, w), y, x in zip(shapes, halves[::2], halves[1::2], strict=True)
    ]
    return torch.cat(maps, 1).to(like.dtype)
