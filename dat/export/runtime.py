"""Runs exported models: ONNX files by onnxruntime, packages of torch.export and AOTInductor by torch."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor

from dat.engine.checkpoint import check_class_names, check_content, checkpoint_errors
from dat.export.aot_inductor import is_compiled, load_compiled
from dat.utils.errors import CheckpointError, ConfigError, one_line

SUFFIXES = (".onnx", ".pt2")
# Seconds after which onnxruntime is stopped, for one batch: a graph may hold an endless loop.
LONGEST_RUN = 600.0


def _memory() -> int:
    """Bytes of memory of the machine or the container, whichever is smaller; 16 GiB if the system does not say."""
    try:
        known = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        known = 2**34
    try:
        return min(known, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    # No container, or no limit, which reads "max".
    except (ValueError, OSError):
        return known


# Bytes that all ONNX models of a process may allocate together.
MOST_MEMORY = _memory() * 3 // 4


@dataclass(frozen=True)
class Exported:
    """A model that `dat.export.export` wrote.

    Attributes:
        metadata: "kind" ("detection" or "classification"), "class_names" (of labels 0, 1, ...), "mean" and "std" (of
            the normalisation in the graph), and further keys of each kind.
        run: takes the inputs in the order of the file, returns its outputs, all on the CPU.
    """

    metadata: dict[str, Any]
    run: Callable[..., tuple[Tensor, ...]]


def is_exported(path: Path) -> bool:
    """Whether the suffix of a file is that of an exported model."""
    return path.suffix.lower() in SUFFIXES


def load_exported(path: Path, kind: str, trust: bool = False) -> Exported:
    """Reads an exported model.

    Args:
        path: .onnx or .pt2.
        kind: "detection" or "classification".
        trust: load .pt2 packages, whose pickles or machine code can run anything.

    Raises:
        ConfigError: onnxruntime is missing, or the file is a .pt2 and not trusted.
        CheckpointError: a file that is missing, damaged, of another origin or kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix.lower() == ".onnx":
        exported = _load_onnx(path)
    elif not trust:
        raise ConfigError(
            f"{path}: loading a .pt2 package can run any code; --trust (trust=True) loads it all the same"
        )
    else:
        exported = _load_package(path)
    metadata = exported.metadata
    if metadata.get("kind") != kind:
        found = f"of a {metadata['kind']} model" if "kind" in metadata else "without the metadata of an export"
        raise CheckpointError(f"{path}: {found}, should be a {kind} model exported by this project")
    check_content(metadata, path)
    check_class_names(metadata.get("class_names"), path)
    return exported


def _load_onnx(path: Path) -> Exported:
    try:
        import onnx
        import onnxruntime
        from google.protobuf.message import DecodeError
    except ImportError as error:
        needed = f"running ONNX files needs {error.name}"
        raise ConfigError(f'{path}: {needed}: pip install "dat-vision[onnx]"') from error
    try:
        _check_content(onnx.load(path, load_external_data=False), path)
    except (DecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not an ONNX model, or a damaged one") from error
    _bound_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Errors are raised and need not be logged as well.
    options.log_severity_level = 4
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Constant folding allocates outside the bounded arena; exports were folded when they were written.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        texts = session.get_modelmeta().custom_metadata_map
        metadata = {name: json.loads(text) for name, text in texts.items()}
    # The error classes of onnxruntime have no common parent.
    except Exception as error:
        raise CheckpointError(f"{path}: not an ONNX model that can be run, or a damaged one") from error
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        limit = onnxruntime.RunOptions()
        # Shrink the arena after each run: varied image sizes would fragment it.
        limit.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        watchdog = Timer(LONGEST_RUN, setattr, (limit, "terminate", True))
        watchdog.daemon = True
        watchdog.start()
        try:
            arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
            return tuple(torch.from_numpy(output) for output in session.run(None, arrays, limit))
        except Exception as error:
            reason = one_line(error, 1000)
            if "is smaller than requested bytes" in reason:
                reason = f"needs more than {MOST_MEMORY / 2**30:.3g} GiB; try smaller batches"
            raise CheckpointError(f"{path}: onnxruntime cannot run it: {reason}") from error
        finally:
            watchdog.cancel()

    return Exported(metadata, run)


def _check_content(model: Any, path: Path) -> None:
    """Raises CheckpointError for functions and tensors that exports never hold, of a model (onnx.ModelProto).

    onnxruntime inlines functions before any limit holds: 18 that each call the next one twice are 2**18 nodes. External
    tensors may name any file of the machine, and sparse ones take any memory while the model is read.
    """
    import onnx

    if model.functions:
        raise CheckpointError(f"{path}: defines {len(model.functions)} functions, which exports never do")
    waiting = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.SparseTensorProto):
            raise CheckpointError(f"{path}: holds a sparse tensor, which exports never do")
        if not isinstance(message, onnx.TensorProto):
            parts = [(field, value) for field, value in message.ListFields() if field.message_type]
            waiting += [part for field, value in parts for part in (value if field.is_repeated else [value])]
        elif message.external_data or message.data_location == onnx.TensorProto.EXTERNAL:
            raise CheckpointError(f"{path}: keeps {message.name[:100]!r} in another file, which exports never do")


@cache
def _bound_memory() -> None:
    """Registers an arena of MOST_MEMORY bytes for all sessions of the process that use environment allocators."""
    import onnxruntime

    arena = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, onnxruntime.OrtMemType.DEFAULT)
    # Extend by the requested size, not by powers of two.
    bound = onnxruntime.OrtArenaCfg({"max_mem": MOST_MEMORY, "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(memory, bound)


def _load_package(path: Path) -> Exported:
    import dat.ops  # noqa: F401  defines the operators of the package

    try:
        if is_compiled(path):
            metadata, model = load_compiled(path)
            return Exported(metadata, _as_tuple(model, path))
        extra = {"metadata.json": ""}
        # The guards refuse axes of length 1, batches of one image too; the graph itself takes them.
        module = torch.export.load(path, extra_files=extra).module(check_guards=False)
        return Exported(json.loads(extra["metadata.json"] or "{}"), _as_tuple(module, path))
    except CheckpointError:
        raise
    # A damaged archive raises errors of many kinds.
    except Exception as error:
        raise CheckpointError(f"{path}: not a package of torch.export or AOTInductor, or a damaged one") from error


def _as_tuple(model: Callable[..., Any], path: Path) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), checkpoint_errors(path):
            return tuple(torch.as_tensor(output) for output in model(*inputs))

    return run
