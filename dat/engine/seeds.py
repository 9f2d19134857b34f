"""Seeds: every random number of a run is a function of the seed and of counters (epoch, step, sample).

Nothing depends on what happened before, so that a resumed run equals an uninterrupted one, whatever the number of
workers.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int, *counters: int) -> None:
    """Seeds torch, CUDA, numpy and Python from a seed and counters, such as the step and the process."""
    torch.manual_seed(_seed_host(seed, *counters))


@contextmanager
def isolated_rng(seed: int, *counters: int) -> Iterator[None]:
    """Seeds the CPU generators inside the block and puts them back after it: for the augmentation of one sample."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # not torch.manual_seed: that would reach the CUDA generators too
    torch.random.default_generator.manual_seed(_seed_host(seed, *counters))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def derive_seed(seed: int, *counters: int) -> int:
    """A seed in 0 .. 2**63 - 1 for one purpose among many of the same run, such as the order of one epoch."""
    # the count: numpy pads with zeros, so that (seed, 5) and (seed, 5, 0) would be the same
    sequence = np.random.SeedSequence([seed, len(counters), *counters])
    return int(sequence.generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))


def _seed_host(seed: int, *counters: int) -> int:
    derived = derive_seed(seed, *counters)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    return derived
