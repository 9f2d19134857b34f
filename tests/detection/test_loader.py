import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dat.detection.config import TrainDataConfig
from dat.detection.data import (
    AspectRatioBatchSampler,
    DetectionDataset,
    ImageRecord,
    SameSizeBatchSampler,
    make_loader,
    read_coco,
    train_transform,
)
from dat.detection.data.cache import ImageCache
from dat.detection.data.loader import collate
from dat.utils.errors import DataError

TRANSFORM = {
    "sizes": [32, 48],
    "max_size": 80,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.0,
    "crop": 0.5,
    "crop_resize": [60],
    "crop_min": 20,
    "crop_max": 50,
    "photometric": 0.5,
}


def transform(**changes):
    return train_transform(TrainDataConfig(**TRANSFORM | changes), [0.5] * 3, [0.25] * 3)


def records(sizes):
    """Records of (width, height), without boxes or files."""
    nothing = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.float32))
    return [ImageRecord(i, Path(f"{i}.jpg"), width, height, *nothing) for i, (width, height) in enumerate(sizes)]


def mixed(wide, upright):
    return records([(80, 60)] * wide + [(60, 80)] * upright)


def load(scenes, workers, epoch=0, start=0):
    annotations = read_coco(scenes / "train.json", scenes / "images")
    sampler = AspectRatioBatchSampler(annotations.records, 2, seed=3)
    sampler.set_position(epoch, start)
    dataset = DetectionDataset(annotations.records, transform(), seed=3)
    return list(make_loader(dataset, sampler, 1, workers, pin_memory=False))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for (images, mask, targets), (other_images, other_mask, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert (mask is None) == (other_mask is None)
        assert mask is None or torch.equal(mask, other_mask)
        for target, other in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"])
            assert target["image_id"] == other["image_id"]


def test_samples_do_not_depend_on_the_number_of_workers(scenes):
    alone = load(scenes, workers=0)
    assert_same(alone, load(scenes, workers=2))
    assert not torch.equal(alone[0][0], load(scenes, workers=0, epoch=1)[0][0])


def test_an_epoch_can_be_entered_in_its_middle(scenes):
    assert_same(load(scenes, workers=0)[1:], load(scenes, workers=0, start=1))


def test_loading_leaves_the_callers_generator_alone(scenes):
    torch.manual_seed(0)
    load(scenes, workers=0)
    after = torch.rand(1)
    torch.manual_seed(0)
    # the loader itself draws one seed for its workers
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(after, torch.rand(1))


def test_targets_are_relative_to_the_image_itself(scenes):
    for images, mask, targets in load(scenes, workers=0):
        for i, target in enumerate(targets):
            assert target["boxes"].min() >= 0
            corners = target["boxes"][:, :2] + target["boxes"][:, 2:] / 2
            assert corners.max() <= 1 + 1e-6
            if mask is not None:
                assert (images[i][:, mask[i]] == 0).all()


def test_padding_is_masked():
    samples = [(torch.ones(3, 4, 6), {"image_id": 0}), (torch.ones(3, 5, 3), {"image_id": 1})]
    images, mask, targets = collate(samples, 4)
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(images[:, 0] == 0, mask)
    assert (~mask).sum((1, 2)).tolist() == [24, 15]
    assert [target["image_id"] for target in targets] == [0, 1]


def test_no_mask_without_padding():
    samples = [(torch.ones(3, 4, 8), {})] * 2
    assert collate(samples, 4)[1] is None
    assert collate(samples)[1] is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_in_equal_parts(world_size):
    samplers = [AspectRatioBatchSampler(mixed(23, 18), 3, 0, rank, world_size) for rank in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {41 // (3 * world_size)}
    seen = [index for share in shares for batch in share for _, index in batch]
    assert len(seen) == len(set(seen)) == 41 // (3 * world_size) * 3 * world_size


def test_batches_are_of_one_orientation_but_for_the_left_over():
    data = mixed(23, 18)
    kinds = [
        {data[index].width > data[index].height for _, index in batch} for batch in AspectRatioBatchSampler(data, 4, 0)
    ]
    assert sum(len(kind) > 1 for kind in kinds) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = AspectRatioBatchSampler(mixed(9, 9), 3, seed)
        sampler.set_position(epoch)
        return [[index for _, index in batch] for batch in sampler]

    assert order(0, 5) == order(0, 5)
    assert order(0, 5) != order(0, 6)
    assert order(0, 5) != order(1, 5)


@pytest.mark.parametrize(("count", "world_size", "expected"), [(3, 1, 3), (3, 2, 2), (1, 2, 1)])
def test_fewer_images_than_a_batch_still_train(count, world_size, expected):
    for rank in range(world_size):
        (batch,) = AspectRatioBatchSampler(mixed(count, 0), 8, 0, rank, world_size)
        assert len(batch) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once_without_padding(world_size):
    data = records([(80, 60), (160, 120), (60, 80), (80, 61), (80, 60), (80, 60)])
    shares = [list(SameSizeBatchSampler(data, 2, 30, 100, rank, world_size)) for rank in range(world_size)]
    batches = [[index for _, index in batch] for share in shares for batch in share]
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    ratios = [{round(data[index].width / data[index].height, 3) for index in batch} for batch in batches]
    assert all(len(ratio) == 1 for ratio in ratios)


def test_a_truncated_image_stops_the_loader_and_is_named(scenes):
    path = scenes / "images" / "train_2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"train_2.jpg: cannot be read as an image"):
        load(scenes, workers=0)


@pytest.mark.parametrize(("world_size", "accumulate", "batch_size"), [(1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 4, 1)])
def test_steps_take_the_same_images_however_they_are_split(world_size, accumulate, batch_size):
    def steps(batch_size, world_size, accumulate):
        samplers = [
            AspectRatioBatchSampler(mixed(23, 18), batch_size, 3, r, world_size, accumulate) for r in range(world_size)
        ]
        batches = [list(sampler) for sampler in samplers]
        assert {len(share) for share in batches} == {len(samplers[0])} == {samplers[0].steps * accumulate}
        assert samplers[0].images == 8
        return [
            sorted(key for share in batches for batch in share[i : i + accumulate] for key in batch)
            for i in range(0, len(samplers[0]), accumulate)
        ]

    assert steps(batch_size, world_size, accumulate) == steps(8, 1, 1)


def test_an_epoch_of_accumulated_batches_is_entered_at_a_step():
    sampler = AspectRatioBatchSampler(mixed(20, 0), 2, 3, accumulate=3)
    whole = list(sampler)
    sampler.set_position(0, 1)
    assert list(sampler) == whole[3:]


def test_images_of_a_step_have_similar_shapes():
    data = records([(100 + 10 * (i % 10), 100) for i in range(1, 401)])
    spreads = []
    for batch in AspectRatioBatchSampler(data, 4, 0):
        ratios = [data[index].width for _, index in batch]
        spreads.append(max(ratios) - min(ratios))
    assert sum(spreads) / len(spreads) < 20


@pytest.mark.parametrize("multiple", [1, 16])
def test_no_batch_has_more_pixels_than_allowed(scenes, multiple):
    limit = 3 * 48 * 48
    annotations = read_coco(scenes / "train.json", scenes / "images")
    sampler = AspectRatioBatchSampler(annotations.records, 2, seed=3, max_pixels=limit, pad_multiple=multiple)
    settings = {"sizes": [48, 90], "max_size": 200}
    seen = set()
    for epoch in range(8):
        sampler.set_position(epoch)
        dataset = DetectionDataset(annotations.records, transform(**settings), seed=3)
        for images, _, targets in make_loader(dataset, sampler, multiple, 0, pin_memory=False):
            pixels = images.shape[0] * images.shape[2] * images.shape[3]
            assert pixels <= limit
            seen.add(pixels)
            assert all(target["boxes"].max() <= 1 for target in targets if len(target["boxes"]))
    assert max(seen) > 0.6 * limit


@pytest.mark.parametrize(("gib", "kept"), [(1.0, 4), (2.5 * 3 * 80 * 60 / 2**30, 2), (0.0, 0)])
def test_cached_images_change_nothing(scenes, gib, kept):
    annotations = read_coco(scenes / "train.json", scenes / "images")
    cache = ImageCache(gib)
    cache.fill(annotations.records)
    assert len(cache) == kept
    if kept == 4:
        shutil.rmtree(scenes / "images")
    batches = []
    for workers in (0, 2):
        dataset = DetectionDataset(annotations.records, transform(), 3, cache)
        sampler = AspectRatioBatchSampler(annotations.records, 2, seed=3)
        batches.append(list(make_loader(dataset, sampler, 1, workers, pin_memory=False)))
    assert_same(*batches)
    if kept < 4:
        assert_same(batches[0], load(scenes, workers=0))
