import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dat.layers import DeformableAttention


def make_layer(embed_dims=24, num_heads=6, **arguments) -> DeformableAttention:
    torch.manual_seed(0)
    layer = DeformableAttention(embed_dims, num_heads, dtype=torch.float64, **arguments)
    # Offsets and biases large enough to matter.
    nn.init.normal_(layer.offset_proj.weight)
    if layer.rpe_table is not None:
        nn.init.normal_(layer.rpe_table)
    return layer


def centres(length: int) -> torch.Tensor:
    return torch.linspace(0.5, length - 0.5, length, dtype=torch.float64) / length * 2 - 1


def by_the_paper(layer: DeformableAttention, x: torch.Tensor) -> torch.Tensor:
    """Group by group and head by head, with maps in NCHW and grid_sample."""
    B, H, W, C = x.shape
    query = layer.q(x).permute(0, 3, 1, 2)
    heads_per_group, head_dim = layer.num_heads // layer.num_groups, C // layer.num_heads
    outs = []
    for g, part in enumerate(query.chunk(layer.num_groups, 1)):
        hidden = layer.offset_norm(layer.offset_conv(part).permute(0, 2, 3, 1))
        offset = layer.offset_proj(F.gelu(hidden))
        Hk, Wk = offset.shape[1:3]
        reference = torch.stack(torch.meshgrid(centres(Hk), centres(Wk), indexing="ij"), -1)
        factor = layer.offset_range_factor
        if factor > 0:
            position = reference + offset.tanh() * factor / torch.tensor([Hk, Wk])
        else:
            position = (reference + offset).tanh() if factor < 0 else reference + offset
        maps = x.permute(0, 3, 1, 2).chunk(layer.num_groups, 1)[g]
        outs.append((position, F.grid_sample(maps, position.flip(-1), align_corners=True).flatten(2)))
    sampled = torch.cat([s for _, s in outs], 1).mT
    key, value = layer.k(sampled), layer.v(sampled)
    grid = torch.stack(torch.meshgrid(centres(H), centres(W), indexing="ij"), -1).reshape(1, H * W, 1, 2)
    results = []
    for h in range(layer.num_heads):
        channels = slice(h * head_dim, (h + 1) * head_dim)
        scores = query.flatten(2).mT[..., channels] @ key[..., channels].mT * head_dim**-0.5
        if layer.rpe_table is not None:
            shift = (grid - outs[h // heads_per_group][0].reshape(B, 1, -1, 2)) / 2
            table = layer.rpe_table[h].expand(B, 1, -1, -1)
            scores = scores + F.grid_sample(table, shift.flip(-1), align_corners=True)[:, 0]
        results.append(scores.softmax(-1) @ value[..., channels])
    return layer.proj(torch.cat(results, -1)).view(B, H, W, C)


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (1, 1), (1, 6)])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_groups": 3, "table_size": (7, 7)},
        {"num_groups": 2, "table_size": (4, 5), "stride": 2, "kernel_size": 3},
        {"num_groups": 1, "offset_range_factor": -1.0, "table_size": (7, 7)},
        {"num_groups": 6, "offset_range_factor": 0.0},
    ],
)
def test_equals_the_paper(arguments, size):
    layer = make_layer(**arguments)
    x = torch.randn(2, *size, 24, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), by_the_paper(layer, x)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    tensors = (x, *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, tensors, cotangent), torch.autograd.grad(theirs, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("stride", "keys"), [(1, 35), (2, 12), (8, 1)])
def test_positions(stride, keys):
    layer = make_layer(num_groups=2, kernel_size=9, stride=stride, offset_range_factor=2.0)
    query = torch.randn(3, 5, 7, 24, dtype=torch.float64)
    positions = layer.positions(query)
    assert positions.shape == (3, 2, keys, 2)
    nn.init.zeros_(layer.offset_proj.weight)
    rows, columns = -(-5 // stride), -(-7 // stride)
    still = layer.positions(query)
    expected = torch.stack((centres(columns).expand(rows, -1), centres(rows)[:, None].expand(-1, columns)), -1)
    torch.testing.assert_close(still, expected.reshape(1, 1, keys, 2).expand(3, 2, -1, -1))
    assert ((positions - still).abs() <= torch.tensor([2 / columns, 2 / rows])).all()


def test_positions_stay_float32_under_autocast():
    layer = make_layer(num_groups=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.positions(layer.q(torch.randn(1, 4, 4, 24))).dtype == torch.float32
        assert layer(torch.randn(1, 4, 4, 24)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 10, "num_heads": 3}, "embed_dims must be a multiple of num_heads = 3, got 10"),
        ({"embed_dims": 12, "num_heads": 3, "num_groups": 2}, "num_groups must be a divisor of num_heads = 3, got 2"),
        ({"embed_dims": 12, "num_heads": 3, "num_groups": -1}, "num_groups must be a divisor of num_heads = 3, got -1"),
        ({"embed_dims": 12, "num_heads": 3, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"embed_dims": 12, "num_heads": 3, "stride": 0}, "stride must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformableAttention(**arguments)
