"""The DETR family on any timm backbone: models, matching, losses and post-processing."""

from dat.detection import official as official
from dat.detection.criterion import SetCriterion
from dat.detection.detections import Detections
from dat.detection.detector import Detector
from dat.detection.matcher import HungarianMatcher
from dat.detection.models.deformable_detr import DeformableDETR
from dat.detection.models.detr import DETR
from dat.detection.models.dino import DINO
from dat.detection.post_process import post_process

__all__ = [
    "DETR",
    "DINO",
    "DeformableDETR",
    "Detections",
    "Detector",
    "HungarianMatcher",
    "SetCriterion",
    "official",
    "post_process",
]
