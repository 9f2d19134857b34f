"""`ms_deform_attn` where arguments are not numbers, infinite or huge."""

import math

import pytest
import torch
from ops import samples
from ops.samples import every_device

from dat.ops import ms_deform_attn, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative to the largest element, or to 1 where all are smaller.
pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHAPES = ((5, 7), (3, 4))
WILD = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9]

every_reference = pytest.mark.parametrize("reference_size", [2, 4])


def inputs(reference_size=2, *, B=2, Q=5, H=3, D=8, P=2, shapes=SHAPES, dtype=torch.float32, narrow=None, device="cpu"):
    """Value, reference, offsets and logits; offsets and logits have the dtype `narrow`, and values `dtype`."""
    generator = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    layout = (B, Q, H, len(shapes), P)

    def rand(*shape, low, high, dtype):
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (uniform * (high - low) + low).to(device, dtype)

    value = rand(B, sum(h * w for h, w in shapes), H, D, low=-2, high=2, dtype=dtype)
    points = rand(B, Q, len(shapes), reference_size, low=-0.1, high=1.1, dtype=real)
    offsets = rand(*layout, 2, low=-3, high=3, dtype=narrow or dtype)
    return value, points, offsets, rand(*layout, low=-3, high=3, dtype=narrow or dtype)


def with_gradients(tensors, shapes=SHAPES):
    """Output, and gradients by value, reference, offsets and logits."""
    value, *points = (tensor.detach().requires_grad_() for tensor in tensors)
    out = ms_deform_attn(value, shapes, *points)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return out.detach(), *torch.autograd.grad(out, (value, *points), grad)


def exact(tensors, shapes=SHAPES):
    """What the definition says in float64."""
    value, *points = (tensor.double().cpu() for tensor in tensors)
    out = reference.ms_deform_attn(value, shapes, *points)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    grad = grad.to(tensors[0].dtype).double()
    return out, *reference.ms_deform_attn_backward(grad, value, shapes, *points)


def close(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        samples.close(a, b, TOLERANCE[dtype], least=1.0)


@every_device
@every_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wild", WILD)
def test_a_wild_offset_is_a_sample_outside_the_map(wild, dtype, reference_size, device):
    tensors = inputs(reference_size, dtype=dtype, device=device)
    if reference_size == 4:
        # Boxes large enough for an offset of 1e3 to lead out of them.
        tensors[1][..., 2:] = tensors[1][..., 2:].abs() + 0.5
    outside = [tensor.clone() for tensor in tensors]
    for axis in range(2):
        tensors[2][:, axis::2, 1, :, 0, axis] = wild
        outside[2][:, axis::2, 1, :, 0, axis] = 1e3
    for ours, expected in zip(with_gradients(tensors), with_gradients(outside), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@every_device
@every_reference
@pytest.mark.parametrize("wild", WILD)
def test_a_wild_reference_is_outside_the_map(wild, reference_size, device):
    for coordinate in range(reference_size):
        tensors = inputs(reference_size, device=device)
        outside = [tensor.clone() for tensor in tensors]
        tensors[1][:, ::2, 1, coordinate] = wild
        outside[1][:, ::2, 1, 0] = 1e3
        for ours, expected in zip(with_gradients(tensors), with_gradients(outside), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@every_device
@every_reference
def test_a_logit_of_minus_infinity_takes_no_part(reference_size, device):
    tensors = inputs(reference_size, device=device)
    tensors[3][:, :, 1, :, 0] = -math.inf
    ours = with_gradients(tensors)
    close(ours, exact(tensors), torch.float32)
    assert ours[3][:, :, 1, :, 0].count_nonzero() == 0
    assert ours[4][:, :, 1, :, 0].count_nonzero() == 0


@every_device
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e37])
def test_huge_logits_attend_to_one_sample(scale, device):
    tensors = inputs(device=device)
    tensors[3].mul_(scale)
    close(with_gradients(tensors), exact(tensors), torch.float32)


@every_device
@pytest.mark.parametrize("logits", [(math.inf, 0.0), (math.nan, 0.0), (-math.inf, -math.inf)])
def test_a_softmax_that_is_not_a_number_spoils_its_own_head_alone(logits, device):
    tensors = inputs(device=device)
    tensors[1].fill_(0.5)
    tensors[2].clamp_(-1, 1)
    clean = with_gradients(tensors)
    tensors[3][1, 2, 1] = torch.tensor(logits, device=device)
    spoiled = with_gradients(tensors)
    assert spoiled[0][1, 2, 1].isnan().all()
    others = torch.ones_like(tensors[3][..., 0, 0], dtype=torch.bool)
    others[1, 2, 1] = False
    for index in (0, 3, 4):
        torch.testing.assert_close(spoiled[index][others], clean[index][others], rtol=0, atol=0)
