import pytest
import torch

from dat.ops import deform_attn


def bias_of_pairs(table, positions, size, align_corners):
    """The definition, pair by pair: a bilinear look-up at half the displacement, zero outside the table."""
    (H, W), (B, groups, N, _) = size, positions.shape
    heads, T_h, T_w = table.shape
    bias = torch.zeros(B, heads, H * W, N, dtype=table.dtype)

    def grid(i, length):
        return i / max(length - 1, 1) * 2 - 1 if align_corners else (i + 0.5) / length * 2 - 1

    def cell(head, row, column):
        return table[head, row, column] if 0 <= row < T_h and 0 <= column < T_w else 0.0

    for b, head, q, n in torch.cartesian_prod(*(torch.arange(k) for k in (B, heads, H * W, N))).tolist():
        x, y = positions[b, head // (heads // groups), n].tolist()
        column = ((grid(q % W, W) - x) / 2 + 1) / 2 * (T_w - 1)
        row = ((grid(q // W, H) - y) / 2 + 1) / 2 * (T_h - 1)
        j, i = int(column // 1), int(row // 1)
        u, v = column - j, row - i
        top = (1 - u) * cell(head, i, j) + u * cell(head, i, j + 1)
        bottom = (1 - u) * cell(head, i + 1, j) + u * cell(head, i + 1, j + 1)
        bias[b, head, q, n] = (1 - v) * top + v * bottom
    return bias


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "table_size"), [((3, 4), (5, 7)), ((1, 4), (1, 7)), ((2, 5), (9, 3))])
def test_deform_attn_equals_its_definition(size, table_size, align_corners):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    B, heads, groups, N, c = 2, 4, 2, 3, 5
    query = rand(B, heads, size[0] * size[1], c)
    key, value, positions = rand(B, heads, N, c), rand(B, heads, N, c), rand(B, groups, N, 2) * 1.2
    table = rand(heads, *table_size)
    kwargs = {"size": size, "scale": 0.3, "align_corners": align_corners}
    bias = bias_of_pairs(table, positions, size, align_corners)
    expected = (query @ key.transpose(-1, -2) * 0.3 + bias).softmax(-1) @ value
    torch.testing.assert_close(deform_attn(query, key, value, positions, table, **kwargs), expected)
    plain = (query @ key.transpose(-1, -2) * 0.3).softmax(-1) @ value
    torch.testing.assert_close(deform_attn(query, key, value, positions, **kwargs), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (3, 3)}, "query must have H.W = 9"),
        ({"key": torch.zeros(1, 2, 3, 5)}, "key and value must be"),
        ({"positions": torch.zeros(1, 3, 3, 2)}, "positions must be"),
        ({"table": torch.zeros(3, 3, 3)}, "table must be"),
    ],
)
def test_deform_attn_errors_name_the_argument(change, message):
    args = {
        "query": torch.zeros(1, 2, 4, 4),
        "key": torch.zeros(1, 2, 3, 4),
        "value": torch.zeros(1, 2, 3, 4),
        "positions": torch.zeros(1, 1, 3, 2),
        "size": (2, 2),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        deform_attn(**{**args, **change})
