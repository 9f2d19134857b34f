"""Mosaic, mixup, copy-paste and large-scale jitter: boxes stay around their objects, and draws are the sample's own."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from dat.detection.config import TrainDataConfig
from dat.detection.data import AspectRatioBatchSampler, DetectionDataset, make_loader, read_coco, train_transform
from dat.detection.data.cache import ImageCache
from dat.detection.data.mixing import MIN_SIDE, Mixing, _draw, copy_paste, mixup, mosaic, place
from dat.detection.data.records import Sample
from dat.engine.seeds import isolated_rng

KEYS = {"mosaic": {"mosaic": 1.0}, "mixup": {"mixup": 1.0}, "copy_paste": {"copy_paste": 1.0},
        "jitter": {"scale_jitter": [0.1, 2.0]},
        "all": {"mosaic": 0.5, "mixup": 0.5, "copy_paste": 0.5, "scale_jitter": [0.5, 1.5]}}  # fmt: skip


def sample(height, width, *boxes, value=255):
    """Bright rectangles on black, their labels 0, 1, ..., and their masks."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
        image[:, mask] = value
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(len(boxes)),
        "masks": tv_tensors.Mask(masks),
        "source": f"{height}x{width}",
    }
    return Sample(tv_tensors.Image(image), target)


def bright_box(image):
    y, x = torch.nonzero(image.float().mean(0) > 185, as_tuple=True)
    return torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def assert_consistent(image, target, size):
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    assert target["boxes"].canvas_size == size
    boxes = target["boxes"].as_subclass(torch.Tensor)
    assert len(target["labels"]) == len(target["masks"]) == len(boxes)
    assert target["masks"].shape[1:] == size
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all()
    return boxes


def test_boxes_follow_a_placed_image():
    kept = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = place(sample(80, 120, (10, 20, 40, 60)), (90, 100), (0.3, 2.0))
        for box in assert_consistent(image, target, (90, 100)):
            kept += 1
            torch.testing.assert_close(box, bright_box(image), atol=1.5, rtol=0)
            torch.testing.assert_close(box, bright_box(255 * target["masks"]), atol=1.5, rtol=0)
    assert kept > 25


def test_boxes_of_a_mosaic_are_around_their_objects_in_each_quadrant():
    """Each of the four images is bright in another colour channel."""
    sizes, found = [(80, 120), (100, 70), (60, 60), (90, 140)], set()
    for seed in range(40):
        samples = []
        for number, size in enumerate(sizes):
            one = sample(*size, (20, 15, 50, 55))
            image = torch.zeros_like(one.image)
            image[number % 3] = one.image[0] if number < 3 else 0
            shown = one.image if number == 3 else tv_tensors.Image(image)
            samples.append(Sample(shown, one.target | {"labels": torch.tensor([number])}))
        torch.manual_seed(seed)
        image, target = mosaic(samples)
        assert target["source"] == "80x120"
        boxes = assert_consistent(image, target, (80, 120))
        for box, label in zip(boxes, target["labels"].tolist(), strict=True):
            found.add(label)
            r, g, b = image.float()
            shown = [r - g.maximum(b), g - r.maximum(b), b - r.maximum(g), r.minimum(g).minimum(b)][label]
            y, x = torch.nonzero(shown > 185, as_tuple=True)
            extent = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            torch.testing.assert_close(box, extent, atol=1.5, rtol=0)
    assert found == {0, 1, 2, 3}


def test_small_remainders_are_dropped():
    """The first object keeps a tenth of itself, the second half, the third is one pixel high; masks follow."""
    whole = sample(100, 100, (0, 0, 40, 20), (0, 40, 40, 60), (60, 80, 90, 81))
    torch.manual_seed(0)
    image, target = place(whole, (100, 100), (1.0, 1.0))
    assert torch.equal(image, whole.image)
    assert target["labels"].tolist() == [0, 1]
    canvas = torch.zeros(3, 100, 100, dtype=torch.uint8)
    target = _draw(canvas, whole, (100, 100), (-18, 0), (0, 0, 100, 100))
    assert target["labels"].tolist() == [1]
    assert target["boxes"].as_subclass(torch.Tensor).tolist() == [[0, 22, 40, 42]]
    assert torch.equal(canvas[:, :82], whole.image[:, 18:])


def test_mixup_is_the_mean_with_the_objects_of_both():
    first, other = sample(20, 30, (2, 3, 9, 9), value=200), sample(20, 30, (2, 3, 9, 9), (10, 10, 20, 19), value=100)
    image, target = mixup(first, other)
    assert image[0, 4, 4] == 150
    assert image[0, 15, 15] == 50
    assert target["labels"].tolist() == [0, 0, 1]
    assert len(target["masks"]) == len(target["boxes"]) == 3


def test_pasted_boxes_cover_objects_and_show_their_neighbours():
    covered, half, free = (10, 10, 20, 20), (35, 10, 55, 20), (70, 70, 80, 80)
    first = sample(100, 100, covered, half, free, value=100)
    # The second object lies in the box of the first, the third mostly outside.
    other = sample(100, 100, (8, 8, 40, 30), (12, 12, 18, 18), (38, 20, 60, 40), value=255)
    image = target = None
    for seed in range(100):
        torch.manual_seed(seed)
        if (torch.rand(3) < 0.5).tolist() == [True, False, False]:
            torch.manual_seed(seed)
            image, target = copy_paste(first, other)
            break
    boxes = target["boxes"].as_subclass(torch.Tensor).int().tolist()
    assert boxes == [list(half), list(free), [8, 8, 40, 30], [12, 12, 18, 18]]
    assert torch.equal(image[:, 8:30, 8:40], other.image[:, 8:30, 8:40])
    assert torch.equal(image[:, 30:], first.image[:, 30:])


@pytest.mark.parametrize("name", KEYS)
def test_degenerate_images(name):
    """One pixel, and no objects."""
    mixing = Mixing(TrainDataConfig(**KEYS[name]), epochs=1)
    for seed, size in enumerate([(1, 1), (1, 300), (3, 2), (50, 40)] * 4):
        torch.manual_seed(seed)
        image, target = mixing(sample(*size), 0, lambda: sample(2, 1))
        assert_consistent(image, target, size)
        assert len(target["boxes"]) == 0


def load(scenes, workers, cache=None, sampling=None, **keys):
    annotations = read_coco(scenes / "train.json", scenes / "images")
    split = TrainDataConfig(sizes=[32, 48], max_size=80, crop=0.0, **keys)
    dataset = DetectionDataset(
        annotations.records, train_transform(split, [0.5] * 3, [0.25] * 3), 3, cache, Mixing(split, epochs=4)
    )
    sampler = AspectRatioBatchSampler(annotations.records, 2, seed=3, **(sampling or {}))
    batches = []
    for epoch in (0, 3):
        sampler.set_position(epoch)
        batches.append(list(make_loader(dataset, sampler, 1, workers, pin_memory=False)))
    return batches


def assert_same(batches, others):
    for (images, _, targets), (other_images, _, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        for target, other in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"])
            assert torch.equal(target["labels"], other["labels"])


@pytest.mark.parametrize("name", KEYS)
def test_samples_depend_neither_on_workers_nor_on_the_cache(scenes, name):
    annotations = read_coco(scenes / "train.json", scenes / "images")
    cache = ImageCache(1.0)
    cache.fill(annotations.records)
    before = [cache.get(record.path).clone() for record in annotations.records]
    alone = load(scenes, 0, **KEYS[name])
    for other in (load(scenes, 2, **KEYS[name]), load(scenes, 0, cache, **KEYS[name])):
        for epoch in range(2):
            assert_same(alone[epoch], other[epoch])
    assert all(torch.equal(cache.get(r.path), image) for r, image in zip(annotations.records, before, strict=True))
    plain = load(scenes, 0)
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(alone[0], plain[0], strict=True))


def test_the_last_epochs_are_without_mosaic_and_mixup(scenes):
    closed = load(scenes, 0, mosaic=1.0, mixup=1.0, close_mosaic=1)
    plain = load(scenes, 0)
    assert not torch.equal(closed[0][0][0], plain[0][0][0])
    assert_same(closed[1], plain[1])


def test_mixed_batches_stay_within_the_limit_of_pixels(scenes):
    limit = 2 * 40 * 40
    for epoch in load(scenes, 0, sampling={"max_pixels": limit}, mosaic=1.0, mixup=1.0, copy_paste=1.0):
        for images, _, _ in epoch:
            assert images.shape[0] * images.shape[2] * images.shape[3] <= limit


def test_no_image_of_a_mosaic_comes_from_outside_the_generator_of_the_sample():
    drawn = []

    def draw():
        drawn.append(int(torch.randint(1000, ())))
        return sample(20, 30, (2, 3, 9, 9))

    for _ in range(2):
        with isolated_rng(0, 1, 2):
            Mixing(TrainDataConfig(mosaic=1.0), 5)(sample(20, 30), 1, draw)
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) > 1
    assert np.isin(drawn, range(1000)).all()
