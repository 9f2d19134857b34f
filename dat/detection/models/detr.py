"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020, arXiv:2005.12872).

Semantics, initialisation and defaults are those of the official implementation, facebookresearch/detr. DETR-DC5 is the
same model on a backbone made with output_stride=16: timm, as torchvision, gives the first block of the last stage the
dilation of the stage before it and dilates the others, so official weights mean the same.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dat.detection.matcher import Scores
from dat.detection.models.backbone import feature_maps
from dat.detection.models.base import BaseDETR, ModelConfig, box_head, feature_channels, resize_masks
from dat.detection.models.denoising import Denoising
from dat.detection.models.position_encoding import sine_positions
from dat.detection.models.registry import register
from dat.detection.models.transformer import TransformerLayer, attention
from dat.layers.autocast import casts_parameters_together
from dat.layers.norm import add_layer_norm
from dat.utils.errors import ConfigError


@dataclass
class DETRConfig(ModelConfig):
    """`pre_norm`: normalise before attention instead of after."""

    kind: str = "detr"
    pre_norm: bool = False

    def check(self) -> None:
        super().check()
        maps = len(self.backbone.get("out_indices", [-1]))
        if maps != 1:
            raise ConfigError(f"model.backbone.out_indices gives {maps} maps, model.kind=detr takes one, such as [-1]")


class EncoderLayer(TransformerLayer):
    """Self-attention and an MLP, each followed by a LayerNorm or, with pre_norm, preceded by it."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, drop_rate: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = attention(embed_dim, num_heads, drop_rate)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.add_mlp(embed_dim, mlp_dim, drop_rate)
        self.norm2 = nn.LayerNorm(embed_dim)

    @casts_parameters_together
    def forward(self, x: Tensor, pos: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x [B, S, C], pos [B or 1, S, C], padding_mask [B, S] -> [B, S, C]."""
        if self.pre_norm:
            x = x + self._attend(self.norm1(x), pos, padding_mask)
            return x + self.mlp(self.norm2(x))
        x = add_layer_norm(self.norm1, x, self._attend(x, pos, padding_mask))[1]
        return add_layer_norm(self.norm2, x, self.mlp(x))[1]

    def _attend(self, x: Tensor, pos: Tensor, padding_mask: Tensor | None) -> Tensor:
        query = x + pos
        return self.drop(self.self_attn(query, query, x, key_padding_mask=padding_mask, need_weights=False)[0])


class DecoderLayer(TransformerLayer):
    """Self-attention among the queries, attention to the encoded map and an MLP, normalised as in EncoderLayer."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, drop_rate: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = attention(embed_dim, num_heads, drop_rate)
        self.cross_attn = attention(embed_dim, num_heads, drop_rate)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.add_mlp(embed_dim, mlp_dim, drop_rate)
        self.norm3 = nn.LayerNorm(embed_dim)

    @casts_parameters_together
    def forward(self, x: Tensor, pos: Tensor, key: Tensor, memory: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x [B, Q, C], pos [1, Q, C], key and memory [B, S, C] (with and without positions) -> [B, Q, C]."""
        if self.pre_norm:
            x = x + self._attend_queries(self.norm1(x), pos)
            x = x + self._attend_memory(self.norm2(x), pos, key, memory, padding_mask)
            return x + self.mlp(self.norm3(x))
        x = add_layer_norm(self.norm1, x, self._attend_queries(x, pos))[1]
        x = add_layer_norm(self.norm2, x, self._attend_memory(x, pos, key, memory, padding_mask))[1]
        return add_layer_norm(self.norm3, x, self.mlp(x))[1]

    def _attend_queries(self, x: Tensor, pos: Tensor) -> Tensor:
        query = x + pos
        return self.drop(self.self_attn(query, query, x, need_weights=False)[0])

    def _attend_memory(
        self, x: Tensor, pos: Tensor, key: Tensor, memory: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        attended, _ = self.cross_attn(x + pos, key, memory, key_padding_mask=padding_mask, need_weights=False)
        return self.drop(attended)


@register("detr", DETRConfig)
class DETR(BaseDETR):
    """Detects objects by attention from a set of learned queries to the backbone's last map.

    Args:
        backbone: any model made by timm with features_only=True: returns a list of NCHW maps (NHWC if its `output_fmt`
            says so), coarsest last, and has `feature_info.channels()`. Only its last map is used. DETR-DC5: made with
            output_stride=16.
        num_classes: number of classes; class k is logit k, and the logit after the last is "no object".
        num_queries: number of boxes predicted per image.
        embed_dim: width C, a multiple of 4 and of num_heads.
        num_heads: attention heads.
        encoder_depth, decoder_depth: numbers of layers.
        mlp_dim: width of the layers' MLPs.
        drop_rate: dropout in both transformers, of attention too.
        pre_norm: normalise before attention and MLP instead of after; the encoder's output is then normalised as well.
        aux_loss: return the predictions of every decoder layer, for the auxiliary losses.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    scores: ClassVar[Scores] = "softmax"
    class_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_queries: int = 100,
        embed_dim: int = 256,
        num_heads: int = 8,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        mlp_dim: int = 2048,
        drop_rate: float = 0.1,
        pre_norm: bool = False,
        aux_loss: bool = True,
    ):
        super().__init__(backbone, num_classes, num_queries, embed_dim, num_heads, decoder_depth, aux_loss)
        layer_args = (embed_dim, num_heads, mlp_dim, drop_rate, pre_norm)
        self.input_proj = nn.Conv2d(feature_channels(backbone)[-1], embed_dim, 1)
        self.encoder = nn.ModuleList([EncoderLayer(*layer_args) for _ in range(encoder_depth)])
        self.encoder_norm = nn.LayerNorm(embed_dim) if pre_norm else nn.Identity()
        self.decoder = nn.ModuleList([DecoderLayer(*layer_args) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_classes + 1)
        self.bbox_embed = box_head(embed_dim)

    def features(self, images: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
        levels = [self.input_proj(feature_maps(self.backbone, images)[-1])]
        return levels, resize_masks(mask, levels)

    def detect(
        self, levels: list[Tensor], masks: list[Tensor] | None = None, denoising: Denoising | None = None
    ) -> dict[str, Any]:
        (level,) = levels
        x = level.flatten(2).transpose(1, 2)
        mask = None if masks is None else masks[0]
        pos = sine_positions(masks, [(level.shape[-2], level.shape[-1])], x.shape[-1], like=x, anchor=1.0)
        padding_mask = None if mask is None else _attended(mask.flatten(1))
        for layer in self.encoder:
            x = self.run_layer(layer, x, pos, padding_mask)
        memory = self.encoder_norm(x)
        return self._decode(memory + pos, memory, padding_mask)

    def _decode(self, key: Tensor, memory: Tensor, padding_mask: Tensor | None) -> dict[str, Any]:
        pos = self.query_embed.weight[None]
        x = torch.zeros_like(pos, dtype=memory.dtype).expand(memory.shape[0], -1, -1)
        layers = []
        for layer in self.decoder:
            x = self.run_layer(layer, x, pos, key, memory, padding_mask)
            layers.append(self.decoder_norm(x))
        decoded = torch.stack(layers)
        logits, boxes = self.class_embed(decoded), self.bbox_embed(decoded)
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).sigmoid()
        return self.as_outputs([{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)])


def _attended(padding_mask: Tensor) -> Tensor:
    """The mask [B, S], cleared for images that are all padding.

    Attention to no position at all is 0 / 0, which some kernels return as NaN.
    """
    return padding_mask & ~padding_mask.all(1, keepdim=True)
