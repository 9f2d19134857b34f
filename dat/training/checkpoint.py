"""Checkpoints: dictionaries of tensors and plain values, replaced atomically and read with weights_only."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dat.training.errors import CheckpointError

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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch's zip writer reports a failed write as RuntimeError
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: not a training checkpoint of this project: format is {found!r}, not {FORMAT}")
    if kind is not None and state.get("kind") != kind:
        raise CheckpointError(f"{path}: is a {state.get('kind')} checkpoint, should be a {kind} checkpoint")
    return state


def load_weights(model: torch.nn.Module, state_dict: dict[str, Any], path: str | Path) -> None:
    """load_state_dict, strict, whose mismatch is one line: CheckpointError names the first tensor that differs."""
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
    model.load_state_dict(state_dict)


def rng_state() -> dict[str, Any]:
    """State of torch's (CPU and CUDA), numpy's and Python's generators, as tensors and plain values."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what rng_state returned. CUDA generators are restored where as many devices exist."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))


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
