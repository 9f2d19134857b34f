"""Arithmetic of boxes that torchvision has only in another form."""

import torch
from torch import Tensor


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of boxes (Rezatofighi et al., CVPR 2019), -1 to 1.

    torchvision compares all pairs of two lists, without a batch, or equally long lists, and then indexes by a mask, for
    which the host waits for the device.

    Args:
        boxes, others: [..., 4], xyxy, whose leading dimensions broadcast.

    Returns:
        [...]; 0 for two empty boxes at the same place.
    """
    low, high, other_low, other_high = boxes[..., :2], boxes[..., 2:], others[..., :2], others[..., 2:]
    intersection, union = _overlap(boxes, others)
    hull = _area(low.minimum(other_low), high.maximum(other_high))
    # A larger eps would not be negligible next to the areas of small boxes.
    eps = torch.finfo(boxes.dtype).tiny
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes [..., 4], xyxy, whose leading dimensions broadcast: [...]; 0 for two empty boxes."""
    intersection, union = _overlap(boxes, others)
    return intersection / (union + torch.finfo(boxes.dtype).tiny)


def _overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of the intersections and unions."""
    low, high, other_low, other_high = boxes[..., :2], boxes[..., 2:], others[..., :2], others[..., 2:]
    intersection = _area(low.maximum(other_low), high.minimum(other_high))
    return intersection, _area(low, high) + _area(other_low, other_high) - intersection


def coverage(boxes: Tensor, others: Tensor) -> Tensor:
    """The fraction [n, m] of each of n boxes [n, 4] that lies in each of m others [m, 4]; 0 for empty boxes."""
    boxes = boxes[:, None]
    areas = _area(boxes[..., :2], boxes[..., 2:])
    return _overlap(boxes, others)[0] / areas.clamp(min=torch.finfo(boxes.dtype).tiny)


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height
