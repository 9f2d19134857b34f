"""Base class of the detectors: configuration, forward arguments, backbone features, padding masks and heads."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dat.detection.matcher import Scores
from dat.detection.models.denoising import Denoising
from dat.engine.config import check_range
from dat.utils.errors import ConfigError

# Widths and numbers of layers and queries are no larger than this, so that no weights overflow memory's addresses.
LARGEST_INTEGER = 2**16


@dataclass
class ModelConfig:
    """The keys that every detector has; the dataclass of a `kind`, beside its model, adds those of that kind.

    `backbone` is `name`, `checkpoint_path` (of a classifier) and any argument of `timm.create_model`: output_stride=16
    makes the DC5 models, `out_indices` chooses the maps. Left out, it is the last one for detr and the last
    `num_levels`, at most three, for deformable_detr and dino.
    `checkpoint_path`: a whole detector to start from, official, of transformers or of a run here: a file, or
    hf-hub:OWNER/NAME. Its class heads stay new where its number of classes is another.
    `freeze_batch_norm`: batch norms of the backbone keep their statistics and weights. A run whose backbone starts from
    random weights sets it to false.
    `norm_maps`: the maps of a Swin backbone as its official detectors have them, see SwinMaps.
    `freeze`: modules of the backbone that are not trained, such as [conv1, bn1, layer1] of a ResNet.
    """

    # The dataclass of each kind: a configuration is read as the one that its key `kind` names.
    variants: ClassVar[dict[str, type["ModelConfig"]]] = {}
    may_be_0: ClassVar[tuple[str, ...]] = ("encoder_depth", "denoising", "one_to_many_queries")

    kind: str = "deformable_detr"
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "dat_tiny"})
    checkpoint_path: str | None = None
    num_queries: int = 300
    embed_dim: int = 256
    num_heads: int = 8
    encoder_depth: int = 6
    decoder_depth: int = 6
    mlp_dim: int = 1024
    drop_rate: float = 0.1
    freeze_batch_norm: bool = True
    norm_maps: bool = False
    freeze: list[str] = field(default_factory=list)

    @property
    def num_maps(self) -> int:
        """Number of maps of the backbone if `backbone` has no out_indices."""
        return 1

    def arguments(self) -> dict[str, Any]:
        """Arguments of the detector's constructor beside the backbone and the number of classes."""
        others = ("kind", "backbone", "checkpoint_path", "freeze_batch_norm", "norm_maps", "freeze")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in others}

    def check(self) -> None:
        """Raises ConfigError on values out of their range: integers are at least 1, except those of `may_be_0`."""
        if "name" not in self.backbone:
            raise ConfigError("model.backbone: has no 'name'; it should name a timm model, such as dat_tiny")
        if self.backbone.get("in_chans", 3) != 3:
            raise ConfigError(f"model.backbone.in_chans is {self.backbone['in_chans']!r}, images have 3 channels")
        _check_out_indices(self.backbone.get("out_indices", [-1]))
        integers = [name for name, value in self.arguments().items() if type(value) is int]
        for name in integers:
            check_range({"model": self}, [f"model.{name}"], 0 if name in self.may_be_0 else 1, LARGEST_INTEGER)
        check_range({"model": self}, ["model.drop_rate"], 0, 1)


def _check_out_indices(indices: Any) -> None:
    """Raises ConfigError unless these are numbers of maps in the order of the network, the last ones from -1 down."""
    known = isinstance(indices, list) and all(type(i) is int for i in indices)
    order = [(i < 0, i) for i in indices] if known else []
    if not order or order != sorted(set(order)):
        raise ConfigError(
            f"model.backbone.out_indices is {indices}, should list maps in the order of the network, such as [1, 2, 3] "
            "or [-2, -1]"
        )


class BaseDETR(nn.Module):
    """A backbone; `features` and `detect` of the subclass, which documents the arguments, turn its maps into boxes."""

    # Name in the registry; how the matcher, the losses and post_process turn logits into probabilities.
    kind: ClassVar[str]
    scores: ClassVar[Scores]
    # Weight of the classification loss in the model's paper.
    class_weight: ClassVar[float]
    # Whether training takes denoising queries: 0 without them.
    denoising: int = 0

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_queries: int,
        embed_dim: int,
        num_heads: int,
        decoder_depth: int,
        aux_loss: bool,
    ) -> None:
        super().__init__()
        counts = {"num_classes": num_classes, "num_queries": num_queries, "decoder_depth": decoder_depth}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}={value} should be at least 1")
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} should be a multiple of 4 and of num_heads={num_heads}")
        self.num_classes, self.num_queries, self.aux_loss = num_classes, num_queries, aux_loss
        self.grad_checkpointing = False
        self.backbone = backbone

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        targets: list[dict[str, Any]] | None = None,
        denoising: Denoising | None = None,
    ) -> dict[str, Any]:
        """Detects objects.

        Args:
            images: [B, 3, H, W].
            mask: [B, H, W] bool, True on padding, which lies to the right and below; None where nothing is padded.
            targets: as SetCriterion takes them; in training, `make_denoising` makes denoising queries of them. Models
                without denoising ignore them, and all do in evaluation.
            denoising: these queries, already made.

        Returns:
            "pred_logits" [B, Q, K] and "pred_boxes" [B, Q, 4], cxcywh in 0..1 of the unpadded image; with aux_loss
            "aux_outputs", a list of the same for every decoder layer except the last; subclasses may add more.
        """
        expected = (images.shape[0], *images.shape[-2:])
        if mask is not None and mask.shape != expected:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, should be [B, H, W] = {expected}")
        if targets is not None and denoising is None:
            denoising = self.make_denoising(targets)
        return self.detect(*self.features(*pad_to_multiple(images, mask, self.pad_multiple)), denoising)

    def make_denoising(self, targets: list[dict[str, Any]]) -> Denoising | None:
        """Denoising queries of targets; None in evaluation and for models without denoising."""
        return None

    @property
    def pad_multiple(self) -> int:
        """The multiple to which the backbone needs the sides of its images padded."""
        return getattr(self.backbone, "pad_multiple", 1)

    def features(self, images: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor] | None]:
        """The maps that `detect` works on, projected to embed_dim channels [B, C, h, w], and their masks [B, h, w]."""
        raise NotImplementedError

    def detect(
        self, levels: list[Tensor], masks: list[Tensor] | None = None, denoising: Denoising | None = None
    ) -> dict[str, Any]:
        """Computes forward's outputs from levels [B, C, h, w], masks [B, h, w] and denoising queries."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes layers, and the backbone where it can, in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable
        # Some of timm's feature extractors hold the model that can.
        for part in (self.backbone, getattr(self.backbone, "model", None)):
            switch: Any = getattr(part, "set_grad_checkpointing", None)
            if callable(switch):
                # timm's backbones that cannot raise an AssertionError.
                with suppress(AssertionError):
                    switch(enable)

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """layer(*inputs), recomputed in the backward pass under gradient checkpointing."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def as_outputs(self, layers: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """forward's outputs from those of each decoder layer."""
        *before, final = layers
        return {**final, "aux_outputs": before} if self.aux_loss else final


def pad_to_multiple(images: Tensor, mask: Tensor | None, multiple: int) -> tuple[Tensor, Tensor | None]:
    """Images [B, 3, H, W] and their mask, padded at the right and below so that sides are multiples of a number."""
    if multiple == 1:
        return images, mask
    height, width = images.shape[-2:]
    # torch.export can reason about this form of rounding up.
    down, right = (((side - 1) // multiple + 1) * multiple - side for side in (height, width))
    padding = (0, right, 0, down)
    inside = torch.zeros_like(images[:, 0]) if mask is None else mask.to(images.dtype)
    return F.pad(images, padding), F.pad(inside, padding, value=1.0) > 0


def feature_channels(backbone: Any) -> list[int]:
    """Channels of each map of a timm feature extractor."""
    return list(backbone.feature_info.channels())


def resize_masks(mask: Tensor | None, levels: list[Tensor]) -> list[Tensor] | None:
    """The mask [B, H, W] at the size of each level [B, C, h, w]: that of the nearest pixel above and to the left."""
    if mask is None:
        return None
    image = mask[:, None].float()
    return [F.interpolate(image, size=x.shape[-2:])[:, 0].bool() for x in levels]


def box_head(embed_dim: int) -> nn.Sequential:
    """The MLP of three layers that predicts a box: four numbers before the sigmoid."""
    hidden = (nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(embed_dim, 4))
