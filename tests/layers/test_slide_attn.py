import pytest
import torch
from torch.nn import functional as F

from dat.layers import SlideAttention


def make_layer(**arguments) -> SlideAttention:
    torch.manual_seed(0)
    return SlideAttention(24, 2, **{"kernel_size": 3, "reduction": 4, "dtype": torch.float64, **arguments})


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6)])
def test_equals_a_loop_over_neighbours(size):
    """Head by head: key and value i of a pixel are the map moved by the i-th shift plus a learned convolution of it."""
    layer = make_layer()
    H, W = size
    x = torch.randn(2, H, W, 24, dtype=torch.float64)
    width = 24 // 4 // 2
    outs = []
    for head, part in enumerate(layer.qkv(x).chunk(2, -1)):
        q, k, v = part.permute(0, 3, 1, 2).chunk(3, 1)
        learned = [F.conv2d(m, layer.conv.weight, layer.conv.bias, padding=1, groups=width) for m in (k, v)]
        scores, values = [], []
        for i in range(9):
            moved = [F.pad(m, (1, 1, 1, 1))[:, :, i // 3 : i // 3 + H, i % 3 : i % 3 + W] for m in (k, v)]
            key, value = (
                m + layer.shift.bias[i::9, None, None] + c[:, i::9] for m, c in zip(moved, learned, strict=True)
            )
            key = key + layer.relative_position_bias_table[head, i]
            scores.append((q * key).sum(1) * 12**-0.5)
            values.append(value)
        attention = torch.stack(scores).softmax(0)
        outs.append((attention.unsqueeze(2) * torch.stack(values)).sum(0))
    expected = layer.proj(torch.cat(outs, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(layer(x), expected)


def test_shifts_are_not_learned():
    layer = make_layer()
    assert not layer.shift.weight.requires_grad
    assert layer.shift.weight.shape == (27, 1, 3, 3)
    assert layer.shift.weight[[0, 9]].flatten(1).argmax(1).tolist() == [0, 0]
    assert layer.shift.weight[[5, 17]].flatten(1).argmax(1).tolist() == [5, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 5}, r"embed_dims must be a multiple of num_heads \* reduction = 10, got 24"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**arguments)
