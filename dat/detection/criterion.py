"""Losses of DETR (arXiv:2005.12872) and Deformable DETR (arXiv:2010.04159)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from dat.detection.boxes import generalized_iou
from dat.detection.config import LossConfig
from dat.detection.matcher import HungarianMatcher, Matches, Scores, Targets, check_scores
from dat.detection.models.base import BaseDETR

PAPER_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
# The weight of "loss_ce", which differs between Deformable DETR and DETR.
CLASS_WEIGHTS: dict[Scores, float] = {"sigmoid": 2.0, "softmax": 1.0}


class Normalizers(NamedTuple):
    """Scalar tensors by which sums over one optimizer step are divided.

    `boxes`: number of target boxes, at least 1. `class_weights`: weights of all queries in the cross-entropy.
    """

    boxes: Tensor
    class_weights: Tensor


@dataclass(frozen=True)
class Layers:
    """L layers with the same number of queries, stacked along the batch so that a loss treats them in one call.

    `outputs`: "pred_logits" [L * B, Q, K] and "pred_boxes" [L * B, Q, 4]; `targets` of the B images; `suffixes`: L ends
    of the losses' names. Match i of all M pairs output [image[i], query[i]] with number target[i] of all targets.
    """

    outputs: dict[str, Tensor]
    targets: Targets
    suffixes: list[str]
    image: Tensor
    query: Tensor
    target: Tensor

    @cached_property
    def matched_boxes(self) -> tuple[Tensor, Tensor]:
        """Predicted and target boxes [M, 4] of the matches, cxcywh."""
        predicted = self.outputs["pred_boxes"][self.image, self.query]
        return predicted, torch.cat([t["boxes"] for t in self.targets])[self.target].to(predicted.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """[L]: sums over equal parts of the first dimension; each layer has as many matches as any other."""
        layers = len(self.suffixes)
        return x.reshape(layers, x.numel() // layers).sum(1)


class SetCriterion(nn.Module):
    """Matches predictions to targets and supervises the class of every query and the box of every matched one.

    A loss is a method of the name that it has in `weight_dict`: it takes Layers and Normalizers and returns [L].

    Args:
        num_classes: number of classes, without "no object".
        matcher: gives the assignment: a HungarianMatcher, or a function of the same arguments and result.
        scores: "sigmoid": focal loss on num_classes logits; "softmax": cross-entropy on num_classes + 1.
        weights: of losses in `total`; those of the papers that are not given keep the papers' weights.
        focal_alpha, focal_gamma: of the focal loss.
        no_object_weight: of the class "no object" in the cross-entropy.
        class_weights: [num_classes], of the classification loss of queries that are matched with an object of the
            class, as in class-balanced losses (arXiv:1901.05555); None: 1.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: Callable[[dict[str, Tensor], Targets], Matches],
        scores: Scores = "sigmoid",
        weights: dict[str, float] | None = None,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        no_object_weight: float = 0.1,
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        check_scores(scores)
        known = [name for name in dir(type(self)) if name.startswith("loss_")]
        for name in weights or {}:
            if name not in known:
                raise ValueError(f"weights has {name!r}, its keys should be among {known}")
        self.num_classes, self.matcher, self.scores = num_classes, matcher, scores
        self.weight_dict = PAPER_WEIGHTS | {"loss_ce": CLASS_WEIGHTS[scores]} | (weights or {})
        self.focal_alpha, self.focal_gamma, self.no_object_weight = focal_alpha, focal_gamma, no_object_weight
        self.class_weights = class_weights

    def forward(
        self, outputs: dict[str, Any], targets: Targets, normalizers: Normalizers | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses.

        Args:
            outputs: "pred_logits" [B, Q, K], "pred_boxes" [B, Q, 4] and, where the model gives them, "aux_outputs" and
                "enc_outputs"; anything else is ignored.
            targets: B times "labels" [T_i] int64 and "boxes" [T_i, 4], cxcywh in 0..1.
            normalizers: of all batches of an optimizer step; None: this batch is all of it.

        Returns:
            The losses of `weight_dict`, scalars, of the last decoder layer, with the suffix "_0", "_1", ... of the
            layers before and "_enc" of the encoder.
        """
        if normalizers is None:
            normalizers = self.normalizers(targets, outputs["pred_logits"].shape[1], outputs["pred_logits"].device)
        if self.class_weights is not None:
            # Before the encoder's targets forget their classes.
            weights = self.class_weights.to(outputs["pred_logits"].device, non_blocking=True)
            targets = [{**t, "class_weights": weights[t["labels"]]} for t in targets]
        layers = [outputs, *outputs.get("aux_outputs", ())]
        stacks = [(self._stack(layers), targets, ["", *(f"_{i}" for i in range(len(layers) - 1))])]
        if "enc_outputs" in outputs:
            # The encoder only separates objects from background: every object is of class 0.
            binary = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            stacks.append((self._stack([outputs["enc_outputs"]]), binary, ["_enc"]))
        losses: dict[str, Tensor] = {}
        for stack in self._match(stacks):
            values = {name: getattr(self, name)(stack, normalizers) for name in self.weight_dict}
            losses |= {name + end: value[i] for i, end in enumerate(stack.suffixes) for name, value in values.items()}
        return losses

    def loss_ce(self, layers: Layers, normalizers: Normalizers) -> Tensor:
        """Focal loss per box, or cross-entropy averaged with the weights of the classes."""
        logits = layers.outputs["pred_logits"]
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[layers.image, layers.query] = torch.cat([t["labels"] for t in layers.targets])[layers.target]
        if self.scores == "sigmoid":
            one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
            loss = sigmoid_focal_loss(logits, one_hot, self.focal_alpha, self.focal_gamma)
            return layers.sum(self._weight_objects(loss, layers)) / normalizers.boxes
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        loss = F.cross_entropy(logits.transpose(1, 2), classes, weight, reduction="none")
        return layers.sum(self._weight_objects(loss, layers)) / normalizers.class_weights

    def _weight_objects(self, loss: Tensor, layers: Layers) -> Tensor:
        """The loss [L * B, Q, ...], where that of every matched query is multiplied by the weight of its object."""
        if self.class_weights is None:
            return loss
        weights = loss.new_ones(loss.shape[:2])
        weights[layers.image, layers.query] = torch.cat([t["class_weights"] for t in layers.targets])[layers.target]
        return loss * weights.view(*weights.shape, *(1,) * (loss.ndim - 2))

    def loss_bbox(self, layers: Layers, normalizers: Normalizers) -> Tensor:
        """L1 distance of cxcywh boxes."""
        predicted, wanted = layers.matched_boxes
        return layers.sum((predicted - wanted).abs().sum(-1)) / normalizers.boxes

    def loss_giou(self, layers: Layers, normalizers: Normalizers) -> Tensor:
        """1 minus the generalised IoU."""
        predicted, wanted = (box_convert(boxes, "cxcywh", "xyxy") for boxes in layers.matched_boxes)
        return layers.sum(1 - generalized_iou(predicted, wanted)) / normalizers.boxes

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what forward returned, a scalar; suffixes such as "_0" or "_enc" do not matter."""
        return torch.stack([self._weight(name) * loss for name, loss in losses.items()]).sum()

    def normalizers(self, targets: Targets, num_queries: int, device: torch.device) -> Normalizers:
        """Loss normalisers for the targets of all batches of one optimizer step.

        They are the same whatever is matched, and means over the processes, whose gradients are averaged.
        """
        boxes = sum(len(t["labels"]) for t in targets)
        matched = [min(len(t["labels"]), num_queries) for t in targets]
        unmatched = len(targets) * num_queries - sum(matched)
        weights: list[float] = [*matched]
        if self.class_weights is not None:
            # With more objects than queries, the matched ones are taken to weigh as much as all on average.
            means = [self.class_weights[t["labels"].cpu()].double().mean().item() for t in targets]
            weights = [count * mean if count else 0.0 for count, mean in zip(matched, means, strict=True)]
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.tensor([boxes, sum(weights) + self.no_object_weight * unmatched], dtype=dtype)
        totals = totals.to(device, non_blocking=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
        # The lower bounds avoid 0 / 0 for an empty batch.
        return Normalizers(totals[0].clamp(min=1.0), totals[1].clamp(min=torch.finfo(torch.float32).tiny))

    def _weight(self, name: str) -> float:
        return next(weight for key, weight in self.weight_dict.items() if f"{name}_".startswith(f"{key}_"))

    def _stack(self, layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        outputs = {key: torch.cat([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes")}
        outputs = {key: x.to(torch.promote_types(x.dtype, torch.float32)) for key, x in outputs.items()}
        found, expected = outputs["pred_logits"].shape[-1], self.num_classes + (self.scores == "softmax")
        if found != expected:
            raise ValueError(
                f"pred_logits has {found} classes, should have {expected}: "
                f"num_classes={self.num_classes}, scores={self.scores!r}"
            )
        return outputs

    def _match(self, stacks: list[tuple[dict[str, Tensor], Targets, list[str]]]) -> list[Layers]:
        """Matches all stacks; the indices go to the device in one copy, for which the host does not wait."""
        batches = [(outputs, targets * len(suffixes)) for outputs, targets, suffixes in stacks]
        if isinstance(self.matcher, HungarianMatcher):
            matches = self.matcher.match_all(batches)
        else:
            matches = [self.matcher(*batch) for batch in batches]
        flat = [_flat_indices(found, stack[1]) for found, stack in zip(matches, stacks, strict=True)]
        on_device = torch.cat(flat, 1).to(stacks[0][0]["pred_boxes"].device, non_blocking=True)
        indices = on_device.split([index.shape[1] for index in flat], 1)
        return [Layers(*stack, *index) for stack, index in zip(stacks, indices, strict=True)]


def _flat_indices(matches: Matches, targets: Targets) -> Tensor:
    """[3, M]: rows of the stacked batch, queries, and positions among the concatenated targets of the B images."""
    starts = [0, *accumulate(len(t["labels"]) for t in targets)]
    rows = [
        (torch.full_like(query, i), query, target + starts[i % len(targets)])
        for i, (query, target) in enumerate(matches)
    ]
    return torch.stack([torch.cat(part) for part in zip(*rows, strict=True)])


def build_criterion(model: BaseDETR, loss: LossConfig, class_weights: Tensor | None = None) -> SetCriterion:
    """The losses of a model; values that are null in `loss` are those of the model's paper."""
    paper = CLASS_WEIGHTS[model.scores]
    cost_class, weight_class = (paper if x is None else x for x in (loss.cost_class, loss.weight_class))
    return SetCriterion(
        model.num_classes,
        HungarianMatcher(cost_class, loss.cost_box, loss.cost_giou, model.scores),
        model.scores,
        weights={"loss_ce": weight_class, "loss_bbox": loss.weight_box, "loss_giou": loss.weight_giou},
        focal_alpha=loss.focal_alpha,
        no_object_weight=loss.no_object_weight,
        class_weights=class_weights,
    )
