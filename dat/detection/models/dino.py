"""DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection (Zhang et al., arXiv:2203.03605).

Semantics, initialisation and defaults are those of the official implementation, IDEA-Research/DINO.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dat.detection.models.deformable import DeformableConfig, DeformableModel, Encoded, Queries
from dat.detection.models.denoising import Denoising
from dat.detection.models.position_encoding import sine_encoding
from dat.detection.models.registry import register
from dat.engine.config import check_range
from dat.ops.sizes import sym_min


@dataclass
class DINOConfig(DeformableConfig):
    """The arguments of DINO."""

    kind: str = "dino"
    num_queries: int = 900
    mlp_dim: int = 2048
    drop_rate: float = 0.0
    look_forward_twice: bool = True
    denoising: int = 100
    share_heads: bool = True
    share_encoder_heads: bool = False
    position_temperature: float = 20.0
    position_anchor: float = 1.0

    def check(self) -> None:
        super().check()
        check_range({"model": self}, ["model.position_temperature"], 0, exclusive=True)


@register("dino", DINOConfig)
class DINO(DeformableModel):
    """Detects objects as two-stage Deformable DETR with box refinement does, with better queries and denoising.

    The encoder scores all classes. Its best boxes are the references of queries with learned content (mixed query
    selection), whose positions are computed from the boxes anew in each layer. Heads see normalised states, but boxes
    are refined from states before the norm. The arguments that are not listed are those of DeformableModel.

    Args:
        share_heads: one pair of heads for all decoder layers, instead of one for each layer (detrex).
        share_encoder_heads: the encoder has this pair too, instead of its own.
        position_temperature, position_anchor: of image positions, as in sine_positions; 20 and 1 are those of the
            official weights, 10000 and 0.5 those of detrex'.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    class_weight: ClassVar[float] = 1.0
    eps: ClassVar[float] = 1e-3
    box_refine = True

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_queries: int = 900,
        embed_dim: int = 256,
        num_heads: int = 8,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        mlp_dim: int = 2048,
        drop_rate: float = 0.0,
        num_levels: int = 4,
        num_points: int = 4,
        look_forward_twice: bool = True,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        one_to_many_queries: int = 0,
        share_heads: bool = True,
        share_encoder_heads: bool = False,
        position_temperature: float = 20.0,
        position_anchor: float = 1.0,
        aux_loss: bool = True,
    ):
        if share_encoder_heads and not share_heads:
            raise ValueError("share_encoder_heads=True needs share_heads=True")
        super().__init__(
            backbone,
            num_classes,
            num_queries,
            embed_dim,
            num_heads,
            encoder_depth,
            decoder_depth,
            mlp_dim,
            drop_rate,
            num_levels,
            num_points,
            look_forward_twice,
            denoising,
            label_noise,
            box_noise,
            one_to_many_queries,
            aux_loss,
        )
        self.share_heads, self.share_encoder_heads = share_heads, share_encoder_heads
        self.position_temperature, self.position_anchor = position_temperature, position_anchor
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.enc_output = nn.Linear(embed_dim, embed_dim)
        self.enc_output_norm = nn.LayerNorm(embed_dim)
        self.query_embed = nn.Embedding(num_queries + one_to_many_queries, embed_dim)
        hidden, out = nn.Linear(2 * embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.ref_point_head = nn.Sequential(hidden, nn.ReLU(), out)
        for layer in (self.enc_output, self.query_embed, hidden, out):
            nn.init.xavier_uniform_(layer.weight)
        if denoising:
            self.label_enc = nn.Embedding(num_classes, embed_dim)
        class_head, box_head = self.add_heads(embed_dim, 1 if share_heads else decoder_depth)
        if not share_encoder_heads:
            self.enc_out_class_embed, self.enc_out_bbox_embed = class_head, box_head

    def queries(self, encoded: Encoded, denoising: Denoising | None) -> Queries:
        """Queries of the best proposals, which "enc_outputs" has by falling score, with their positions [B, Q]."""
        own = not self.share_encoder_heads
        class_head = self.enc_out_class_embed if own else self.class_embed[0]
        box_head = self.enc_out_bbox_embed if own else self.bbox_embed[0]
        logits, boxes = self.propose(encoded, class_head, box_head)
        count = sym_min(self.num_queries + self.extra_queries, logits.shape[1])
        top = logits.amax(-1).topk(count, dim=1).indices
        logits, boxes = (x.gather(1, top[..., None].expand(-1, -1, x.shape[-1])) for x in (logits, boxes))
        boxes = boxes.sigmoid()
        content = self.query_embed.weight[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        content, reference = self.add_denoising(content, boxes.detach(), denoising)
        proposals = {"pred_logits": logits, "pred_boxes": boxes, "positions": top}
        return Queries(content, reference, proposals=proposals)

    def query_position(self, reference: Tensor, encoded: Encoded) -> Tensor:
        ratios = encoded.ratios[:, :1].repeat(1, 1, 2)
        x, y, w, h = (reference * ratios).unbind(-1)
        boxes = torch.stack((y, x, w, h), -1)
        encoding = sine_encoding(boxes, encoded.memory.shape[-1] // 2)
        return self.ref_point_head(encoding.to(encoded.memory.dtype))
