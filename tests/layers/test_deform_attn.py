import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dat
from dat.layers import DeformableAttention, deform_attn
from dat.layers.position_bias import resize_pairs


def make_layer(embed_dims=24, num_heads=6, **arguments) -> DeformableAttention:
    torch.manual_seed(0)
    layer = DeformableAttention(embed_dims, num_heads, dtype=torch.float64, **arguments)
    # Offsets and biases large enough to matter.
    for name, parameter in layer.named_parameters():
        if "offset_proj" in name or "table" in name or "log_cpb" in name:
            nn.init.normal_(parameter)
    return layer


def centres(length: int, span: int) -> torch.Tensor:
    return torch.linspace(0.5, length - 0.5, length, dtype=torch.float64) / span * 2 - 1


def pairs(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)


def moved(layer: DeformableAttention, offset: torch.Tensor) -> torch.Tensor:
    """Positions (y, x) of a group's keys, by the table of the releases' coordinates."""
    sides = offset.shape[1:3]
    spans = sides if layer.release == "2022" else [side - 1 for side in sides]
    reference = pairs(*(centres(side, span) for side, span in zip(sides, spans, strict=True)))
    factor = layer.offset_range_factor
    if factor > 0 or (factor == 0 and layer.release == "2023"):
        return reference + offset.tanh() * factor / torch.tensor(spans)
    if factor == 0:
        return reference + offset
    return (reference + offset).tanh() if layer.release == "2022" else (reference + offset).clamp(-1, 1)


def query_grid(layer: DeformableAttention, H: int, W: int) -> torch.Tensor:
    if layer.release == "2022":
        return pairs(centres(H, H), centres(W, W))
    return pairs(*(torch.linspace(-1, 1, side, dtype=torch.float64) for side in (H, W)))


def bias_of(layer: DeformableAttention, head: int, grid: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The bias of a head's scores [B, H*W, N]."""
    shift = grid.reshape(1, -1, 1, 2) - position.reshape(len(position), 1, -1, 2)
    if layer.rpe_table is not None:
        table = layer.rpe_table[head].expand(len(position), 1, -1, -1)
        return F.grid_sample(table, shift.flip(-1) / 2, align_corners=True)[:, 0]
    if layer.fixed_bias is not None:
        return layer.fixed_bias.rpe_table[head]
    if layer.log_cpb is not None:
        spaced = (4 * shift).sign() * (4 * shift.abs() + 1).log2() / 3
        return layer.log_cpb.mlp(spaced)[..., head % (layer.num_heads // layer.num_groups)]
    return torch.zeros(())


def by_the_paper(layer: DeformableAttention, x: torch.Tensor) -> torch.Tensor:
    """Group by group and head by head, with maps in NCHW and grid_sample."""
    B, H, W, C = x.shape
    query = layer.q(x).permute(0, 3, 1, 2)
    heads_per_group, head_dim = layer.num_heads // layer.num_groups, C // layer.num_heads
    outs = []
    for g, part in enumerate(query.chunk(layer.num_groups, 1)):
        maps = x.permute(0, 3, 1, 2).chunk(layer.num_groups, 1)[g]
        if layer.no_off:
            sampled = F.avg_pool2d(maps, layer.stride)
            position = moved(layer, torch.zeros(B, *sampled.shape[2:], 2, dtype=x.dtype))
        else:
            hidden = layer.offset_norm(layer.offset_conv(part).permute(0, 2, 3, 1))
            position = moved(layer, layer.offset_proj(F.gelu(hidden)))
            sampled = F.grid_sample(maps, position.flip(-1), align_corners=True)
        outs.append((position, sampled.flatten(2)))
    sampled = torch.cat([s for _, s in outs], 1).mT
    key, value = layer.k(sampled), layer.v(sampled)
    results = []
    for h in range(layer.num_heads):
        channels = slice(h * head_dim, (h + 1) * head_dim)
        scores = query.flatten(2).mT[..., channels] @ key[..., channels].mT * head_dim**-0.5
        scores = scores + bias_of(layer, h, query_grid(layer, H, W), outs[h // heads_per_group][0])
        results.append(scores.softmax(-1) @ value[..., channels])
    out = torch.cat(results, -1).view(B, H, W, C)
    if layer.lepe is not None:
        out = out + layer.lepe(query).permute(0, 2, 3, 1)
    return layer.proj(out)


def assert_equals_the_paper(layer: DeformableAttention, size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, 24, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), by_the_paper(layer, x)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    tensors = (x, *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, tensors, cotangent, allow_unused=True),
        torch.autograd.grad(theirs, tensors, cotangent, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


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
    assert_equals_the_paper(make_layer(**arguments), size)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_groups": 3, "table_size": (8, 8)},
        {"num_groups": 2, "table_size": (4, 5), "stride": 2, "kernel_size": 3},
        {"num_groups": 2, "stride": 4, "kernel_size": 4, "table_size": (8, 8)},
        {"num_groups": 1, "offset_range_factor": 3.0, "table_size": (8, 8)},
        {"num_groups": 6, "offset_range_factor": 0.0, "position_bias": "none", "table_size": (8, 8)},
        {"num_groups": 2, "stride": 2, "position_bias": "log_cpb"},
        {"num_groups": 3, "stride": 2, "position_bias": "dwc_pe"},
        {"num_groups": 2, "stride": 2, "no_off": True, "position_bias": "log_cpb"},
    ],
)
def test_equals_the_paper_of_2023(arguments, size):
    assert_equals_the_paper(make_layer(**{"release": "2023", "offset_range_factor": -1.0, **arguments}), size)


def test_log_cpb_a_part_of_the_queries_at_a_time(monkeypatch):
    layer = make_layer(num_groups=2, position_bias="log_cpb", offset_range_factor=-1.0, release="2023")
    calls = []
    layer.log_cpb.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    monkeypatch.setattr(dat.layers.deform_attn, "LOG_CPB_PAIRS", 25 * 2 * 2 * 60)
    assert_equals_the_paper(layer, (6, 10))
    assert sorted(calls) == [10, 10, 25, 25, 25, 25]


@pytest.mark.parametrize("release", ["2022", "2023"])
def test_fixed_biases(release):
    layer = make_layer(stride=2, position_bias="fixed_pe", table_size=(6, 10), release=release)
    assert_equals_the_paper(layer, (6, 10))
    x = torch.randn(1, 9, 5, 24, dtype=torch.float64)
    out = layer(x)
    layer.set_table_size((9, 5))
    assert layer.fixed_bias.rpe_table.shape == (6, 45, 8)
    # The table is made for 4 x 2 keys, as in the official code, and the map has 5 x 3.
    assert layer(x).shape == out.shape


def test_fixed_biases_are_resampled_map_by_map():
    query, key = torch.randn(1, 6, 4), torch.randn(1, 3, 2)
    table = query.flatten()[:, None] * key.flatten()
    resized = resize_pairs(table[None], (6, 4), (3, 2), (9, 5), (4, 7))
    query, key = (F.interpolate(m[None], size, mode="bicubic") for m, size in ((query, (9, 5)), (key, (4, 7))))
    torch.testing.assert_close(resized[0], query.flatten()[:, None] * key.flatten())


def test_a_single_key_of_2023_is_at_the_end():
    """The official code puts its start at infinity, and clamps that; its offset has no influence."""
    layer = make_layer(stride=8, kernel_size=9, offset_range_factor=-1.0, table_size=(8, 8), release="2023")
    query = torch.randn(2, 5, 8, 24, dtype=torch.float64)
    positions = layer.positions(query)
    torch.testing.assert_close(positions, torch.ones_like(positions))
    layer(query).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("stride", "keys"), [(1, 35), (2, 12), (8, 1)])
def test_positions(stride, keys):
    layer = make_layer(num_groups=2, kernel_size=9, stride=stride, offset_range_factor=2.0)
    query = torch.randn(3, 5, 7, 24, dtype=torch.float64)
    positions = layer.positions(query)
    assert positions.shape == (3, 2, keys, 2)
    nn.init.zeros_(layer.offset_proj.weight)
    rows, columns = -(-5 // stride), -(-7 // stride)
    still = layer.positions(query)
    expected = pairs(centres(rows, rows), centres(columns, columns)).flip(-1)
    torch.testing.assert_close(still, expected.reshape(1, 1, keys, 2).expand(3, 2, -1, -1))
    assert ((positions - still).abs() <= torch.tensor([2 / columns, 2 / rows])).all()


def test_positions_are_not_rounded_under_autocast():
    layer = make_layer(num_groups=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query = layer.q(torch.randn(1, 4, 4, 24))
        positions = layer.positions(query)
        assert layer(torch.randn(1, 4, 4, 24)).isfinite().all()
    assert query.dtype == torch.bfloat16
    torch.testing.assert_close(positions, layer.positions(query.float()), atol=0.01, rtol=0)
    assert (positions != positions.bfloat16()).float().mean() > 0.9
    # A model in half precision has no float32 weights to work with.
    layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.positions(query).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 10, "num_heads": 3}, "embed_dims must be a multiple of num_heads = 3, got 10"),
        ({"embed_dims": 12, "num_heads": 3, "num_groups": 2}, "num_groups must be a divisor of num_heads = 3, got 2"),
        ({"embed_dims": 12, "num_heads": 3, "num_groups": -1}, "num_groups must be a divisor of num_heads = 3, got -1"),
        ({"embed_dims": 12, "num_heads": 3, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"embed_dims": 12, "num_heads": 3, "kernel_size": 4, "stride": 4}, "kernel_size must be odd, got 4"),
        ({"embed_dims": 12, "num_heads": 3, "stride": 0}, "stride must be at least 1, got 0"),
        ({"embed_dims": 12, "num_heads": 3, "release": "2024"}, "release must be '2022' or '2023', got '2024'"),
        ({"embed_dims": 12, "num_heads": 3, "position_bias": "rope"}, "position_bias must be one of .* got 'rope'"),
        (
            {"embed_dims": 12, "num_heads": 3, "position_bias": "fixed_pe"},
            r"table_size must be \(H, W\) for .*got None",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformableAttention(**arguments)


def test_what_moved_the_keys_of_a_large_map_is_computed_again(monkeypatch):
    layer = make_layer(num_groups=2, table_size=(7, 7), release="2023")
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    calls = []
    offsets = DeformableAttention._offsets
    monkeypatch.setattr(DeformableAttention, "_offsets", lambda *arguments: calls.append(1) or offsets(*arguments))

    def results():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]

    kept = results()
    assert len(calls) == 1
    monkeypatch.setattr(deform_attn, "LARGE_MAP", 0)
    for ours, expected in zip(results(), kept, strict=True):
        torch.testing.assert_close(ours, expected)
    assert len(calls) == 3
