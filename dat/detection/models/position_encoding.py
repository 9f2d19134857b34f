"""Sine position encodings (DETR, arXiv:2005.12872, appendix A.4)."""

import math

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


def sine_position(
    mask: Tensor | None,
    size: tuple[int, int],
    embed_dim: int,
    like: Tensor,
    anchor: float = 0.5,
    temperature: float = 10000.0,
) -> Tensor:
    """Position encoding of every pixel of a map: half of the channels for y, half for x.

    Coordinates are fractions of the unpadded part, so padding does not change them.

    Args:
        mask: [B, h, w], True on padding, or None where nothing is padded.
        size: (h, w).
        embed_dim: channels, a multiple of 4.
        like: gives the device and the result's dtype; computed in float32, as the official implementation does.
        anchor: the point of a pixel that is encoded: 0.5, its centre (Deformable DETR), or 1, its far edge (DETR).
        temperature: as for sine_encoding.

    Returns:
        [B, h * w, embed_dim], or [1, h * w, embed_dim] without a mask.
    """
    h, w = size
    device = like.device
    if mask is None:
        y = torch.arange(1, h + 1, dtype=torch.float32, device=device)[None, :, None]
        x = torch.arange(1, w + 1, dtype=torch.float32, device=device)[None, None, :]
    else:
        y, x = (~mask).cumsum(1, dtype=torch.float32), (~mask).cumsum(2, dtype=torch.float32)
    # A wholly padded row or column has 0 valid pixels: the small term keeps the quotient finite.
    y = (y - 1 + anchor) / (y[:, -1, None] + 1e-6)
    x = (x - 1 + anchor) / (x[:, :, -1, None] + 1e-6)
    halves = (sine_encoding(c[..., None], embed_dim // 2, temperature).expand(-1, h, w, -1) for c in (y, x))
    return torch.cat(list(halves), -1).flatten(1, 2).to(like.dtype)
