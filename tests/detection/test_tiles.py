"""Tiles of large images: a detector that finds coloured rectangles by their pixels, so that all boxes are exact."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from commands import dat
from exporting import CATEGORIES, write_detector
from PIL import Image, ImageDraw
from scipy import ndimage

from dat.detection import Detector
from dat.detection.config import TrainDataConfig
from dat.detection.data import ImageRecord, cut_into_windows, load_record, read_coco, read_sample, tile_windows
from dat.detection.data.cache import ImageCache
from dat.detection.detections import Detections
from dat.detection.points import detect_with_points
from dat.detection.predictor import detect_split
from dat.detection.tiles import detect_in_tiles
from dat.engine.checkpoint import load_checkpoint
from dat.utils.errors import ConfigError, DataError

COLORS = ((30, 60, 220), (220, 30, 30))


def paint(size, objects):
    """An image with filled boxes; `objects`: (x0, y0, x1, y1, label)."""
    image = Image.new("RGB", size, (60, 60, 60))
    for x0, y0, x1, y1, label in objects:
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill=COLORS[label])
    return image


def find(images, score=lambda box: 0.9):
    """Every rectangle of one colour, if more than half of it is left at its border."""
    found = []
    for image in images:
        boxes, labels = [], []
        for label, color in enumerate(COLORS):
            areas, _ = ndimage.label(np.abs(np.asarray(image, int) - color).sum(2) < 90)
            for rows, columns in ndimage.find_objects(areas):
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                labels.append(label)
        scores = torch.tensor([score(box) for box in boxes])
        order = scores.argsort(descending=True, stable=True)
        values = (
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[order],
            scores[order],
            torch.tensor(labels, dtype=torch.long)[order],
        )
        found.append(Detections(image, *values, torch.arange(len(boxes)), CATEGORIES))
    return found


def reduced(image):
    """(height, width) with a longest side of 100 pixels."""
    return tuple(round(side * 100 / max(image.size)) for side in (image.height, image.width))


def objects_of(found):
    return sorted(
        (*map(round, box), label) for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("width", "height", "size", "overlap"),
    [(230, 170, 100, 0.4), (101, 99, 100, 0.25), (100, 100, 100, 0.0), (1000, 33, 64, 0.9), (7, 300, 1, 0.5)],
)
def test_windows_cover_the_image_and_overlap_enough(width, height, size, overlap):
    windows = np.array(tile_windows(width, height, size, overlap))
    assert len(np.unique(windows, axis=0)) == len(windows)
    assert (windows[:, 2] - windows[:, 0] == min(width, size)).all()
    assert (windows[:, 3] - windows[:, 1] == min(height, size)).all()
    assert (windows[:, :2].min(), *windows[:, 2:].max(0)) == (0, width, height)
    for axis in (0, 1):
        starts = np.unique(windows[:, axis])
        # A step is a whole number of pixels, at least one.
        assert (np.diff(starts) <= max(1, size * (1 - overlap))).all()


@pytest.mark.parametrize("side", [3, 40])
@pytest.mark.parametrize("whole_image", [True, False])
def test_an_object_no_larger_than_the_overlap_is_found_once_wherever_it_is(side, whole_image):
    """It lies within a tile, at its border, or in two or four of them."""
    windows, holding = tile_windows(230, 170, 100, 0.4), set()
    for x in range(0, 230 - side + 1, 19):
        for y in range(0, 170 - side + 1, 26):
            holding.add(sum(a <= x and b <= y and x + side <= c and y + side <= d for a, b, c, d in windows))
            image = paint((230, 170), [(x, y, x + side, y + side, 1)])
            found = detect_in_tiles(find, image, 100, 0.4, reduced(image) if whole_image else None, 3)
            assert objects_of(found) == [(x, y, x + side, y + side, 1)]
    assert {1, 2, 4} <= holding


def test_many_objects_of_two_classes():
    rng = np.random.default_rng(0)
    objects = []
    # Small enough not to pass for larger than the overlap in the reduced image.
    for y in range(0, 460, 46):
        for x in range(0, 590, 46):
            width, height = rng.integers(2, 32, 2)
            left, top = x + rng.integers(0, 45 - width), y + rng.integers(0, 45 - height)
            objects.append((left, top, left + width, top + height, int(rng.integers(2))))
    image = paint((601, 467), objects)
    for whole_size in (reduced(image), None):
        assert objects_of(detect_in_tiles(find, image, 100, 0.4, whole_size)) == sorted(objects)


@pytest.mark.parametrize("box", [(20, 30, 130, 120), (70, 60, 135, 125), (5, 80, 229, 95), (0, 0, 230, 170)])
def test_an_object_larger_than_the_overlap_is_found_in_the_whole_image(box):
    image = paint((230, 170), [(*box, 0)])
    found = detect_in_tiles(find, image, 100, 0.25, reduced(image))
    ((*corners, label),) = objects_of(found)
    # The whole image is reduced by a factor of 2.3.
    np.testing.assert_allclose(corners, box, atol=3)
    assert label == 0


def test_without_the_whole_image_large_objects_are_found_in_parts():
    box = (20, 30, 190, 120)
    found = detect_in_tiles(find, paint((230, 170), [(*box, 0)]), 100, 0.25)
    assert len(found)
    low, high = found.boxes[:, :2].amin(0), found.boxes[:, 2:].amax(0)
    assert [*low.tolist(), *high.tolist()] == list(box)


@pytest.mark.parametrize("left", range(63, 100, 4))
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_an_object_whole_in_one_tile_only_is_not_also_found_in_parts(left, part):
    """It is wider than the overlap; its part in the first tile may have the higher score."""
    assert tile_windows(160, 100, 100, 0.4) == [(0, 0, 100, 100), (60, 0, 160, 100)]
    # A part at most 2 pixels narrower than the overlap cannot be told from an object that the other tile cuts.
    box = (left, 20, left + 60, 30)
    image = paint((160, 100), [(*box, 0)])
    found = detect_in_tiles(partial(find, score=lambda box: part if box[2] == 100 else 0.5), image, 100, 0.4)
    assert objects_of(found) == [(*box, 0)]


def test_the_best_detection_of_an_object_is_kept():
    image = paint((160, 100), [(70, 20, 90, 40, 0)])
    # The object is at another place in each tile.
    found = detect_in_tiles(partial(find, score=lambda box: 0.5 + box[0] / 1000), image, 100, 0.4)
    assert found.scores.tolist() == pytest.approx([0.57])


def test_classes_do_not_suppress_each_other():
    """The object is blue in the first tile and red in the second."""

    def confuse(images):
        first, second = find(images)
        return [first, replace(second, labels=1 - second.labels)]

    found = detect_in_tiles(confuse, paint((160, 100), [(70, 20, 90, 40, 0)]), 100, 0.4)
    assert objects_of(found) == [(70, 20, 90, 40, 0), (70, 20, 90, 40, 1)]


@pytest.mark.parametrize("size", [(100, 100), (31, 77), (100, 1)])
def test_an_image_that_fits_into_a_tile_is_searched_as_it_is(size):
    image = paint(size, [(1, 0, 9, 1, 0)])
    calls = []
    found = detect_in_tiles(lambda images: calls.append(images) or find(images), image, 100)
    assert calls == [[image]]
    assert found.boxes.tolist() == [[1, 0, 9, 1]]


def test_memory_is_that_of_a_batch_of_tiles():
    sizes = []

    def detect(images):
        sizes.append([image.size for image in images])
        return find(images)

    detect_in_tiles(detect, paint((500, 300), []), 100, whole_size=(60, 100), batch_size=4)
    *tiles, whole = sizes
    assert max(map(len, tiles)) == 4
    assert {size for batch in tiles for size in batch} == {(100, 100)}
    assert whole == [(100, 60)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("detector") / "best.pth", box_refine=True)


@pytest.fixture
def photo(tmp_path):
    """A file of 240 x 170 pixels."""
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (17, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((240, 170)).save(tmp_path / "in/photo.png")
    return tmp_path / "in/photo.png"


def read(folder):
    return json.loads((folder / "detections.json").read_text())


def test_predict_in_tiles(checkpoint, photo, tmp_path):
    """The command, a checkpoint that is configured so, and the class give the same; tables, crops and images too."""
    arguments = ["detect", "predict", checkpoint, photo, "--device", "cpu", "--threshold", "0.0"]
    options = ["--tiles", 100, "--tile-overlap", 0.4, "--tiles-only"]
    dat(*arguments, *options, "--out", tmp_path / "a", "--crops", "--classes", "red", "--batch-size", 5)
    configured = ["data.val.tiles=100", "data.val.tile_overlap=0.4", "data.val.whole_image=false"]
    dat(*arguments, *configured, "--out", tmp_path / "b")
    found = Detector.from_checkpoint(checkpoint, device="cpu").predict(
        photo, 0.0, tiles=100, tile_overlap=0.4, whole_image=False
    )
    red = [result for result in read(tmp_path / "b") if result["category_id"] == 11]
    assert len(red) == len(read(tmp_path / "a")) == len(list((tmp_path / "a/crops/red").iterdir()))
    wanted = [(result["category_id"], *result["bbox"]) for result in found.to_coco()]
    assert len(wanted) > 14
    np.testing.assert_allclose([(r["category_id"], *r["bbox"]) for r in read(tmp_path / "b")], wanted, atol=1e-2)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([240, 170] * 2)).all()
    assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("tiles", [0, 40])
def test_evaluate_finds_what_predict_finds(checkpoint, scenes, tmp_path, tiles):
    data = ["data.val.annotations=val.json", "data.val.images=images", f"data.root={scenes}"]
    arguments = [checkpoint, *data, "--device", "cpu", "--tiles", tiles, "--nms", 0.5, "--one-class-per-object"]
    dat("detect", "evaluate", *arguments, "--out", tmp_path / "out")
    evaluated = read(tmp_path / "out")
    files = [scenes / f"images/val_{i}.jpg" for i in range(4)]
    detector = Detector.from_checkpoint(checkpoint, device="cpu")
    for i, found in enumerate(detector.predict(files, 0.0, tiles=tiles, nms=0.5, one_class=True)):
        own = [result for result in evaluated if result["image_id"] == 100 + i]
        # The model has 7 queries and 2 classes.
        assert len(own) > 7 if tiles else len(own) <= 7
        np.testing.assert_allclose([r["bbox"] for r in own], [r["bbox"] for r in found.to_coco()], atol=1e-2)
    assert json.loads((tmp_path / "out/metrics.json").read_text())["AP"] is not None


@pytest.mark.parametrize("tiles", [0, 40])
def test_validation_reads_images_that_are_in_memory_there_and_keeps_the_mode(checkpoint, scenes, tiles, monkeypatch):
    detector = Detector.from_checkpoint(checkpoint, [f"data.val.tiles={tiles}", "train.workers=0"], device="cpu")
    annotations, cache = read_coco(scenes / "val.json", scenes / "images"), ImageCache(1.0)
    cache.fill(annotations.records)
    model = detector.model.train()

    def run(some):
        return detect_split(model, detector.config, annotations, detector.distributed, cache=some)

    wanted = run(None)
    for record in annotations.records:
        record.path.unlink()
    assert run(cache) == wanted
    with pytest.raises(DataError):
        run(None)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": -1}, "data.val.tiles is -1, should be at least 0"),
        ({"tile_overlap": 1.0}, "data.val.tile_overlap is 1.0, should be 0 to 0.9"),
        ({"nms": 1.5}, "data.val.nms is 1.5, should be 0 to 1"),
        ({"tile": 8}, "predict has no option 'tile', there are tiles, tile_overlap"),
    ],
)
def test_options_that_cannot_work_are_named(checkpoint, photo, options, message):
    with pytest.raises(ConfigError, match=message):
        Detector.from_checkpoint(checkpoint, device="cpu").predict(photo, **options)


def test_points_of_tiles_are_refused(checkpoint, photo, tmp_path):
    with pytest.raises(ConfigError, match="sampling points are of whole images, not of tiles of 100 pixels"):
        dat("detect", "predict", checkpoint, photo, "--out", tmp_path / "out", "--tiles", 100, "--show-points")
    detector = Detector.from_checkpoint(checkpoint, ["data.val.tiles=100"], device="cpu")
    with pytest.raises(ConfigError, match="not of tiles"):
        detect_with_points(detector, Image.open(photo))


@pytest.fixture
def large(photo, scenes):
    """The photograph with an object, a crowd and an object that no window holds, then four small images."""
    boxes = np.array([(10, 10, 20, 20), (90, 100, 110, 120), (0, 0, 240, 170)], np.float32)
    labels, crowd, areas = np.array([0, 1, 1]), np.array([False, True, False]), np.array([80, 400, 40800], np.float32)
    small = read_coco(scenes / "train.json", scenes / "images")
    return replace(small, records=(ImageRecord(7, photo, 240, 170, boxes, labels, crowd, areas), *small.records))


def windows_of(annotations, empty=0.0, visible=0.6):
    split = TrainDataConfig(tiles=100, tile_overlap=0.3, tile_visible=visible, tile_empty=empty)
    return cut_into_windows(annotations, split, 0)


def test_training_images_are_cut_into_windows_with_the_objects_that_are_visible(large):
    cut = windows_of(large)
    assert [record.id for record in cut.records] == [1, 2, 3, 4, 5, 6]
    first, second, *small = cut.records
    # Images that fit into a window stay as they are.
    assert [record.path for record in small] == [record.path for record in large.records[1:]]
    assert (first.window, second.window) == ((0, 0, 100, 100), (70, 70, 170, 170))
    assert (first.boxes.tolist(), first.areas.tolist(), first.crowd.tolist()) == ([[10, 10, 20, 20]], [80], [False])
    assert (second.boxes.tolist(), second.areas.tolist(), second.crowd.tolist()) == ([[20, 30, 40, 50]], [400], [True])
    # With half of an object as enough, the window on the left has its part of the crowd.
    _, left, *_ = windows_of(large, visible=0.5).records
    assert (left.window, left.boxes.tolist(), left.areas.tolist()) == ((0, 70, 100, 170), [[90, 30, 100, 50]], [200])


def test_empty_windows_are_kept_by_their_fraction(large):
    assert len(windows_of(large, empty=1.0).records) == 6 + 4
    counts = [len(cut_into_windows(large, TrainDataConfig(tiles=20, tile_empty=f), 0).records) for f in (0, 0.5, 1)]
    assert counts[1] == pytest.approx((counts[0] + counts[2]) / 2, rel=0.1)


def test_windows_are_the_same_in_every_run(large):
    first, again = (windows_of(large, empty=0.5).records for _ in range(2))
    assert [record.window for record in first] == [record.window for record in again]


def test_samples_of_windows_are_cut_from_the_file_or_from_memory(large):
    cut, cache = windows_of(large), ImageCache(1.0)
    cache.fill(cut.records)
    assert len(cache) == 5
    left, top, right, bottom = cut.records[1].window
    for record in cut.records[:2]:
        image, target = read_sample(record)
        torch.testing.assert_close(image, read_sample(record, cache.get(record.path)).image)
        assert image.shape == (3, 100, 100)
    torch.testing.assert_close(image, load_record(large.records[0])[:, top:bottom, left:right])
    # Crowds are left out of targets.
    assert len(target["boxes"]) == 0


def test_a_run_on_windows_resumes_to_the_same_weights(config_file, tmp_path):
    tiles = ["data.train.tiles=60", "data.val.tiles=40", "train.pictures=0", "train.worst=0"]
    dat("detect", "train", config_file, *tiles, f"output={tmp_path / 'whole'}")
    assert "7 training and 4 validation images" in (tmp_path / "whole/train.log").read_text()
    for epochs in (1, 2):
        arguments = [f"train.epochs={epochs}", "train.resume=true", f"output={tmp_path / 'parts'}"]
        dat("detect", "train", config_file, *tiles, "train.schedule=step", *arguments)
    whole, parts = (load_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert json.loads((tmp_path / "parts/metrics.json").read_text())["AP"] is not None
