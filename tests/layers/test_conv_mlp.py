import pytest
import torch
from torch.nn import functional as F

from dat.layers import ConvMlp, mlp


def convolve(mlp: ConvMlp, x: torch.Tensor) -> torch.Tensor:
    """The depth-wise convolution of NHWC maps, tap by tap."""
    H, W = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    taps = [padded[:, i : i + H, j : j + W] * mlp.dwconv.weight[:, 0, i, j] for i in range(3) for j in range(3)]
    return sum(taps) + mlp.dwconv.bias


@pytest.mark.parametrize("residual", [True, False])
def test_equals_its_parts(residual):
    torch.manual_seed(0)
    mlp = ConvMlp(6, 15, residual, dtype=torch.float64)
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    hidden = mlp.fc1(x)
    hidden = hidden * residual + convolve(mlp, hidden)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(hidden)))


@pytest.mark.parametrize("residual", [True, False])
def test_drops_before_the_convolution_or_behind_the_activation(residual):
    torch.manual_seed(0)
    mlp = ConvMlp(6, 15, residual, drop=0.5)
    inputs = []
    mlp.drop.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    x = torch.randn(1, 4, 4, 6)
    mlp(x)
    first = mlp.fc1(x)
    torch.testing.assert_close(inputs[0], first if residual else F.gelu(convolve(mlp, first)))
    assert inputs[1].shape == (1, 4, 4, 6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_large_map_in_parts_is_the_map_as_a_whole(monkeypatch, residual, rows):
    torch.manual_seed(0)
    layer = ConvMlp(6, 10, residual).double()
    x = torch.randn(2, 11, 5, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)

    def results():
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]

    whole = results()
    monkeypatch.setattr(mlp, "LARGE_MAP", 0)
    # of both images, except for what a batch adds
    monkeypatch.setattr(mlp, "CHUNK", rows * 2 * 5 * 10)
    monkeypatch.setattr(ConvMlp, "forward", ConvMlp._images)
    calls = []
    forward = ConvMlp._chunk
    monkeypatch.setattr(ConvMlp, "_chunk", lambda *arguments: calls.append(1) or forward(*arguments))
    for ours, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(ours, expected)
    # again in the backward
    assert len(calls) == 2 * max(-(-11 // rows), mlp.MIN_CHUNKS)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole[0])


def test_a_batch_in_parts_is_the_batch_as_a_whole(monkeypatch):
    torch.manual_seed(0)
    layer = ConvMlp(6, 10).double()
    x = torch.randn(5, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    whole = layer(x)
    expected = torch.autograd.grad(whole, [x, *layer.parameters()], cotangent)
    monkeypatch.setattr(mlp, "CHUNK", 2 * 4 * 3 * 10)
    sizes = []
    rows = ConvMlp._rows
    monkeypatch.setattr(ConvMlp, "_rows", lambda self, x, *place: sizes.append(len(x)) or rows(self, x, *place))
    parts = layer(x)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(parts, whole)
    for ours, theirs in zip(torch.autograd.grad(parts, [x, *layer.parameters()], cotangent), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_takes_a_large_map_as_a_whole(monkeypatch):
    """A pixel in the overlap of two chunks would be dropped in one and kept in the other."""
    monkeypatch.setattr(mlp, "LARGE_MAP", 0)
    monkeypatch.setattr(ConvMlp, "_chunk", None)
    layer = ConvMlp(6, 10, drop=0.5)
    layer(torch.randn(1, 9, 5, 6)).sum().backward()
    assert layer.fc1.weight.grad.isfinite().all()
