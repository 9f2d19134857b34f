"""Files of weights by anybody, which may be damaged or made to do harm: what is in them before it is used.

torch.load with weights_only runs no code. What is left is to bound what a small file can ask for.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from dat.utils.errors import CheckpointError

# what torch.load raises at files that are no checkpoints, or damaged ones
BROKEN = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, AttributeError, TypeError, AssertionError, MemoryError,
    OverflowError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError,
)  # fmt: skip
# of plain values, far beyond what checkpoints hold
MOST_VALUES = 200_000
DEEPEST = 50
LONGEST_TEXT = 100_000
LARGEST_NUMBER = 2**63
# by which tensors may exceed their file: weights that layers share are stored once and listed often
SHARED = 16


def read_file(path: Path) -> Any:
    """What torch.save wrote, on the CPU. Raises CheckpointError for anything that is no such file or not sound."""
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    check_content(content, path)
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of any project, .safetensors too, its averaged weights where it has them.

    Raises CheckpointError for a file that is no checkpoint or not sound, and for values that are no tensors.
    """
    if path.suffix != ".safetensors":
        check_archive(path)
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except BROKEN as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    check_content(state, path)
    check_tensors(state, path)
    return state


def check_archive(path: Path) -> None:
    """Raises CheckpointError for a zip file whose members are packed or overlap, as torch.save never writes them.

    They would need more memory than the file has bytes. Files of torch's older format, which is no zip, pass.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except BROKEN as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: has compressed parts, which torch.save never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path}: its parts are larger than the file")


def check_content(content: Any, path: Path) -> None:
    """Raises CheckpointError for plain values without end, and for tensors that their file cannot hold.

    A list may hold itself, or lists that hold one list twice, and so on: what walks through them would not end. A
    tensor may repeat one number a billion times.
    """
    values, size = 0, 0
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, Tensor):
            size += value.nbytes if value.layout == torch.strided else 0
        elif isinstance(value, (Mapping, list, tuple, set)):
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else list(value)
            waiting += [(part, depth + 1) for part in parts]
        if depth > DEEPEST or values + len(waiting) > MOST_VALUES:
            raise CheckpointError(f"{path}: holds values nested without end")
        if isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise CheckpointError(f"{path}: holds a text of {len(value)} characters")
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise CheckpointError(f"{path}: holds a number of {value.bit_length()} bits")
    if size > SHARED * path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors would take {size} bytes, the file has {path.stat().st_size}")


def check_tensors(state: Any, path: Path) -> None:
    """Raises CheckpointError unless these are plain tensors by name."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, should hold tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {str(name)[:100]} is a {type(tensor).__name__}, should be a tensor")
        # neither sparse nor quantized, neither complex nor without memory
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.is_complex():
            raise CheckpointError(
                f"{path}: {name[:100]} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, "
                "should be a plain one"
            )
