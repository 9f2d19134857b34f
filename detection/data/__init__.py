"""COCO-JSON detection data: annotations, augmentation, loaders."""

from .coco import Category, CocoAnnotations, ImageRecord, read_categories, read_coco, read_image, read_sample
from .loader import (
    AspectRatioBatchSampler,
    Batch,
    DetectionDataset,
    SameSizeBatchSampler,
    make_loader,
)
from .transforms import resized_size, train_transform, val_transform

__all__ = [
    "AspectRatioBatchSampler",
    "Batch",
    "Category",
    "CocoAnnotations",
    "DetectionDataset",
    "ImageRecord",
    "SameSizeBatchSampler",
    "make_loader",
    "read_categories",
    "read_coco",
    "read_image",
    "read_sample",
    "resized_size",
    "train_transform",
    "val_transform",
]
