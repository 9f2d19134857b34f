import pytest
import torch
from torchvision import tv_tensors

from dat.detection.config import TrainDataConfig, ValDataConfig
from dat.detection.data import resized_size, train_transform, val_transform
from dat.detection.data.transforms import RandomSizeCrop

PLAIN = {
    "sizes": [40],
    "max_size": 200,
    "horizontal_flip": 0.0,
    "vertical_flip": 0.0,
    "crop": 0.0,
    "crop_resize": [60],
    "crop_min": 20,
    "crop_max": 50,
    "photometric": 0.0,
}


def transform(**changes):
    return train_transform(TrainDataConfig(**PLAIN | changes), [0.0] * 3, [1.0] * 3)


def sample():
    """A white rectangle on black, and its box."""
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    image[:, 20:60, 10:40] = 255
    boxes = tv_tensors.BoundingBoxes([[10.0, 20, 40, 60]], format="XYXY", canvas_size=(80, 120))
    return tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([1])}


def bright_box(image):
    """The box around what is white in an image [3, H, W]."""
    y, x = torch.nonzero(image.mean(0) > 0.5, as_tuple=True)
    return torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1067)),
        (640, 480, (1067, 800)),
        (500, 1500, (444, 1333)),
        (100, 100, (800, 800)),
        (1, 5000, (1, 1333)),
    ],
)
def test_the_shortest_edge_is_exact_unless_the_longest_limits_it(height, width, expected):
    assert resized_size(height, width, 800, 1333) == expected


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"horizontal_flip": 1.0},
        {"vertical_flip": 1.0},
        {"crop": 1.0, "crop_min": 50},
        {"crop": 0.5, "horizontal_flip": 0.5, "vertical_flip": 0.5, "sizes": [32, 48, 64]},
    ],
)
def test_boxes_follow_their_pixels(change):
    augment = transform(**change)
    kept = 0
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = augment(*sample())
        for box in target["boxes"].as_subclass(torch.Tensor):
            kept += 1
            # a crop magnifies; half a source pixel is blurred on each side
            torch.testing.assert_close(box, bright_box(image), atol=3, rtol=0)
        assert len(target["labels"]) == len(target["boxes"])
    assert kept >= 10


def test_photometric_distortion_changes_colours_only():
    torch.manual_seed(0)
    plain, target = transform()(*sample())
    distorted, other = transform(photometric=1.0)(*sample())
    assert distorted.shape == plain.shape
    assert torch.equal(target["boxes"], other["boxes"])
    assert not torch.equal(distorted, plain)


def test_a_crop_is_no_larger_than_the_image():
    for seed in range(20):
        torch.manual_seed(seed)
        image, _ = RandomSizeCrop(60, 500)(*sample())
        height, width = image.shape[-2:]
        assert 60 <= height <= 80
        assert 60 <= width <= 120


def test_validation_keeps_all_and_normalises():
    image, target = val_transform(ValDataConfig(size=40, max_size=200), [0.5] * 3, [0.25] * 3)(*sample())
    assert image.shape == (3, 40, 60)
    assert image.max() == 2
    assert image.min() == -2
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), torch.tensor([[5.0, 10, 20, 30]]))


def test_rows_of_any_tensor_follow_their_boxes():
    """Targets are open: a dropped box takes its row of each tensor, and its mask, along."""
    image, target = sample()
    boxes = torch.cat((torch.tensor([[3.0, 3, 3.2, 3.2]]), target["boxes"]))
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(80, 120)),
        "labels": torch.tensor([5, 1]),
        "heights": torch.tensor([0.5, 2.5]),
        "masks": tv_tensors.Mask(torch.stack((torch.zeros(80, 120), image[0] / 255)).bool()),
        "source": "camera 3",
    }
    image, found = transform(horizontal_flip=1.0)(image, target)
    assert found["labels"].tolist() == [1]
    assert found["heights"].tolist() == [2.5]
    assert found["source"] == "camera 3"
    assert found["masks"].shape == (1, *image.shape[1:])
    torch.testing.assert_close(bright_box(found["masks"].float()), found["boxes"].as_subclass(torch.Tensor)[0])
