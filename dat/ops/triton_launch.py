"""Functions for the Triton kernels, among them `launch`, which costs the host little for arguments seen before."""

# Triton finds out the types of its kernels' arguments when they are called.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)

# Compiled kernels and the values of their constants. Sizes and chunks of a map are keys too: enough for many maps.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
MOST_KEYS = 4096


def launch(
    kernel: Any, programs: int, tensors: Sequence[Tensor], numbers: tuple[float, ...], constants: dict[str, Any]
) -> None:
    """kernel[(programs,)](*tensors, *numbers, **constants), the arguments in the order of the kernel's.

    Triton looks at every argument of every launch to find out which compiled kernel it needs, which takes the host
    several times as long as to launch it. The same numbers with tensors of the same dtypes, aligned alike, always need
    the same one.
    """
    key = (
        id(kernel),
        tensors[0].device,
        numbers,
        tuple([(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors]),
        tuple(constants.values()),
    )
    found = _compiled.get(key)
    if found is not None:
        compiled, values = found
        compiled[(programs, 1, 1)](*tensors, *numbers, *values)
        return
    # Triton 3.10 adds and multiplies in two instructions unless told otherwise.
    compiled = kernel[(programs,)](*tensors, *numbers, **constants, enable_fp_fusion=True)
    # The interpreter compiles nothing.
    if compiled is not None:
        if len(_compiled) >= MOST_KEYS:
            _compiled.clear()
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _compiled[key] = compiled, [constants[name] for name in names]


def ceil_div(length: int, size: int) -> int:
    """Blocks of `size` in `length`; triton.cdiv takes several microseconds on the host."""
    return -(-length // size)


def power_of_2(least: int) -> int:
    """The first power of 2 that is not below `least`."""
    return 1 << (least - 1).bit_length()


def product_precision(dtype: torch.dtype) -> str:
    """How exact products are: as those of float32, by three of 19-bit numbers, unless torch allows TF32 for them."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


@triton.jit
def exp(scores, shift):
    """exp(scores - shift) in two instructions; tl.exp takes six, as it keeps numbers below 1e-38."""
    return tl.exp2(scores * LOG2E - shift * LOG2E)
