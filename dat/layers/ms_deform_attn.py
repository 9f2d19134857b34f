"""Multi-scale deformable attention layer of Deformable DETR."""

import math

import torch
from torch import Tensor, nn

from dat.ops import ms_deform_attn
from dat.ops._common import Shapes, autocast


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, section 4.1); parameters are named as the official module's.

    Args:
        embed_dim: channels C of queries and values; a multiple of num_heads.
        num_levels: feature levels L.
        num_heads: heads H.
        num_points: samples P per head and level.
    """

    def __init__(self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets in one direction per head, p + 1 pixels for point p; uniform attention (appendix A.4)."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, shapes: Shapes, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend from queries to L feature levels.

        Args:
            query: [B, Q, C].
            reference: [B, Q, L, 2] points or [B, Q, L, 4] boxes (cx, cy, w, h), 0 to 1, float32 or float64.
            value: [B, S, C], the levels flattened row by row and laid end to end.
            shapes: ((h_0, w_0), ...) of the levels.
            padding_mask: [B, S] bool, True on padding, whose values are replaced by zero.

        Returns:
            [B, Q, C].
        """
        B, Q, _ = query.shape
        # Once, for both of its projections.
        query = autocast(query)
        values = self.value_proj(value)
        if padding_mask is not None:
            values = values.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        layout = (B, Q, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*layout, 2)
        logits = self.attention_weights(query).view(layout)
        out = ms_deform_attn(values.unflatten(-1, (self.num_heads, -1)), shapes, reference, offsets, logits)
        return self.output_proj(out.flatten(2))
