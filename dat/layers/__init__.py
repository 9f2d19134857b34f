"""Layers built on `dat.ops`, one per file."""

from dat.layers.deform_attn import DeformableAttention
from dat.layers.ms_deform_attn import MSDeformAttn
from dat.layers.window_attn import WindowAttention

__all__ = ["DeformableAttention", "MSDeformAttn", "WindowAttention"]
