"""Layer norms of DAT's maps beside torch's, under autocast, and their number of launches."""

import pytest
import torch
from gpu.calls import assert_close
from gpu.device import DEVICE, DRY, needs_card
from gpu.test_depthwise import kernels
from torch import nn

from dat.layers.norm import add_layer_norm, layer_norm

# Stem and stages of DAT++, a map of a detector, and widths of other models.
CARD_SHAPES = (
    (8, 112, 112, 32),
    (8, 56, 56, 64),
    (8, 14, 14, 256),
    (8, 7, 7, 512),
    (2, 200, 334, 64),
    (3, 9, 13, 260),
)
SHAPES = ((2, 9, 13, 260), (3, 7, 7, 32)) if DRY else CARD_SHAPES
HALF = torch.bfloat16
LINEAR = nn.Linear(1, 1)


def make(shape):
    """A norm, a map, a branch that is added to it, and gradients of the sum and of its norm."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(shape[-1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, *(torch.randn(shape) for _ in range(4))


def on_device(norm, *tensors):
    return norm.to(DEVICE), *(t.to(DEVICE) for t in tensors)


def with_gradients(norm, x, branch, grad_sum, grad, before=LINEAR):
    leaves = [t.detach().requires_grad_() for t in (x, branch)]
    outs = add_layer_norm(norm, *leaves, before)
    return [t.detach() for t in (*outs, *torch.autograd.grad(outs, [*leaves, *norm.parameters()], (grad_sum, grad)))]


@pytest.mark.parametrize(("half", "before"), [(False, LINEAR), (True, LINEAR), (True, None)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_equal_those_of_the_cpu_in_float64_and_repeat_to_the_bit(shape, half, before):
    norm, x, branch, grad_sum, grad = on_device(*make(shape))
    with torch.autocast(DEVICE.type, HALF, enabled=half):
        if half:
            branch = branch.to(HALF)
        grad = grad.to(add_layer_norm(norm, x, branch, before)[1].dtype)
        ours, again = (with_gradients(norm, x, branch, grad_sum, grad, before) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    exact = with_gradients(norm.double().cpu(), *(t.double().cpu() for t in (x, branch, grad_sum, grad)))
    assert_close(ours, exact, 2e-2 if half else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_of_convolutions(shape, dtype):
    norm, x, _, _, grad = on_device(*make(shape))
    half = dtype != torch.float32

    def run(norm, x, grad):
        x = x.detach().requires_grad_()
        out = layer_norm(norm, x)
        return [t.detach() for t in (out, *torch.autograd.grad(out, [x, *norm.parameters()], grad.to(out.dtype)))]

    x = x.to(dtype)
    with torch.autocast(DEVICE.type, dtype, enabled=half):
        ours = run(norm, x, grad)
    # On a GPU autocast has norms in float32.
    assert DRY or ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    assert_close(ours, run(norm.double().cpu(), x.double().cpu(), grad.double().cpu()), 5e-2 if half else 1e-5)


def test_memory_that_starts_between_two_vectors():
    norm, *tensors = on_device(*make(SHAPES[-1]))
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in tensors]
    assert_close(with_gradients(norm, *shifted), with_gradients(norm, *tensors), 1e-6)


@needs_card
def test_a_step_takes_one_launch_and_two():
    norm, x, branch, *_ = on_device(*make(SHAPES[0]))
    branch = branch.to(HALF)
    with torch.autocast("cuda", HALF):
        with_gradients(norm, x, branch, x, branch)
        x.requires_grad_()
        branch.requires_grad_()
        forward, outs = kernels(lambda: add_layer_norm(norm, x, branch, before=LINEAR))
    grads = [torch.ones_like(out) for out in outs]
    backward, _ = kernels(lambda: torch.autograd.grad(outs, [x, branch, *norm.parameters()], grads))
    assert (forward, backward) == (1, 2)


@needs_card
def test_ops_refuse_arguments_that_do_not_fit():
    x, weight = torch.zeros(2, 4, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    ops, float32, wide = torch.ops.dat, torch.float32, torch.zeros(2, 516, device=DEVICE)
    for op, args, message in (
        (ops.layer_norm, (x[..., :6], None, weight[:6], weight[:6], 1e-5, float32), "multiple of 4"),
        (ops.layer_norm, (wide, None, wide[0], wide[0], 1e-5, float32), "multiple of 4 up to 512"),
        (ops.layer_norm, (x.double(), None, weight, weight, 1e-5, float32), "must be float32"),
        (ops.layer_norm, (x.half(), None, weight, weight, 1e-5, HALF), "must be float32"),
        (ops.layer_norm, (x, x, weight, weight, 1e-5, HALF), "must be float32"),
        (ops.layer_norm, (x, x[1:], weight, weight, 1e-5, float32), "branch must have"),
        (ops.layer_norm, (x, None, weight[1:], weight, 1e-5, float32), "weight must be"),
        (ops.layer_norm, (x, None, weight, weight.half(), 1e-5, float32), "bias must be"),
        (ops.layer_norm_backward, (x[1:], None, x, weight, 1e-5, None, True), "grad must have"),
        (ops.layer_norm_backward, (x, x.half(), x, weight, 1e-5, None, True), "grad_sum must have"),
    ):
        with pytest.raises(RuntimeError, match=f"layer_norm: .*{message}"):
            op(*args)
