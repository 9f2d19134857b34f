import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from detr_inputs import fixture_targets, load_fixture, part, relative_error
from torch.utils._pytree import tree_map
from torchvision.ops import box_convert, generalized_box_iou

from dat.detection import HungarianMatcher, SetCriterion
from dat.detection import criterion as criterion_module


def layer(batch=2, queries=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.1
    logits = torch.randn(batch, queries, classes, generator=generator)
    return {"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}


def targets(*counts, classes=4):
    generator = torch.Generator().manual_seed(9)
    return [
        {
            "labels": torch.randint(classes, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.1,
        }
        for n in counts
    ]


def test_perfect_boxes_cost_nothing():
    outputs, t = layer(1, 3), targets(3)
    outputs["pred_boxes"] = t[0]["boxes"][None].clone()
    losses = SetCriterion(4, HungarianMatcher(cost_class=0))(outputs, t)
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou"].item() == pytest.approx(0, abs=1e-5)


def test_focal_loss_in_plain_arithmetic():
    outputs, t = layer(1, 2, classes=1), targets(1, classes=1)
    losses = SetCriterion(1, HungarianMatcher())(outputs, t)
    query = HungarianMatcher()(outputs, t)[0][0].item()
    p = outputs["pred_logits"][0, :, 0].sigmoid()
    positive = 0.25 * (1 - p[query]) ** 2 * -p[query].log()
    negative = 0.75 * p[1 - query] ** 2 * -(1 - p[1 - query]).log()
    torch.testing.assert_close(losses["loss_ce"], positive + negative)


def test_softmax_losses_are_the_official_ones():
    tensors, _ = load_fixture("detr_losses")
    criterion = SetCriterion(7, HungarianMatcher(1, 5, 2, scores="softmax"), scores="softmax")
    outputs = part(tensors, "pred_")
    outputs = {f"pred_{k}": v for k, v in outputs.items()} | {"aux_outputs": [part(tensors, "aux.0.")]}
    losses = criterion(outputs, fixture_targets(tensors))
    assert len(losses) == 6
    for name, loss in losses.items():
        assert relative_error(loss.reshape(1), tensors[f"loss.{name}"]) < 1e-8, name
    assert relative_error(criterion.total(losses).reshape(1), tensors["total_loss"]) < 1e-8


def test_layers_are_independent():
    """Stacking the layers gives what each would give alone; encoder targets are all of class 0."""
    layers, encoder, t = [layer(seed=i) for i in range(3)], layer(queries=20, seed=7), targets(2, 5)
    criterion = SetCriterion(4, HungarianMatcher())
    losses = criterion({**layers[2], "aux_outputs": layers[:2], "enc_outputs": encoder}, t)
    for suffix, outputs in (("_0", layers[0]), ("_1", layers[1]), ("", layers[2])):
        for name, loss in criterion(outputs, t).items():
            torch.testing.assert_close(losses[name + suffix], loss)
    objects = [{"labels": torch.zeros_like(x["labels"]), "boxes": x["boxes"]} for x in t]
    for name, loss in criterion(encoder, objects).items():
        torch.testing.assert_close(losses[name + "_enc"], loss)
    assert len(losses) == 12


def plain_losses(outputs, t, scores):
    """The papers' losses, image by image and in float64."""
    total, ce, weights, bbox, giou = max(1, sum(len(x["labels"]) for x in t)), 0, 0, 0, 0
    for i, (query, target) in enumerate(HungarianMatcher(scores=scores)(outputs, t)):
        logits, boxes, wanted = outputs["pred_logits"][i], outputs["pred_boxes"][i][query], t[i]["boxes"][target]
        classes = torch.full((len(logits),), 4)
        classes[query] = t[i]["labels"][target]
        if scores == "sigmoid":
            one_hot = F.one_hot(classes, 5)[:, :4].double()
            p = logits.sigmoid()
            right = one_hot * p + (1 - one_hot) * (1 - p)
            ce -= ((0.25 * one_hot + 0.75 * (1 - one_hot)) * (1 - right) ** 2 * right.log()).sum()
        else:
            weight = torch.where(classes == 4, 0.1, 1.0).double()
            ce -= (weight * logits.log_softmax(-1)[range(len(logits)), classes]).sum()
            weights += weight.sum()
        bbox += (boxes - wanted).abs().sum()
        corners = [box_convert(x, "cxcywh", "xyxy") for x in (boxes, wanted)]
        giou += (1 - generalized_box_iou(*corners).diagonal()).sum()
    return {"loss_ce": ce / (weights or total), "loss_bbox": bbox / total, "loss_giou": giou / total}


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("counts", [(3, 0, 9), (0, 0, 0), (1, 2, 5)])
def test_losses_and_gradients_are_those_of_a_plain_loop(scores, counts, double):
    outputs, t = layer(3, classes=4 + (scores == "softmax")), targets(*counts)
    criterion = SetCriterion(4, HungarianMatcher(scores=scores), scores)
    found, wanted = criterion(outputs, t), plain_losses(outputs, t, scores)
    inputs = list(outputs.values())
    for name, loss in wanted.items():
        torch.testing.assert_close(found[name], torch.as_tensor(loss, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        if loss.requires_grad:
            ours, theirs = (
                torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in (found[name], loss)
            )
            for a, b in zip(ours, theirs, strict=True):
                if b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_any_function_can_match():
    outputs, t = {**layer(seed=2), "aux_outputs": [layer()], "enc_outputs": layer(queries=20)}, targets(2, 5)
    matcher = HungarianMatcher()
    for name, loss in SetCriterion(4, lambda outputs, targets: matcher(outputs, targets))(outputs, t).items():
        assert loss == SetCriterion(4, matcher)(outputs, t)[name]


def test_a_loss_is_a_method_and_a_weight():
    class WithSizes(SetCriterion):
        def loss_size(self, layers, normalizers):
            predicted, wanted = layers.matched_boxes
            return layers.sum((predicted - wanted)[:, 2:].abs().sum(-1)) / normalizers.boxes

    outputs, t = {**layer(seed=2), "aux_outputs": [layer()], "more_outputs": torch.ones(1)}, targets(2, 5)
    criterion = WithSizes(4, HungarianMatcher(), weights={"loss_size": 3.0})
    losses, plain = criterion(outputs, t), SetCriterion(4, HungarianMatcher())
    assert losses.keys() - plain(outputs, t).keys() == {"loss_size", "loss_size_0"}
    more = 3 * (losses["loss_size"] + losses["loss_size_0"])
    torch.testing.assert_close(criterion.total(losses), plain.total(plain(outputs, t)) + more)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what a host waits for a GPU")
def test_the_host_waits_once():
    outputs = {**layer(seed=2), "aux_outputs": [layer()], "enc_outputs": layer(queries=20)}
    outputs = tree_map(lambda x: x.detach().cuda().requires_grad_(), outputs)
    t = [{key: x.cuda() for key, x in target.items()} for target in targets(2, 5)]
    criterion = SetCriterion(4, HungarianMatcher())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            criterion.total(criterion(outputs, t)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


def test_one_transfer_brings_the_costs_of_all_layers(monkeypatch):
    calls, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: calls.append(x.numel()) or cpu(x))
    outputs = {**layer(seed=2), "aux_outputs": [layer(seed=0), layer(seed=1)], "enc_outputs": layer(queries=20)}
    SetCriterion(4, HungarianMatcher())(outputs, targets(2, 5))
    # of 2 images with 5 targets at most: 3 decoder layers of 6 queries, 20 pixels of the encoder
    assert calls == [2 * 5 * (3 * 6 + 20)]


@pytest.mark.parametrize(("scores", "classes"), [("sigmoid", 4), ("softmax", 5)])
def test_no_targets_at_all(scores, classes):
    outputs = layer(classes=classes)
    criterion = SetCriterion(4, HungarianMatcher(scores=scores), scores=scores)
    losses = criterion(outputs, targets(0, 0))
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou"] == 0
    assert losses["loss_ce"] > 0
    criterion.total(losses).backward()
    # Present though zero: distributed training waits for every gradient.
    assert outputs["pred_boxes"].grad.abs().sum() == 0
    assert outputs["pred_logits"].grad.abs().sum() > 0


def test_more_targets_than_queries():
    losses = SetCriterion(4, HungarianMatcher())(layer(queries=3), targets(7, 1))
    assert all(loss.isfinite() for loss in losses.values())


def test_unmatched_queries_get_no_box_gradient():
    outputs, t = layer(), targets(1, 2)
    matcher = HungarianMatcher()
    criterion = SetCriterion(4, matcher)
    criterion.total(criterion(outputs, t)).backward()
    matched = torch.zeros(2, 6, dtype=torch.bool)
    for i, (query, _) in enumerate(matcher(outputs, t)):
        matched[i, query] = True
    assert ((outputs["pred_boxes"].grad.abs().sum(-1) > 0) == matched).all()


@pytest.mark.parametrize(
    ("counts", "others", "alone_boxes", "average"),
    # 12 boxes on two processes; and none anywhere, which counts as one in both together.
    [((1, 2), 9, 3, 6), ((0, 0), 0, 1, 0.5)],
)
def test_number_of_boxes_is_averaged_over_processes(counts, others, alone_boxes, average, monkeypatch):
    outputs, t = layer(), targets(*counts)
    alone = SetCriterion(4, HungarianMatcher())(outputs, t)
    monkeypatch.setattr(criterion_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(criterion_module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(criterion_module.dist, "all_reduce", lambda total: total.add_(others))
    losses = SetCriterion(4, HungarianMatcher())(outputs, t)
    for name in alone:
        torch.testing.assert_close(losses[name], alone[name] * alone_boxes / average)


def test_losses_may_be_added_in_place():
    outputs = {**layer(seed=1), "aux_outputs": [layer(seed=2)]}
    losses = SetCriterion(4, HungarianMatcher())(outputs, targets(2, 1))
    expected = sum(losses.values()).item()
    total = losses["loss_ce"]
    for name, loss in losses.items():
        if name != "loss_ce":
            total += loss
    assert total.item() == pytest.approx(expected)
    total.backward()


def test_total_weights():
    names = ("loss_ce", "loss_bbox", "loss_giou")
    ones = {name + suffix: torch.tensor(1.0) for name in names for suffix in ("", "_0", "_enc")}
    assert SetCriterion(4, HungarianMatcher()).total(ones) == 27
    assert SetCriterion(4, HungarianMatcher(), scores="softmax").total(ones) == 24
    assert SetCriterion(4, HungarianMatcher(), weights={"loss_ce": 0.5}).total(ones) == 22.5


def weighted(scores, weights, queries=6):
    """The losses of 4 classes with class weights, their gradient, the outputs, the targets and the classes [2, Q]."""
    outputs, wanted = layer(2, queries, classes=4 if scores == "sigmoid" else 5), targets(3, 2)
    matcher = HungarianMatcher(scores=scores)
    classes = torch.full((2, queries), 4)
    for row, (query, target) in enumerate(matcher(outputs, wanted)):
        classes[row, query] = wanted[row]["labels"][target]
    losses = SetCriterion(4, matcher, scores, class_weights=weights)(outputs, wanted)
    losses["loss_ce"].backward()
    return losses, outputs["pred_logits"].grad, outputs, wanted, classes


def test_class_weights_of_the_cross_entropy():
    weights = torch.tensor([0.5, 1.0, 3.0, 0.0])
    losses, gradient, outputs, _, classes = weighted("softmax", weights)
    logits = outputs["pred_logits"].detach().requires_grad_()
    expected = F.cross_entropy(logits.transpose(1, 2), classes, torch.cat((weights, torch.tensor([0.1]))))
    expected.backward()
    torch.testing.assert_close(losses["loss_ce"], expected)
    torch.testing.assert_close(gradient, logits.grad)


def test_class_weights_of_the_focal_loss():
    weights = torch.tensor([0.5, 1.0, 3.0, 0.0])
    losses, _, outputs, _, classes = weighted("sigmoid", weights)
    expected = 0.0
    for logits, label in zip(outputs["pred_logits"].flatten(0, 1).tolist(), classes.flatten().tolist(), strict=True):
        for k, logit in enumerate(logits):
            p = 1 / (1 + math.exp(-logit))
            focal = 0.25 * (1 - p) ** 2 * -math.log(p) if k == label else 0.75 * p**2 * -math.log(1 - p)
            expected += focal * (1.0 if label == 4 else weights[label].item()) / 5
    assert losses["loss_ce"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_class_weights_of_1_change_no_bit_and_boxes_have_none(scores):
    plain, gradient, *_ = weighted(scores, None)
    ones, other, *_ = weighted(scores, torch.ones(4))
    assert torch.equal(gradient, other)
    assert all(torch.equal(plain[name], ones[name]) for name in plain)
    heavy, *_ = weighted(scores, torch.full((4,), 9.0))
    assert heavy["loss_ce"] != plain["loss_ce"]
    assert all(torch.equal(plain[name], heavy[name]) for name in ("loss_bbox", "loss_giou"))


@pytest.mark.parametrize(("outputs_name", "suffix"), [("enc_outputs", "_enc"), ("one_to_many_outputs", "_o2m")])
def test_other_outputs_have_the_weights_of_their_objects(outputs_name, suffix):
    """The encoder's targets have one class only, but an object of a rare class is as rare there."""
    outputs, wanted = layer(1, 3), [{"labels": torch.tensor([2]), "boxes": targets(1)[0]["boxes"]}]
    others = layer(1, 1 if suffix == "_enc" else 3, seed=3)
    losses = {
        weight: SetCriterion(4, HungarianMatcher(), class_weights=torch.tensor([1.0, 1.0, weight, 1.0]))(
            outputs | {outputs_name: others}, wanted
        )
        for weight in (1.0, 2.0)
    }
    name = f"loss_ce{suffix}"
    # All queries of one-to-many matching are matched to the object.
    torch.testing.assert_close(losses[2.0][name], 2 * losses[1.0][name])


def test_class_weights_with_more_objects_than_queries():
    losses, *_ = weighted("softmax", torch.ones(4), queries=1)
    plain, *_ = weighted("softmax", None, queries=1)
    assert torch.equal(losses["loss_ce"], plain["loss_ce"])


def test_no_object_weight():
    outputs, t = layer(classes=5), targets(0, 0)
    losses = SetCriterion(4, HungarianMatcher(scores="softmax"), scores="softmax", no_object_weight=0.3)(outputs, t)
    expected = F.cross_entropy(outputs["pred_logits"].flatten(0, 1), torch.full((12,), 4))
    torch.testing.assert_close(losses["loss_ce"], expected)


def test_arguments():
    with pytest.raises(ValueError, match="scores='x' should be"):
        SetCriterion(4, HungarianMatcher(), scores="x")
    with pytest.raises(ValueError, match="weights has 'loss_box', its keys should be among"):
        SetCriterion(4, HungarianMatcher(), weights={"loss_box": 1.0})
    with pytest.raises(ValueError, match="pred_logits has 4 classes, should have 5: num_classes=5"):
        SetCriterion(5, HungarianMatcher())(layer(), targets(1, 1))
