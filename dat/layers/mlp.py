"""MLP with a depth-wise convolution between its two layers, as in DAT++."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvMlp(nn.Module):
    """Linear layer, 3x3 depth-wise convolution, GELU, linear layer: [B, H, W, C] to [B, H, W, C].

    Args:
        dim: channels C.
        hidden_dim: channels between the linear layers.
        residual: add the convolution to its input, and drop before it (DAT++, release 2023), or put it in the place of
            its input, and drop after the GELU (release 2022).
        drop: dropout, 0..1.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        residual: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.residual:
            x = self.drop(x)
            x = F.gelu(x + depthwise(self.dwconv, x))
        else:
            x = self.drop(F.gelu(depthwise(self.dwconv, x)))
        return self.drop(self.fc2(x))


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map [B, H, W, C]."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
