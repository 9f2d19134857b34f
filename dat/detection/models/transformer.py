"""Layers of Deformable DETR (arXiv:2010.04159, section 4), their geometry, and the MLP and attention of DETR too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat.layers.autocast import casts_parameters_together
from dat.layers.ms_deform_attn import MSDeformAttn
from dat.layers.norm import add_layer_norm

Shapes = tuple[tuple[int, int], ...]


class TransformerLayer(nn.Module):
    """A layer with an MLP, whose parameters are named as in the official implementations."""

    def add_mlp(self, embed_dim: int, mlp_dim: int, drop_rate: float) -> None:
        self.linear1 = nn.Linear(embed_dim, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, embed_dim)
        self.drop = nn.Dropout(drop_rate)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def mlp(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], with the dropout that precedes the sum."""
        return self.drop(self.linear2(self.drop(F.relu(self.linear1(x)))))


def attention(embed_dim: int, num_heads: int, drop_rate: float) -> nn.MultiheadAttention:
    """Attention initialised as the official implementations do it."""
    attn = nn.MultiheadAttention(embed_dim, num_heads, dropout=drop_rate, batch_first=True)
    nn.init.xavier_uniform_(attn.out_proj.weight)
    return attn


class DeformableEncoderLayer(TransformerLayer):
    """Multi-scale deformable self-attention and an MLP, each followed by a LayerNorm."""

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_dim: int, drop_rate: float, num_levels: int, num_points: int
    ):
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.add_mlp(embed_dim, mlp_dim, drop_rate)
        self.norm2 = nn.LayerNorm(embed_dim)

    @casts_parameters_together
    def forward(self, x: Tensor, pos: Tensor, reference: Tensor, shapes: Shapes, padding_mask: Tensor | None) -> Tensor:
        """x [B, S, C], pos [B or 1, S, C], reference [B, S, L, 2], padding_mask [B, S] -> [B, S, C]."""
        branch = self.drop(self.self_attn(x + pos, reference, x, shapes, padding_mask))
        x = add_layer_norm(self.norm1, x, branch)[1]
        return add_layer_norm(self.norm2, x, self.mlp(x))[1]


class DeformableDecoderLayer(TransformerLayer):
    """Self-attention among the queries, deformable attention to the encoded levels and an MLP, post-normalised."""

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_dim: int, drop_rate: float, num_levels: int, num_points: int
    ):
        super().__init__()
        self.cross_attn = MSDeformAttn(embed_dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.self_attn = attention(embed_dim, num_heads, drop_rate)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.add_mlp(embed_dim, mlp_dim, drop_rate)
        self.norm3 = nn.LayerNorm(embed_dim)

    @casts_parameters_together
    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding_mask: Tensor | None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """x, pos [B, Q, C], reference [B, Q, L, 2 or 4], memory [B, S, C], padding_mask [B, S] -> [B, Q, C].

        query_mask [Q, Q]: True where the query of the row may not attend to that of the column.
        """
        query = x + pos
        branch = self.drop(self.self_attn(query, query, x, need_weights=False, attn_mask=query_mask)[0])
        x = add_layer_norm(self.norm2, x, branch)[1]
        branch = self.drop(self.cross_attn(x + pos, reference, memory, shapes, padding_mask))
        x = add_layer_norm(self.norm1, x, branch)[1]
        return add_layer_norm(self.norm3, x, self.mlp(x))[1]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both terms at least `eps`, so that 0 and 1 stay finite."""
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))


def reference_grid(shapes: Shapes, masks: list[Tensor] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of the pixels of every level in the unpadded image, and the part of each level that is unpadded.

    Args:
        shapes: (h, w) of each of the L levels, S pixels in all.
        masks: for each level [B, h, w], True on padding (to the right and below), or None where nothing is padded.
        device: of the results.

    Returns:
        centres [B, S, 2], (x, y), 0 to 1 inside the unpadded part and past 1 on padding,
        and valid ratios [B, L, 2], (x, y) in 0..1, both float32. B is 1 without masks.
    """
    centres, ratios = [], []
    for level, (h, w) in enumerate(shapes):
        if masks is None:
            valid = torch.stack([torch.full((1,), n, dtype=torch.float32, device=device) for n in (w, h)], -1)
        else:
            mask = ~masks[level]
            valid = torch.stack((mask[:, 0].sum(1), mask[:, :, 0].sum(1)), -1).float()
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / valid[:, :1]
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / valid[:, 1:]
        grid = torch.stack((x[:, None, :].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)), -1)
        centres.append(grid.flatten(1, 2))
        ratios.append(torch.stack((valid[:, 0] / w, valid[:, 1] / h), -1))
    return torch.cat(centres, 1), torch.stack(ratios, 1)


def encoder_proposals(centres: Tensor, shapes: Shapes, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One anchor box per pixel of the levels, 0.05 * 2**level of the image wide and high (the paper's appendix A.4).

    Args:
        centres: [B or 1, S, 2], (x, y).
        shapes: (h, w) of each level.
        padding_mask: [B, S], True on padding, or None.

    Returns:
        inverse sigmoids of the boxes [B or 1, S, 4] cxcywh, infinite where a pixel may not propose
        (padding, or a box coordinate outside 0.01..0.99), and True for those pixels [B or 1, S, 1].
    """
    sizes = [torch.full_like(centres[:1, : h * w], 0.05 * 2.0**level) for level, (h, w) in enumerate(shapes)]
    boxes = torch.cat((centres, torch.cat(sizes, 1).expand_as(centres)), -1)
    refused = ~((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    if padding_mask is not None:
        refused = refused | padding_mask[..., None]
    return torch.log(boxes / (1 - boxes)).masked_fill(refused, float("inf")), refused
