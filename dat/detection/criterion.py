"""Losses of DETR (arXiv:2005.12872), Deformable DETR (arXiv:2010.04159), DINO (arXiv:2203.03605) and others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from dat.detection.boxes import generalized_iou, paired_iou
from dat.detection.config import ClassLoss, LossConfig
from dat.detection.matcher import HungarianMatcher, Matches, Scores, Targets, check_scores
from dat.detection.models.base import BaseDETR

PAPER_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
# The weight of "loss_ce", which differs between Deformable DETR and DETR.
CLASS_WEIGHTS: dict[Scores, float] = {"sigmoid": 2.0, "softmax": 1.0}
IOU_AWARE = ("varifocal", "matchability")
MATCHABILITY_GAMMA = 1.5


class Stack(NamedTuple):
    """Layers, see there, before they are matched; `matches` are those of denoising, which are known."""

    outputs: dict[str, Tensor]
    targets: Targets
    suffixes: list[str]
    repeats: int = 1
    matches: Matches | None = None


class Normalizers(NamedTuple):
    """Scalar tensors by which sums over one optimizer step are divided.

    `boxes`: number of target boxes, at least 1 in all processes together. `class_weights`: weights of all queries in
    the cross-entropy. Both are means over the processes.
    """

    boxes: Tensor
    class_weights: Tensor


@dataclass(frozen=True)
class Layers:
    """L layers with the same number of queries, stacked along the batch so that a loss treats them in one call.

    `outputs`: "pred_logits" [L * B, Q, K] and "pred_boxes" [L * B, Q, 4]; `targets` of the B images; `suffixes`: L ends
    of the losses' names; `repeats`: queries that are to be matched to each target. Match i of all M pairs output
    [image[i], query[i]] with number target[i] of all targets.
    """

    outputs: dict[str, Tensor]
    targets: Targets
    suffixes: list[str]
    repeats: int
    image: Tensor
    query: Tensor
    target: Tensor

    @cached_property
    def matched_boxes(self) -> tuple[Tensor, Tensor]:
        """Predicted and target boxes [M, 4] of the matches, cxcywh."""
        predicted = self.outputs["pred_boxes"][self.image, self.query]
        return predicted, torch.cat([t["boxes"] for t in self.targets])[self.target].to(predicted.dtype)

    @cached_property
    def matched_corners(self) -> tuple[Tensor, Tensor]:
        """The same boxes, xyxy."""
        predicted, wanted = box_convert(torch.stack(self.matched_boxes), "cxcywh", "xyxy")
        # Otherwise the losses would work out gradients by the targets.
        return predicted, wanted.detach()

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
        class_loss: instead of the focal loss of sigmoids, one whose positive targets are IoUs: "varifocal"
            (VarifocalNet, arXiv:2008.13367) or "matchability" (DEIM, arXiv:2412.04234).
        one_to_many: queries that are matched to each target in one-to-many matching (arXiv:2207.13080).
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
        class_loss: ClassLoss = "focal",
        one_to_many: int = 6,
    ):
        super().__init__()
        check_scores(scores)
        if class_loss not in get_args(ClassLoss) or (class_loss != "focal" and scores != "sigmoid"):
            raise ValueError(f"class_loss={class_loss!r} should be 'focal' or, with sigmoid scores, {IOU_AWARE}")
        known = [name for name in dir(type(self)) if name.startswith("loss_")]
        for name in weights or {}:
            if name not in known:
                raise ValueError(f"weights has {name!r}, its keys should be among {known}")
        self.num_classes, self.matcher, self.scores = num_classes, matcher, scores
        self.weight_dict = PAPER_WEIGHTS | {"loss_ce": CLASS_WEIGHTS[scores]} | (weights or {})
        self.focal_alpha, self.focal_gamma, self.no_object_weight = focal_alpha, focal_gamma, no_object_weight
        self.class_weights = class_weights
        self.class_loss, self.one_to_many = class_loss, one_to_many

    def forward(
        self, outputs: dict[str, Any], targets: Targets, normalizers: Normalizers | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses.

        Args:
            outputs: "pred_logits" [B, Q, K], "pred_boxes" [B, Q, 4] and, where the model gives them, "aux_outputs",
                "enc_outputs" (of one class, or of all where it has the "positions" that were selected),
                "one_to_many_outputs" and "dn_outputs" (denoising queries of these targets, slot by slot), the latter
                two with their "aux_outputs"; anything else is ignored.
            targets: B times "labels" [T_i] int64 and "boxes" [T_i, 4], cxcywh in 0..1.
            normalizers: of all batches of an optimizer step; None: this batch is all of it.

        Returns:
            The losses of `weight_dict`, scalars, of the last decoder layer, with the suffix "_0", "_1", ... of the
            layers before, "_enc" of the encoder, "_o2m", "_o2m_0", ... of one-to-many matching and "_dn", "_dn_0", ...
            of denoising, which are divided by the number of queries of each target.
        """
        if normalizers is None:
            normalizers = self.normalizers(targets, outputs["pred_logits"].shape[1], outputs["pred_logits"].device)
        if self.class_weights is not None:
            # Before the encoder's targets forget their classes.
            weights = self.class_weights.to(outputs["pred_logits"].device, non_blocking=True)
            targets = [{**t, "class_weights": weights[t["labels"]]} for t in targets]
        losses: dict[str, Tensor] = {}
        for stack in self._match(self._stacks(outputs, targets)):
            scaled = normalizers._replace(boxes=normalizers.boxes * stack.repeats)
            values = {name: getattr(self, name)(stack, scaled) for name in self.weight_dict}
            # Not by index, whose backward pass would fill a tensor of zeros for each layer, nor by `unbind`, whose
            # results may not be changed in place.
            layers = zip(stack.suffixes, *(value.unsafe_split(1) for value in values.values()), strict=True)
            losses |= {
                name + end: loss.squeeze(0) for end, *one in layers for name, loss in zip(values, one, strict=True)
            }
        return losses

    def _stacks(self, outputs: dict[str, Any], targets: Targets) -> list[Stack]:
        stacks = [self._stack(outputs, targets)]
        if "enc_outputs" in outputs:
            wanted = targets
            if "positions" not in outputs["enc_outputs"]:
                # The encoder of Deformable DETR only separates objects from background: every object is of class 0.
                wanted = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            stacks.append(self._stack(outputs["enc_outputs"], wanted, "_enc"))
        if "one_to_many_outputs" in outputs:
            times = self.one_to_many
            names = ("labels", "boxes", "class_weights")
            many = [{**t, **{name: torch.cat([t[name]] * times) for name in names if name in t}} for t in targets]
            stacks.append(self._stack(outputs["one_to_many_outputs"], many, "_o2m", times))
        slots = outputs["dn_outputs"]["pred_logits"].shape[1] if "dn_outputs" in outputs else 0
        if slots:
            groups = slots // (2 * max(len(t["labels"]) for t in targets))
            matches = denoising_matches(targets, slots, groups)
            stacks.append(self._stack(outputs["dn_outputs"], targets, "_dn", groups, matches))
        return stacks

    def loss_ce(self, layers: Layers, normalizers: Normalizers) -> Tensor:
        """Focal loss per box, or cross-entropy averaged with the weights of the classes."""
        logits = layers.outputs["pred_logits"]
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[layers.image, layers.query] = torch.cat([t["labels"] for t in layers.targets])[layers.target]
        if self.scores == "sigmoid":
            one_hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits.dtype)
            if self.class_loss == "focal":
                loss = sigmoid_focal_loss(logits, one_hot, self.focal_alpha, self.focal_gamma)
            else:
                loss = self._iou_aware_loss(logits, one_hot, layers)
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

    def _iou_aware_loss(self, logits: Tensor, one_hot: Tensor, layers: Layers) -> Tensor:
        """Binary cross-entropy [L * B, Q, K] whose positive targets are IoUs; weights are not differentiated.

        Negatives are weighted by 0.75 p^2 (varifocal) or p^1.5 (matchability), positives by their target, the IoU
        (varifocal), or by 1, with the target IoU^1.5.
        """
        predicted, wanted = layers.matched_corners
        iou = torch.zeros_like(logits[..., 0])
        iou[layers.image, layers.query] = paired_iou(predicted.detach(), wanted).to(iou.dtype)
        p, target = logits.detach().sigmoid(), one_hot * iou[..., None]
        if self.class_loss == "varifocal":
            weight = torch.where(one_hot > 0, target, (1 - self.focal_alpha) * p**self.focal_gamma)
        else:
            target = target**MATCHABILITY_GAMMA
            weight = torch.where(one_hot > 0, 1.0, p**MATCHABILITY_GAMMA)
        return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")

    def loss_bbox(self, layers: Layers, normalizers: Normalizers) -> Tensor:
        """L1 distance of cxcywh boxes."""
        predicted, wanted = layers.matched_boxes
        return layers.sum((predicted - wanted).abs().sum(-1)) / normalizers.boxes

    def loss_giou(self, layers: Layers, normalizers: Normalizers) -> Tensor:
        """1 minus the generalised IoU."""
        predicted, wanted = layers.matched_corners
        return layers.sum(1 - generalized_iou(predicted, wanted)) / normalizers.boxes

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what forward returned, a scalar; suffixes such as "_0" or "_enc" do not matter."""
        groups: dict[float, list[Tensor]] = {}
        for name, loss in losses.items():
            groups.setdefault(self._weight(name), []).append(loss)
        # A sum of each group, as a product for each loss would be a launch for each, and another in the backward pass.
        return torch.stack([weight * torch.stack(group).sum() for weight, group in groups.items()]).sum()

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
        processes = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
            processes = dist.get_world_size()
        # The lower bounds avoid 0 / 0 for an empty step.
        num_boxes, weight = totals[0].clamp(min=1.0), totals[1].clamp(min=torch.finfo(torch.float32).tiny)
        return Normalizers(num_boxes / processes, weight / processes)

    def _weight(self, name: str) -> float:
        return next(weight for key, weight in self.weight_dict.items() if f"{name}_".startswith(f"{key}_"))

    def _stack(
        self,
        last: dict[str, Any],
        targets: Targets,
        suffix: str = "",
        repeats: int = 1,
        matches: Matches | None = None,
    ) -> Stack:
        """The stack of a layer and its "aux_outputs"; `matches` of one layer, where they are known."""
        layers = [last, *last.get("aux_outputs", ())]
        outputs = {key: torch.cat([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes")}
        outputs = {key: x.to(torch.promote_types(x.dtype, torch.float32)) for key, x in outputs.items()}
        found, expected = outputs["pred_logits"].shape[-1], self.num_classes + (self.scores == "softmax")
        if found != expected:
            raise ValueError(
                f"pred_logits has {found} classes, should have {expected}: "
                f"num_classes={self.num_classes}, scores={self.scores!r}"
            )
        suffixes = [suffix, *(f"{suffix}_{i}" for i in range(len(layers) - 1))]
        return Stack(outputs, targets, suffixes, repeats, None if matches is None else matches * len(layers))

    def _match(self, stacks: list[Stack]) -> list[Layers]:
        """Matches all stacks; the indices go to the device in one copy, for which the host does not wait."""
        batches = [(stack.outputs, stack.targets * len(stack.suffixes)) for stack in stacks if stack.matches is None]
        if isinstance(self.matcher, HungarianMatcher):
            found = iter(self.matcher.match_all(batches))
        else:
            found = iter([self.matcher(*batch) for batch in batches])
        flat = [_flat_indices(next(found) if s.matches is None else s.matches, s.targets) for s in stacks]
        on_device = torch.cat(flat, 1).to(stacks[0].outputs["pred_boxes"].device, non_blocking=True)
        indices = on_device.split([index.shape[1] for index in flat], 1)
        return [Layers(*stack[:-1], *index) for stack, index in zip(stacks, indices, strict=True)]


def denoising_matches(targets: Targets, slots: int, groups: int) -> Matches:
    """Positive denoising queries (see Denoising) and the targets that they were made of, for each image."""
    first = torch.arange(0, slots, slots // groups)
    counts = [len(t["labels"]) for t in targets]
    return [((first[:, None] + torch.arange(n)).flatten(), torch.arange(n).repeat(groups)) for n in counts]


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
    cost_class = CLASS_WEIGHTS[model.scores] if loss.cost_class is None else loss.cost_class
    weight_class = model.class_weight if loss.weight_class is None else loss.weight_class
    return SetCriterion(
        model.num_classes,
        HungarianMatcher(cost_class, loss.cost_box, loss.cost_giou, model.scores),
        model.scores,
        weights={"loss_ce": weight_class, "loss_bbox": loss.weight_box, "loss_giou": loss.weight_giou},
        focal_alpha=loss.focal_alpha,
        no_object_weight=loss.no_object_weight,
        class_weights=class_weights,
        class_loss=loss.class_loss,
        one_to_many=loss.one_to_many,
    )
