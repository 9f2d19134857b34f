"""Layers built on `dat.ops`, one per file."""

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
