"""Detection data: readers of formats, augmentation, loaders."""

import dat.detection.data.formats  # noqa: F401  registers the readers
from dat.detection.data.formats.coco import read_categories, read_coco
from dat.detection.data.loader import (
    AspectRatioBatchSampler,
    Batch,
    DetectionDataset,
    SameSizeBatchSampler,
    make_loader,
    train_loader,
    val_loader,
)
from dat.detection.data.readers import describe_sets, read_dataset, read_splits, register_reader
from dat.detection.data.records import Annotations, Category, ImageRecord, Sample, load_image, load_record, read_sample
from dat.detection.data.tiles import cut_into_windows, tile_windows
from dat.detection.data.transforms import resized_size, train_transform, val_transform

__all__ = [
    "Annotations",
    "AspectRatioBatchSampler",
    "Batch",
    "Category",
    "DetectionDataset",
    "ImageRecord",
    "SameSizeBatchSampler",
    "Sample",
    "cut_into_windows",
    "describe_sets",
    "load_image",
    "load_record",
    "make_loader",
    "read_categories",
    "read_coco",
    "read_dataset",
    "read_sample",
    "read_splits",
    "register_reader",
    "resized_size",
    "tile_windows",
    "train_loader",
    "train_transform",
    "val_loader",
    "val_transform",
]
