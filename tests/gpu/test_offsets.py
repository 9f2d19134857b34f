"""Positions of keys by the offset networks of DAT's stages beside those of the CPU, and their number of launches."""

import copy

import pytest
import torch
from gpu.calls import assert_close
from gpu.device import DEVICE, DRY, needs_card
from gpu.test_depthwise import kernels
from torch import nn

from dat.layers import DeformableAttention

HALF = torch.bfloat16
# Channels, groups, stride, kernel, release and range of the first, third and last stage of DAT++, and of DAT's third.
LAYERS = {
    "stage-1": (64, 1, 8, 9, "2023", -1.0),
    "stage-3": (256, 4, 2, 5, "2023", -1.0),
    "stage-4": (512, 8, 1, 3, "2023", -1.0),
    "2022": (384, 3, 1, 5, "2022", 2.0),
}


def make(name):
    torch.manual_seed(0)
    channels, groups, stride, kernel_size, release, factor = LAYERS[name]
    layer = DeformableAttention(channels, groups, groups, kernel_size, stride, factor, release=release)
    nn.init.normal_(layer.offset_proj.weight, std=0.1)
    nn.init.normal_(layer.offset_conv.bias)
    B = 1 if DRY else 8
    return layer, torch.randn(B, 14, 13, channels)


def with_gradients(layer, query, dtype):
    """Positions, locations, and the gradients of fixed sums of both by the query and all parameters."""
    leaf = query.to(dtype).detach().requires_grad_()
    parameters = [p for name, p in layer.named_parameters() if name.startswith("offset")]
    with torch.autocast(query.device.type, HALF, enabled=dtype == HALF):
        outs = layer._place_keys(leaf)
    grads = [torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out) for out in outs]
    return [t.detach() for t in (*outs, *torch.autograd.grad(outs, [leaf, *parameters], grads))]


@pytest.mark.parametrize("name", LAYERS)
def test_positions_equal_those_of_the_cpu_in_float64_and_repeat_to_the_bit(name):
    layer, query = make(name)
    exact = with_gradients(copy.deepcopy(layer).double(), query.double(), torch.float64)
    layer, query = layer.to(DEVICE), query.to(DEVICE)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        ours, again = (with_gradients(layer, query, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert_close(ours, exact, 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_rounds_convolutions_alone(name):
    layer, query = make(name)
    layer, query = layer.to(DEVICE), query.to(DEVICE)
    ours = with_gradients(layer, query, HALF)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_close(ours[:2], with_gradients(layer, query, torch.float32)[:2], 2e-2)


@needs_card
def test_what_follows_the_convolution_takes_one_launch_and_two():
    layer, query = make("stage-3")
    layer, query = layer.to(DEVICE), query.to(DEVICE)
    x = layer._convolve(query, None).detach().requires_grad_()
    layer._convolve = lambda query, bias: x
    layer._place_keys(query)
    forward, outs = kernels(lambda: layer._place_keys(query))
    leaves = [x, layer.offset_conv.bias, *layer.offset_norm.parameters(), layer.offset_proj.weight]
    grads = [torch.ones_like(out) for out in outs]
    backward, _ = kernels(lambda: torch.autograd.grad(outs, leaves, grads))
    assert (forward, backward) == (1, 2)
