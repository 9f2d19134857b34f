"""Feature extractors from timm, for images of any size."""

import inspect
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerNorm2d, to_2tuple
from timm.models import FeatureInfo
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import Tensor, nn
from torch.nn import functional as F

import dat  # noqa: F401  registers the backbones with timm
from dat.engine.backbones import classifier_weights, create_timm_model, without_weights
from dat.layers.autocast import casts_parameters_together, is_ours
from dat.utils.errors import ConfigError

# Heights and widths to try a backbone on, smaller and larger than most are made for, of various remainders.
SIDES = ((161, 238), (319, 130))
# Arguments of timm's models that let them take images of other sizes than their own.
ANY_SIZE = {"strict_img_size": False, "dynamic_img_size": True, "dynamic_img_pad": True}


def build_backbone(arguments: dict[str, Any], num_maps: int = 3, norm_maps: bool = False) -> nn.Module:
    """A timm feature extractor from `name`, `checkpoint_path` (of a classifier) and any arguments of its model.

    Gives the last `num_maps` maps, of strides 8, 16 and 32 when three, unless `out_indices` says otherwise. If all of
    a model's maps have one stride, they are made from the last one (SimplePyramid). `norm_maps`: see SwinMaps. Its
    attributes `pad_multiple` and `largest_side` say what the sides of images must be.

    Raises ConfigError for arguments that do not work, such as a model for images of one size, and CheckpointError for
    unfit weights.
    """
    makes_pyramid = num_maps > 1 and "out_indices" not in arguments
    arguments = {"out_indices": list(range(-num_maps, 0)), **arguments}
    checkpoint_path = arguments.pop("checkpoint_path", None)
    fit = fit_sizes(arguments)
    fixed: dict[str, Any] = {"features_only": True, **fit.arguments}
    if checkpoint_path:
        weights = {"state_dict": classifier_weights(arguments, checkpoint_path), "num_classes": 0}
        fixed |= {"pretrained": True, "pretrained_cfg_overlay": weights}
    backbone: Any = create_timm_model(arguments, **fixed)
    if makes_pyramid and len(set(backbone.feature_info.reduction())) == 1:
        backbone = SimplePyramid(backbone, num_maps)
    if norm_maps:
        if not any(isinstance(module, SwinTransformerBlock) for module in backbone.modules()):
            raise ConfigError(f"model.norm_maps is true, should be false: {arguments['name']} is no Swin Transformer")
        backbone = SwinMaps(backbone)
    backbone.pad_multiple, backbone.largest_side = fit.multiple, fit.largest
    return backbone


@dataclass(frozen=True)
class Fit:
    """How a timm model takes images of many sizes.

    `arguments` are added to its own; images are padded to a multiple of `multiple` pixels, of at most `largest`.
    """

    arguments: dict[str, Any]
    multiple: int = 1
    largest: float = math.inf


# By the model's arguments: a run builds the same model several times.
_FITS: dict[str, Fit] = {}


def fit_sizes(arguments: dict[str, Any]) -> Fit:
    """Finds by trying how a timm model takes images of many sizes, on the meta device if it can be built there.

    Args:
        arguments: as for create_timm_model; what they set stays as it is.

    Raises:
        ConfigError: arguments that do not work, or a model for images of one size without `img_size`.
    """
    arguments = without_weights(arguments)
    key = repr(sorted(arguments.items()))
    if key in _FITS:
        return _FITS[key]
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                fit = _fit_sizes(arguments)
        except ConfigError as error:
            # A model that computes with tensors while it is built cannot be built on the meta device.
            if device == "cpu" or not isinstance(error.__cause__, RuntimeError):
                raise
        else:
            if fit is not None:
                _FITS[key] = fit
                return fit
    remedy = "set img_size to a multiple of 32" if "img_size" in arguments else "choose another model"
    raise ConfigError(f"model.backbone: {arguments} fails on images of every size that was tried; {remedy}")


def _fit_sizes(arguments: dict[str, Any]) -> Fit | None:
    """fit_sizes on the current device; None if the model never runs."""
    plain: Any = create_timm_model(arguments, features_only=True)
    if _runs(plain, SIDES):
        return Fit({})
    body = {name: value for name, value in arguments.items() if name != "out_indices"}
    model: Any = create_timm_model(body)
    # A model's class may pass on arguments that only its parent lists.
    known = {name for cls in type(model).__mro__[:-1] for name in inspect.signature(cls).parameters}
    free: dict[str, Any] = {name: value for name, value in ANY_SIZE.items() if name in known and name not in arguments}
    backbone: Any = create_timm_model(arguments, features_only=True, **free) if free else plain
    own = max(to_2tuple(arguments.get("img_size") or model.pretrained_cfg["input_size"][1:]))
    for multiple in (1, 16, 32, 64, own):
        # Its own size is no evidence.
        sizes = [*SIDES, (2 * own, own)] if multiple == own else SIDES
        if _runs(backbone, [tuple(-(-side // multiple) * multiple for side in size) for size in sizes]):
            return Fit(free, multiple)
    if not _runs(plain, [(own, own)]):
        return None
    if "img_size" in arguments:
        return Fit({}, own, own)
    remedy = "choose another model, such as resnet50 or swin_tiny_patch4_window7_224"
    with suppress(ConfigError):
        if _runs(create_timm_model({**arguments, "img_size": 2 * own}, features_only=True), [(2 * own, 2 * own)]):
            remedy = (
                "set model.backbone.img_size to the larger of data.train.max_size and data.val.max_size, rounded up to "
                "a multiple of 32, and all images are padded to that square"
            )
    raise ConfigError(f"model.backbone: {arguments['name']!r} takes images of {own}x{own} pixels only: {remedy}")


def _runs(backbone: Any, sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a feature extractor takes images of these sizes, in training mode: no model caches tensors in it."""
    try:
        with torch.no_grad():
            for size in sizes:
                maps = feature_maps(backbone, torch.zeros(2, 3, *size))
                # Maps come in the order of the network, whatever the order of `out_indices`.
                if [x.shape[1] for x in maps] != backbone.feature_info.channels():
                    return False
    # A model fails with errors of any type.
    except Exception:
        return False
    return True


class SimplePyramid(nn.Module):
    """Maps of several strides from the last map of a plain ViT.

    The simple feature pyramid of ViTDet (arXiv:2203.16527, section 3): each map comes from the last one alone, by
    transposed convolutions of stride 2 with LayerNorm and GELU between them, or by max pooling. The 1x1 convolutions
    and norms that follow are the detector's.

    Args:
        body: a timm feature extractor.
        num_maps: the strides are the last of 4, 8, 16 and 32 (times 7/8 for patches of 14 pixels).
    """

    def __init__(self, body: Any, num_maps: int) -> None:
        super().__init__()
        self.body = body
        width, patch = body.feature_info.channels()[-1], body.feature_info.reduction()[-1]
        self.levels = nn.ModuleList()
        info: list[dict[str, Any]] = []
        for level in range(6 - num_maps, 6):
            # Halvings of the map, or doublings where negative.
            halvings = level - round(math.log2(patch))
            layers: list[nn.Module] = []
            channels = width
            for i in range(-halvings):
                layers += [LayerNorm2d(channels), nn.GELU()] if i else []
                layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
                channels //= 2
            if halvings > 0:
                layers.append(nn.MaxPool2d(2**halvings, ceil_mode=True))
            self.levels.append(nn.Sequential(*layers))
            info.append({"num_chs": channels, "reduction": patch * 2.0**halvings, "module": f"levels.{len(info)}"})
        self.feature_info = FeatureInfo(info, tuple(range(num_maps)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to maps [B, C, h, w], coarsest last."""
        x = feature_maps(self.body, images)[-1]
        return [level(x) for level in self.levels]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the ViT's blocks in the backward pass."""
        getattr(self.body, "model", self.body).set_grad_checkpointing(enable)


class SwinMaps(nn.Module):
    """Maps of a Swin as its detectors have them (arXiv:2103.14030; the official Swin-Transformer-Object-Detection).

    Each map has a LayerNorm of its own, and maps whose sides are no multiple of the window's are padded before they are
    rolled. timm rolls first, so that the lowest pixels attend to those at the top of the image.

    Args:
        body: timm's feature extractor of a Swin Transformer (the first version).
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.feature_info = body.feature_info
        stages = [name.split(".")[-1] for name in body.feature_info.module_name()]
        self.norms = nn.ModuleDict(
            {stage: nn.LayerNorm(width) for stage, width in zip(stages, body.feature_info.channels(), strict=True)}
        )
        for module in body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = _PaddedSwinBlock

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to maps [B, C, h, w], coarsest last."""
        maps = feature_maps(self.body, images)
        norms = self.norms.values()
        return [
            norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous() for norm, x in zip(norms, maps, strict=True)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks in the backward pass."""
        for module in self.body.modules():
            if isinstance(module, SwinTransformerStage):
                module.grad_checkpointing = enable


class _PaddedSwinBlock(SwinTransformerBlock):
    """timm's block, which pads its map to whole windows before it rolls it."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(x)[:, :height, :width]


def feature_maps(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps of a timm feature extractor, [B, C, h, w] each, coarsest last."""
    maps = _run(backbone, images) if is_ours(backbone) else backbone(images)
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    return maps


@casts_parameters_together
def _run(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Casts the parameters of timm's ResNets; our own backbones do so block by block."""
    return backbone(images)


def freeze(backbone: nn.Module, names: list[str]) -> None:
    """Excludes modules of the backbone from training. Raises ConfigError for names that it lacks."""
    for name in names:
        try:
            backbone.get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join(name for name, _ in backbone.named_children())
            raise ConfigError(f"model.freeze: the backbone has no module {name!r}, it has {known}") from None
