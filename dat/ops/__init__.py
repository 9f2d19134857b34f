"""Deformable sampling and attention ops: one public function per file, readable references in `reference`."""

from dat.ops import _library
from dat.ops.deform_attn import deform_attn
from dat.ops.deform_sample import deform_sample
from dat.ops.ms_deform_attn import ms_deform_attn
from dat.ops.neighborhood_attn import neighborhood_attn

__all__ = ["deform_attn", "deform_sample", "ms_deform_attn", "neighborhood_attn"]

# Why a built library is not in use, by its name; None for one that is.
MISSING = _library.load_all()
