import pytest
import torch
from torch.nn import functional as F

from dat.layers import ConvMlp


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
