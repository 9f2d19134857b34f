"""The depth-wise convolutions with residual of DAT++ beside torch's, and their number of launches."""

from contextlib import nullcontext

import pytest
import torch
from gpu.calls import assert_close
from gpu.device import DEVICE, DRY, needs_card
from torch import nn

from dat.layers.mlp import residual_depthwise

# Maps of DAT++, one that strips and tiles do not divide, and one of a detector.
CARD_SHAPES = ((8, 56, 56, 64), (8, 14, 14, 1024), (3, 9, 13, 260), (2, 200, 334, 64))
SHAPES = ((2, 9, 13, 260), (3, 7, 7, 8)) if DRY else CARD_SHAPES
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 in full where torch convolves, that values may be compared with the CPU's."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def make(shape, dtype=torch.float32):
    """A convolution, a map and the output's gradient."""
    torch.manual_seed(0)
    C = shape[-1]
    return nn.Conv2d(C, C, 3, padding=1, groups=C), *(torch.randn(shape).to(dtype) for _ in range(2))


def gradients(conv, x, grad, device=DEVICE):
    """The output, and the gradients by map, weight and bias."""
    conv, x = conv.to(device), x.to(device).requires_grad_()
    half = x.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, x.dtype) if half else nullcontext():
        out = residual_depthwise(conv, x)
    return [t.detach() for t in (out, *torch.autograd.grad(out, [x, conv.weight, conv.bias], grad.to(device)))]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_equal_those_of_the_cpu_in_float64_and_repeat_to_the_bit(shape, dtype):
    conv, x, grad = make(shape, dtype)
    ours, again = (gradients(conv, x, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert ours[0].dtype == dtype
    exact = gradients(conv.double(), x.double(), grad.double(), torch.device("cpu"))
    assert_close(ours, exact, 1e-5 if dtype == torch.float32 else 2e-2)


def kernels(run):
    """How many kernels a call starts, and what it returns."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()), result


@needs_card
def test_a_step_takes_one_launch_and_three():
    conv, x, grad = make(SHAPES[0], torch.bfloat16)
    gradients(conv, x, grad)
    x, grad = x.to(DEVICE).requires_grad_(), grad.to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        forward, out = kernels(lambda: residual_depthwise(conv, x))
    backward, _ = kernels(lambda: torch.autograd.grad(out, [x, conv.weight, conv.bias], grad))
    assert (forward, backward) == (1, 3)


def test_frozen_weights_change_no_gradient_of_the_map():
    conv, x, grad = make(SHAPES[0])
    _, expected, *_ = gradients(conv, x, grad)
    frozen, x = conv.to(DEVICE).requires_grad_(False), x.to(DEVICE).requires_grad_()
    out = residual_depthwise(frozen, x)
    assert torch.equal(torch.autograd.grad(out, x, grad.to(DEVICE))[0], expected)


class Residual(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return residual_depthwise(self.conv, x)


def test_compiled_calls_equal_eager_ones():
    torch.compiler.reset()
    conv, x, grad = make(SHAPES[0])
    eager = gradients(conv, x, grad)
    compiled = torch.compile(Residual(conv), fullgraph=True)
    x, grad = x.to(DEVICE).requires_grad_(), grad.to(DEVICE)
    out = compiled(x)
    grads = torch.autograd.grad(out, [x, conv.weight, conv.bias], grad)
    assert_close([out.detach(), *grads], eager, 1e-6 if DEVICE.type == "cuda" else 1e-5)
    if DEVICE.type == "cuda":
        assert kernels(lambda: compiled(x))[0] == 1


def second_derivatives(conv, x):
    x = x.requires_grad_()
    first = torch.autograd.grad(residual_depthwise(conv, x).square().sum(), x, create_graph=True)[0]
    return torch.autograd.grad(first.square().sum(), [x, conv.weight, conv.bias], allow_unused=True)[:2]


def test_second_derivatives():
    conv, x, _ = make((2, 9, 13, 12))
    ours = second_derivatives(conv.to(DEVICE), x.to(DEVICE))
    assert_close(ours, second_derivatives(conv.cpu().double(), x.double()), 1e-4)


def test_memory_that_starts_between_two_vectors():
    conv, x, grad = make((2, 9, 13, 12))
    expected = gradients(conv, x, grad)
    shifted = torch.cat((torch.zeros(1), x.flatten())).to(DEVICE)[1:].view(x.shape)
    assert_close(gradients(conv, shifted, grad), expected, 1e-6)


@needs_card
def test_ops_refuse_arguments_that_do_not_fit():
    x, weight = torch.zeros(2, 4, 4, 8, device=DEVICE), torch.zeros(8, 1, 3, 3, device=DEVICE)
    ops = torch.ops.dat
    for op, args, message in (
        (ops.residual_depthwise, (x[..., :6], weight[:6], None), "multiple of 4"),
        (ops.residual_depthwise, (x.double(), weight, None), "x must be float32"),
        (ops.residual_depthwise, (x, weight[1:], None), "weight must be"),
        (ops.residual_depthwise, (x, weight.half(), None), "weight must be float32"),
        (ops.residual_depthwise, (x, weight, weight[:7, 0, 0, 0]), "bias must be"),
        (ops.residual_depthwise_backward, (x[1:], x, weight, True), "grad must be"),
        (ops.residual_depthwise_backward, (x.half(), x, weight, False), "grad must be"),
    ):
        with pytest.raises(RuntimeError, match=f"residual_depthwise: .*{message}"):
            op(*args)
