"""Vision Transformer with Deformable Attention.

`Vision Transformer with Deformable Attention` - https://arxiv.org/abs/2201.00520 (CVPR 2022), release 2022:
four stages of local (L), shifted-window (S) and deformable (D) attention.
`DAT++: Spatially Dynamic Vision Transformer with Deformable Attention` - https://arxiv.org/abs/2309.01430 (2023):
neighbourhood (N) and deformable attention in every stage, with more convolutions in DAT++ and without in DAT+.
Features are NCHW; tokens stay NHWC inside.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, PatchEmbed, to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from dat.layers import DeformableAttention
from dat.layers.conv_stem import ConvStem
from dat.layers.norm import layer_norm
from dat.models.blocks import Block, ConvBlock, StageConfig
from dat.models.checkpoint import checkpoint_filter_fn, load_into_features
from dat.ops.sizes import is_exporting

__all__ = ["DAT", "StageConfig"]


def _record_input_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Has timm save the model with this size; timm before 1.0.31, with which models run too, keeps no record."""
    with contextlib.suppress(ImportError):
        from timm.models._input import update_model_input_size

        update_model_input_size(model, size)


class Patches(PatchEmbed):
    """timm's embedding [B, C, H, W] to [B, ceil(H/p), ceil(W/p), C'], exportable with dynamic sizes."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_exporting():
            return super().forward(x)
        # Pad by the most that a patch can lack, whatever the size: the convolution ignores an incomplete patch.
        height, width = self.patch_size
        x = self.proj(F.pad(x, (0, width - 1, 0, height - 1)))
        return self.norm(x.permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Convolution of stride 2, LayerNorm: [B, H, W, C] to [B, ceil(H/2), ceil(W/2), C'].

    The kernel is 2 x 2, and odd sides are padded for it, or 3 x 3.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, 2, padding=kernel_size // 3, bias=False, **dd)
        self.norm = nn.LayerNorm(dim_out, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.kernel_size == (2, 2):
            # An exported graph serves all sizes and always pads: the convolution ignores a single row.
            odd = (1, 1) if is_exporting() else (x.shape[2] % 2, x.shape[1] % 2)
            x = F.pad(x, (0, 0, 0, odd[0], 0, odd[1]))
        return layer_norm(self.norm, self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Downsampling, except in the first stage, and blocks: [B, H, W, C] to [B, H', W', C']."""

    def __init__(
        self,
        downsample: nn.Module,
        config: StageConfig,
        map_size: tuple[int, int],
        mlp_ratio: float,
        proj_drop: float,
        drop_path: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(
            ConvBlock(config, mlp_ratio, proj_drop, rate, **dd)
            if letter == "X"
            else Block(letter, config, map_size, mlp_ratio, proj_drop, rate, **dd)
            for letter, rate in zip(config.blocks, drop_path, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x


class DAT(nn.Module):
    """Vision Transformer with Deformable Attention, with timm's interface.

    Args:
        stages: one `StageConfig`, or a dictionary of its arguments, for each stage; stage i works at stride
            patch_size * 2**i.
        img_size: image size (one side, or height and width) that position-bias tables are made for; any image runs.
        patch_size: side of the patches of the embedding; 4 for the other stems.
        stem: how images are embedded. "patch": patches that do not overlap; "overlap": a 7x7 convolution of stride 4
            (release 2022), "conv": two 3x3 of stride 2 (release 2023). Stages halve the map by 2x2 convolutions
            behind "patch", by 3x3 behind the others.
        stem_dims: channels of the embedding; None: those of the first stage.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0: none.
        global_pool: timm's pooling before the classifier; "" for none: the classifier then classifies every pixel.
        mlp_ratio: hidden width of the MLPs over their width.
        drop_rate: dropout before the classifier, 0..1.
        proj_drop_rate: dropout in attention projections and MLPs, 0..1.
        drop_path_rate: stochastic depth of the last block; increases linearly from 0 over the blocks.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig | Mapping[str, Any]],
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        stem: str = "patch",
        stem_dims: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.img_size, self.patch_size = to_2tuple(img_size), patch_size
        configs = [config if isinstance(config, StageConfig) else StageConfig(**config) for config in stages]
        dim = stem_dims or configs[0].embed_dims
        self.patch_embed = create_stem(stem, patch_size, in_chans, dim, **dd)
        depth = sum(len(config.blocks) for config in configs)
        rates = iter(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))
        # timm's feature extractors of the kinds "list" and "dict" look for stages in a Sequential.
        self.stages = nn.Sequential()
        self.feature_info = []
        for i, config in enumerate(configs):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = Downsample(dim, config.embed_dims, 2 if stem == "patch" else 3, **dd)
            elif dim != config.embed_dims:
                downsample = nn.Linear(dim, config.embed_dims, **dd)
            drop_path = [next(rates) for _ in config.blocks]
            self.stages.append(Stage(downsample, config, self._map_size(i), mlp_ratio, proj_drop_rate, drop_path, **dd))
            dim = config.embed_dims
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"})
        self.num_features = dim
        self.norm: nn.Module = nn.LayerNorm(dim, **dd)
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = dim * self.head.global_pool.feat_mult()

    def _map_size(self, stage: int) -> tuple[int, int]:
        """Size of the map that a stage's tables are made for: rounded down, as in the official code."""
        H, W = (max(side // (self.patch_size * 2**stage), 1) for side in self.img_size)
        return H, W

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the official training treats as position biases: all but those of N blocks."""
        biases = ("relative_position_bias_table", "rpe_table", ".lepe.", ".log_cpb.")
        return {name for name, _ in self.named_parameters() if any(bias in name for bias in biases)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for timm's layer-wise learning rate decay."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample the position-bias tables for another image size, bicubically as in the official code.

        This is for fine-tuning at another size; images of any size run without it. None changes nothing.
        """
        if img_size is None:
            return
        self.img_size = to_2tuple(img_size)
        _record_input_size(self, self.img_size)
        for i, stage in enumerate(self.stages):
            for module in stage.modules():
                if isinstance(module, DeformableAttention):
                    module.set_table_size(self._map_size(i))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a new classifier of `num_classes` (0: none), with pooling `global_pool` (None: unchanged)."""
        # Read device and dtype first: the head alone may have no parameters.
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool)
        self.head.to(weight.device, weight.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages.

        Args:
            x: images [B, in_chans, H, W].
            indices: stages; an int selects the last so many, None all.
            norm: apply the final norm to the last stage's features, the only ones that it fits.
            stop_early: skip the stages after the last one selected.
            output_fmt: layout of the intermediates, "NCHW" or "NHWC".
            intermediates_only: return only the list.

        Returns:
            The list of maps, finest first; without intermediates_only, the output of `forward_features` and that list.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.feature_info) - 1
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == last else x).permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the features of `indices` do not need; returns the indices as stage numbers."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to normed features [B, num_features, H', W'] of the last stage."""
        return self.norm(self.stages(self.patch_embed(x))).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, num_features, H', W'] to logits [B, num_classes], or to the classifier's input.

        Without pooling, both are maps [B, channels, H', W'].
        """
        if not self.global_pool:
            return self.head(x.permute(0, 2, 3, 1), pre_logits=pre_logits).permute(0, 3, 1, 2)
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes], or without pooling [B, num_classes, H', W']."""
        return self.forward_head(self.forward_features(x))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict after converting official names and tables for another image or window size."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict=strict, assign=assign)


def create_stem(stem: str, patch_size: int, in_chans: int, embed_dims: int, **dd: Any) -> nn.Module:
    """The embedding of images [B, in_chans, H, W] as maps [B, H', W', embed_dims]; see `DAT`."""
    if stem == "patch":
        return Patches(
            None,
            patch_size,
            in_chans,
            embed_dims,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
            **dd,
        )
    if stem not in ("overlap", "conv"):
        raise ValueError(f"stem must be 'patch', 'overlap' or 'conv', got {stem!r}")
    if patch_size != 4:
        raise ValueError(f"patch_size must be 4 for stem {stem!r}, got {patch_size}")
    if stem == "overlap":
        return OverlapPatchEmbed(7, 4, in_chans, embed_dims, **dd)
    return ConvStem(in_chans, embed_dims, **dd)


def _create_dat(variant: str, pretrained: bool = False, **kwargs: Any) -> DAT:
    sources = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not (sources.state_dict or sources.file or sources.url or sources.hf_hub_id):
        raise RuntimeError(
            f"{variant}: pretrained=True cannot work, the official weights are on cloud drives with no stable address. "
            "Download a file such as dat_pp_tiny_in1k_224.pth by the links in the README of "
            "https://github.com/LeapLabTHU/DAT (for the models of 2022, the README of its commit 566a593) "
            "and pass pretrained=False, checkpoint_path=FILE instead"
        )
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["stages"]))))
    model = build_model_with_cfg(
        DAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter", "flatten_sequential": True},
        **kwargs,
    )
    if isinstance(model, FeatureGetterNet):
        model.register_load_state_dict_pre_hook(load_into_features)
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/LeapLabTHU/DAT",
        "paper_ids": "arXiv:2201.00520",
        **kwargs,
    }


def _cfg_2023(**kwargs: Any) -> dict[str, Any]:
    return _cfg(**{"first_conv": "patch_embed.conv1", "paper_ids": "arXiv:2309.01430", **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "dat_tiny.in1k": _cfg(),
        "dat_small.in1k": _cfg(),
        "dat_base.in1k": _cfg(),
        "dat_base_384.in1k": _cfg(input_size=(3, 384, 384), pool_size=(12, 12)),
        "dat_nano.untrained": _cfg(),
        "dat_plus_tiny.in1k": _cfg_2023(first_conv="patch_embed.proj"),
        "dat_plus_nano.untrained": _cfg_2023(first_conv="patch_embed.proj"),
        "dat_pp_tiny.in1k": _cfg_2023(),
        "dat_pp_small.in1k": _cfg_2023(),
        "dat_pp_base.in1k": _cfg_2023(),
        "dat_pp_base_384.in1k": _cfg_2023(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "dat_pp_nano.untrained": _cfg_2023(),
    }
)


def _release_2022(
    dims: int, heads: int, groups: tuple[int, int], depth: int, window_size: int = 7
) -> tuple[StageConfig, ...]:
    """Official stages: `dims` and `heads` of stage 1 double from stage to stage, stage 3 has `depth` blocks."""
    return (
        StageConfig("LS", dims, heads, window_size),
        StageConfig("LS", dims * 2, heads * 2, window_size),
        StageConfig("LD" * (depth // 2), dims * 4, heads * 4, window_size, groups[0], kernel_size=5),
        StageConfig("LD", dims * 8, heads * 8, window_size, groups[1], kernel_size=3),
    )


def _release_2023(
    dims: int, heads: int, groups: tuple[int, int, int, int], convs: bool = True, depth: int = 18
) -> tuple[StageConfig, ...]:
    """Official stages: `dims` and `heads` of stage 1 double from stage to stage, stage 3 has `depth` blocks."""
    blocks = ("ND", "NDND", "ND" * (depth // 2), "DD")
    return tuple(
        StageConfig(
            blocks[i],
            dims * 2**i,
            heads * 2**i,
            num_groups=groups[i],
            kernel_size=9 - 2 * i,
            stride=8 // 2**i,
            offset_range_factor=-1.0,
            release="2023",
            lpu=convs,
            conv_mlp=convs,
        )
        for i in range(4)
    )


@register_model
def dat_nano(pretrained: bool = False, **kwargs: Any) -> DAT:
    """A small DAT for tests, demos and CPUs; not one of the paper's."""
    stages = (
        StageConfig("LS", 32, 1),
        StageConfig("LS", 64, 2),
        StageConfig("LD", 128, 4, num_groups=2, kernel_size=5, stride=2),
        StageConfig("LD", 256, 8, num_groups=4, kernel_size=3),
    )
    return _create_dat("dat_nano", pretrained, **dict({"stages": stages, "mlp_ratio": 3.0}, **kwargs))


@register_model
def dat_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2022(96, 3, (3, 6), depth=6), "drop_path_rate": 0.2}
    return _create_dat("dat_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2022(96, 3, (3, 6), depth=18), "drop_path_rate": 0.3}
    return _create_dat("dat_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2022(128, 4, (4, 8), depth=18), "drop_path_rate": 0.5}
    return _create_dat("dat_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_base_384(pretrained: bool = False, **kwargs: Any) -> DAT:
    stages = _release_2022(128, 4, (4, 8), depth=18, window_size=12)
    model_args = {"stages": stages, "img_size": 384, "drop_path_rate": 0.5}
    return _create_dat("dat_base_384", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_plus_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2023(64, 2, (1, 2, 4, 8), convs=False), "drop_path_rate": 0.2}
    return _create_dat("dat_plus_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_plus_nano(pretrained: bool = False, **kwargs: Any) -> DAT:
    """A small DAT+ for tests, demos and CPUs; not one of the paper's."""
    stages = _release_2023(32, 1, (1, 1, 2, 4), convs=False, depth=4)
    return _create_dat("dat_plus_nano", pretrained, **dict({"stages": stages, "mlp_ratio": 3.0}, **kwargs))


@register_model
def dat_pp_nano(pretrained: bool = False, **kwargs: Any) -> DAT:
    """A small DAT++ for tests, demos and CPUs; not one of the paper's."""
    model_args = {"stages": _release_2023(32, 1, (1, 1, 2, 4), depth=4), "stem": "conv", "mlp_ratio": 3.0}
    return _create_dat("dat_pp_nano", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_pp_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2023(64, 2, (1, 2, 4, 8)), "stem": "conv", "drop_path_rate": 0.2}
    return _create_dat("dat_pp_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_pp_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2023(96, 3, (1, 2, 3, 6)), "stem": "conv", "drop_path_rate": 0.4}
    return _create_dat("dat_pp_small", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_pp_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    model_args = {"stages": _release_2023(128, 4, (2, 4, 8, 16)), "stem": "conv", "drop_path_rate": 0.7}
    return _create_dat("dat_pp_base", pretrained, **dict(model_args, **kwargs))


@register_model
def dat_pp_base_384(pretrained: bool = False, **kwargs: Any) -> DAT:
    """DAT-B++ for images of 384: its tables keep the size for 224 and are interpolated at the displacements."""
    model_args = {"stages": _release_2023(128, 4, (2, 4, 8, 16)), "stem": "conv", "drop_path_rate": 0.6}
    return _create_dat("dat_pp_base_384", pretrained, **dict(model_args, **kwargs))
