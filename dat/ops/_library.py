"""The `dat` namespace of torch.ops, what its sampling ops register alike, and the built libraries of kernels."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    """Load what this torch can use; warns once where the CPU library is missing."""
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


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError for dual tensors: torch would call the op without their tangents."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{name} has no forward-mode derivatives; dat.ops.reference.{name} has them")


def second_derivatives(
    backward: Callable[..., tuple[Tensor, ...]], saved: Sequence[Tensor | None], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of `backward(*saved)` by the tensors `saved`, rarely needed and so not fast.

    torch differentiates `backward`, a reference, which makes third and higher derivatives work too.
    """
    higher = torch.is_grad_enabled()

    def input_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        # A view stands for the tensor alone, without the others that it may have been computed from or into.
        return tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        inputs = [input_of(tensor) for tensor in saved]
        firsts = backward(*inputs)
        used = [(first, g) for first, g in zip(firsts, cotangents, strict=True) if first.requires_grad]
        seconds = iter(
            torch.autograd.grad(
                [first for first, _ in used],
                [t for t in inputs if t is not None],
                [g for _, g in used],
                create_graph=higher,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return [None if tensor is None else next(seconds) for tensor in inputs]


def register_batching(name: str, dims: Sequence[int], outputs: Sequence[int]) -> None:
    """A vmap rule for an op that takes the items of one dimension each by itself: what is mapped over joins it.

    `dims` has that dimension of each tensor argument, `outputs` for each output the argument that it is batched like.
    """
    op = getattr(torch.ops.dat, name)

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def expand(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)

        many = [expand(tensor, dim) for tensor, dim in zip(args[: len(dims)], in_dims, strict=False)]
        merged = [
            x if x is None else x.movedim(0, dim).flatten(dim, dim + 1) for x, dim in zip(many, dims, strict=True)
        ]

        def split(out: Tensor, like: int) -> tuple[Tensor, int | None]:
            source = many[like]
            # What an op has nothing to say about comes back empty, without a batch dimension.
            if source is None or out.ndim == 1:
                return out, None
            return out.unflatten(dims[like], (info.batch_size, source.shape[1 + dims[like]])), dims[like]

        out = op(*merged, *args[len(dims) :])
        if isinstance(out, Tensor):
            return split(out, outputs[0])
        outs, out_dims = zip(*map(split, out, outputs), strict=True)
        return outs, out_dims

    torch.library.register_vmap(f"dat::{name}", batched, lib=LIBRARY)


def sampling_flops(samples: Sequence[int], value: Sequence[int]) -> int:
    """Four multiply-adds for each sample and channel of `value` [B, S, H, D]; a backward has twice as many.

    It takes four for the value's gradient and four for the corners' products with the output's gradient.
    """
    return 8 * math.prod(samples) * value[3]
