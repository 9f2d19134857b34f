"""Recipes of detection; the library, whose names are here too, is dat.detection."""

from dat.detection import DETR, DeformableDETR, HungarianMatcher, SetCriterion, official, post_process

__all__ = ["DETR", "DeformableDETR", "HungarianMatcher", "SetCriterion", "official", "post_process"]
