"""Seeds: every random number of a run is a function of the seed and of counters (epoch, step, sample).

Nothing depends on earlier draws, so that a resumed run equals an uninterrupted one with any number of workers.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int, *counters: int) -> None:
    """Seeds torch on all devices, numpy and Python from a seed and counters."""
    torch.manual_seed(_seed_host(seed, *counters))


def seed_device(device: torch.device, seed: int, *counters: int) -> None:
    """Seeds torch's generator of one device, which draws dropout there, from a seed and counters.

    Much cheaper than seed_everything, for every step: it does not touch numpy, Python and other devices.
    """
    derived = derive_seed(seed, *counters)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(derived)
    elif device.type == "mps":
        torch.mps.manual_seed(derived)
    else:
        torch.random.default_generator.manual_seed(derived)


@contextmanager
def isolated_rng(seed: int, *counters: int) -> Iterator[None]:
    """Seeds the generators of the CPU inside the block and restores them after it, to augment one sample."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # torch.manual_seed would seed the generators of CUDA too.
    torch.random.default_generator.manual_seed(_seed_host(seed, *counters))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def derive_seed(seed: int, *counters: int) -> int:
    """A seed in 0 .. 2**63 - 1 for one purpose of a run, such as the order of one epoch."""
    # The number of counters is included: numpy pads with zeros, so that (seed, 5) and (seed, 5, 0) would be the same.
    sequence = np.random.SeedSequence([seed, len(counters), *counters])
    return int(sequence.generate_state(1, dtype=np.uint64)[0] >> np.uint64(1))


def _seed_host(seed: int, *counters: int) -> int:
    derived = derive_seed(seed, *counters)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    return derived
