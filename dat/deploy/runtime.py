"""Runs exported models: ONNX files in onnxruntime, packages of torch.export and of AOTInductor in torch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor

from dat.deploy.compiled import is_compiled, load_compiled
from dat.training.errors import CheckpointError, ConfigError
from dat.training.rebuild import check_class_names
from dat.training.untrusted import check_content

SUFFIXES = (".onnx", ".pt2")
# seconds of onnxruntime for one batch
LONGEST_RUN = 600.0


@dataclass(frozen=True)
class Exported:
    """A model that `dat.deploy.export` wrote.

    Attributes:
        metadata: "kind" ("detection" or "classification"), "class_names" (of label 0, 1, ...), "mean" and "std" (of the
            normalisation that is inside), and what else the commands of the kind wrote.
        run: the inputs, in the order of the file, to its outputs, all on the CPU.
    """

    metadata: dict[str, Any]
    run: Callable[..., tuple[Tensor, ...]]


def is_exported(path: Path) -> bool:
    """Whether a file's name is that of an exported model."""
    return path.suffix.lower() in SUFFIXES


def load_exported(path: Path, kind: str, trust: bool = False) -> Exported:
    """Reads an exported model.

    Args:
        path: .onnx or .pt2.
        kind: "detection" or "classification".
        trust: .pt2 packages hold pickles or machine code, which loading runs; False refuses them.

    Raises:
        ConfigError: onnxruntime is missing, or the file is a .pt2 and not trusted.
        CheckpointError: no such file, a damaged one, one of another origin or kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix.lower() == ".onnx":
        exported = _load_onnx(path)
    elif not trust:
        raise ConfigError(f"{path}: a .pt2 package can run any code when it is loaded; --trust loads it all the same")
    else:
        exported = _load_package(path)
    check_metadata(exported.metadata, kind, path)
    return exported


def check_metadata(metadata: dict[str, Any], kind: str, path: Path) -> None:
    """Raises CheckpointError unless this is the metadata of a model that was exported here."""
    if metadata.get("kind") != kind:
        found = f"of a {metadata['kind']} model" if "kind" in metadata else "without the metadata of an export"
        raise CheckpointError(f"{path}: {found}, should be a {kind} model exported by this project")
    check_content(metadata, path)
    check_class_names(metadata.get("class_names"), path)


def check_found(labels: Tensor, classes: int, numbers: Sequence[Tensor], path: Path | str) -> None:
    """Raises CheckpointError for labels that are not 0 to classes - 1, and for numbers that are NaN or infinite."""
    whole = not labels.is_floating_point() and not labels.is_complex()
    if not whole or (labels.numel() and not 0 <= labels.min() <= labels.max() < classes):
        raise CheckpointError(f"{path}: gives labels that are not 0 to {classes - 1}")
    if not all(values.isfinite().all() for values in numbers):
        raise CheckpointError(f"{path}: gives numbers that are NaN or infinite")


def _load_onnx(path: Path) -> Exported:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"{path}: running ONNX files needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # errors are raised, and need not be logged too
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        metadata = _parse(session.get_modelmeta().custom_metadata_map)
    # its classes of errors have no parent of their own
    except Exception as error:
        raise CheckpointError(f"{path}: not an ONNX model that can be run, or a damaged one") from error
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        # a graph may hold a loop without end
        limit = onnxruntime.RunOptions()
        watchdog = Timer(LONGEST_RUN, setattr, (limit, "terminate", True))
        watchdog.daemon = True
        watchdog.start()
        try:
            arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
            return tuple(torch.from_numpy(output) for output in session.run(None, arrays, limit))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: onnxruntime cannot run it: {reason}") from error
        finally:
            watchdog.cancel()

    return Exported(metadata, run)


def _parse(texts: dict[str, str]) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in texts.items()}


def _load_package(path: Path) -> Exported:
    import dat.ops  # noqa: F401  defines the operators of the package

    try:
        if is_compiled(path):
            return Exported(*load_compiled(path))
        extra = {"metadata.json": ""}
        # Its guards refuse axes of 1, of batches too, where shapes were inferred for longer ones: the graph does not.
        module = torch.export.load(path, extra_files=extra).module(check_guards=False)
        return Exported(json.loads(extra["metadata.json"] or "{}"), _as_tuple(module))
    except CheckpointError:
        raise
    # a damaged archive fails in ways as many as its parts
    except Exception as error:
        raise CheckpointError(f"{path}: not a package of torch.export or AOTInductor, or a damaged one") from error


def _as_tuple(model: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(model(*inputs))

    return run
