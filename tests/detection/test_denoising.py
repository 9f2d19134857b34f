"""Denoising queries follow the rules of DINO's official implementation."""

import pytest
import torch
from torchvision.ops import box_convert

from dat.detection.models.denoising import make_denoising, num_denoising_groups, query_mask


def some_targets(*counts, classes=5):
    """Boxes that noise of a whole side keeps inside the image."""
    return [
        {"labels": torch.randint(classes, (n,)), "boxes": torch.rand(n, 4) * 0.2 + torch.tensor([0.4, 0.4, 0.05, 0.05])}
        for n in counts
    ]


@pytest.mark.parametrize(
    ("number", "most", "groups"),
    [(100, 3, 33), (50, 3, 16), (49, 3, 98), (6, 3, 12), (6, 500, 12), (100, 101, 1), (100, 100, 1), (100, 0, 1)],
)
def test_groups_come_from_a_budget_or_are_given(number, most, groups):
    assert num_denoising_groups(number, most) == groups


def test_every_target_has_a_positive_and_a_negative_slot_in_each_group():
    torch.manual_seed(0)
    targets = some_targets(3, 1, 0)
    made = make_denoising(targets, 5, 100, label_noise=0.0, box_noise=0.5)
    assert (made["num_groups"], made["labels"].shape) == (33, (3, 33 * 6))
    for labels, boxes, target in zip(made["labels"], made["boxes"], targets, strict=True):
        n = len(target["labels"])
        labels, boxes = labels.view(33, 2, 3), boxes.view(33, 2, 3, 4)
        assert (labels[..., :n] == target["labels"]).all()
        assert (labels[..., n:] == -1).all()
        assert (boxes[..., n:, :] == 0).all()
        moved = (
            box_convert(boxes[..., :n, :], "cxcywh", "xyxy") - box_convert(target["boxes"], "cxcywh", "xyxy")
        ).abs()
        # in halves of the sides, times the noise
        moved = moved / target["boxes"][:, [2, 3, 2, 3]] * 4
        assert (moved[:, 0] < 1 + 1e-4).all()
        assert ((moved[:, 1] > 1 - 1e-4) & (moved[:, 1] < 2 + 1e-4)).all()


def test_corners_move_both_ways_and_stay_in_the_image():
    torch.manual_seed(0)
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.1, 0.5, 0.2, 0.4]])}]
    made = make_denoising(targets, 5, 200, label_noise=0.0, box_noise=1.0)
    corners = box_convert(made["boxes"][0], "cxcywh", "xyxy")
    assert ((corners > -1e-6) & (corners < 1 + 1e-6)).all()
    assert (corners[:, 0].abs() < 1e-6).any()
    # negatives of a whole side can swap corners
    assert (made["boxes"][0, :, 3] < 0).any()
    above = (corners[:, 1] > 0.3).double().mean()
    assert above == pytest.approx(0.5, abs=0.1)


def test_a_quarter_of_the_labels_is_drawn_anew():
    torch.manual_seed(0)
    targets = some_targets(20, classes=4)
    made = make_denoising(targets, 4, 2000, label_noise=0.5, box_noise=1.0)
    changed = made["labels"][0].view(-1, 20) != targets[0]["labels"]
    # one of four comes out the same
    assert changed.double().mean() == pytest.approx(0.25 * 0.75, abs=0.02)
    assert made["labels"].unique().tolist() == [0, 1, 2, 3]


def test_draws_come_from_torchs_generator():
    targets = some_targets(2, 3)
    torch.manual_seed(3)
    first = make_denoising(targets, 5, 10, 0.5, 1.0)
    second = make_denoising(targets, 5, 10, 0.5, 1.0)
    torch.manual_seed(3)
    again = make_denoising(targets, 5, 10, 0.5, 1.0)
    for key in ("labels", "boxes"):
        assert first[key].equal(again[key])
        assert not first[key].equal(second[key])


def test_no_targets_make_one_group_of_no_queries():
    made = make_denoising(some_targets(0, 0), 5, 100, 0.5, 1.0)
    assert (made["num_groups"], made["labels"].shape, made["boxes"].shape) == (1, (2, 0), (2, 0, 4))
    assert not query_mask(made, 7, 0, torch.device("cpu")).any()


@pytest.mark.parametrize("more", [0, 5])
def test_who_sees_whom(more):
    made = make_denoising(some_targets(3, 1), 5, 6, 0.5, 1.0)
    slots, mask = 12 * 6, query_mask(made, 9, more, torch.device("cpu"))
    kinds = [f"group {i // 6}" for i in range(slots)] + ["matched"] * 9 + ["more"] * more
    for row, hidden in zip(kinds, mask.tolist(), strict=True):
        seen = {kind for kind, no in zip(kinds, hidden, strict=True) if not no}
        assert seen == ({row, "matched"} if row.startswith("group") else {row})


def test_without_further_queries_there_is_no_mask():
    assert query_mask(None, 9, 0, torch.device("cpu")) is None
