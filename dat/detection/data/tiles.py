"""Large training images, cut into overlapping windows that are samples of their own (SAHI, arXiv:2202.06934)."""

import math
from dataclasses import replace

import numpy as np

from dat.detection.config import TrainDataConfig
from dat.detection.data.records import Annotations, ImageRecord

# left, top, right, bottom in pixels of the image.
Window = tuple[int, int, int, int]


def tile_windows(width: int, height: int, size: int, overlap: float) -> list[Window]:
    """The windows that cover an image, row by row, evenly spaced.

    Args:
        width, height: of the image, in pixels.
        size: sides of the windows; that of the image where it is smaller.
        overlap: fraction of `size` by which neighbours overlap at least, 0 to less than 1.
    """
    rows, columns = (_starts(side, size, overlap) for side in (height, width))
    return [(x, y, min(x + size, width), min(y + size, height)) for y in rows for x in columns]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    if length <= size:
        return [0]
    # At most this many pixels from one start to the next, and at least one.
    step = max(1, math.floor(size * (1 - overlap)))
    count = math.ceil((length - size) / step)
    return [(length - size) * i // count for i in range(count + 1)]


def cut_into_windows(annotations: Annotations, split: TrainDataConfig, seed: int) -> Annotations:
    """The windows of all images that are larger than `split.tiles`, and the other images, numbered from 1.

    Of the windows without objects a fraction `split.tile_empty` is drawn by `seed`.
    """
    if not split.tiles:
        return annotations
    generator = np.random.default_rng(seed)
    records: list[ImageRecord] = []
    for record in annotations.records:
        windows = tile_windows(record.width, record.height, split.tiles, split.tile_overlap)
        if len(windows) == 1:
            records.append(record)
            continue
        cut = [cut_window(record, window, split.tile_visible) for window in windows]
        records += [one for one in cut if len(one.boxes) or generator.random() < split.tile_empty]
    numbered = tuple(replace(record, id=number) for number, record in enumerate(records, start=1))
    return replace(annotations, records=numbered)


def cut_window(record: ImageRecord, window: Window, visible: float) -> ImageRecord:
    """The part of an image inside a window, with the objects of which a fraction of at least `visible` is inside."""
    left, top, right, bottom = window
    boxes = record.boxes - np.array([left, top, left, top], np.float32)
    clipped = boxes.clip(0, np.array([right - left, bottom - top] * 2, np.float32))
    fraction = _areas(clipped) / _areas(boxes)
    kept = (fraction > 0) & (fraction >= visible)
    return replace(
        record,
        width=right - left,
        height=bottom - top,
        boxes=clipped[kept],
        labels=record.labels[kept],
        crowd=record.crowd[kept],
        areas=(record.areas * fraction)[kept].astype(record.areas.dtype),
        window=window,
        whole=record,
    )


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)
