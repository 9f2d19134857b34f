"""The DETR family on any timm backbone: models, matching, losses and post-processing."""

from .criterion import SetCriterion
from .deformable_detr import DeformableDETR
from .detr import DETR
from .matcher import HungarianMatcher
from .post_process import post_process

__all__ = ["DETR", "DeformableDETR", "HungarianMatcher", "SetCriterion", "post_process"]
