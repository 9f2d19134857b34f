from itertools import permutations

import pytest
import torch
from detr_inputs import fixture_targets, load_fixture

from dat.detection import HungarianMatcher
from dat.utils.errors import NonFiniteError


def some_outputs(batch=2, queries=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.1
    return {"pred_logits": torch.randn(batch, queries, classes, generator=generator), "pred_boxes": boxes}


def some_targets(*counts, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.1,
        }
        for n in counts
    ]


def pair_cost(logits, box, label, target, scores):
    """The papers' cost of one pair, in plain arithmetic."""
    if scores == "softmax":
        cost = 2 * -logits.softmax(0)[label].item()
    else:
        p = logits.sigmoid()[label].double()
        cost = 2 * (0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()).item()
    cost += 5 * (box - target).abs().sum().item()
    a, b = [
        (t[0] - t[2] / 2, t[1] - t[3] / 2, t[0] + t[2] / 2, t[1] + t[3] / 2) for t in (box.tolist(), target.tolist())
    ]
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return cost - 2 * (overlap / union - (hull - union) / hull)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_least_cost_of_all_assignments(scores):
    outputs, targets = some_outputs(), some_targets(3, 2)
    for i, (query, target) in enumerate(HungarianMatcher(scores=scores)(outputs, targets)):
        logits, boxes, t = outputs["pred_logits"][i], outputs["pred_boxes"][i], targets[i]
        count = len(t["labels"])
        costs = [
            [pair_cost(logits[q], boxes[q], t["labels"][k], t["boxes"][k], scores) for k in range(count)]
            for q in range(5)
        ]
        best = min(sum(costs[q][k] for k, q in enumerate(queries)) for queries in permutations(range(5), count))
        ours = sum(costs[q][k] for q, k in zip(query.tolist(), target.tolist(), strict=True))
        assert ours == pytest.approx(best, abs=1e-5)
        assert sorted(target.tolist()) == list(range(count))
        assert len(set(query.tolist())) == count


@pytest.mark.parametrize(
    ("name", "scores", "cost"), [("deformable_detr_micro", "sigmoid", 2), ("detr_losses", "softmax", 1)]
)
def test_official_matches(name, scores, cost):
    tensors, _ = load_fixture(name)
    matches = HungarianMatcher(cost_class=cost, scores=scores)(tensors, fixture_targets(tensors))
    for i, (query, target) in enumerate(matches):
        ours = sorted(zip(query.tolist(), target.tolist(), strict=True))
        theirs = (tensors[f"match.{i}.{side}"].tolist() for side in ("query", "target"))
        assert ours == sorted(zip(*theirs, strict=True))


def test_images_do_not_influence_each_other():
    outputs, targets = some_outputs(3), some_targets(1, 4, 0)
    for i, (query, target) in enumerate(HungarianMatcher()(outputs, targets)):
        alone = HungarianMatcher()({k: v[i : i + 1] for k, v in outputs.items()}, targets[i : i + 1])[0]
        assert query.equal(alone[0])
        assert target.equal(alone[1])


def test_batches_together_are_matched_as_alone():
    batches = [(some_outputs(2, 5), some_targets(3, 1)), (some_outputs(1, 9, seed=4), some_targets(2, seed=5))]
    for together, batch in zip(HungarianMatcher().match_all(batches), batches, strict=True):
        for found, alone in zip(together, HungarianMatcher()(*batch), strict=True):
            assert all(a.equal(b) for a, b in zip(found, alone, strict=True))


def test_no_targets():
    for query, target in HungarianMatcher()(some_outputs(), some_targets(0, 0)):
        assert query.shape == target.shape == (0,)
        assert query.dtype == target.dtype == torch.int64


def test_more_targets_than_queries():
    query, target = HungarianMatcher()(some_outputs(1, queries=3), some_targets(8))[0]
    assert query.tolist() == [0, 1, 2]
    assert len(set(target.tolist())) == 3


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_non_finite_outputs_are_named(name):
    outputs = some_outputs()
    outputs[name][1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=f"matching.*{name}.*4 NaN"):
        HungarianMatcher()(outputs, some_targets(2, 2))


def test_half_precision_outputs():
    outputs = {k: v.bfloat16() for k, v in some_outputs().items()}
    assert [len(query) for query, _ in HungarianMatcher()(outputs, some_targets(3, 1))] == [3, 1]


def test_arguments():
    with pytest.raises(ValueError, match="scores='logits' should be"):
        HungarianMatcher(scores="logits")
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0, 0, 0)
