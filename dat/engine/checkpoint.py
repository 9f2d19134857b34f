"""Checkpoints: written atomically, read without running code and checked before anything is built from them.

A file may come from anyone. `torch.load(weights_only=True)` runs no code; the checks here also limit the memory and
time that a small file can ask for.
"""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dat.engine.config import IGNORED, flatten, from_dict, rename_keys, to_dict
from dat.utils.errors import CheckpointError, DataError, UserError, one_line
from dat.utils.files import atomic_write
from dat.utils.finite import check_finite

M = TypeVar("M", bound=nn.Module)

FORMAT = 1


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_finite(value: Any) -> bool:
    """Whether this is a number, neither NaN nor infinite."""
    return type(value) in (int, float) and math.isfinite(value)


def _is_optimizer_state(value: Any) -> bool:
    """Whether this has the structure of torch.optim.Optimizer.state_dict()."""
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return (
        all(type(key) is int and isinstance(item, dict) for key, item in value["state"].items())
        and all(isinstance(name, str) for item in value["state"].values() for name in item)
        and isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    )


_COUNT, _FINITE = ("an integer of at least 0", _is_count), ("a finite number", is_finite)
_SECONDS = ("a number of seconds", lambda value: is_finite(value) and 0 <= value < 1e12)
_TENSORS = ("a dictionary of tensors", lambda value: isinstance(value, dict))

# Entries of last.pth beside those of the classes: the values that each should be, and a test for them.
REQUIRED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("a dictionary", lambda value: isinstance(value, dict)),
    "state_dict": _TENSORS,
    "step": _COUNT,
    "epoch": _COUNT,
    "step_in_epoch": _COUNT,
    "best": _FINITE,
    "best_epoch": _COUNT,
}
# Earlier versions lack some of these; best.pth has no optimizer, and not every run has averaged weights.
OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "state_dict_ema": _TENSORS,
    "optimizer": ("an optimizer's state_dict()", _is_optimizer_state),
    "images_per_step": ("an integer of at least 1", lambda value: _is_count(value) and value > 0),
    "closed": _COUNT,
    "stale": _COUNT,
    "seconds": _SECONDS,
    "train_seconds": _SECONDS,
    "eval_seconds": _SECONDS,
    # NaN before the first line of the log.
    "loss": ("a number", lambda value: type(value) in (int, float)),
    "sums": ("a list of numbers", lambda value: isinstance(value, list) and all(map(is_finite, value))),
    "summed": _COUNT,
}
# The state of training after the last save and after the one before, in the folder of a run.
LAST, PREVIOUS = "last.pth", "previous.pth"

# torch.load raises any of these for damaged files and files of other formats.
UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, AttributeError, TypeError, AssertionError, MemoryError,
    OverflowError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError,
)  # fmt: skip

# Types of the numbers of weights and of an optimizer's state.
PLAIN = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip

# Limits far beyond any real checkpoint: plain values, their nesting, characters of a text, integers.
MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_INTEGER = 200_000, 50, 100_000, 2**63
# Tensors may exceed the size of their file: weights that several layers use are stored once and listed several times.
MAX_EXPANSION = 16
# Numbers in a model's configuration, such as widths and depths, and characters of a class name.
MAX_NUMBER, MAX_NAME = 100_000, 1000


@dataclass(frozen=True)
class Trained:
    """The parts of a checkpoint that inference needs, and the whole content as `state`.

    `config` holds plain values; `weights` are the averaged weights if there are any.
    """

    config: dict[str, Any]
    class_names: list[str]
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(path: str | Path, state: dict[str, Any], keep: str | None = None) -> None:
    """Writes `state` (tensors and plain values) to `path`; a crash at any moment leaves the old or the new file.

    `keep`: name under which the old file stays in the folder.

    Raises:
        CheckpointError: the file cannot be written (for example, the disk is full); the old files are kept.
    """
    path = Path(path)
    try:
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                _write(state, file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                _keep(path, path.with_name(keep))
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is kept" if path.exists() else "nothing was written"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n", 1)[0]
        raise CheckpointError(f"{path}: cannot write the checkpoint: {reason.split(';')[0]}; {kept}") from error


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, which turns the errors of a file into a RuntimeError about positions; this raises them."""
    errors: list[OSError] = []

    class File:
        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                errors.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save({"format": FORMAT, **state}, cast(BinaryIO, File()))
    except (OSError, RuntimeError):
        if errors:
            raise errors[0] from None
        raise


def _keep(path: Path, kept: Path) -> None:
    """Gives a file a second name, which replaces an older file."""
    try:
        with atomic_write(kept) as link:
            os.link(path, link)
    # Some file systems have no links; for a moment there is no file at `path` then.
    except OSError:
        os.replace(path, kept)


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint from which a run goes on: last.pth, or previous.pth if that is missing or damaged."""
    last, previous = output / LAST, output / PREVIOUS
    if not last.exists():
        return previous if previous.exists() else None
    if not is_intact(last) and is_intact(previous):
        return previous
    return last


def is_intact(path: Path) -> bool:
    """Whether a file is a whole archive of torch.save, with the right checksums."""
    try:
        check_archive(path)
        return zipfile.is_zipfile(path)
    except CheckpointError:
        return False


def load_checkpoint(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint to the CPU; old keys of its configuration get their current names.

    Args:
        path: checkpoint file.
        kind: "classification" or "detection"; None accepts both.
    Raises:
        CheckpointError: missing, damaged, not a checkpoint of this project, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    check_content(state, path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: not a training checkpoint of this project: format is {found!r}, not {FORMAT}")
    if kind is not None and state.get("kind") != kind:
        raise CheckpointError(f"{path}: is a {state.get('kind')} checkpoint, should be a {kind} checkpoint")
    if isinstance(state.get("config"), dict):
        state["config"] = rename_keys(state["config"], saved=True)
    return state


def read_trained(path: Path, kind: str | None) -> Trained:
    """Reads a checkpoint for inference; `kind` as in load_checkpoint.

    Raises:
        CheckpointError: as load_checkpoint does, or a part is missing, of another type or not finite.
    """
    state = load_checkpoint(path, kind)
    weights: Any = state.get("state_dict_ema") or state.get("state_dict")
    _check_weights(weights, path)
    config: Any = state.get("config")
    names: Any = state.get("class_names")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path}: has no configuration of a model")
    _check_numbers(config["model"], "model", path)
    check_class_names(names, path)
    return Trained(config, names, weights, state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint of any project, .safetensors included; averaged weights if there are any.

    Raises:
        CheckpointError: damaged, not a checkpoint, or values that are not tensors.
    """
    if path.suffix != ".safetensors":
        check_archive(path)
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    check_content(state, path)
    check_tensors(state, path)
    return state


def build_and_load(build: Callable[[], M], weights: dict[str, Tensor], path: Path) -> M:
    """Builds a model and loads its weights, all of which must fit.

    The model is built without memory first, because a configuration may describe a far larger model than its weights.
    The weights then become its parameters; only a model with further tensors, which are computed when it is built, is
    built again.

    Raises:
        CheckpointError: the model cannot be built, or the weights do not fit.
    """
    model = None
    with checkpoint_errors(path), limit_parameters(weights, path):
        try:
            with torch.device("meta"):
                model = build()
            check_fits(model, weights, path)
        except UserError as error:
            # A model that computes with tensors while it is built cannot be built on the meta device.
            if not isinstance(error.__cause__, (RuntimeError, NotImplementedError)):
                raise
            model = None
        if model is not None:
            own = model.state_dict()
            # Copies: the tensors of a file may overlap, and `weights` stay the caller's.
            copies = {name: tensor.to(own[name].dtype, copy=True) for name, tensor in weights.items()}
            model.load_state_dict(copies, assign=True)
            if not _has_meta_tensors(model):
                return model
        model = build()
    load_weights(model, weights, path)
    return model


def load_weights(model: nn.Module, state_dict: dict[str, Any], path: str | Path) -> None:
    """A strict load_state_dict; CheckpointError names the first tensor that does not fit, in one line."""
    check_fits(model, state_dict, path)
    model.load_state_dict(state_dict)


def check_fits(model: nn.Module, state_dict: dict[str, Any], path: str | Path) -> None:
    """Raises CheckpointError unless these are tensors with the names and shapes of a model's."""
    check_tensors(state_dict, path)
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state_dict:
            raise CheckpointError(f"{path}: of another architecture: it lacks {name} {tuple(tensor.shape)}")
        found = tuple(state_dict[name].shape)
        if found != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: of another architecture: {name} is {found}, should be {tuple(tensor.shape)}"
            )
        if state_dict[name].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is of {state_dict[name].dtype}, should be of {tensor.dtype}")
    for name in state_dict:
        if name not in own:
            raise CheckpointError(f"{path}: of another architecture: the model has no {name}")


def check_weights_finite(state: dict[str, Any], where: str) -> None:
    """Raises NonFiniteError if weights or averaged weights of a checkpoint's `state` are not finite."""
    check_finite(state["state_dict"].items(), where)
    check_finite(((f"averaged {name}", tensor) for name, tensor in state.get("state_dict_ema", {}).items()), where)


def check_training_state(state: dict[str, Any], classes: Collection[str], values: int, path: str | Path) -> None:
    """Raises CheckpointError unless training can go on from the entries of a checkpoint; names the first that is wrong.

    Args:
        state: from load_checkpoint.
        classes: further entries, which describe the classes.
        values: number of values of a step that are logged, whose sums the checkpoint holds.
        path: file of the checkpoint, for messages.
    """
    for name in (*REQUIRED, *classes):
        if name not in state:
            raise CheckpointError(f"{path}: has no {name}; resuming needs it")
    for name, (expected, test) in (REQUIRED | OPTIONAL).items():
        if name in state and not test(state[name]):
            raise CheckpointError(f"{path}: {name} is {describe(state[name])}, should be {expected}")
    for part in ("state_dict", "state_dict_ema"):
        _check_weights({f"{part}.{name}": value for name, value in state.get(part, {}).items()}, path)
    sums, summed = state.get("sums", []), state.get("summed", 0)
    if len(sums) != (values if summed else 0):
        raise CheckpointError(
            f"{path}: sums has {len(sums)} numbers of {summed} steps, should have {values if summed else 0}"
        )
    for name, most in (("closed", "step"), ("step_in_epoch", "step"), ("best_epoch", "epoch")):
        if state.get(name, 0) > state[most]:
            raise CheckpointError(f"{path}: {name} is {state[name]}, should be at most {most}, which is {state[most]}")
    train = state["config"].get("train")
    if isinstance(train, dict) and train.get("ema_decay") and "optimizer" in state and "state_dict_ema" not in state:
        raise CheckpointError(f"{path}: has no state_dict_ema, but its train.ema_decay is {train['ema_decay']}")


def describe(value: Any) -> str:
    """A value for an error message, or its type and shape."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    simple = value is None or isinstance(value, (bool, int, float, str))
    return repr(value)[:60] if simple else f"a {type(value).__name__}"


def check_resumable(old: dict[str, Any], new: Any, keys: Sequence[str], path: str | Path) -> list[str]:
    """Refuses to resume under a configuration that would not continue the same run.

    Args:
        old: plain configuration in the checkpoint at `path`.
        new: configuration (a dataclass) of this run.
        keys: values or whole sections that should be equal, except for drop rates and the source of weights.

    Returns:
        The other keys that changed, each with both values; without IGNORED.

    Raises:
        CheckpointError: names the first of `keys` that changed.
    """
    before, now = flatten(to_dict(from_dict(type(new), old, str(path)))), flatten(to_dict(new))
    changes = []
    for name in sorted(before.keys() | now.keys()):
        if name in before and name in now and before[name] == now[name]:
            continue
        was, wanted = (repr(values[name]) if name in values else "absent" for values in (before, now))
        free = "drop" in name or name.endswith((".pretrained", ".checkpoint_path"))
        if not free and f"{name}.".startswith(tuple(f"{key}." for key in keys)):
            raise CheckpointError(f"{path}: {name} was {was}, is now {wanted}; resuming needs the same")
        if name not in IGNORED:
            changes.append(f"{name} was {was}, is now {wanted}")
    return changes


@contextmanager
def checkpoint_errors(path: Path | str) -> Iterator[None]:
    """Turns errors inside the block into a CheckpointError that names the file, except those of data and reading."""
    try:
        yield
    except (DataError, OSError):
        raise
    except UserError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    # A configuration from a file may fail anywhere in a model.
    except Exception as error:
        raise CheckpointError(f"{path}: its model cannot be used: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def limit_parameters(weights: dict[str, Tensor], path: Path) -> Iterator[None]:
    """Stops building a model that has far more parameters than the checkpoint has weights, such as a million layers."""
    limit, count = 4 * len(weights) + 1000, 0

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(f"{path}: its configuration is of a much larger model than its weights")

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def check_content(content: Any, path: Path) -> None:
    """Raises CheckpointError for endless plain values, and for tensors that the file cannot hold.

    A list may contain itself, and a tensor of a few bytes may repeat one number a billion times.
    """
    values, size = 0, 0
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if isinstance(value, Tensor):
            if value.is_nested:
                raise CheckpointError(f"{path}: holds a tensor of tensors")
            size += value.nbytes if value.layout == torch.strided else 0
        elif isinstance(value, (Mapping, list, tuple, set)):
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else list(value)
            waiting += [(part, depth + 1) for part in parts]
        if depth > MAX_DEPTH or values + len(waiting) > MAX_VALUES:
            raise CheckpointError(f"{path}: holds values nested without end")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise CheckpointError(f"{path}: holds a text of {len(value)} characters")
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise CheckpointError(f"{path}: holds a number of {value.bit_length()} bits")
    if size > MAX_EXPANSION * path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors would take {size} bytes, the file has {path.stat().st_size}")


def check_tensors(state: Any, path: str | Path) -> None:
    """Raises CheckpointError unless this is a dictionary of dense, real tensors by name."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, should hold tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {str(name)[:100]} is a {type(tensor).__name__}, should be a tensor")
        if not is_plain(tensor):
            raise CheckpointError(
                f"{path}: {name[:100]} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, "
                "should be a plain one"
            )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a dense one of real numbers in the main memory."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in PLAIN


def _check_weights(tensors: Any, path: str | Path) -> None:
    """check_tensors, which also raises CheckpointError for NaN and infinity."""
    check_tensors(tensors, path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} holds NaN or infinity")


def check_class_names(names: Any, path: Path) -> None:
    """Raises CheckpointError unless `names` is a list of one or more texts."""
    texts = isinstance(names, list) and all(isinstance(name, str) and len(name) < MAX_NAME for name in names)
    if not names or not texts:
        raise CheckpointError(f"{path}: its class_names should be a list of texts, each shorter than {MAX_NAME}")


def check_archive(path: Path) -> None:
    """Raises CheckpointError for a damaged zip file, and for compressed or overlapping members.

    torch.load ignores checksums: a changed byte would be another weight. torch.save never compresses, and compressed or
    overlapping members would need more memory than the file has bytes. Files of torch's older format, which is not zip,
    pass.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise CheckpointError(f"{path}: has compressed parts, which torch.save never writes")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise CheckpointError(f"{path}: its parts are larger than the file")
            # torch.serialization.set_crc32_options(False) leaves them out.
            broken = archive.testzip() if any(member.CRC for member in members) else None
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from error
    if broken is not None:
        raise CheckpointError(f"{path}: is damaged: the checksum of {one_line(ValueError(broken), 100)} does not match")


def _check_numbers(value: Any, key: str, path: Path) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, f"{key}.{name}", path)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            _check_numbers(item, key, path)
    elif isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
        raise CheckpointError(f"{path}: {key} is {value}, should be at most {MAX_NUMBER}")


def _has_meta_tensors(model: nn.Module) -> bool:
    """Whether buffers that are not saved, or tensors in attributes, are still without memory."""
    return any(
        isinstance(value, Tensor) and value.is_meta
        for module in model.modules()
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
    )


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk too; folders cannot be opened on every system.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
