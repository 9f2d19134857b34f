import io

import pytest
import torch
from torch import nn

from dat.layers import WindowAttention


def dense_attention(layer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention over all pairs of pixels, with windows, shift and table applied to each pair."""
    B, H, W, C = x.shape
    w, s = layer.window_size, layer.shift_size
    side = 2 * w - 1
    pixels = [(r, c) for r in range(H) for c in range(W)]

    def place(index: int, length: int) -> tuple[int, bool]:
        padded = (length + w - 1) // w * w
        return (index - s) % padded // w, index < s

    visible = torch.zeros(H * W, H * W, dtype=torch.bool)
    bias = torch.zeros(layer.num_heads, H * W, H * W, dtype=x.dtype)
    for i, (r, c) in enumerate(pixels):
        for j, (r2, c2) in enumerate(pixels):
            visible[i, j] = place(r, H) == place(r2, H) and place(c, W) == place(c2, W)
            if visible[i, j]:
                bias[:, i, j] = layer.relative_position_bias_table[(r - r2 + w - 1) * side + c - c2 + w - 1]
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).reshape(B, H, W, C))


def make_layer(**arguments) -> WindowAttention:
    torch.manual_seed(0)
    layer = WindowAttention(12, 3, dtype=torch.float64, **arguments)
    nn.init.normal_(layer.relative_position_bias_table)
    return layer


@pytest.mark.parametrize("shift_size", [0, 2])
@pytest.mark.parametrize("size", [(6, 9), (3, 3), (7, 5), (2, 8), (1, 1), (1, 4)])
def test_equals_dense_attention(size, shift_size):
    layer = make_layer(window_size=3, shift_size=shift_size)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense_attention(layer, x))


@pytest.mark.parametrize("shift_size", [0, 4])
def test_window_of_seven(shift_size):
    layer = make_layer(window_size=7, shift_size=shift_size)
    x = torch.randn(2, 14, 10, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense_attention(layer, x))


def test_shift_connects_windows():
    x = torch.randn(1, 8, 8, 12, dtype=torch.float64)
    moved = x.clone()
    moved[:, 3, 3] += 1
    local, shifted = make_layer(window_size=4), make_layer(window_size=4, shift_size=2)
    changed_local = (local(x) - local(moved)).abs().sum(-1)[0] > 1e-9
    changed_shifted = (shifted(x) - shifted(moved)).abs().sum(-1)[0] > 1e-9
    assert changed_local.nonzero().amax().item() == 3
    assert changed_shifted.nonzero().amin().item() == 2
    assert changed_shifted.nonzero().amax().item() == 5


def test_gradient_reaches_table_and_is_finite_with_padding():
    layer = make_layer(window_size=4, shift_size=2)
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")
def test_runs_in_onnx_files_of_the_torchscript_exporter():
    """Which timm's onnx_export.py uses."""
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x, file = make_layer(window_size=4, shift_size=2).float().eval(), torch.randn(1, 8, 5, 12), io.BytesIO()
    torch.onnx.export(layer, (x,), file, input_names=["x"], dynamo=False)
    (out,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 10, "num_heads": 3}, "embed_dims must be a multiple of num_heads = 3, got 10"),
        ({"embed_dims": 9, "num_heads": 3, "window_size": 4, "shift_size": 4}, "below window_size = 4, got 4"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(**arguments)
