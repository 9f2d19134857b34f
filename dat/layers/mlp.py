"""MLP with a depth-wise convolution between its two layers, as in DAT++."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dat.layers.autocast import calls_forward_only
from dat.ops import depthwise as fused

# Above this many elements of the hidden map per image, compute it in chunks of rows. On a GPU small kernels cost more
# than memory: all maps of an image of 1333 x 1333 pixels are below.
LARGE_MAP, GPU_LARGE_MAP = 2**21, 2**25
# Elements of the hidden map in a chunk, of rows or of images.
CHUNK = 2**20
# The fewest chunks of a large map: with two or three, one of them would still hold much of it.
MIN_CHUNKS = 5


class ConvMlp(nn.Module):
    """Linear layer, 3x3 depth-wise convolution, GELU, linear layer: [B, H, W, C] to [B, H, W, C].

    The hidden map dominates a block's memory: large maps, as in detectors, are processed in chunks of rows, which are
    recomputed in the backward pass.

    Args:
        dim: channels C.
        hidden_dim: channels between the linear layers.
        residual: whether the convolution is added to its input, with dropout before it (DAT++, release 2023), or
            replaces its input, with dropout after the GELU (release 2022).
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
        # Compilers choose which values to recompute themselves.
        if torch.compiler.is_compiling():
            return self._rows(x, 0, H)
        images = max(CHUNK // max(H * W * self.fc1.out_features, 1), 1)
        # On a CPU the hidden maps of a few images at a time stay in the cache.
        if x.device.type == "cpu" and images < B:
            return torch.cat([self._images(chunk) for chunk in x.split(images)])
        return self._images(x)

    def _images(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        width = W * self.fc1.out_features
        # Dropout would draw different masks for the rows that two chunks overlap in.
        large, elements = (LARGE_MAP, CHUNK) if x.device.type == "cpu" else (GPU_LARGE_MAP, GPU_LARGE_MAP // 2)
        if H * width <= large or (self.training and self.drop.p > 0):
            return self._rows(x, 0, H)
        # Chunks of nearly equal size, as the largest one decides about the memory.
        chunks = x.tensor_split(min(max(-(-B * H * width // elements), MIN_CHUNKS), H), 1)
        above = [x[:, :0], *(chunk[:, -1:] for chunk in chunks[:-1])]
        below = [*(chunk[:, :1] for chunk in chunks[1:]), x[:, :0]]
        run = partial(checkpoint, self._chunk, use_reentrant=False) if torch.is_grad_enabled() else self._chunk
        return torch.cat([run(*rows) for rows in zip(above, chunks, below, strict=True)], 1)

    def _chunk(self, above: Tensor, chunk: Tensor, below: Tensor) -> Tensor:
        """The result for a chunk of rows, given the row above and the row below it (empty at the map's borders)."""
        return self._rows(torch.cat((above, chunk, below), 1), above.shape[1], chunk.shape[1])

    def _rows(self, x: Tensor, start: int, count: int) -> Tensor:
        """`count` rows of the result, from row `start` of `x` on."""
        rows = slice(start, start + count)
        x = self.fc1(x)
        if self.residual:
            x = self.drop(x)
            x = F.gelu(residual_depthwise(self.dwconv, x)[:, rows])
        else:
            x = self.drop(F.gelu(depthwise(self.dwconv, x)[:, rows]))
        return self.drop(self.fc2(x))


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution applied to a map [B, H, W, C]."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def residual_depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A map [B, H, W, C] plus a convolution of it that keeps its size."""
    plain = _is_plain(conv)
    if plain and fused.has_residual_depthwise(x, conv.weight, conv.bias):
        return fused.residual_depthwise(x, conv.weight, conv.bias)
    wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if not (plain and wide and x.device.type == "cpu"):
        return x + depthwise(conv, x)
    # Fold the residual into the kernel's centre, which saves a pass over the map; not in half precision, where adding 1
    # rounds the weights away.
    weight = conv.weight + F.pad(conv.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, padding=1, groups=conv.groups)
    return x.permute(0, 2, 3, 1)


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether a call of `conv` pads by one zero, convolves every channel by itself and does nothing else."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and calls_forward_only(conv)
    )
