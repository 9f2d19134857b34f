"""Assignment of predictions to ground truth by the Hungarian algorithm (DETR, arXiv:2005.12872, section 3.1)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from dat.detection.boxes import generalized_iou
from dat.utils.errors import NonFiniteError
from dat.utils.finite import check_finite

Scores = Literal["sigmoid", "softmax"]
# A dictionary for each image: "boxes" [n, 4], "labels" [n], and any other entries that a loss needs.
Targets = list[dict[str, Any]]
Matches = list[tuple[Tensor, Tensor]]


def check_scores(scores: str) -> None:
    if scores not in ("sigmoid", "softmax"):
        raise ValueError(f'scores={scores!r} should be "sigmoid" or "softmax"')


class HungarianMatcher:
    """The one-to-one assignment of least cost; predictions left over stand for "no object".

    Args:
        cost_class: weight of the class: minus the probability ("softmax", DETR), or the focal loss of predicting the
            target's class less that of not predicting it ("sigmoid", Deformable DETR; alpha 0.25, gamma 2).
        cost_box: weight of the L1 distance of cxcywh boxes.
        cost_giou: weight of minus the generalised IoU.
        scores: how logits become probabilities; with "softmax" the last logit is "no object".
    """

    def __init__(
        self, cost_class: float = 2.0, cost_box: float = 5.0, cost_giou: float = 2.0, scores: Scores = "sigmoid"
    ):
        check_scores(scores)
        if not (cost_class or cost_box or cost_giou):
            raise ValueError("cost_class, cost_box and cost_giou are all 0, one should not be")
        self.cost_class, self.cost_box, self.cost_giou, self.scores = cost_class, cost_box, cost_giou, scores

    def __call__(self, outputs: dict[str, Tensor], targets: Targets) -> Matches:
        """Matches every image of a batch, with one transfer from the device.

        Args:
            outputs: "pred_logits" [B, Q, K] and "pred_boxes" [B, Q, 4], cxcywh.
            targets: B times "labels" [T_i] and "boxes" [T_i, 4], cxcywh; T_i may be 0, or more than Q.

        Returns:
            B times (query indices, target indices), both int64 [min(Q, T_i)] on the CPU, by increasing query index.

        Raises:
            NonFiniteError: naming the first of the tensors that holds NaN or infinity.
        """
        return self.match_all([(outputs, targets)])[0]

    @torch.no_grad()
    def match_all(self, batches: Sequence[tuple[dict[str, Tensor], Targets]]) -> list[Matches]:
        """Matches several batches, whose numbers of queries may differ; arguments, results and errors as in a call."""
        costs = [self._cost(outputs, targets) for outputs, targets in batches]
        # The only place in a training step where the host waits for the device: the costs of all layers in one copy.
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
        return [
            _assign(flat.view(cost.shape), *batch) for flat, cost, batch in zip(on_host, costs, batches, strict=True)
        ]

    def _cost(self, outputs: dict[str, Tensor], targets: Targets) -> Tensor:
        """[B, Q, T] for the largest number T of targets in an image; entries past an image's own are padding."""
        dtype = torch.promote_types(outputs["pred_logits"].dtype, torch.float32)
        logits, boxes = outputs["pred_logits"].to(dtype), outputs["pred_boxes"].to(dtype)
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        target_boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(dtype)
        probabilities = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(-1)
        p = probabilities.gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
        class_cost = -p
        if self.scores == "sigmoid":
            class_cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        corners = box_convert(torch.cat((boxes, target_boxes), 1), "cxcywh", "xyxy")
        giou = generalized_iou(corners[:, : boxes.shape[1], None], corners[:, None, boxes.shape[1] :])
        distance = torch.cdist(boxes, target_boxes, p=1)
        return self.cost_class * class_cost + self.cost_box * distance - self.cost_giou * giou


def _assign(costs: Tensor, outputs: dict[str, Tensor], targets: Targets) -> Matches:
    matches = []
    for cost, target in zip(costs, targets, strict=True):
        cost = cost[:, : len(target["labels"])]
        if not cost.isfinite().all():
            _raise_non_finite(outputs, targets)
        query, matched = linear_sum_assignment(cost)
        matches.append((torch.as_tensor(query), torch.as_tensor(matched)))
    return matches


def _raise_non_finite(outputs: dict[str, Tensor], targets: Targets) -> None:
    check_finite([(name, outputs[name]) for name in ("pred_logits", "pred_boxes")], "matching")
    check_finite([(f"targets[{i}]['boxes']", t["boxes"]) for i, t in enumerate(targets)], "matching")
    raise NonFiniteError("matching: the cost of an assignment is not finite although predictions and targets are")
