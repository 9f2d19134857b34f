import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from dat.detection.boxes import generalized_iou


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_pairs_of_a_batch_are_torchvisions(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (box_convert(torch.rand(2, n, 4, generator=generator, dtype=dtype), "cxcywh", "xyxy") for n in (5, 7))
    found = generalized_iou(a[:, :, None], b[:, None])
    assert torch.equal(found, torch.stack([generalized_box_iou(x, y) for x, y in zip(a, b, strict=True)]))


def test_gradients_of_pairs():
    generator = torch.Generator().manual_seed(1)
    a, b = (box_convert(torch.rand(20, 4, generator=generator).double(), "cxcywh", "xyxy") for _ in range(2))
    assert torch.autograd.gradcheck(generalized_iou, (a.requires_grad_(), b.requires_grad_()))


def test_empty_boxes_are_finite():
    empty, unit = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert generalized_iou(empty, empty) == 0
    assert generalized_iou(empty, unit) == 0
    far = generalized_iou(empty, unit + 2)
    assert -1 < far < 0
    far.backward()
    assert empty.grad.isfinite().all()
