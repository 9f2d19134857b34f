"""MLP with a depth-wise convolution between its two layers, as in DAT++."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Values between the linear layers, of an image, beyond which its map is computed in parts.
LARGE_MAP = 2**21
# The same, in a part of a map or of a batch.
PART = 2**20
# Parts of such a map, at least: of one that is not much larger, a few rows would be half of it.
FEWEST_PARTS = 5


class ConvMlp(nn.Module):
    """Linear layer, 3x3 depth-wise convolution, GELU, linear layer: [B, H, W, C] to [B, H, W, C].

    What is between the linear layers would be most of what a block holds. Of maps as large as those of detectors it is
    in memory for a few rows at a time, and computed again in the backward pass.

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
        B, H, W, _ = x.shape
        # The compiler plans memory by itself.
        if torch.compiler.is_compiling():
            return self._rows(x, 0, H)
        images = max(PART // max(H * W * self.fc1.out_features, 1), 1)
        # A few images at a time stay in a processor's cache.
        if x.device.type == "cpu" and images < B:
            return torch.cat([self._images(part) for part in x.split(images)])
        return self._images(x)

    def _images(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        width = W * self.fc1.out_features
        # A dropped cell would be another one in the rows that two parts share.
        if H * width <= LARGE_MAP or (self.training and self.drop.p > 0):
            return self._rows(x, 0, H)
        # The largest part is what counts, so that they are of about the same size.
        parts = x.tensor_split(min(max(-(-B * H * width // PART), FEWEST_PARTS), H), 1)
        above = [x[:, :0], *(part[:, -1:] for part in parts[:-1])]
        below = [*(part[:, :1] for part in parts[1:]), x[:, :0]]
        run = partial(checkpoint, self._part, use_reentrant=False) if torch.is_grad_enabled() else self._part
        return torch.cat([run(*rows) for rows in zip(above, parts, below, strict=True)], 1)

    def _part(self, above: Tensor, part: Tensor, below: Tensor) -> Tensor:
        """The result of some rows, which takes a row on either side, if there is one."""
        return self._rows(torch.cat((above, part, below), 1), above.shape[1], part.shape[1])

    def _rows(self, x: Tensor, start: int, count: int) -> Tensor:
        """`count` rows of the result."""
        rows = slice(start, start + count)
        x = self.fc1(x)
        if self.residual:
            x = self.drop(x)
            x = F.gelu(residual_depthwise(self.dwconv, x)[:, rows])
        else:
            x = self.drop(F.gelu(depthwise(self.dwconv, x)[:, rows]))
        return self.drop(self.fc2(x))


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map [B, H, W, C]."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def residual_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A map [B, H, W, C] and its convolution, one that keeps its size, added."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return x + depthwise(conv, x)
    # One pass over the map, not two: the kernel with 1 added at its centre, beside which short numbers lose the rest.
    centre = [side // 2 for side in reversed(conv.kernel_size) for _ in range(2)]
    weight = conv.weight + F.pad(conv.weight.new_ones(1, 1, 1, 1), centre)
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, padding=conv.padding, groups=conv.groups)
    return x.permute(0, 2, 3, 1)
