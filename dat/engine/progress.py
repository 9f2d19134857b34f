"""The progress of a training run, and the values of its steps while they are copied from the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Progress:
    """The state of a run that its checkpoints hold beside tensors.

    `closed` is the step at the end of the last epoch whose evaluation, if it was due, is done. `best` is the best value
    of the trainer's metric, and `stale` the number of evaluations since. `sums` add up the logged values of `summed`
    steps since the last line of the log; `loss` is the mean loss of that line.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    closed: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    loss: float = math.nan
    sums: list[float] = field(default_factory=list)
    summed: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any], steps_per_epoch: int) -> "Progress":
        """Reads the progress from a checkpoint; earlier versions lack `closed`, or have a single number of seconds."""
        defaults = {"closed": state["epoch"] * steps_per_epoch, "train_seconds": state.get("seconds", 0.0)}
        known = defaults | state
        return cls(**{name: known[name] for name in vars(cls()) if name in known})

    @property
    def seconds(self) -> float:
        """Seconds of training and evaluation so far, over all sessions of the run."""
        return self.train_seconds + self.eval_seconds

    def add(self, values: Sequence[float]) -> None:
        """Adds the values of a step to those of the next line of the log."""
        sums = self.sums or [0.0] * len(values)
        self.sums = [total + value for total, value in zip(sums, values, strict=True)]
        self.summed += 1

    def take_means(self) -> list[float]:
        """The means over the steps since the last call, the loss first."""
        means = [total / self.summed for total in self.sums]
        self.sums, self.summed = [], 0
        self.loss = means[0]
        return means

    def seconds_left(self, total_steps: int) -> float:
        """Seconds until the last step, evaluations included, at the average speed so far."""
        return self.seconds / self.step * (total_steps - self.step)

    def images_per_second(self, images_per_step: int) -> float:
        """Training throughput, averaged over all sessions of the run."""
        return self.step * images_per_step / max(self.train_seconds, 1e-9)


class StepRecord:
    """Values of a step that are copied to the host, with its batches to repeat the step if a value is not finite.

    Nothing waits for the device before `read`.
    """

    def __init__(self, step: int, batches: Sequence[Any], normalizers: Any, values: Tensor) -> None:
        self.step, self.batches, self.normalizers = step, batches, normalizers
        self.copied = None
        if values.is_cuda:
            # The copy goes to pinned memory, so that it overlaps with the next kernels.
            self.values = values.to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))
        else:
            self.values = values

    def read(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


def format_seconds(seconds: float) -> str:
    """Formats a duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
