"""A user's augmentation: torchvision's transforms, Albumentations, and what neither should give."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from dat.detection import Detector
from dat.detection.config import TrainDataConfig
from dat.detection.data import DetectionDataset, read_coco, train_transform
from dat.detection.data.pipeline import UserTransform
from dat.detection.data.transforms import Canvas
from dat.engine.checkpoint import load_checkpoint
from dat.utils.errors import ConfigError


class FlippingCompose:
    """Takes and gives what albumentations.Compose does, with generators of its own: crops the left half, or mirrors."""

    def __init__(self, bbox_format="pascal_voc", label_fields=("labels",)):
        params = SimpleNamespace(format=bbox_format, label_fields=label_fields)
        self.processors = {"bboxes": SimpleNamespace(params=params)} if bbox_format else {}

    def set_random_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, image, bboxes, **labels):
        assert image.dtype == np.uint8
        assert image.flags["C_CONTIGUOUS"]
        assert all(len(values) == len(bboxes) for values in labels.values())
        width = image.shape[1]
        if self.generator.random() < 0.5:
            boxes = bboxes[bboxes[:, 0] < width // 2].copy()
            boxes[:, 2] = boxes[:, 2].clip(max=width // 2)
            return {"image": image[:, : width // 2], "bboxes": [tuple(box) for box in boxes[::-1]]}
        boxes = bboxes.copy()
        boxes[:, [0, 2]] = width - bboxes[:, [2, 0]]
        return {"image": image[:, ::-1], "bboxes": boxes}


def sample():
    """Two bright rectangles on black, of brightness 100 and 200."""
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    image[:, 20:60, 10:40], image[:, 5:30, 80:110] = 100, 200
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[10.0, 20, 40, 60], [80, 5, 110, 30]]), format="XYXY", canvas_size=(80, 120)
    )
    target = {"boxes": boxes, "labels": torch.tensor([100, 200]), "heights": torch.tensor([0.5, 1.5])}
    return tv_tensors.Image(image), target


def assert_follows(transform):
    """Boxes, labels and other rows are those of the rectangles in the result, over many draws."""
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = transform(*sample())
        boxes = target["boxes"].as_subclass(torch.Tensor)
        assert isinstance(image, tv_tensors.Image)
        assert target["boxes"].canvas_size == tuple(image.shape[-2:])
        assert target["heights"].tolist() == [label / 100 - 0.5 for label in target["labels"].tolist()]
        assert len(boxes) == len(target["labels"])
        for box, label in zip(boxes, target["labels"], strict=True):
            y, x = torch.nonzero(image[0] == label, as_tuple=True)
            expected = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
            assert box.tolist() == pytest.approx(expected, abs=1e-3)
        seen.add((tuple(image.shape), tuple(target["labels"].tolist())))
    return seen


@pytest.mark.parametrize("label_fields", [("labels",), ("labels", "more"), None])
def test_boxes_labels_and_rows_follow_an_albumentations_pipeline(label_fields):
    seen = assert_follows(UserTransform(FlippingCompose(label_fields=label_fields)))
    assert seen == {((3, 80, 60), (100,)), ((3, 80, 120), (100, 200))}


def test_boxes_follow_albumentations_itself():
    albumentations = pytest.importorskip("albumentations")
    steps = [albumentations.HorizontalFlip(p=0.5), albumentations.RandomCrop(70, 60, p=0.5)]
    params = albumentations.BboxParams("pascal_voc", label_fields=["labels"])
    compose = albumentations.Compose(steps, bbox_params=params)
    assert len(assert_follows(UserTransform(compose))) > 2
    empty = {"boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(80, 120)),
             "labels": torch.zeros(0, dtype=torch.long)}  # fmt: skip
    assert len(UserTransform(compose)(sample()[0], empty)[1]["boxes"]) == 0


def test_boxes_follow_a_torchvision_pipeline():
    rows = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: (inputs[1]["labels"], inputs[1]["heights"]))
    steps = [v2.RandomHorizontalFlip(), v2.RandomCrop((70, 60)), rows]
    assert len(assert_follows(UserTransform(v2.Compose(steps)))) > 2


def test_draws_are_those_of_the_sample(scenes):
    annotations = read_coco(scenes / "train.json", scenes / "images")
    split = TrainDataConfig(sizes=[48], max_size=80, crop=0.0)
    transform = train_transform(split, [0.5] * 3, [0.5] * 3, FlippingCompose())
    dataset = DetectionDataset(annotations.records, transform, seed=1)
    first = [dataset[epoch, 0] for epoch in range(8)]
    again = [dataset[epoch, 0] for epoch in reversed(range(8))][::-1]
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert len({a.image.shape for a in first}) == 2


def test_the_limit_of_pixels_survives_a_function_that_makes_new_targets():
    transform = UserTransform(lambda image, target: (image, {key: target[key] for key in ("boxes", "labels")}))
    image, target = sample()
    assert transform(image, {**target, "canvas": Canvas(3, 4)})[1]["canvas"] == Canvas(3, 4)


def changed(**entries):
    return lambda image, target: (image, {**target, **entries})


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image, target: image, r"gave a Image, should give \(image, target\)"),
        (lambda image, target: (image / 255, target), r"gave an image float32 \[3, 80, 120\], should be .* uint8"),
        (lambda image, target: (image[:1], target), r"gave an image uint8 \[1, 80, 120\]"),
        (
            lambda image, target: (image[:, :, :60], target),
            r"gave boxes of an image of \(80, 120\), the image is \(80, 60\)",
        ),
        (changed(boxes=torch.zeros(2, 4)), r"gave boxes float32 \[2, 4\], should be tv_tensors.BoundingBoxes"),
        (changed(labels=torch.zeros(3)), r"gave labels float32 \[3\] for 2 boxes"),
        (changed(labels=[1, 2]), r"gave labels of type list for 2 boxes"),
    ],
)
def test_results_that_cannot_be_used(transform, message):
    with pytest.raises(ConfigError, match=f"^transform: {message}"):
        UserTransform(transform)(*sample())


@pytest.mark.parametrize(("bbox_format", "shown"), [("coco", "coco"), ("", "None")])
def test_a_pipeline_whose_boxes_would_not_follow_is_refused(bbox_format, shown):
    with pytest.raises(ConfigError, match=f"the format of its bbox_params is {shown}, should be pascal_voc"):
        UserTransform(FlippingCompose(bbox_format))


def test_an_augmentation_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match=r"^transform: is of type int, should be a function"):
        UserTransform(3)


def test_a_detector_trains_with_a_pipeline(config_file, tmp_path):
    calls = []

    def transform(image, target):
        calls.append(image.dtype)
        flip = v2.functional.horizontal_flip
        return flip(image), {**target, "boxes": flip(target["boxes"])}

    options = {"epochs": 1, "pictures": 0, "worst": 0, "data__train__horizontal_flip": 0.0}
    Detector.from_config(config_file, **options).train(transform=transform)
    assert calls == [torch.uint8] * 4
    assert "augmented by function first" in (tmp_path / "run/train.log").read_text()
    Detector.from_config(config_file, **options, output=str(tmp_path / "other")).train()
    one, other = (load_checkpoint(tmp_path / name / "last.pth")["state_dict"] for name in ("run", "other"))
    assert not all(torch.equal(one[name], other[name]) for name in one)
