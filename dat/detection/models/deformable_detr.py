"""Deformable DETR: Deformable Transformers for End-to-End Object Detection (Zhu et al., ICLR 2021, arXiv:2010.04159).

Semantics, initialisation and defaults are those of the official implementation, fundamentalvision/Deformable-DETR.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat.detection.matcher import Scores
from dat.detection.models.base import BaseDETR, ModelConfig, box_head, feature_channels, resize_masks
from dat.detection.models.position_encoding import sine_encoding, sine_position
from dat.detection.models.registry import register
from dat.detection.models.transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    Shapes,
    encoder_proposals,
    inverse_sigmoid,
    reference_grid,
)
from dat.ops.sizes import sym_min


@dataclass
class DeformableDETRConfig(ModelConfig):
    """The arguments of DeformableDETR."""

    num_levels: int = 4
    num_points: int = 4
    box_refine: bool = False
    two_stage: bool = False

    @property
    def num_maps(self) -> int:
        return min(3, self.num_levels)


def _class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(embed_dim, num_classes)
    # Every class starts at probability 0.01, so that the many background queries do not swamp the focal loss at first.
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def _box_head(embed_dim: int) -> nn.Sequential:
    """Starts at zero: each layer at first returns its reference."""
    head = box_head(embed_dim)
    for parameter in head[-1].parameters():
        nn.init.zeros_(parameter)
    return head


def _projections(channels: list[int], embed_dim: int, num_levels: int) -> nn.ModuleList:
    """1x1 convolutions of the backbone's maps, then 3x3 ones of stride 2: of its last map, and of each other."""
    in_chans = (channels + channels[-1:] + [embed_dim] * num_levels)[:num_levels]
    projections = nn.ModuleList()
    for level, chans in enumerate(in_chans):
        conv: Any = nn.Conv2d(chans, embed_dim, 1) if level < len(channels) else nn.Conv2d(chans, embed_dim, 3, 2, 1)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
        projections.append(nn.Sequential(conv, nn.GroupNorm(math.gcd(32, embed_dim), embed_dim)))
    return projections


@register("deformable_detr", DeformableDETRConfig)
class DeformableDETR(BaseDETR):
    """Detects objects by deformable attention from a set of queries to the levels of a backbone.

    Args:
        backbone: any model made by timm with features_only=True: returns a list of NCHW maps (NHWC if its `output_fmt`
            says so), coarsest last, and has `feature_info.channels()`.
        num_classes: number of classes; class k is logit k, there is no "no object" class.
        num_queries: number of boxes predicted per image (with two_stage at most one per position of the levels).
        embed_dim: width C, a multiple of 4 and of num_heads.
        num_heads: attention heads.
        encoder_depth, decoder_depth: numbers of layers.
        mlp_dim: width of the layers' MLPs.
        drop_rate: dropout in both transformers.
        num_levels: levels attended to; beyond the backbone's maps they are made by stride-2 convolutions.
        num_points: samples per head and level.
        box_refine: each decoder layer has its own heads and refines the boxes of the layer before.
        two_stage: queries start from the encoder's highest scoring boxes; needs box_refine.
        aux_loss: return the predictions of every decoder layer, for the auxiliary losses.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    scores: ClassVar[Scores] = "sigmoid"

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
        aux_loss: bool = True,
    ):
        super().__init__(backbone, num_classes, num_queries, embed_dim, num_heads, decoder_depth, aux_loss)
        channels = feature_channels(backbone)
        if num_levels < len(channels):
            raise ValueError(
                f"num_levels={num_levels} is fewer than the backbone's {len(channels)} feature maps: "
                "raise it, or give the backbone fewer out_indices"
            )
        if two_stage and not box_refine:
            raise ValueError("two_stage=True needs box_refine=True")
        self.box_refine, self.two_stage = box_refine, two_stage
        self.input_proj = _projections(channels, embed_dim, num_levels)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        layer_args = (embed_dim, num_heads, mlp_dim, drop_rate, num_levels, num_points)
        self.encoder = nn.ModuleList([DeformableEncoderLayer(*layer_args) for _ in range(encoder_depth)])
        self.decoder = nn.ModuleList([DeformableDecoderLayer(*layer_args) for _ in range(decoder_depth)])
        self._add_queries(embed_dim)
        self._add_heads(embed_dim, decoder_depth)

    def _add_queries(self, embed_dim: int) -> None:
        if self.two_stage:
            self.enc_output = nn.Linear(embed_dim, embed_dim)
            self.enc_output_norm = nn.LayerNorm(embed_dim)
            self.pos_trans = nn.Linear(2 * embed_dim, 2 * embed_dim)
            self.pos_trans_norm = nn.LayerNorm(2 * embed_dim)
            nn.init.xavier_uniform_(self.enc_output.weight)
            nn.init.xavier_uniform_(self.pos_trans.weight)
        else:
            self.query_embed = nn.Embedding(self.num_queries, 2 * embed_dim)
            self.reference_points = nn.Linear(embed_dim, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def _add_heads(self, embed_dim: int, decoder_depth: int) -> None:
        """One head per decoder layer when boxes are refined, plus the encoder's in two stages; else one for all."""
        num_heads = decoder_depth + self.two_stage if self.box_refine else 1
        class_head, box_head = _class_head(embed_dim, self.num_classes), _box_head(embed_dim)
        self.class_embed = nn.ModuleList([copy.deepcopy(class_head) for _ in range(num_heads)])
        self.bbox_embed = nn.ModuleList([copy.deepcopy(box_head) for _ in range(num_heads)])
        if not self.two_stage:
            # Without proposals the initial boxes are small: sigmoid(-2) of the image.
            first: Any = self.bbox_embed[0]
            nn.init.constant_(first[-1].bias[2:], -2.0)

    def features(self, images: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
        maps = self.backbone_maps(images)
        levels = [project(x) for project, x in zip(self.input_proj, maps, strict=False)]
        for project in self.input_proj[len(maps) :]:
            levels.append(project(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return levels, resize_masks(mask, levels)

    def detect(self, levels: list[Tensor], masks: list[Tensor] | None = None) -> dict[str, Any]:
        """See BaseDETR; two_stage adds "enc_outputs", the predictions of every position of the levels."""
        B = levels[0].shape[0]
        shapes: Shapes = tuple((x.shape[-2], x.shape[-1]) for x in levels)
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        padding_mask = None if masks is None else torch.cat([m.flatten(1) for m in masks], 1)
        positions = [
            sine_position(None if masks is None else masks[i], shapes[i], x.shape[-1], like=x) + self.level_embed[i]
            for i in range(len(levels))
        ]
        pos = torch.cat(positions, 1)
        centres, ratios = reference_grid(shapes, masks, x.device)
        reference = (centres[:, :, None] * ratios[:, None]).expand(B, -1, -1, -1)
        memory = x
        for layer in self.encoder:
            memory = self.run_layer(layer, memory, pos, reference, shapes, padding_mask)
        if not self.two_stage:
            return self._decode(*self._learned_queries(memory), memory, shapes, ratios, padding_mask)
        encoded = self._propose(memory, centres, shapes, padding_mask)
        outputs = self._decode(*self._proposed_queries(*encoded), memory, shapes, ratios, padding_mask)
        outputs["enc_outputs"] = {"pred_logits": encoded[0], "pred_boxes": encoded[1].sigmoid()}
        return outputs

    def _learned_queries(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Content [B, Q, C], position [B, Q, C] and reference points [B, Q, 2] of the queries."""
        pos, content = self.query_embed.weight.expand(memory.shape[0], -1, -1).chunk(2, -1)
        reference = self.reference_points(pos)
        reference = reference.to(torch.promote_types(reference.dtype, torch.float32)).sigmoid()
        return content, pos, reference

    def _propose(
        self, memory: Tensor, centres: Tensor, shapes: Shapes, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The encoder's own detections: logits [B, S, K] and inverse sigmoids of boxes [B, S, 4]."""
        anchors, refused = encoder_proposals(centres, shapes, padding_mask)
        output = self.enc_output_norm(self.enc_output(memory.masked_fill(refused, 0.0)))
        return self.class_embed[-1](output), self.bbox_embed[-1](output) + anchors

    def _proposed_queries(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Content [B, Q, C], position [B, Q, C] and reference boxes [B, Q, 4] of the best proposals."""
        # The encoder is trained to separate objects from background by class 0 only.
        top = logits[..., 0].topk(sym_min(self.num_queries, logits.shape[1]), dim=1).indices
        reference = boxes.gather(1, top[..., None].expand(-1, -1, 4)).detach().sigmoid()
        encoding = sine_encoding(reference, self.pos_trans.in_features // 4).to(logits.dtype)
        pos, content = self.pos_trans_norm(self.pos_trans(encoding)).chunk(2, -1)
        return content, pos, reference

    def _decode(
        self,
        x: Tensor,
        pos: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        ratios: Tensor,
        padding_mask: Tensor | None,
    ) -> dict[str, Any]:
        outputs = []
        for i, layer in enumerate(self.decoder):
            scale = ratios if reference.shape[-1] == 2 else torch.cat((ratios, ratios), -1)
            x = self.run_layer(layer, x, pos, reference[:, :, None] * scale[:, None], memory, shapes, padding_mask)
            head = i if self.box_refine else 0
            delta = self.bbox_embed[head](x)
            # A point reference gives the centre only, the width and height come from the head.
            start = F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
            boxes = (delta + start).sigmoid()
            outputs.append({"pred_logits": self.class_embed[head](x), "pred_boxes": boxes})
            if self.box_refine:
                reference = boxes.detach()
        return self.as_outputs(outputs)
