"""Layers built on `dat.ops`, one per file."""

import torch
from einops import rearrange

from dat.layers.deform_attn import DeformableAttention
from dat.layers.deform_conv import DeformConv2d, deform_conv2d
from dat.layers.mlp import ConvMlp
from dat.layers.ms_deform_attn import MSDeformAttn
from dat.layers.neighborhood_attn import NeighborhoodAttention
from dat.layers.slide_attn import SlideAttention
from dat.layers.spatial_reduction_attn import SpatialReductionAttention
from dat.layers.window_attn import WindowAttention

__all__ = [
    "ConvMlp",
    "DeformConv2d",
    "DeformableAttention",
    "MSDeformAttn",
    "NeighborhoodAttention",
    "SlideAttention",
    "SpatialReductionAttention",
    "WindowAttention",
    "deform_conv2d",
]

# einops remembers a type of tensors at its first call with it, which torch.compile refuses within a checkpointed layer.
for _tensor in (torch.empty(0), torch.nn.Parameter(torch.empty(0))):
    rearrange(_tensor, "n -> n")
