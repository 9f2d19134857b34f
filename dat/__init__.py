"""Vision Transformer with Deformable Attention: a sampling op, layers, and backbones registered with timm."""

import sys

__version__ = "0.1.0"

# A command that only prints its help does not need torch, whose import takes seconds.
if not {"-h", "--help"}.intersection(sys.argv):
    from dat import models as models
    from dat import ops as ops
