"""Helpers of several ops: checks of arguments, dtypes, derivatives, vmap rules and FLOPs."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from dat.ops._library import LIBRARY

Shapes = Sequence[tuple[int, int]]
# The types of tensors that nobody else has to do with.
PLAIN = (Tensor, torch.nn.Parameter)

# The abstract class comes last: asking it takes ten times as long as the others.
_SEQUENCES = (tuple, list, Sequence)
_INTS = (int, torch.SymInt)


def check_value(value: Tensor, shapes: Shapes) -> None:
    """Raise TypeError or ValueError unless `value` is [B, S, H, D] with the pixels of `shapes`."""
    if value.ndim != 4:
        raise ValueError(f"value must be [B, S, H, D], got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"value must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if isinstance(shapes, Tensor):
        raise TypeError("shapes must be ((h_0, w_0), ...) of ints, got a tensor (use shapes.tolist())")
    if not isinstance(shapes, _SEQUENCES) or not shapes or not all(map(_is_size, shapes)):
        raise ValueError(f"shapes must be ((h_0, w_0), ...) of non-negative ints, got {shapes}")
    S = value.shape[1]
    if sum([h * w for h, w in shapes]) != S:
        raise ValueError(f"shapes {tuple(map(tuple, shapes))} must have as many pixels as value has rows, S = {S}")


def _is_size(shape: object) -> bool:
    if not isinstance(shape, _SEQUENCES) or len(shape) != 2:
        return False
    h, w = shape
    return isinstance(h, _INTS) and isinstance(w, _INTS) and bool(h >= 0 and w >= 0)


def check_device(like: Tensor, tensor: Tensor, name: str, like_name: str = "value") -> None:
    """Raise ValueError unless the argument `name` is on the device of the argument `like_name`."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of `tensor`, None where it is off."""
    device = tensor.device.type
    # The meta device has no autocast, and torch refuses to say that it is off.
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def autocast(value: Tensor) -> Tensor:
    """`value`, where it is float32 and autocast is on, in autocast's dtype."""
    dtype = autocast_dtype(value) if value.dtype == torch.float32 else None
    return value if dtype is None else value.to(dtype)


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of `tensor`: it rounds the operands of products to half precision."""
    on = autocast_dtype(tensor) is not None
    return torch.autocast(tensor.device.type, enabled=False) if on else nullcontext()


def sum_dtype(value: Tensor) -> torch.dtype:
    """The dtype that kernels sum `value` in: float64 for float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which takes a microsecond even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def untraced(shapes: Shapes) -> Shapes:
    """`shapes` of ints: while torch.jit.trace runs, sizes taken from a tensor's shape are tensors."""
    if torch.jit.is_tracing() and not isinstance(shapes, Tensor):
        return [(int(h), int(w)) for h, w in shapes]
    return shapes


def flatten(shapes: Shapes) -> list[int]:
    """(h_0, w_0, h_1, ...), as the ops' schemas take them."""
    return [size for shape in shapes for size in shape]


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """((h_0, w_0), ...) of `flatten`'s list."""
    return list(zip(flat[::2], flat[1::2], strict=True))


@cache
def why_no_triton() -> str:
    """The reason why Triton cannot launch kernels on GPUs here, "" if it can."""
    if find_spec("triton") is None:
        return "it is not installed"
    try:
        from triton.runtime import driver

        # Compiles a module with the C compiler of the machine.
        _ = driver.active.utils
    # Whatever ails an installation: imports, a compiler, files that cannot be written.
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


@cache
def has_triton() -> bool:
    """Whether Triton can launch kernels on GPUs; warns where it cannot."""
    if reason := why_no_triton():
        warnings.warn(f"Triton does not work, so DAT's attentions are slow on this GPU: {reason}", stacklevel=2)
    return not reason


def run_triton(kernels: Callable[..., Any], reference: Callable[..., Any], query: Tensor, *args: Any) -> Any:
    """`kernels(*args)` on the device of `query`; `reference(*args)` where tiles exceed the GPU's shared memory."""
    from triton.runtime.errors import OutOfResources

    try:
        with torch.cuda.device_of(query):
            return kernels(*args)
    except OutOfResources:
        return reference(*args)


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError for dual tensors: torch would call the op without their tangents."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(f"{name} has no forward-mode derivatives; dat.ops.reference.{name} has them")


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Register the derivatives of op `name`, as torch.library.register_autograd does; returns the op to call.

    torch.library's wrapper around derivatives serves every tracer and takes most of a small call's time. The returned
    function calls the registered op where something traces, and otherwise an autograd.Function with the same formulas.
    """
    torch.library.register_autograd(f"dat::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    packet = getattr(torch.ops.dat, name)
    op = packet.default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out = op(*args)
        setup_context(ctx, args, out)
        return out

    # Autograd graphs and the profiler show this name.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        if is_traced(args):
            return packet(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def fits_kernels(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a map and its parameters may go to kernels that take parameters in float32.

    Dual tensors may not, nor subclasses: those that only dispatch, as DTensor, have no mode and no __torch_function__
    that `is_traced` would see.
    """
    return (
        # First, as tensors of torch.fx have no device.
        type(x) in PLAIN
        and all(p is None or (type(p) in PLAIN and p.dtype == torch.float32) for p in parameters)
        and forward_ad._current_level < 0
        # Without autocast, torch refuses a map in half precision with weights in float32.
        and x.dtype in (torch.float32, autocast_dtype(x))
    )


def is_traced(args: Sequence[Any]) -> bool:
    """Whether anything but autograd may want to see a call: torch.compile, export, torch.func, modes or subclasses."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or _has_torch_function(args)
    )


def _has_torch_function(args: Sequence[Any]) -> bool:
    """Whether an argument's type, or a mode that is not just torch.set_default_device, wants to see a call."""
    if not torch.overrides.has_torch_function(args):
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    others = not modes or any(type(mode) is not DeviceContext for mode in modes)
    return others or any(hasattr(type(arg), "__torch_function__") and type(arg) not in PLAIN for arg in args)


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
        # Differentiate with respect to a view, so that gradients stop at this tensor.
        return tensor.view_as(tensor) if higher and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad(), full_precision(cotangents[0]):
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
    """A vmap rule for an op that is independent along one dimension: the mapped dimension is merged into it.

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
            # Outputs for absent optional inputs are empty and have no batch dimension.
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
