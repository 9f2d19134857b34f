"""Contrastive denoising queries: targets with noise, which training teaches a decoder to undo (DINO, arXiv:2203.03605).

Each group of queries holds every target twice: once with little noise, to be corrected (positive), and once with more,
to be rejected (negative). The rules are those of the official implementation, IDEA-Research/DINO.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert


class Denoising(TypedDict):
    """Denoising queries of a batch, P = num_groups * 2 * (most targets of an image).

    A group has a slot for each target of an image, positive, and then as many negative ones. Images with fewer targets
    leave slots empty.

    Attributes:
        labels: [B, P] int64, after noise; -1 in empty slots.
        boxes: [B, P, 4], cxcywh after noise, whose sizes can be negative; 0 in empty slots.
        num_groups: number of groups, at least 1.
    """

    labels: Tensor
    boxes: Tensor
    num_groups: int


def num_denoising_groups(number: int, most: int) -> int:
    """Groups for batches with up to `most` targets in an image.

    From 50 on, `number` is a budget: as many groups as fit into it with their positive queries, at least one. Below, it
    is half the number of groups, however many targets there are (as in the official implementation).
    """
    if most == 0:
        return 1
    return 2 * number if number < 50 else max(1, number // most)


def make_denoising(
    targets: Sequence[dict[str, Any]], num_classes: int, number: int, label_noise: float, box_noise: float
) -> Denoising:
    """Draws denoising queries from torch's generator of the targets' device, without waiting for that device.

    Args:
        targets: B times "labels" [T_i] and "boxes" [T_i, 4], cxcywh in 0..1.
        num_classes: labels are drawn from 0 to num_classes - 1.
        number: see num_denoising_groups.
        label_noise: half of it is the probability that a label is drawn anew.
        box_noise: the largest distance that a corner's coordinate moves in a positive query, and the smallest in a
            negative one, whose largest is twice that: in halves of the box's side.
    """
    most = max(len(target["labels"]) for target in targets)
    groups = num_denoising_groups(number, most)
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True, padding_value=-1)
    labels = labels.repeat(1, 2 * groups)
    boxes = pad_sequence([target["boxes"] for target in targets], batch_first=True).repeat(1, 2 * groups, 1)
    anew = (torch.rand_like(labels, dtype=torch.float32) < label_noise / 2) & (labels >= 0)
    labels = torch.where(anew, torch.randint_like(labels, num_classes), labels)
    slots = torch.arange(labels.shape[1], device=labels.device)
    negative = slots // max(1, most) % 2
    sign = 2 * torch.randint_like(boxes, 2) - 1
    distance = (torch.rand_like(boxes) + negative[:, None]) * box_noise * boxes[..., 2:].repeat(1, 1, 2) / 2
    corners = (box_convert(boxes, "cxcywh", "xyxy") + sign * distance).clamp(0, 1)
    return {"labels": labels, "boxes": box_convert(corners, "xyxy", "cxcywh"), "num_groups": groups}


def query_mask(denoising: Denoising | None, matched: int, one_to_many: int, device: torch.device) -> Tensor | None:
    """Which queries may not attend to which: [T, T], True where the row's may not look at the column's.

    The order is that of the decoder: the denoising queries, `matched` ones and those of one-to-many matching. A group
    of denoising queries sees itself and the matched ones, the others see only their own kind. None where all see all.
    """
    if denoising is None and not one_to_many:
        return None
    slots = 0 if denoising is None else denoising["labels"].shape[1]
    groups = 1 if denoising is None else denoising["num_groups"]
    group = torch.arange(slots, device=device) // max(1, slots // groups)
    group = torch.cat((group, group.new_full((matched,), -1), group.new_full((one_to_many,), -2)))
    hidden = group[:, None] != group
    hidden[:slots, slots : slots + matched] = False
    return hidden
