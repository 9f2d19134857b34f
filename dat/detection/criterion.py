"""Losses of DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from dat.detection.matcher import HungarianMatcher, Matches, Scores, Targets, check_scores

PAPER_WEIGHTS = {
    "sigmoid": {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
    "softmax": {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0},
}


@dataclass
class _Stack:
    """Layers of the same number of queries, stacked along the batch, so that they are treated in one go.

    `outputs`: "pred_logits" [layers * B, Q, K] and "pred_boxes" [layers * B, Q, 4]; `targets` of the B images.
    """

    outputs: dict[str, Tensor]
    suffixes: list[str]
    targets: Targets

    @property
    def num_layers(self) -> int:
        return len(self.suffixes)


class SetCriterion(nn.Module):
    """Matches predictions to targets and supervises the class of every query and the box of every matched one.

    Args:
        num_classes: number of classes, without "no object".
        matcher: gives the assignment.
        scores: "sigmoid": focal loss on num_classes logits; "softmax": cross-entropy on num_classes + 1.
        weights: of "loss_ce", "loss_bbox" and "loss_giou" in `total`; those not given are the papers'.
        focal_alpha, focal_gamma: of the focal loss.
        no_object_weight: of the class "no object" in the cross-entropy.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        scores: Scores = "sigmoid",
        weights: dict[str, float] | None = None,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        no_object_weight: float = 0.1,
    ):
        super().__init__()
        check_scores(scores)
        unknown = sorted(set(weights or {}) - set(PAPER_WEIGHTS[scores]))
        if unknown:
            raise ValueError(f"weights has {unknown[0]!r}, its keys should be among {list(PAPER_WEIGHTS[scores])}")
        self.num_classes, self.matcher, self.scores = num_classes, matcher, scores
        self.weights = PAPER_WEIGHTS[scores] | (weights or {})
        self.focal_alpha, self.focal_gamma, self.no_object_weight = focal_alpha, focal_gamma, no_object_weight

    def forward(self, outputs: dict[str, Any], targets: Targets, shares: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted losses.

        Args:
            outputs: "pred_logits" [B, Q, K], "pred_boxes" [B, Q, 4] and, where the model gives them, "aux_outputs" and
                "enc_outputs".
            targets: B times "labels" [T_i] int64 and "boxes" [T_i, 4], cxcywh in 0..1.
            shares: what `shares` returns for all batches of an optimizer step; None: this batch is all of it.

        Returns:
            scalars "loss_ce", "loss_bbox", "loss_giou" of the last decoder layer, with the suffix "_0", "_1", ...
            of the layers before and "_enc" of the encoder, each divided by the number of boxes, or for
            cross-entropy the weights of the classes: see `shares`.
        """
        device = outputs["pred_boxes"].device
        if shares is None:
            shares = self.normalizers(targets, outputs["pred_logits"].shape[1], device)
        layers = [outputs, *outputs.get("aux_outputs", ())]
        suffixes = ["", *(f"_{i}" for i in range(len(layers) - 1))]
        stacks = [self._stack(layers, suffixes, targets)]
        if "enc_outputs" in outputs:
            # The encoder tells objects from background: every object is of class 0.
            binary = [{"labels": torch.zeros_like(t["labels"]), "boxes": t["boxes"]} for t in targets]
            stacks.append(self._stack([outputs["enc_outputs"]], ["_enc"], binary))
        matches = self.matcher.match_all([(stack.outputs, stack.targets * stack.num_layers) for stack in stacks])
        indices = _flat_indices(stacks, matches, device)
        losses: dict[str, Tensor] = {}
        for stack, index in zip(stacks, indices, strict=True):
            losses |= self._losses(stack, index, shares)
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what forward returned, a scalar."""
        return torch.stack([self.weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()]).sum()

    def normalizers(self, targets: Targets, num_queries: int, device: torch.device) -> Tensor:
        """What the losses of `targets`, those of all batches of one optimizer step, are divided by.

        Returns [2]: the number of boxes, at least 1, and the sum of the weights of all queries in the cross-entropy,
        the same whatever is matched; means over the processes, whose gradients are averaged.
        """
        boxes = sum(len(t["labels"]) for t in targets)
        matched = sum(min(len(t["labels"]), num_queries) for t in targets)
        unmatched = len(targets) * num_queries - matched
        totals = torch.tensor([boxes, matched + self.no_object_weight * unmatched], dtype=torch.float64, device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
        # an empty batch divides zeros
        return totals.maximum(totals.new_tensor([1.0, torch.finfo(torch.float32).tiny]))

    def _stack(self, layers: list[dict[str, Tensor]], suffixes: list[str], targets: Targets) -> _Stack:
        logits = torch.cat([layer["pred_logits"] for layer in layers])
        boxes = torch.cat([layer["pred_boxes"] for layer in layers])
        logits, boxes = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, boxes))
        self._check_classes(logits)
        return _Stack({"pred_logits": logits, "pred_boxes": boxes}, suffixes, targets)

    def _losses(self, stack: _Stack, index: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """The losses of every layer; index [3, M] is that of _flat_indices."""
        num_boxes, class_weights = shares.unbind()
        logits, boxes = stack.outputs["pred_logits"], stack.outputs["pred_boxes"]
        image, query, target = index
        labels = torch.cat([t["labels"] for t in stack.targets])[target]
        target_boxes = torch.cat([t["boxes"] for t in stack.targets])[target].to(boxes.dtype)

        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[image, query] = labels
        matched = boxes[image, query]
        corners = [box_convert(b, "cxcywh", "xyxy") for b in (matched, target_boxes)]
        # The function's own eps is large next to the area of a small box.
        giou = generalized_box_iou_loss(*corners, eps=torch.finfo(boxes.dtype).tiny)
        per_layer = {
            "loss_ce": self._class_loss(logits, classes, stack.num_layers, num_boxes, class_weights),
            "loss_bbox": _sum_per_layer((matched - target_boxes).abs().sum(-1), stack.num_layers) / num_boxes,
            "loss_giou": _sum_per_layer(giou, stack.num_layers) / num_boxes,
        }
        return {name + suffix: value[i] for i, suffix in enumerate(stack.suffixes) for name, value in per_layer.items()}

    def _class_loss(
        self, logits: Tensor, classes: Tensor, num_layers: int, num_boxes: Tensor, class_weights: Tensor
    ) -> Tensor:
        """[num_layers]: focal loss per box, or cross-entropy averaged with the weights of the classes."""
        if self.scores == "sigmoid":
            one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
            loss = sigmoid_focal_loss(logits, one_hot, self.focal_alpha, self.focal_gamma)
            return _sum_per_layer(loss, num_layers) / num_boxes
        weight = torch.ones(self.num_classes + 1, dtype=logits.dtype, device=logits.device)
        weight[-1] = self.no_object_weight
        loss = F.cross_entropy(logits.transpose(1, 2), classes, weight, reduction="none")
        return _sum_per_layer(loss, num_layers) / class_weights

    def _check_classes(self, logits: Tensor) -> None:
        expected = self.num_classes + (self.scores == "softmax")
        if logits.shape[-1] != expected:
            raise ValueError(
                f"pred_logits has {logits.shape[-1]} classes, should have {expected}: "
                f"num_classes={self.num_classes}, scores={self.scores!r}"
            )


def _sum_per_layer(x: Tensor, num_layers: int) -> Tensor:
    """Sums the num_layers equal parts of the first axis; each layer has as many matches as any other."""
    return x.reshape(num_layers, x.numel() // num_layers).sum(1)


def _flat_indices(stacks: list[_Stack], matches: list[Matches], device: torch.device) -> list[Tensor]:
    """For each stack [3, M]: rows of the batch, queries, and positions in the concatenated targets, in one transfer."""
    flat = []
    for stack, of_stack in zip(stacks, matches, strict=True):
        sizes = torch.tensor([len(t["labels"]) for t in stack.targets])
        starts = (sizes.cumsum(0) - sizes).repeat(stack.num_layers)
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(of_stack)])
        query = torch.cat([query for query, _ in of_stack])
        target = torch.cat([target + start for (_, target), start in zip(of_stack, starts, strict=True)])
        flat.append(torch.stack((image, query, target)))
    joined = torch.cat(flat, 1)
    if device.type == "cuda":
        # The host need not wait for the device again.
        joined = joined.pin_memory()
    return list(joined.to(device, non_blocking=True).split([index.shape[1] for index in flat], 1))
