import pytest
import torch
from detr_inputs import load_fixture, part

from dat.detection import post_process
from dat.detection.post_process import select_detections


@pytest.mark.parametrize(("name", "scores"), [("deformable_detr_micro", "sigmoid"), ("detr_losses", "softmax")])
def test_official_results(name, scores):
    tensors, _ = load_fixture(name)
    results = post_process(tensors, torch.tensor([[192, 256], [96, 128]]), scores=scores)
    for i, result in enumerate(results):
        theirs = part(tensors, f"post.{i}.")
        order = theirs["scores"].argsort(descending=True, stable=True)
        torch.testing.assert_close(result["scores"], theirs["scores"][order])
        torch.testing.assert_close(result["boxes"], theirs["boxes"][order])
        assert result["labels"].equal(theirs["labels"][order])


def test_boxes_are_corners_in_pixels():
    outputs = {"pred_logits": torch.tensor([[[-1.0, 2.0]]]), "pred_boxes": torch.tensor([[[0.5, 0.25, 0.2, 0.1]]])}
    result = post_process(outputs, torch.tensor([[100, 400]]), top_k=1)[0]
    assert result["labels"].tolist() == [1]
    torch.testing.assert_close(result["scores"], torch.tensor([2.0]).sigmoid())
    torch.testing.assert_close(result["boxes"], torch.tensor([[160.0, 20.0, 240.0, 30.0]]))


@pytest.mark.parametrize(("scores", "count"), [("sigmoid", 6), ("softmax", 3)])
def test_fewer_candidates_than_top_k(scores, count):
    outputs = {"pred_logits": torch.randn(2, 3, 2), "pred_boxes": torch.rand(2, 3, 4)}
    results = post_process(outputs, torch.tensor([[10, 10], [20, 20]]), scores=scores, top_k=100)
    for result in results:
        assert len(result["scores"]) == len(result["labels"]) == len(result["boxes"]) == count
        assert (result["scores"].diff() <= 0).all()


def test_softmax_never_answers_no_object():
    outputs = {"pred_logits": torch.tensor([[[0.0, 1.0, 9.0]]]), "pred_boxes": torch.rand(1, 1, 4)}
    assert post_process(outputs, torch.tensor([[8, 8]]), scores="softmax")[0]["labels"].tolist() == [1]


def test_half_precision_boxes_keep_their_pixels():
    outputs = {
        "pred_logits": torch.zeros(1, 1, 1, dtype=torch.bfloat16),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]),
    }
    result = post_process(outputs, torch.tensor([[1333, 801]]))[0]
    torch.testing.assert_close(result["boxes"], torch.tensor([[200.25, 333.25, 600.75, 999.75]]))


def test_sizes_must_fit():
    outputs = {"pred_logits": torch.zeros(2, 1, 1), "pred_boxes": torch.rand(2, 1, 4)}
    with pytest.raises(ValueError, match=r"sizes has shape \(1, 2\), should be \[B, 2\] = \(2, 2\)"):
        post_process(outputs, torch.tensor([[8, 8]]))


def test_selection_among_detections():
    """The query 4 has two classes; the first and third box of class 0 overlap by an IoU of 0.8, the last by 0.5."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 8, 10], [50, 0, 60, 10], [0, 0, 5, 10]]).float()
    found = torch.arange(5, 0, -1) / 5, torch.tensor([0, 1, 0, 0, 0]), boxes, torch.tensor([4, 4, 1, 2, 3])

    def kept(**options):
        _, labels, _, queries = select_detections(found, **options)
        return [(int(label), int(query)) for label, query in zip(labels, queries, strict=True)]

    everything = [(0, 4), (1, 4), (0, 1), (0, 2), (0, 3)]
    assert kept() == everything
    assert kept(nms=0.85) == everything
    assert kept(nms=0.6) == [(0, 4), (1, 4), (0, 2), (0, 3)]
    assert kept(nms=0.0) == [(0, 4), (1, 4), (0, 2)]
    assert kept(one_class=True) == [(0, 4), (0, 1), (0, 2), (0, 3)]
    # A detection that its query's better class excludes does not suppress others.
    assert kept(one_class=True, nms=0.6) == [(0, 4), (0, 2), (0, 3)]
    assert select_detections([values[:0] for values in found], 0.5, True)[2].shape == (0, 4)


def test_selection_is_the_same_for_every_class_in_large_images():
    left = 7000 + 20 * torch.arange(20.0)
    boxes = torch.stack((left, left, left + 6.1, left + 6.1), 1)
    boxes = torch.cat((boxes, boxes + torch.tensor([0, 0, 0, -2.5])))
    order = torch.arange(40)
    # The IoU of each pair is 3.6 / 6.1.
    for label in (0, 1202):
        found = order.flip(0) / 40, torch.full((40,), label), boxes, order
        assert len(select_detections(found, nms=0.58)[0]) == 20
        assert len(select_detections(found, nms=0.6)[0]) == 40
