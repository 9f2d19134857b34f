import pytest
import torch
from torch.nn import functional as F

from dat.layers import SpatialReductionAttention


def make_layer(sr_ratio: int, num_heads: int = 3) -> SpatialReductionAttention:
    torch.manual_seed(0)
    return SpatialReductionAttention(12, num_heads, sr_ratio, dtype=torch.float64)


@pytest.mark.parametrize("sr_ratio", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 9), (7, 4), (1, 5)])
def test_equals_a_loop_over_heads(sr_ratio, size):
    layer = make_layer(sr_ratio)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    keys = x
    if sr_ratio > 1:
        H, W = (max(side, sr_ratio) // sr_ratio * sr_ratio for side in size)
        pixels = F.pad(x, (0, 0, 0, sr_ratio, 0, sr_ratio))[:, :H, :W]
        pixels = pixels.unflatten(2, (-1, sr_ratio)).unflatten(1, (-1, sr_ratio))
        keys = layer.norm(torch.einsum("brictd,odit->brco", pixels, layer.sr.weight) + layer.sr.bias)
    q, (k, v) = layer.q(x).flatten(1, 2), layer.kv(keys).flatten(1, 2).chunk(2, -1)
    heads = [
        (qh @ kh.mT / 2).softmax(-1) @ vh
        for qh, kh, vh in zip(q.chunk(3, -1), k.chunk(3, -1), v.chunk(3, -1), strict=True)
    ]
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, -1)).view_as(x))


def test_errors():
    with pytest.raises(ValueError, match="embed_dims must be a multiple of num_heads = 5, got 12"):
        make_layer(1, num_heads=5)
    with pytest.raises(ValueError, match="sr_ratio must be at least 1, got 0"):
        make_layer(0)
