"""One call of each op that both launches and compilation are tested with."""

import math

import torch

from dat.ops import deform_attn, deform_sample, ms_deform_attn, neighborhood_attn

SHAPES = ((12, 16), (6, 8))


def _sample(value, locations, weights):
    return deform_sample(value, SHAPES, locations, weights)


def _lone(value, locations):
    return deform_sample(value, SHAPES[:1], locations, align_corners=True)


def _attend(value, reference, offsets, logits):
    return ms_deform_attn(value, SHAPES, reference, offsets, logits)


def _deform(query, key, value, positions, table):
    return deform_attn(query, key, value, positions, table, size=(12, 16), scale=0.2)


def _neighborhood(query, key, value, bias):
    return neighborhood_attn(query, key, value, bias, size=(12, 16), kernel_size=7, scale=0.2)


def _shapes(name):
    B, Q, H, L, P, D = 2, 50, 4, len(SHAPES), 4, 32
    S, N = sum(h * w for h, w in SHAPES), math.prod(SHAPES[0])
    return {
        "deform_sample": ((B, S, H, D), (B, Q, H, L, P, 2), (B, Q, H, L, P)),
        "deform_sample-lone": ((B, N, H, 64), (B, Q, H, 1, 1, 2)),
        "ms_deform_attn": ((B, S, H, D), (B, Q, L, 2), (B, Q, H, L, P, 2), (B, Q, H, L, P)),
        "deform_attn": ((B, H, N, D), (B, H, 24, D), (B, H, 24, D), (B, 2, 24, 2), (H, 23, 31)),
        "neighborhood_attn": ((B, H, N, D), (B, H, N, D), (B, H, N, D), (H, 13, 13)),
    }[name]


FUNCTIONS = {
    "deform_sample": _sample,
    "deform_sample-lone": _lone,
    "ms_deform_attn": _attend,
    "deform_attn": _deform,
    "neighborhood_attn": _neighborhood,
}
# Arguments that are places in a map, and stay in float32.
PLACES = {"deform_sample": (1,), "deform_sample-lone": (1,), "ms_deform_attn": (1,), "deform_attn": (3,)}


def inputs(name, device, dtype=torch.float32):
    """Tensors of the call; places are random ones inside their map."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for index, shape in enumerate(_shapes(name)):
        drawn = torch.randn(shape, generator=generator)
        place = index in PLACES.get(name, ())
        tensors.append(drawn.sigmoid().to(device) if place else drawn.to(device, dtype))
    return tensors


def with_gradients(function, tensors):
    """The output, and the gradients of a fixed sum of it by every tensor."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_close(ours, theirs, tolerance=1e-4):
    """Every tensor equals the other's, up to `tolerance` times its largest value (1 where that is smaller)."""
    for one, other in zip(ours, theirs, strict=True):
        other = other.to(one.device, torch.float64)
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
