"""Image embedding by overlapping convolutions, as in DAT++."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dat.layers.norm import layer_norm


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with LayerNorms, and a GELU between them.

    Takes images [B, in_chans, H, W] to maps [B, ceil(H/4), ceil(W/4), embed_dims].

    Args:
        in_chans: channels of the image.
        embed_dims: channels of the map; half as many after the first convolution.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dims: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, embed_dims // 2, 3, 2, 1, **dd)
        self.norm1 = nn.LayerNorm(embed_dims // 2, **dd)
        self.conv2 = nn.Conv2d(embed_dims // 2, embed_dims, 3, 2, 1, **dd)
        self.norm2 = nn.LayerNorm(embed_dims, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(layer_norm(self.norm1, self.conv1(x).permute(0, 2, 3, 1)))
        return layer_norm(self.norm2, self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
