"""residual_depthwise: its CUDA kernels on the host, its derivatives, and the convolutions that it stands in for."""

import ctypes
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from ops import samples
from ops.samples import drawn, empty_like
from ops.test_cuda_kernels_on_host import Buffer, build, run_on_host
from torch import Tensor, nn
from torch.nn import functional as F

from dat.layers import mlp
from dat.ops import depthwise

BUFFERS = ("x", "weight", "bias", "out", "grad", "grad_x", "grad_weight", "grad_bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Errors that are allowed, relative to the largest value: kernels sum in float32 and round the sum once.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
close = partial(samples.close, least=1.0)


class Arguments(ctypes.Structure):
    """The same fields as in residual_depthwise.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*"BHWC", "processors", "last_lane_first")),
        *((name, Buffer) for name in BUFFERS),
    ]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    nchw = x.permute(0, 3, 1, 2)
    return (nchw + F.conv2d(nchw, weight, bias, padding=1, groups=len(weight))).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    bias: bool = True
    # Multiprocessors of the device: the parts that the weight's gradient is summed in.
    processors: int = 2


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("cuda_host") / "residual_depthwise.so", "residual_depthwise.cpp")


def call(library: ctypes.CDLL, case: Case, tensors: dict[str, Tensor], last_lane_first: bool) -> None:
    """Runs the kernels on `tensors`, by the names of BUFFERS."""
    sizes = dict(zip("BHWC", case.shape, strict=True))
    arguments = Arguments(**sizes, processors=case.processors, last_lane_first=last_lane_first)
    run_on_host(library, arguments, tensors, str(case.dtype))


def check(library: ctypes.CDLL, case: Case) -> None:
    """Forward and gradients against float64, and the same bits in whatever order threads run."""
    C = case.shape[3]
    inputs = {"x": drawn(*case.shape).to(case.dtype), "weight": drawn(C, 1, 3, 3, seed=1)}
    if case.bias:
        inputs["bias"] = drawn(C, seed=2)
    grad = drawn(*case.shape, seed=3).to(case.dtype)
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    expected = exact(*leaves, *([] if case.bias else [None]))
    results = []
    for last_lane_first in (False, True):
        out = {"out": empty_like(inputs["x"])}
        call(library, case, inputs | out, last_lane_first)
        grads = {f"grad_{name}": empty_like(t) for name, t in inputs.items()}
        grads.setdefault("grad_bias", torch.full((C,), float("nan")))
        call(library, case, inputs | {"grad": grad} | grads, last_lane_first)
        results.append([*out.values(), *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    out, grad_x, grad_weight, grad_bias = results[0]
    theirs = torch.autograd.grad(expected, leaves, grad.double())
    close(out, expected.detach(), TOLERANCE[case.dtype])
    close(grad_x, theirs[0], TOLERANCE[case.dtype])
    close(grad_weight, theirs[1], 1e-6)
    close(grad_bias, grad.double().sum((0, 1, 2)), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [4, 12, 64, 260])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (9, 13), (17, 4)], ids=str)
def test_kernels_equal_float64(library, size, C, dtype):
    check(library, Case((3, *size, C), dtype))


CASES = {
    "one-image": Case((1, 9, 13, 12)),
    "without-bias": Case((2, 7, 7, 32), torch.bfloat16, bias=False),
    "one-slot-for-a-thread": Case((3, 17, 9, 32), processors=100),
    "many-parts": Case((30, 8, 24, 4), processors=400),
    "two-tiles-of-32-lanes": Case((1, 3, 5, 256), torch.float16),
    "no-images": Case((0, 4, 4, 8)),
    "no-rows": Case((2, 0, 4, 8)),
    "no-columns": Case((2, 4, 0, 8)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_calls(library, case):
    if 0 not in case.shape[1:3]:
        return check(library, case)
    # torch has no convolution of these.
    C = case.shape[3]
    x, weight, grads = torch.empty(case.shape), drawn(C, 1, 3, 3), [empty_like(drawn(C, 9)), empty_like(drawn(C))]
    call(library, case, {"x": x, "weight": weight, "out": x.clone()}, False)
    outputs = {"grad_x": x.clone(), "grad_weight": grads[0], "grad_bias": grads[1]}
    call(library, case, {"x": x, "weight": weight, "grad": x, **outputs}, False)
    assert not any(grad.any() for grad in grads)


def test_infinity_reaches_its_neighbours_alone(library):
    case = Case((1, 9, 6, 4))
    x, weight = drawn(*case.shape), drawn(4, 1, 3, 3, seed=1)
    x[0, 4, 2, 1] = float("inf")
    out = empty_like(x)
    call(library, case, {"x": x, "weight": weight, "out": out}, False)
    wild = torch.zeros_like(x, dtype=torch.bool)
    wild[0, 3:6, 1:4, 1] = True
    assert torch.equal(~out.isfinite(), wild)


@pytest.fixture
def calls(monkeypatch):
    """Makes the CPU the device of the raw ops, in torch's convolution; the names of those that are called."""
    called = []

    def forward(x, weight, bias):
        called.append("forward")
        return exact(x.float(), weight, bias).to(x.dtype)

    def backward(grad, x, weight, with_weight):
        called.append("backward" if with_weight else "backward of x")
        # Autograd does not reach below the op.
        g, nchw = (t.float().permute(0, 3, 1, 2) for t in (grad, x))
        ones, C = [1, 1], len(weight)
        options = [C], ones, ones, ones, False, [0, 0], C, [True, with_weight, with_weight]
        grad_x, *grads = torch.ops.aten.convolution_backward(g, nchw, weight, *options)
        grad_x = (g + grad_x).permute(0, 2, 3, 1).to(x.dtype)
        return grad_x, *(grads if with_weight else (weight.new_empty(0), weight.new_empty(0)))

    monkeypatch.setattr(depthwise, "DEVICE", "cpu")
    monkeypatch.setattr(depthwise, "BUILT", True)
    with torch.library._scoped_library("dat", "IMPL") as implementation:
        implementation.impl("residual_depthwise", forward, "CPU")
        implementation.impl("residual_depthwise_backward", backward, "CPU")
        yield called


def derivatives(function, inputs):
    """Output, gradients, and gradients of those."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, *([None] if len(leaves) == 2 else []))
    cotangent = drawn(*out.shape, seed=4).to(out.dtype)
    plain = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    firsts = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(first.square().sum() for first in firsts), leaves)
    return [t.detach() for t in (out, *plain, *firsts, *seconds)]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_any_order(bias, dtype):
    inputs = [drawn(2, 5, 4, 8).to(dtype), drawn(8, 1, 3, 3, seed=1), drawn(8, seed=2)][: 3 if bias else 2]
    ours = derivatives(depthwise.residual_depthwise, inputs)
    assert ours[0].dtype == dtype
    for one, other in zip(ours, derivatives(exact, [t.double() for t in inputs]), strict=True):
        close(one, other, 20 * TOLERANCE[dtype])


@pytest.mark.usefixtures("calls")
def test_third_derivatives_and_maps_that_are_not_contiguous():
    x = drawn(2, 8, 5, 4).permute(0, 2, 3, 1).requires_grad_()
    weight = drawn(8, 1, 3, 3, seed=1)

    def third(function):
        first = torch.autograd.grad(function(x, weight, None).pow(4).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        return torch.autograd.grad(second.sum(), x)[0]

    def mixed(function):
        grads = torch.autograd.grad(function(x, weight, None).pow(4).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), x)[0]

    weight.requires_grad_()
    for derivative in (third, mixed):
        close(derivative(depthwise.residual_depthwise), derivative(exact), 1e-5)


class Other(nn.Conv2d):
    pass


def convolution(kind=nn.Conv2d, size=3, **arguments):
    torch.manual_seed(0)
    return kind(8, 8, size, groups=8, **{"padding": size // 2} | arguments)


HOOKS = {
    "forward": lambda conv: conv.register_forward_hook(lambda *_: None),
    "forward-pre": lambda conv: conv.register_forward_pre_hook(lambda *_: None),
    "backward": lambda conv: conv.register_full_backward_hook(lambda *_: None),
    "backward-pre": lambda conv: conv.register_full_backward_pre_hook(lambda *_: None),
    "global": lambda conv: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_convolutions_with_hooks_are_called(calls, hook):
    conv, x = convolution(), drawn(1, 5, 4, 8)
    mlp.residual_depthwise(conv, x)
    assert calls == ["forward"]
    handle = HOOKS[hook](conv)
    try:
        mlp.residual_depthwise(conv, x)
    finally:
        handle.remove()
    assert calls == ["forward"]


CONVOLUTIONS = {
    "subclass": lambda: convolution(Other),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(convolution()),
    "circular": lambda: convolution(padding_mode="circular"),
    "dilated": lambda: convolution(dilation=2, padding=2),
    "same": lambda: convolution(padding="same"),
    "larger": lambda: convolution(size=5),
    "dense": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "half": lambda: convolution().bfloat16(),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_other_convolutions_are_called(calls, make):
    with torch.autocast("cpu"):
        mlp.residual_depthwise(make(), drawn(1, 5, 4, 8))
    assert not calls


def test_a_forward_of_the_instance_is_called(calls):
    conv = convolution()
    conv.forward = torch.zeros_like
    x = drawn(1, 5, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mlp.residual_depthwise(conv, x), x)
    assert not calls


def test_dtypes_and_widths_that_the_kernels_take(calls, monkeypatch):
    conv, x = convolution(), drawn(1, 5, 4, 8)

    def served(x, weight=conv.weight, bias=conv.bias):
        return depthwise.has_residual_depthwise(x, weight, bias)

    assert served(x)
    assert served(x, bias=None)
    assert served(nn.Parameter(x))
    assert not served(x.bfloat16())
    assert not served(x.double())
    assert not served(x[..., :6], conv.weight[:6], conv.bias[:6])
    with torch.autocast("cpu", torch.bfloat16):
        assert served(x)
        assert served(x.bfloat16())
        assert not served(x.half())
        assert mlp.residual_depthwise(conv, x).dtype == torch.float32
    monkeypatch.setattr(depthwise, "BUILT", False)
    assert not served(x)
    monkeypatch.undo()
    assert not served(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = convolution()

    def forward(self, x):
        return mlp.residual_depthwise(self.conv, x)


def flops(layer, x):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 18 * x.numel()


def tangent(layer, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent


def equals_compiled(transform, layer, x):
    torch.compiler.reset()
    found = torch.compile(transform(layer), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, transform(layer)(x))


TRACERS = {
    "compiled-grad": lambda layer, x: equals_compiled(
        lambda f: torch.func.grad(lambda x: f(x).square().sum()), layer, x
    ),
    "compiled-vmap": lambda layer, x: equals_compiled(lambda f: torch.func.vmap(lambda x: f(x)), layer, x[None]),
    "export": lambda layer, x: torch.export.export(layer, (x,), strict=True),
    "export-non-strict": lambda layer, x: torch.export.export(layer, (x,), strict=False),
    "jit": lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None]),
    "forward-mode": tangent,
    "flops": flops,
}


@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_other_tracers_see_torchs_convolution(calls, trace):
    layer, x = Layer(), drawn(2, 5, 4, 8)
    trace(layer, x)
    assert not calls
    layer(x)
    assert calls == ["forward"]


def test_a_training_step_calls_each_op_once(calls):
    layer, x = Layer(), drawn(2, 5, 4, 8).requires_grad_()
    layer(x).square().sum().backward()
    assert calls == ["forward", "backward"]
    conv = layer.conv
    leaves = [t.detach().double().requires_grad_() for t in (x, conv.weight, conv.bias)]
    exact(*leaves).square().sum().backward()
    for ours, theirs in zip((x, conv.weight, conv.bias), leaves, strict=True):
        close(ours.grad, theirs.grad, 1e-5)


def test_frozen_weights_have_no_gradients_to_work_out(calls):
    layer, x = Layer().requires_grad_(False), drawn(2, 5, 4, 8).requires_grad_()
    layer(x).square().sum().backward()
    assert calls == ["forward", "backward of x"]
    leaf = x.detach().double().requires_grad_()
    exact(leaf, layer.conv.weight.double(), layer.conv.bias.double()).square().sum().backward()
    close(x.grad, leaf.grad, 1e-5)


def test_a_compiled_step_calls_each_op_once_for_maps_of_every_size(calls):
    torch.compiler.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 4), (9, 6)):
        x = drawn(2, *size, 8).requires_grad_()
        results = []
        for run in (compiled, layer):
            with torch.autocast("cpu", torch.bfloat16), torch._dynamo.config.patch(error_on_recompile=True):
                out = run(x.bfloat16())
            assert out.dtype == torch.bfloat16
            results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
            assert calls == ["forward", "backward"]
            calls.clear()
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs, 2 * TOLERANCE[torch.bfloat16])
