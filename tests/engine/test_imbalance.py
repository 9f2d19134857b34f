"""Weights of rare classes, and how often their images are drawn."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dat.detection.data import AspectRatioBatchSampler
from dat.engine.imbalance import balanced_factors, class_weights, draw_images, drawn_images, repeat_factors
from dat.engine.loaders import EpochBatchSampler
from dat.engine.seeds import derive_seed
from dat.utils.errors import ConfigError

NAMES = ["cat", "dog", "emu"]


def test_balanced_weights_are_inverse_to_the_counts_and_1_on_average():
    counts = np.array([6, 2, 0])
    weights = class_weights("balanced", NAMES, counts)
    torch.testing.assert_close(weights, torch.tensor([8 / 12, 2.0, 1.0]))
    assert (weights.numpy() * counts).sum() / counts.sum() == pytest.approx(1)


def test_weights_by_name():
    assert class_weights({"emu": 3.0, "cat": 0.0}, NAMES, np.ones(3)).tolist() == [0, 1, 3]
    with pytest.raises(ConfigError, match=r"train.class_weights has 'cats', its keys should be class names, as 'cat'"):
        class_weights({"cats": 3.0}, NAMES, np.ones(3))


def test_repeat_factors_follow_the_rarest_class_of_an_image():
    """Of 8 images all show class 0 but the last, which shows nothing; two show class 1, one class 2 as well."""
    labels = [np.array(x, int) for x in ([0, 0], [0], [0], [0], [0], [0, 1], [1, 0, 2, 2], [])]
    factors = repeat_factors(labels, 4, threshold=0.5)
    assert factors.tolist() == pytest.approx([1, 1, 1, 1, 1, 2**0.5, 2, 1])
    assert (repeat_factors(labels, 4, threshold=1e-3) == 1).all()


def test_balanced_factors_draw_every_class_equally_often():
    labels = np.array([0, 0, 0, 0, 0, 0, 2, 2])
    factors = balanced_factors(labels, 4)
    assert factors.sum() == pytest.approx(8)
    assert factors[labels == 0].sum() == pytest.approx(factors[labels == 2].sum())


def test_images_are_drawn_their_factor_of_times():
    factors = np.array([0.25, 1.0, 1.5, 3.2, 0.05])
    generator, total = np.random.default_rng(0), np.zeros(5)
    for _ in range(2000):
        drawn = draw_images(generator.permutation(5), factors, generator)
        counts = np.bincount(drawn % 5, minlength=5)
        assert len(drawn) == drawn_images(factors) == 6
        # The last numbers of an image are those of its later times.
        assert sorted(drawn) == sorted(i + 5 * time for i in range(5) for time in range(counts[i]))
        assert (np.abs(counts - factors) < 1).all()
        total += counts
    assert (total / 2000).tolist() == pytest.approx(factors.tolist(), abs=0.04)


def test_every_image_is_drawn_where_no_factor_is_less_than_1():
    generator = np.random.default_rng(0)
    factors = 1 + generator.random(50)
    for _ in range(100):
        assert set(draw_images(generator.permutation(50), factors, generator) % 50) == set(range(50))


def test_without_factors_the_order_is_the_permutation_of_seed_and_epoch():
    sampler = EpochBatchSampler(20, 4, seed=1)
    sampler.set_position(2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(derive_seed(1, 2)))
    assert [index for batch in sampler for _, index in batch] == order.tolist()


def by_index(factors, batch_size=6, rank=0, world_size=1, accumulate=1):
    return EpochBatchSampler(20, batch_size, 1, rank, world_size, accumulate, factors)


def by_shape(factors, batch_size=6, rank=0, world_size=1, accumulate=1):
    records = [SimpleNamespace(width=(80, 60)[i % 2], height=70) for i in range(20)]
    return AspectRatioBatchSampler(records, batch_size, 1, rank, world_size, accumulate, factors=factors)


@pytest.mark.parametrize("make", [by_index, by_shape])
def test_steps_of_repeated_images_do_not_depend_on_how_they_are_split(make):
    factors = np.linspace(0.5, 3, 20)
    whole = make(factors)
    whole.set_position(2)
    steps = [sorted(batch) for batch in whole]
    assert len(steps) == whole.steps == drawn_images(factors) // 6 == 5
    assert len({key for step in steps for key in step}) == 30
    counts = np.bincount([index % 20 for step in steps for _, index in step], minlength=20)
    assert counts[10:].sum() > 2 * counts[:10].sum()
    for batch_size, world_size, accumulate in [(3, 2, 1), (1, 3, 2)]:
        samplers = [make(factors, batch_size, rank, world_size, accumulate) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_position(2, 1)
        parts = [list(sampler) for sampler in samplers]
        split = [
            sorted(key for part in parts for batch in part[i : i + accumulate] for key in batch)
            for i in range(0, len(parts[0]), accumulate)
        ]
        assert split == steps[1:]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 12, 13])
def test_processes_share_every_step_of_any_number_of_images_from_any_step_on(length, world_size):
    whole = EpochBatchSampler(length, 2 * world_size, seed=1)
    for first in range(whole.steps + 1):
        whole.set_position(3, first)
        parts = []
        for rank in range(world_size):
            sampler = EpochBatchSampler(length, 2, 1, rank, world_size)
            sampler.set_position(3, first)
            parts.append(list(sampler))
            assert len(parts[-1]) == len(sampler) == len(whole)
        assert [[*chain(*batches)] for batches in zip(*parts, strict=True)] == list(whole)
