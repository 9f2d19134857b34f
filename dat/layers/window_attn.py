"""Self-attention within local or shifted windows, as in Swin and in the L and S blocks of DAT."""

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from dat.ops.sizes import is_exporting


class WindowAttention(nn.Module):
    """Attention within windows with a relative position bias (Swin, https://arxiv.org/abs/2103.14030, equation 4).

    A map whose size is no multiple of the window's is padded, and padding is neither attended to nor returned. A side
    shorter than the window is a single shorter window.

    Args:
        embed_dims: channels C; a multiple of num_heads.
        num_heads: attention heads.
        window_size: side of the square windows, in pixels.
        shift_size: 0 for local windows; otherwise the map is rolled by this many pixels, fewer than window_size, and
            pixels that only the roll made neighbours do not attend to each other.
        proj_drop: dropout after the output projection, 0..1.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(f"embed_dims must be a multiple of num_heads = {num_heads}, got {embed_dims}")
        if not 0 <= shift_size < window_size:
            raise ValueError(f"shift_size must be at least 0 and below window_size = {window_size}, got {shift_size}")
        self.num_heads, self.window_size, self.shift_size = num_heads, window_size, shift_size
        self.scale = (embed_dims // num_heads) ** -0.5
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, device=device, dtype=dtype)
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_size - 1) ** 2, num_heads, device=device, dtype=dtype)
        )
        self.proj = nn.Linear(embed_dims, embed_dims, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.relative_position_bias_table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] of any size to [B, H, W, C]."""
        _, H, W, _ = x.shape
        if is_exporting():
            return self._forward_any_size(x)
        window, padded, shift = zip(*(self._tile(length) for length in (H, W)), strict=True)
        bias = self._bias(window, x.device)
        if self.shift_size or padded != (H, W):
            same = self._same_region((H, W), window, padded, shift, x.device)
            bias = bias.masked_fill(~same.unsqueeze(1), -torch.inf)
        if padded != (H, W):
            x = F.pad(x, (0, 0, 0, padded[1] - W, 0, padded[0] - H))
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        x = self._attend(window_partition(x, window).flatten(1, 2), bias)
        x = window_reverse(x, window, *padded)
        if any(shift):
            x = torch.roll(x, shift, (1, 2))
        return x[:, :H, :W]

    def _forward_any_size(self, x: Tensor) -> Tensor:
        """The same without branches on the size, for an exported graph that serves maps of all sizes.

        Pixels are gathered into windows: reshapes that split rounded-up sizes would take torch.export minutes to prove.
        """
        H, W, device = x.shape[1], x.shape[2], x.device
        (rows, row_regions, row_places), (columns, column_regions, column_places) = (
            self._axis(length, device) for length in (H, W)
        )
        pixels = _pairs(rows * W, columns)
        regions = _pairs(row_regions * 3, column_regions)
        bias = self._bias((self.window_size, self.window_size), device)
        bias = bias.masked_fill((regions[:, :, None] != regions[:, None]).unsqueeze(1), -torch.inf)
        windows = x.flatten(1, 2)[:, pixels]
        q, k, v = rearrange(self.qkv(windows), "b w n (qkv h c) -> qkv b w h n c", qkv=3, h=self.num_heads)
        # torch.onnx exports fused attention only with one batch dimension.
        out = ((q * self.scale) @ k.mT + bias.to(q.dtype)).softmax(-1) @ v
        out = self.proj(rearrange(out, "b w h n c -> b (w n) (h c)"))
        window, inside = row_places
        places = ((window * columns.shape[0])[:, None] + column_places[0]) * self.window_size**2
        return self.proj_drop(out[:, places + (inside * self.window_size)[:, None] + column_places[1]])

    def _axis(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Pixels and their regions [windows, window_size] along a side; each pixel's window and index within it."""
        window = self.window_size
        count = (length - 1) // window + 1
        pixel = torch.arange(count, device=device)[:, None] * window + torch.arange(window, device=device)
        pixel = pixel + self.shift_size
        pixel = torch.where(pixel < count * window, pixel, pixel - count * window)
        # Padding attends to padding, whatever its values, so that no row is masked entirely.
        regions = torch.where(pixel < length, (pixel < self.shift_size).long(), 2)
        place = torch.arange(length, device=device) - self.shift_size
        place = torch.where(place < 0, place + count * window, place)
        return pixel.clamp(max=length - 1), regions, (place // window, place % window)

    def _tile(self, length: int) -> tuple[int, int, int]:
        """Window, padded length and roll along a side; a roll would not change a single window."""
        if length <= self.window_size:
            return length, length, 0
        return self.window_size, length + -length % self.window_size, self.shift_size

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attention within windows [B * n, h*w, C]; all images have the same biases [n or 1, num_heads, h*w, h*w]."""
        # Gradients of chunks come together in one copy, those of a dimension of three in two.
        q, k, v = (rearrange(part, "w n (h c) -> w h n c", h=self.num_heads) for part in self.qkv(x).chunk(3, -1))
        bias = bias.to(q.dtype)
        if (x.device.type == "cpu" and torch.is_grad_enabled()) or torch.jit.is_tracing():
            # No fused CPU kernel differentiates the bias, and PyTorch's substitute copies more than this. Nor does this
            # fix the batch of a trace.
            scores = ((q * self.scale) @ k.transpose(-2, -1)).unflatten(0, (-1, len(bias))) + bias
            x = scores.softmax(-1).flatten(0, 1) @ v
        else:
            bias = bias.repeat(len(q) // len(bias), 1, 1, 1)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj_drop(self.proj(rearrange(x, "w h n c -> w n (h c)")))

    def _bias(self, window: tuple[int, int], device: torch.device) -> Tensor:
        """Bias [1, num_heads, h*w, h*w] of the pairs in a window, from the table by displacement."""
        side = 2 * self.window_size - 1
        rows, columns = (torch.arange(length, device=device) for length in window)
        dy = rows[:, None] - rows + self.window_size - 1
        dx = columns[:, None] - columns + self.window_size - 1
        index = dy[:, None, :, None] * side + dx[None, :, None, :]
        bias = self.relative_position_bias_table[index.flatten()]
        area = window[0] * window[1]
        return bias.view(area, area, self.num_heads).permute(2, 0, 1).unsqueeze(0)

    def _same_region(
        self,
        size: tuple[int, int],
        window: tuple[int, int],
        padded: tuple[int, int],
        shift: tuple[int, int],
        device: torch.device,
    ) -> Tensor:
        """Whether the pixels of each pair in a window may attend to each other: bool [windows, h*w, h*w]."""
        regions = []
        for length, total, roll in zip(size, padded, shift, strict=True):
            index = torch.arange(total, device=device).roll(-roll, 0)
            # 0: unmoved pixels, 1: pixels rolled to the end, 2: padding, which attends to itself: no row is all masked.
            wrapped = (index < self.shift_size).long()
            regions.append(torch.where(index < length, wrapped, 2))
        labels = regions[0][:, None] * 3 + regions[1]
        labels = window_partition(labels[None, ..., None], window).flatten(1)
        return labels[:, :, None] == labels[:, None, :]


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Sums [windows, window_size**2] over all pairs of a row's and a column's value, each [windows, window_size]."""
    return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
