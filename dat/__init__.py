"""Vision Transformer with Deformable Attention: a sampling op, layers, and backbones registered with timm."""

from dat import models as models
from dat import ops as ops

__version__ = "0.1.0"
