"""The `dat` namespace of torch.ops, and the built libraries of kernels."""

import warnings
from pathlib import Path

import torch

LIBRARY = torch.library.Library("dat", "DEF")


def find(name: str) -> Path | None:
    """The built library `name` ("_C_cpu", "_C_cuda"), if there is one."""
    return next(iter(sorted(Path(__file__).parents[1].glob(f"{name}*.so"))), None)


def load(name: str) -> str | None:
    """Load the built library `name` into torch.ops.dat; returns why it is not there, or None."""
    library = find(name)
    if library is None:
        return f"dat/{name}.so was not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load: {error.__cause__ or error}"
    return None


def load_all() -> dict[str, str | None]:
    """Load the libraries that this torch can use; warns once where the CPU library is missing."""
    missing = {"_C_cpu": load("_C_cpu")}
    if torch.version.cuda is None:
        missing["_C_cuda"] = "this torch has no CUDA"
    else:
        missing["_C_cuda"] = load("_C_cuda")
    if missing["_C_cpu"]:
        warnings.warn(
            f"dat.ops runs on its slow PyTorch reference: {missing['_C_cpu']} (reinstall with a C++ compiler)",
            stacklevel=2,
        )
    elif missing["_C_cuda"] and torch.cuda.is_available():
        warnings.warn(
            f"dat.ops runs on its slow PyTorch reference on GPUs: {missing['_C_cuda']} (reinstall with nvcc)",
            stacklevel=2,
        )
    return missing
