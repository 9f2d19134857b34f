"""The parts that Deformable DETR and its successors have in common: levels, encoder, proposals and decoder."""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dat.detection.matcher import Scores
from dat.detection.models.backbone import feature_maps
from dat.detection.models.base import BaseDETR, ModelConfig, box_head, feature_channels, resize_masks
from dat.detection.models.denoising import Denoising, make_denoising, query_mask
from dat.detection.models.position_encoding import sine_positions
from dat.detection.models.transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    Shapes,
    encoder_proposals,
    inverse_sigmoid,
    reference_grid,
)
from dat.engine.config import check_range
from dat.ops._common import autocast


@dataclass
class DeformableConfig(ModelConfig):
    """The arguments of DeformableModel."""

    num_levels: int = 4
    num_points: int = 4
    look_forward_twice: bool = False
    denoising: int = 0
    label_noise: float = 0.5
    box_noise: float = 1.0
    one_to_many_queries: int = 0

    @property
    def num_maps(self) -> int:
        return min(3, self.num_levels)

    def check(self) -> None:
        super().check()
        check_range({"model": self}, ["model.label_noise", "model.box_noise"], 0, 1)


class Encoded(NamedTuple):
    """Levels of a batch: `memory` [B, S, C], `centres` and `ratios` of reference_grid, `padding_mask` [B, S]."""

    memory: Tensor
    shapes: Shapes
    centres: Tensor
    ratios: Tensor
    padding_mask: Tensor | None


class Queries(NamedTuple):
    """Queries of the decoder: denoising ones, matched ones, and those of one-to-many matching.

    Attributes:
        content: [B, T, C].
        reference: points [B, T, 2] or boxes cxcywh [B, T, 4], 0 to 1.
        pos: [B, T, C], or None where `query_position` computes it from the reference in each layer.
        proposals: outputs of the encoder, {"pred_logits", "pred_boxes", ...}; None in one stage.
    """

    content: Tensor
    reference: Tensor
    pos: Tensor | None = None
    proposals: dict[str, Any] | None = None


class DeformableModel(BaseDETR):
    """An encoder and a decoder with deformable attention; a subclass adds its queries and heads.

    Args:
        backbone: any model made by timm with features_only=True: returns a list of NCHW maps (NHWC if its `output_fmt`
            says so), coarsest last, and has `feature_info.channels()`.
        num_classes: number of classes; class k is logit k, there is no "no object" class.
        num_queries: number of boxes predicted per image (with proposals at most one per position of the levels).
        embed_dim: width C, a multiple of 4 and of num_heads.
        num_heads: attention heads.
        encoder_depth, decoder_depth: numbers of layers.
        mlp_dim: width of the layers' MLPs.
        drop_rate: dropout in both transformers.
        num_levels: levels attended to; beyond the backbone's maps they are made by stride-2 convolutions.
        num_points: samples per head and level.
        look_forward_twice: the box loss of a layer trains the boxes of the layer before too (DINO, arXiv:2203.03605);
            needs box refinement.
        denoising: in training, add queries that start from noisy targets (contrastive denoising, DINO): how many, as
            num_denoising_groups counts them; 0: none. Needs references that are boxes.
        label_noise, box_noise: noise of these queries, as in make_denoising.
        one_to_many_queries: in training, add this number of queries, of which several are matched to each target
            (hybrid matching, arXiv:2207.13080).
        aux_loss: return the predictions of every decoder layer, for the auxiliary losses.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    scores: ClassVar[Scores] = "sigmoid"
    # Keeps the inverse sigmoids of boxes finite.
    eps: ClassVar[float] = 1e-5
    # Whether a decoder layer corrects the boxes of the layer before, and whether all layers have the same heads.
    box_refine: bool
    share_heads: bool
    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList
    # Models with proposals have the first two, and those with denoising the third.
    enc_output: nn.Linear
    enc_output_norm: nn.LayerNorm
    label_enc: nn.Embedding
    # Image positions are encoded with these, see sine_positions.
    position_temperature: float = 10000.0
    position_anchor: float = 0.5

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_queries: int,
        embed_dim: int,
        num_heads: int,
        encoder_depth: int,
        decoder_depth: int,
        mlp_dim: int,
        drop_rate: float,
        num_levels: int,
        num_points: int,
        look_forward_twice: bool,
        denoising: int,
        label_noise: float,
        box_noise: float,
        one_to_many_queries: int,
        aux_loss: bool,
    ):
        super().__init__(backbone, num_classes, num_queries, embed_dim, num_heads, decoder_depth, aux_loss)
        channels = feature_channels(backbone)
        if num_levels < len(channels):
            raise ValueError(
                f"num_levels={num_levels} is fewer than the backbone's {len(channels)} feature maps: "
                "raise it, or give the backbone fewer out_indices"
            )
        self.look_forward_twice, self.one_to_many_queries = look_forward_twice, one_to_many_queries
        self.denoising, self.label_noise, self.box_noise = denoising, label_noise, box_noise
        self.input_proj = _projections(channels, embed_dim, num_levels)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        layer_args = (embed_dim, num_heads, mlp_dim, drop_rate, num_levels, num_points)
        self.encoder = nn.ModuleList([DeformableEncoderLayer(*layer_args) for _ in range(encoder_depth)])
        self.decoder = nn.ModuleList([DeformableDecoderLayer(*layer_args) for _ in range(decoder_depth)])
        self.decoder_norm: nn.Module | None = None

    def add_heads(self, embed_dim: int, count: int) -> tuple[nn.Linear, nn.Sequential]:
        """Adds `count` heads for classes and boxes that start equal; returns another such pair."""
        class_head, box_head = make_class_head(embed_dim, self.num_classes), make_box_head(embed_dim)
        self.class_embed = nn.ModuleList([copy.deepcopy(class_head) for _ in range(count)])
        self.bbox_embed = nn.ModuleList([copy.deepcopy(box_head) for _ in range(count)])
        return class_head, box_head

    def features(self, images: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
        maps = feature_maps(self.backbone, images)
        levels = [project(x) for project, x in zip(self.input_proj, maps, strict=False)]
        for project in self.input_proj[len(maps) :]:
            levels.append(project(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return levels, resize_masks(mask, levels)

    def make_denoising(
        self,
        targets: list[dict[str, Any]],
        number: int | None = None,
        label_noise: float | None = None,
        box_noise: float | None = None,
    ) -> Denoising | None:
        """See `denoising.make_denoising`, for the arguments of the constructor where none are given."""
        number = self.denoising if number is None else number
        if not (number and self.training):
            return None
        label_noise = self.label_noise if label_noise is None else label_noise
        box_noise = self.box_noise if box_noise is None else box_noise
        return make_denoising(targets, self.num_classes, number, label_noise, box_noise)

    def detect(
        self, levels: list[Tensor], masks: list[Tensor] | None = None, denoising: Denoising | None = None
    ) -> dict[str, Any]:
        """See BaseDETR. More outputs: "enc_outputs" of the proposals; in training "dn_outputs" of the denoising
        queries, slot by slot, and "one_to_many_outputs", both with their "aux_outputs".
        """
        encoded = self._encode(levels, masks)
        queries = self.queries(encoded, denoising)
        slots = 0 if denoising is None else denoising["labels"].shape[1]
        found = queries.content.shape[1] - slots
        # There are fewer proposals than queries in small images.
        matched = min(found, self.num_queries) if self.extra_queries else found
        mask = query_mask(denoising, matched, found - matched, encoded.memory.device)
        layers = self._decode(queries, encoded, mask)

        def part(start: int, end: int) -> dict[str, Any]:
            return self.as_outputs([{key: x[:, start:end] for key, x in layer.items()} for layer in layers])

        outputs = self.as_outputs(layers) if mask is None else part(slots, slots + matched)
        if denoising is not None:
            outputs["dn_outputs"] = part(0, slots)
        if found > matched:
            outputs["one_to_many_outputs"] = part(slots + matched, slots + found)
        if queries.proposals is not None:
            outputs["enc_outputs"] = queries.proposals
        return outputs

    @property
    def extra_queries(self) -> int:
        """Queries of one-to-many matching, which exist only in training."""
        return self.one_to_many_queries if self.training else 0

    def queries(self, encoded: Encoded, denoising: Denoising | None) -> Queries:
        """The queries of an encoded batch."""
        raise NotImplementedError

    def query_position(self, reference: Tensor, encoded: Encoded) -> Tensor:
        """[B, T, C], for queries without a position of their own."""
        raise NotImplementedError

    def _encode(self, levels: list[Tensor], masks: list[Tensor] | None) -> Encoded:
        shapes: Shapes = tuple((x.shape[-2], x.shape[-1]) for x in levels)
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        padding_mask = None if masks is None else torch.cat([m.flatten(1) for m in masks], 1)
        pos = sine_positions(masks, shapes, x.shape[-1], x, self.position_anchor, self.position_temperature)
        embeds = [embed.expand(h * w, -1) for embed, (h, w) in zip(self.level_embed, shapes, strict=True)]
        pos = pos + torch.cat(embeds)
        centres, ratios = reference_grid(shapes, masks, x.device)
        reference = (centres[:, :, None] * ratios[:, None]).expand(x.shape[0], -1, -1, -1)
        for layer in self.encoder:
            x = self.run_layer(layer, x, pos, reference, shapes, padding_mask)
        return Encoded(x, shapes, centres, ratios, padding_mask)

    def add_denoising(self, content: Tensor, reference: Tensor, denoising: Denoising | None) -> tuple[Tensor, Tensor]:
        """Content [B, Q, C] and reference boxes [B, Q, 4], preceded by those of the denoising queries."""
        if denoising is None:
            return content, reference
        empty = (denoising["labels"] < 0)[..., None]
        labels = self.label_enc(denoising["labels"].clamp(min=0)).masked_fill(empty, 0.0)
        boxes = inverse_sigmoid(denoising["boxes"].to(reference.dtype), self.eps).masked_fill(empty, 0.0).sigmoid()
        return torch.cat((labels.to(content.dtype), content), 1), torch.cat((boxes, reference), 1)

    def _decode(self, queries: Queries, encoded: Encoded, query_mask: Tensor | None) -> list[dict[str, Tensor]]:
        """Predictions of each decoder layer, for all queries."""
        x, reference = queries.content, queries.reference
        memory, shapes, _, ratios, padding_mask = encoded
        # The box that a prediction corrects: the reference, with its gradient in look forward twice.
        start = reference
        outputs = []
        box_ratios = torch.cat((ratios, ratios), -1)
        for i, layer in enumerate(self.decoder):
            scale = ratios if reference.shape[-1] == 2 else box_ratios
            pos = self.query_position(reference, encoded) if queries.pos is None else queries.pos
            located = reference[:, :, None] * scale[:, None]
            x = self.run_layer(layer, x, pos, located, memory, shapes, padding_mask, query_mask)
            head = 0 if self.share_heads else i
            # Cast once, for both heads.
            decoded = autocast(x if self.decoder_norm is None else self.decoder_norm(x))
            delta = self.bbox_embed[head](decoded)
            boxes = self._correct(start, delta)
            outputs.append({"pred_logits": self.class_embed[head](decoded), "pred_boxes": boxes})
            if self.box_refine and i < len(self.decoder) - 1:
                # Boxes are refined before the norm; without one, they are those predicted where both start alike.
                raw = delta if self.decoder_norm is None else self.bbox_embed[head](x)
                refined = boxes if raw is delta and start is reference else self._correct(reference, raw)
                reference = refined.detach()
                start = refined if self.look_forward_twice else reference
        return outputs

    def _correct(self, reference: Tensor, delta: Tensor) -> Tensor:
        """Boxes [B, T, 4] from references and what a head predicts."""
        # A point gives the centre only, the width and height come from the head.
        start = inverse_sigmoid(reference, self.eps)
        if reference.shape[-1] == 2:
            start = F.pad(start, (0, 2))
        return (delta + start).sigmoid()

    def propose(self, encoded: Encoded, class_head: nn.Module, box_head: nn.Module) -> tuple[Tensor, Tensor]:
        """The encoder's own detections: logits [B, S, K] and inverse sigmoids of boxes [B, S, 4]."""
        anchors, refused = encoder_proposals(encoded.centres, encoded.shapes, encoded.padding_mask)
        output = self.enc_output_norm(self.enc_output(encoded.memory.masked_fill(refused, 0.0)))
        return class_head(output), box_head(output) + anchors


def make_class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(embed_dim, num_classes)
    # Every class starts at probability 0.01, so that the many background queries do not swamp the focal loss at first.
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def make_box_head(embed_dim: int) -> nn.Sequential:
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
        projections.append(nn.Sequential(conv, _GroupNorm(math.gcd(32, embed_dim), embed_dim)))
    return projections


class _GroupNorm(nn.GroupNorm):
    """nn.GroupNorm for maps of any size: a group of one value becomes its bias, in a batch of one image too."""

    def forward(self, x: Tensor) -> Tensor:
        # nn.functional.group_norm refuses a single image whose groups have one value, and takes several.
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
