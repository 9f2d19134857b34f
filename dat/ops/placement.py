"""Where the offsets of DAT's offset network move the keys."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dat.ops.sizes import sym_max


@dataclass(frozen=True)
class Placement:
    """Where offsets move keys, after a release of the official code; see `dat.layers.DeformableAttention`."""

    offset_range_factor: float
    release: str

    @property
    def limited(self) -> bool:
        """Whether offsets are limited to a range."""
        return self.offset_range_factor > 0 or (self.offset_range_factor == 0 and self.release == "2023")

    def steps(self, length: int) -> int:
        """Pixels, of a side of `length` keys, that the official code takes its positions -1..1 for."""
        if self.release == "2022":
            return length
        # A single key's position is infinite, and the clamp moves it to 1, as in the official code.
        return length - 1 if self.offset_range_factor < 0 else sym_max(length - 1, 1)

    def __call__(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and locations of `key_positions` for offsets [B, Hk, Wk, g, 2], (y, x), in at least float32."""
        Hk, Wk = offset.shape[1:3]
        # The network predicts (y, x), as in the official checkpoints.
        y, x = (offset.tanh() if self.limited else offset).unbind(-1)
        if self.limited:
            y, x = (
                y * (self.offset_range_factor / self.steps(Hk)),
                x * (self.offset_range_factor / self.steps(Wk)),
            )
        positions = torch.stack((x + self._grid(Wk, x)[:, None], y + self._grid(Hk, y)[:, None, None]), -1)
        if self.offset_range_factor < 0:
            # A clamp whose gradient is one kernel instead of five.
            positions = positions.tanh() if self.release == "2022" else F.hardtanh(positions)
        positions = positions.permute(0, 3, 1, 2, 4).flatten(2, 3)
        return positions, (positions.transpose(1, 2)[:, :, :, None, None] + 1) / 2

    def _grid(self, length: int, like: Tensor) -> Tensor:
        """Positions of keys that are not moved, along a side of `length`."""
        steps = self.steps(length)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or length == 1:
            return (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / steps * 2 - 1
        # The same in one kernel, as small kernels take a GPU's host longer than the GPU.
        return torch.arange(1 / steps - 1, 2 * length / steps - 1, 2 / steps, dtype=like.dtype, device=like.device)
