"""Layers built on `dat.ops`, one per file."""

from dat.layers.deform_attn import DeformableAttention
from dat.layers.deform_conv import DeformConv2d, deform_conv2d
from dat.layers.ms_deform_attn import MSDeformAttn
from dat.layers.window_attn import WindowAttention

__all__ = ["DeformConv2d", "DeformableAttention", "MSDeformAttn", "WindowAttention", "deform_conv2d"]
