"""Checkpoints: dictionaries of tensors and plain values, replaced atomically and read with weights_only."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from dat.engine.config import from_dict, get_value, to_dict
from dat.engine.safe_load import check_tensors, read_file
from dat.utils.errors import CheckpointError
from dat.utils.files import atomic_write

FORMAT = 1


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path` so that a crash at any moment leaves either the old file or the new one.

    Args:
        path: target file; a temporary file beside it is written, flushed to the disk and renamed over it.
        state: tensors and plain values only, "format" is added.
    Raises:
        CheckpointError: the file cannot be written (a full disk); the old file, if any, is untouched.
    """
    path = Path(path)
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    # torch's zip writer reports a failed write as RuntimeError
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is kept" if path.exists() else "nothing was written"
        raise CheckpointError(f"{path}: cannot write the checkpoint: {_reason(error)}; {kept}") from error


def load_checkpoint(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Reads what save_checkpoint wrote, on the CPU and without unpickling objects.

    Args:
        path: checkpoint file.
        kind: "classification" or "detection": what the caller can use; None takes any.
    Raises:
        CheckpointError: missing, truncated, not a checkpoint of this project, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    state = read_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: not a training checkpoint of this project: format is {found!r}, not {FORMAT}")
    if kind is not None and state.get("kind") != kind:
        raise CheckpointError(f"{path}: is a {state.get('kind')} checkpoint, should be a {kind} checkpoint")
    return state


def load_weights(model: torch.nn.Module, state_dict: dict[str, Any], path: str | Path) -> None:
    """load_state_dict, strict, whose mismatch is one line: CheckpointError names the first tensor that differs."""
    check_fits(model, state_dict, path)
    model.load_state_dict(state_dict)


def check_fits(model: torch.nn.Module, state_dict: dict[str, Any], path: str | Path) -> None:
    """Raises CheckpointError unless these are tensors of the names and shapes of a model's."""
    check_tensors(state_dict, Path(path))
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state_dict:
            raise CheckpointError(f"{path}: of another architecture: it lacks {name} {tuple(tensor.shape)}")
        found = tuple(state_dict[name].shape)
        if found != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: of another architecture: {name} is {found}, should be {tuple(tensor.shape)}"
            )
    for name in state_dict:
        if name not in own:
            raise CheckpointError(f"{path}: of another architecture: the model has no {name}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: str | Path) -> None:
    """Restores the "optimizer" of a checkpoint's `state`. Raises CheckpointError when it has none, or one unlike it."""
    if "optimizer" not in state:
        raise CheckpointError(f"{path}: has no optimizer state, as best.pth has none; resuming needs a last.pth")
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its optimizer state does not fit this configuration: {error}") from error


def training_state(
    model: torch.nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """The entries of a checkpoint that hold weights, averaged weights and, where it is given, the optimizer's state."""
    state: dict[str, Any] = {"state_dict": model.state_dict()}
    if ema is not None:
        state["state_dict_ema"] = ema.module.state_dict()
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


def restore_weights(state: dict[str, Any], model: torch.nn.Module, ema: ModelEmaV3 | None, path: str | Path) -> None:
    """Puts back the weights that training_state took. Raises CheckpointError for what does not fit."""
    load_weights(model, state["state_dict"], path)
    if ema is not None:
        load_weights(ema.module, state.get("state_dict_ema", state["state_dict"]), path)


def check_resumable(old: dict[str, Any], new: Any, keys: Sequence[str], path: str | Path) -> None:
    """Refuses to resume under a configuration that would not continue the same run.

    Args:
        old: plain configuration that the checkpoint at `path` holds.
        new: configuration (a dataclass) of the command.
        keys: that should be equal, values or whole sections; within them drop rates and what fetches weights may
            differ.
    Raises:
        CheckpointError: names the first key that changed.
    """
    before, now = to_dict(from_dict(type(new), old, str(path))), to_dict(new)
    for key in keys:
        a, b = _leaves(get_value(before, key), key), _leaves(get_value(now, key), key)
        for name in sorted(a.keys() | b.keys()):
            free = "drop" in name or name.endswith((".pretrained", ".checkpoint_path"))
            if not free and (name not in a or name not in b or a[name] != b[name]):
                was, wanted = (repr(values[name]) if name in values else "absent" for values in (a, b))
                raise CheckpointError(f"{path}: {name} was {was}, is now {wanted}; resuming needs the same")


def _sync_folder(folder: Path) -> None:
    # the rename itself must reach the disk too; folders cannot be opened on every system
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).split("\n", 1)[0]


def _leaves(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: leaf for part, item in value.items() for name, leaf in _leaves(item, f"{key}.{part}").items()}
