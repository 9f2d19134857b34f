"""COCO-JSON detection data: annotations, augmentation, loaders."""

from dat.detection.data.coco import (
    Category,
    CocoAnnotations,
    ImageRecord,
    load_image,
    read_categories,
    read_coco,
    read_sample,
)
from dat.detection.data.loader import (
    AspectRatioBatchSampler,
    Batch,
    DetectionDataset,
    SameSizeBatchSampler,
    make_loader,
)
from dat.detection.data.transforms import resized_size, train_transform, val_transform

__all__ = [
    "AspectRatioBatchSampler",
    "Batch",
    "Category",
    "CocoAnnotations",
    "DetectionDataset",
    "ImageRecord",
    "SameSizeBatchSampler",
    "load_image",
    "make_loader",
    "read_categories",
    "read_coco",
    "read_sample",
    "resized_size",
    "train_transform",
    "val_transform",
]
