"""The parts of a training run that depend on the task: data, model, loss, metrics, results."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import DataLoader


class Task(ABC):
    """The methods and attributes that a subclass of Trainer defines."""

    # "detection" or "classification".
    kind: ClassVar[str]
    # The metric of evaluate() that makes an epoch the best, and the file with the best epoch's predictions.
    metric: ClassVar[str]
    results_file: ClassVar[str]
    # Entries of compute_loss() that are logged beside "loss".
    losses: tuple[str, ...] = ()
    # torch.compile's argument: True for images of many sizes.
    dynamic: ClassVar[bool | None] = None

    @abstractmethod
    def build_loaders(self) -> tuple[Any, DataLoader[Any], DataLoader[Any]]:
        """The sampler of training (with steps, images and set_position), the loader of training, that of validation."""

    @abstractmethod
    def build_model(self, weights: bool = True) -> Any:
        """A new nn.Module; `weights` False: without loading those that the configuration names."""

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """The model's arguments for a batch of the loader, on the device."""

    @abstractmethod
    def compute_loss(self, batch: Any, outputs: Any, normalizers: Any) -> dict[str, Tensor]:
        """Scalars by name: "loss", whose gradient trains the model, and `losses`.

        Args:
            batch: of the loader, on the host.
            outputs: of the model.
            normalizers: of the whole optimizer step, so that the losses of its batches add up.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Metrics of evaluation_model() on the validation data, the same on every process; keeps the predictions."""

    @abstractmethod
    def save_results(self, path: Path) -> None:
        """Writes the predictions of the last evaluation."""

    @abstractmethod
    def load_metrics(self, path: Path) -> dict[str, Any]:
        """Metrics of the predictions that save_results wrote, which write_report draws."""

    @abstractmethod
    def write_report(self, metrics: dict[str, Any], text: str) -> list[Path]:
        """Draws the best epoch's predictions and writes report.html; returns the images."""

    @abstractmethod
    def format_metrics(self, metrics: dict[str, Any]) -> str:
        """Metrics as a table for the console."""

    @abstractmethod
    def class_state(self) -> dict[str, Any]:
        """The classes, as entries of the checkpoint: "class_names" and more."""

    @abstractmethod
    def describe_data(self) -> str:
        """Sizes of the data, for the log."""

    @abstractmethod
    def describe_batch(self, batch: Any) -> str:
        """The images of a batch, for error messages."""

    def normalizers(self, batches: Sequence[Any]) -> Any:
        """Divisors of the losses of an optimizer step: by default the number of its batches."""
        return len(batches)

    def describe_classes(self) -> str:
        """Further lines at the start of the log."""
        return ""


def first_few(items: Sequence[Any]) -> str:
    """A list for an error message: "[1, 2]", or the first eight items and their number."""
    if len(items) <= 8:
        return str(list(items))
    return f"{str(list(items[:8]))[:-1]}, ... {len(items)} in all]"
