"""Models from checkpoints by anybody: what a file says of itself is checked before anything is made of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dat.engine.checkpoint import check_fits, load_checkpoint
from dat.engine.safe_load import check_tensors
from dat.utils.errors import CheckpointError, DataError, UserError, one_line

M = TypeVar("M", bound=nn.Module)

# of a model's configuration, far beyond any: numbers of layers and widths
LARGEST = 100_000
# letters of a class
LONGEST_NAME = 1000


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds for all but training: its configuration, as plain values, classes and weights.

    `state`: all that it holds.
    """

    config: dict[str, Any]
    class_names: list[str]
    weights: dict[str, Tensor]
    state: dict[str, Any]


def read_trained(path: Path, kind: str) -> Trained:
    """Reads a checkpoint of a run, its averaged weights where it has them.

    Raises:
        CheckpointError: as load_checkpoint; or a part of it is missing, of another type, or not finite.
    """
    state = load_checkpoint(path, kind)
    weights: Any = state.get("state_dict_ema") or state.get("state_dict")
    check_tensors(weights, path)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} holds NaN or infinity")
    config: Any = state.get("config")
    names: Any = state.get("class_names")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path}: has no configuration of a model")
    _check_numbers(config["model"], "model", path)
    check_class_names(names, path)
    return Trained(config, names, weights, state)


def check_class_names(names: Any, path: Path) -> None:
    """Raises CheckpointError unless these are texts, one at least."""
    texts = isinstance(names, list) and all(isinstance(name, str) and len(name) < LONGEST_NAME for name in names)
    if not names or not texts:
        raise CheckpointError(f"{path}: its class_names should be a list of texts, each shorter than {LONGEST_NAME}")


def build_and_load(build: Callable[[], M], weights: dict[str, Tensor], path: Path) -> M:
    """The model that `build` makes, with weights, all of which must fit.

    It is made without memory first: a configuration may ask for more than its weights are.

    Raises:
        CheckpointError: it cannot be made, or is not that of the weights.
    """
    with checkpoint_errors(path), limit_parameters(weights, path):
        try:
            with torch.device("meta"):
                check_fits(build(), weights, path)
        except UserError as error:
            # A model that computes while it is made cannot be made without memory, which says nothing against it.
            if not isinstance(error.__cause__, (RuntimeError, NotImplementedError)):
                raise
        model = build()
    check_fits(model, weights, path)
    model.load_state_dict(weights)
    return model


@contextmanager
def checkpoint_errors(path: Path | str) -> Iterator[None]:
    """Inside it errors are the file's: each becomes a CheckpointError that names it, but for those of pictures."""
    try:
        yield
    except (DataError, OSError):
        raise
    except UserError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    # what its configuration says may fail anywhere in a model
    except Exception as error:
        raise CheckpointError(f"{path}: its model cannot be used: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def limit_parameters(weights: dict[str, Tensor], path: Path) -> Iterator[None]:
    """Ends the making of a model that has many more parameters than there are weights: a million layers, say."""
    most, count = 4 * len(weights) + 1000, 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(f"{path}: its configuration is of a much larger model than its weights")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def _check_numbers(value: Any, key: str, path: Path) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, f"{key}.{name}", path)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            _check_numbers(item, key, path)
    elif isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        raise CheckpointError(f"{path}: {key} is {value}, should be at most {LARGEST}")
