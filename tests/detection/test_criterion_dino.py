"""Losses of denoising queries and IoU-aware classification, beside plain loops."""

import pytest
import torch
import torch.nn.functional as F
from test_criterion import layer, targets
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from dat.detection import HungarianMatcher, SetCriterion


def corners(boxes):
    return box_convert(boxes, "cxcywh", "xyxy")


def test_denoising_losses_are_those_of_known_pairs_per_target_and_group(double):
    t, groups, most = targets(3, 1, 0), 4, 3
    slots = groups * 2 * most
    main, dn = layer(3, seed=1), {**layer(3, slots, seed=2), "aux_outputs": [layer(3, slots, seed=3)]}
    losses = SetCriterion(4, HungarianMatcher())({**main, "dn_outputs": dn}, t)
    for end, outputs in (("_dn", dn), ("_dn_0", dn["aux_outputs"][0])):
        one_hot, bbox, giou = torch.zeros(3, slots, 4), 0, 0
        for i, target in enumerate(t):
            for group in range(groups):
                for j, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                    slot = group * 2 * most + j
                    one_hot[i, slot, label] = 1
                    predicted = outputs["pred_boxes"][i, slot]
                    bbox += (predicted - box).abs().sum()
                    giou += 1 - generalized_box_iou(corners(predicted[None]), corners(box[None])).squeeze()
        p = outputs["pred_logits"].sigmoid()
        right = one_hot * p + (1 - one_hot) * (1 - p)
        ce = -((0.25 * one_hot + 0.75 * (1 - one_hot)) * (1 - right) ** 2 * right.log()).sum()
        # There are four targets.
        for name, loss in {"loss_ce": ce, "loss_bbox": bbox, "loss_giou": giou}.items():
            torch.testing.assert_close(losses[name + end], loss / (4 * groups))
    plain = SetCriterion(4, HungarianMatcher())(main, t)
    assert all(losses[name] == loss for name, loss in plain.items())


def test_denoising_losses_count_in_the_total():
    t, criterion = targets(2, 1), SetCriterion(4, HungarianMatcher(), weights={"loss_ce": 1.0})
    main, dn = layer(2), layer(2, 12, seed=2)
    losses = criterion({**main, "dn_outputs": dn}, t)
    more = losses["loss_ce_dn"] + 5 * losses["loss_bbox_dn"] + 2 * losses["loss_giou_dn"]
    torch.testing.assert_close(criterion.total(losses), criterion.total(criterion(main, t)) + more)


@pytest.mark.parametrize("kind", ["varifocal", "matchability"])
def test_iou_aware_losses_are_those_of_a_plain_loop(kind, double):
    outputs, t = layer(2, 6), targets(3, 0)
    found = SetCriterion(4, HungarianMatcher(), class_loss=kind)(outputs, t)["loss_ce"]
    wanted = torch.zeros(())
    pairs = {
        i: dict(zip(q.tolist(), k.tolist(), strict=True)) for i, (q, k) in enumerate(HungarianMatcher()(outputs, t))
    }
    for i in range(2):
        for query in range(6):
            for k in range(4):
                logit = outputs["pred_logits"][i, query, k]
                p, j = logit.detach().sigmoid(), pairs[i].get(query)
                if j is not None and t[i]["labels"][j] == k:
                    boxes = (outputs["pred_boxes"][i, query : query + 1].detach(), t[i]["boxes"][j : j + 1])
                    q = box_iou(*map(corners, boxes)).squeeze()
                    q, weight = (q, q) if kind == "varifocal" else (q**1.5, 1)
                else:
                    q, weight = torch.zeros(()), 0.75 * p**2 if kind == "varifocal" else p**1.5
                wanted = wanted - weight * (q * F.logsigmoid(logit) + (1 - q) * F.logsigmoid(-logit))
    torch.testing.assert_close(found, wanted / 3)
    # The boxes are trained by their own losses.
    gradients = (torch.autograd.grad(x, list(outputs.values()), allow_unused=True) for x in (found, wanted / 3))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"class_loss": "vfl"}, {"class_loss": "varifocal", "scores": "softmax"}])
def test_unknown_class_losses_are_refused(options):
    with pytest.raises(ValueError, match=f"class_loss='{options['class_loss']}' should be 'focal' or, with sigmoid"):
        SetCriterion(4, HungarianMatcher(), **options)
