"""The order of samples, and the DataLoader of every command."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dat.engine.imbalance import draw_images, drawn_images
from dat.engine.seeds import derive_seed


class EpochBatchSampler(Sampler[list[tuple[int, ...]]]):
    """Batches of (epoch, index), shuffled by (seed, epoch) only and distributed over the processes.

    An optimizer step takes `accumulate` batches of `batch_size` samples in each of `world_size` processes. The samples
    of a step depend on the product of the three only. An epoch has whole steps; a dataset smaller than one step gives
    one that repeats samples. Every process gets the same number of batches.

    Args:
        length: number of samples in the dataset.
        batch_size: samples in a batch of one process.
        seed: seed of the run.
        rank, world_size: index of this process, and the number of processes.
        accumulate: batches per step and process.
        factors: how often each sample is drawn in an epoch, None: once; sample i at its r-th time has the index
            i + r * length, so that it is augmented anew.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        factors: np.ndarray | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.factors = length, batch_size, seed, factors
        self.drawn = length if factors is None else drawn_images(factors)
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch, self.first_step = 0, 0

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Starts the next iteration at step `first_step` of `epoch`."""
        self.epoch, self.first_step = epoch, first_step

    @property
    def images(self) -> int:
        """Samples per step, over all its batches and processes."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return max(1, self.drawn // self.images)

    def __len__(self) -> int:
        """Batches of this process in the next iteration."""
        return max(0, self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        epoch = self.epoch
        order = torch.from_numpy(draw_images(order.numpy(), self.factors, np.random.default_rng((self.seed, epoch))))
        order = order.repeat(-(-self.images // self.drawn))[: self.steps * self.images]
        batches = order.view(self.steps, self.accumulate, self.world_size, self.batch_size)
        for batch in batches[self.first_step :, :, self.rank].flatten(0, 1):
            yield [(epoch, index) for index in batch.tolist()]


class Loader(DataLoader[Any]):
    """A DataLoader whose workers persist between epochs and leave SIGTERM to the main process.

    SIGTERM to the process group would otherwise end the workers before the main process could save. They end with the
    main process, however it ends.

    Args:
        dataset: the samples.
        workers: processes that read samples; 0: the main process reads them.
        pin: whether batches go to a GPU.
        options: other arguments of DataLoader.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, pin: bool, **options: Any) -> None:
        if workers:
            options |= {"persistent_workers": True, "worker_init_fn": partial(_ignore_sigterm, _exit_flag())}
            if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) != "spawn":
                # The default before Python 3.14: workers share the memory of cached images, and any transform will do.
                options["multiprocessing_context"] = "fork"
        super().__init__(dataset, num_workers=workers, pin_memory=pin, **options)

    def __iter__(self) -> Any:
        # Workers start with the mask of this thread: SIGTERM waits until they have their handler.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@cache
def _exit_flag() -> Any:
    """A flag in memory shared with the workers; it becomes True when this process begins to exit."""
    flag = multiprocessing.RawValue(ctypes.c_bool, False)
    # Runs before multiprocessing's own handler, which sends SIGTERM to the workers and waits for them.
    atexit.register(setattr, flag, "value", True)
    return flag


def _ignore_sigterm(exiting: Any, worker: int) -> None:
    def receive(number: int, frame: object) -> None:
        if exiting.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
