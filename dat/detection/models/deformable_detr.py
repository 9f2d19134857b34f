"""Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., ICLR 2021, arXiv:2010.04159).

Semantics, initialisation and defaults are those of the official implementation, fundamentalvision/Deformable-DETR.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dat.detection.models.deformable import DeformableConfig, DeformableModel, Encoded, Queries
from dat.detection.models.denoising import Denoising
from dat.detection.models.position_encoding import sine_encoding
from dat.detection.models.registry import register
from dat.ops.sizes import sym_min


@dataclass
class DeformableDETRConfig(DeformableConfig):
    """The arguments of DeformableDETR."""

    box_refine: bool = False
    two_stage: bool = False
    mixed_selection: bool = False


@register("deformable_detr", DeformableDETRConfig)
class DeformableDETR(DeformableModel):
    """Detects objects by deformable attention from a set of queries to the levels of a backbone.

    The arguments that are not listed are those of DeformableModel.

    Args:
        box_refine: each decoder layer has its own heads and refines the boxes of the layer before.
        two_stage: queries start from the encoder's highest scoring boxes; needs box_refine.
        mixed_selection: in two stages, take only the positions of queries from the encoder's boxes and learn their
            content (mixed query selection, DINO, arXiv:2203.03605).

    Raises:
        ValueError: for arguments that do not fit together.
    """

    class_weight: ClassVar[float] = 2.0

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_queries: int = 300,
        embed_dim: int = 256,
        num_heads: int = 8,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        mlp_dim: int = 1024,
        drop_rate: float = 0.1,
        num_levels: int = 4,
        num_points: int = 4,
        box_refine: bool = False,
        two_stage: bool = False,
        mixed_selection: bool = False,
        look_forward_twice: bool = False,
        denoising: int = 0,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        one_to_many_queries: int = 0,
        aux_loss: bool = True,
    ):
        if two_stage and not box_refine:
            raise ValueError("two_stage=True needs box_refine=True")
        if look_forward_twice and not box_refine:
            raise ValueError("look_forward_twice=True needs box_refine=True")
        for name, value in {"mixed_selection": mixed_selection, "denoising": denoising}.items():
            if value and not two_stage:
                raise ValueError(f"{name}={value} needs two_stage=True")
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
        self.box_refine, self.two_stage, self.mixed_selection = box_refine, two_stage, mixed_selection
        self.share_heads = not box_refine
        self._add_queries(embed_dim)
        # One head per decoder layer when boxes are refined, plus the encoder's in two stages; else one for all.
        self.add_heads(embed_dim, decoder_depth + two_stage if box_refine else 1)
        if not two_stage:
            # Without proposals the initial boxes are small: sigmoid(-2) of the image.
            first: Any = self.bbox_embed[0]
            nn.init.constant_(first[-1].bias[2:], -2.0)

    def _add_queries(self, embed_dim: int) -> None:
        num_queries = self.num_queries + self.one_to_many_queries
        if self.two_stage:
            self.enc_output = nn.Linear(embed_dim, embed_dim)
            self.enc_output_norm = nn.LayerNorm(embed_dim)
            self.pos_trans = nn.Linear(2 * embed_dim, 2 * embed_dim)
            self.pos_trans_norm = nn.LayerNorm(2 * embed_dim)
            nn.init.xavier_uniform_(self.enc_output.weight)
            nn.init.xavier_uniform_(self.pos_trans.weight)
            if self.mixed_selection:
                self.query_embed = nn.Embedding(num_queries, embed_dim)
            if self.denoising:
                self.label_enc = nn.Embedding(self.num_classes, embed_dim)
        else:
            self.query_embed = nn.Embedding(num_queries, 2 * embed_dim)
            self.reference_points = nn.Linear(embed_dim, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def queries(self, encoded: Encoded, denoising: Denoising | None) -> Queries:
        """Learned queries or, in two stages, those of the best proposals; "enc_outputs" are all proposals."""
        if self.two_stage:
            return self._proposed_queries(encoded, denoising)
        weight = self.query_embed.weight[: self.num_queries + self.extra_queries]
        pos, content = weight.expand(encoded.memory.shape[0], -1, -1).chunk(2, -1)
        reference = self.reference_points(pos)
        reference = reference.to(torch.promote_types(reference.dtype, torch.float32)).sigmoid()
        return Queries(content, reference, pos)

    def _proposed_queries(self, encoded: Encoded, denoising: Denoising | None) -> Queries:
        logits, boxes = self.propose(encoded, self.class_embed[-1], self.bbox_embed[-1])
        # The encoder is trained to separate objects from background by class 0 only.
        count = sym_min(self.num_queries + self.extra_queries, logits.shape[1])
        top = logits[..., 0].topk(count, dim=1).indices
        reference = boxes.gather(1, top[..., None].expand(-1, -1, 4)).detach().sigmoid()
        pos, content = self._encode_boxes(reference, logits.dtype)
        if self.mixed_selection:
            content = self.query_embed.weight[: content.shape[1]].expand_as(content)
        if denoising is not None:
            content, reference = self.add_denoising(content, reference, denoising)
            pos, _ = self._encode_boxes(reference, logits.dtype)
        return Queries(content, reference, pos, {"pred_logits": logits, "pred_boxes": boxes.sigmoid()})

    def _encode_boxes(self, reference: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position and content [B, Q, C] of queries that start from boxes [B, Q, 4]."""
        encoding = sine_encoding(reference, self.pos_trans.in_features // 4).to(dtype)
        pos, content = self.pos_trans_norm(self.pos_trans(encoding)).chunk(2, -1)
        return pos, content
