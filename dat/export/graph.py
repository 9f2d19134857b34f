"""A model as it is exported: with its preprocessing, and with names for its inputs and outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Tensors = tuple[Tensor, ...]


class Normalize(nn.Module):
    """Pixels [B, 3, H, W], uint8, RGB, to the model's input: (pixel / 255 - mean) / std in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std


@dataclass(frozen=True)
class Graph:
    """A module in evaluation mode on the CPU, and the description that an exporter needs.

    Attributes:
        module: takes tensors, returns a tuple of tensors; includes pre- and post-processing.
        inputs: names of its inputs, in order, each with the names of its axes of variable size, such as {0: "batch"}.
        outputs: the same for its outputs. An axis turns out fixed if its size does not depend on the inputs.
        example: inputs to trace with; their values do not matter. No axis of variable size, of a map in the model
            either, should be 1 long, which broadcasts.
        metadata: JSON values that are stored in the file; see `dat.export.runtime.Exported`.
        difference: (outputs of torch, outputs of the file) -> largest differences by name.
        tolerances: largest allowed differences, by name.
        multiples: {name of an axis: number of which its size is a multiple}.
    """

    module: nn.Module
    inputs: dict[str, dict[int, str]]
    outputs: dict[str, dict[int, str]]
    example: Tensors
    metadata: dict[str, Any]
    difference: Callable[[Tensors, Tensors], dict[str, float]]
    tolerances: dict[str, float]
    multiples: dict[str, int] = field(default_factory=dict)
