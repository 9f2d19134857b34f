"""Packages of AOTInductor: a model as machine code, for processors like the one that compiled it."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat.utils.errors import CheckpointError

# Key of our JSON text in the package's own metadata.
KEY = "dat"
# {name of an input: (dtype, for each axis the smallest size, of which all are multiples, and the largest)}
Inputs = dict[str, tuple[str, list[tuple[int, int]]]]


def write_compiled(program: Any, inputs: Inputs, metadata: dict[str, Any], path: Path) -> None:
    """Compiles a torch.export program, which takes minutes for a detector; errors of the compiler pass through.

    Args:
        program: takes tensors, returns a tuple of tensors.
        inputs: dtypes and sizes that the compiled model accepts; it does not check its inputs itself.
        metadata: JSON values to store.
        path: of the package.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    text = json.dumps({"metadata": metadata, "inputs": inputs, "processor": capability})
    # The number of threads is that of the machine that runs it, not of the one that compiles it.
    options: dict[str, Any] = {"aot_inductor.metadata": {KEY: text}, "cpp.dynamic_threads": True}
    # Use no instructions beyond those of `capability`; older versions of torch have no such option.
    if hasattr(torch._inductor.config.cpp, "march"):
        options["cpp.march"] = ""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def is_compiled(path: Path) -> bool:
    """Whether a .pt2 is a package of AOTInductor, rather than of torch.export."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("data/aotinductor/" in name and name.endswith(".so") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_compiled(path: Path) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The metadata of a package, and a function that runs it. Loading a package runs its code.

    Raises:
        CheckpointError: compiled for other processors. Damaged packages raise errors of many kinds.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: {damaged} is damaged")
        stored = _read_stored(archive)
    capability = torch.backends.cpu.get_cpu_capability()
    if stored["processor"] != capability:
        raise CheckpointError(
            f"{path}: compiled for processors with {stored['processor']}, this one has {capability}; "
            "export the checkpoint on it with --compile"
        )
    model = torch._inductor.aoti_load_package(str(path))

    def run(*inputs: Tensor) -> Any:
        for tensor, (name, (dtype, axes)) in zip(inputs, stored["inputs"].items(), strict=True):
            _check_input(tensor, name, dtype, axes, path)
        return model(*(tensor.contiguous() for tensor in inputs))

    return stored["metadata"], run


def _read_stored(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The JSON text of write_compiled, read without running anything."""
    for name in archive.namelist():
        if "data/aotinductor/" in name and name.endswith("_metadata.json"):
            texts = json.loads(archive.read(name))
            if KEY in texts:
                return json.loads(texts[KEY])
    raise KeyError(KEY)


def _check_input(tensor: Tensor, name: str, dtype: str, axes: list[tuple[int, int]], path: Path) -> None:
    if str(tensor.dtype) != dtype:
        raise CheckpointError(f"{path}: {name} are {tensor.dtype}, should be {dtype}")
    fits = len(axes) == tensor.ndim and all(
        step <= size <= most and size % step == 0 for size, (step, most) in zip(tensor.shape, axes, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(step) if step == most else f"{step} to {most} by {step}" for step, most in axes)
        raise CheckpointError(f"{path}: {name} are {list(tensor.shape)}, should be [{wanted}]")
