"""The Triton kernels of keys' positions without a GPU: under Triton's interpreter, and compiled for one.

Triton decides when it is imported whether it interprets, which takes a process of its own.
"""

from functools import partial

import pytest
import torch
from ops.test_deform_attn_triton import compile_for_sm_90, run
from torch.nn import functional as F

from dat.ops.key_positions import key_positions
from dat.ops.placement import Placement

pytest.importorskip("triton")
EPS = 1e-5
PLACEMENTS = [Placement(factor, release) for release in ("2022", "2023") for factor in (2.0, 0.0, -1.0)]
# [B, Hk, Wk, g, c]: one key, one row, more keys than a program takes at a time, channels that fill no block.
SHAPES = [(1, 1, 1, 2, 16), (2, 1, 5, 1, 20), (2, 5, 4, 3, 32), (1, 3, 3, 1, 130)]


def make(shape, dtype=torch.float32):
    """A map, the four parameters, and gradients of positions and locations."""
    torch.manual_seed(0)
    B, Hk, Wk, g, c = shape
    tensors = [torch.randn(shape).to(dtype), *torch.randn(3, c), torch.randn(2, c) / c**0.5]
    return tensors, (torch.randn(B, g, Hk * Wk, 2), torch.randn(B, Hk * Wk, g, 1, 1, 2))


def reference(placement, x, conv_bias, norm_weight, norm_bias, proj):
    x = F.layer_norm(x + conv_bias, norm_weight.shape, norm_weight, norm_bias, EPS)
    return placement(F.linear(F.gelu(x), proj))


def with_gradients(function, tensors, grads, second):
    """Outputs of a function, its gradients, and, if wanted, the gradients of their sum of squares."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outs = function(*leaves)
    firsts = torch.autograd.grad(outs, leaves, grads, create_graph=second)
    if not second:
        return *outs, *firsts
    return *outs, *firsts, *torch.autograd.grad(sum(first.square().sum() for first in firsts), leaves)


def take_the_cpu():
    """Has the kernels, which the interpreter runs on the CPU, serve it in the place of a GPU."""
    from dat.ops import _library
    from dat.ops import key_positions as module

    module.DEVICE, module.has_triton = "cpu", lambda: True
    for name, kernel in (("key_positions", module._forward), ("key_positions_backward", module._backward)):
        torch.library.impl(_library.LIBRARY, name, "CPU")(kernel)


def interpret():
    from dat.ops import key_positions_triton

    # Sums in several parts, of several blocks each.
    key_positions_triton.ELEMENTS, key_positions_triton.PROGRAMS = 256, 3
    for placement in PLACEMENTS:
        ours = partial(key_positions, eps=EPS, placement=placement)
        for shape in SHAPES:
            tensors, grads = make(shape)
            wide = [t.double() for t in tensors], [g.double() for g in grads]
            for second in (False, True) if shape == SHAPES[1] else (False,):
                results = with_gradients(ours, tensors, grads, second)
                exact = with_gradients(partial(reference, placement), *wide, second)
                for one, other in zip(results, exact, strict=True):
                    assert one.shape == other.shape
                    tolerance = 1e-4 * max(1, float(other.abs().max()))
                    torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)
            print("equal", placement, shape)


def interpret_half():
    """Half precision rounds the map and its gradient, and nothing else; NaN in a key's pixels stays with that key."""
    placement = Placement(-1.0, "2023")
    (x, *parameters), grads = make(SHAPES[2], torch.float16)
    leaf = x.requires_grad_()
    outs = key_positions(leaf, *parameters, eps=EPS, placement=placement)
    wide = x.detach().float().requires_grad_()
    expected = key_positions(wide, *parameters, eps=EPS, placement=placement)
    assert all(map(torch.equal, outs, expected))
    (half,), (full,) = torch.autograd.grad(outs, [leaf], grads), torch.autograd.grad(expected, [wide], grads)
    assert half.dtype == torch.float16
    assert torch.equal(half, full.half())
    spoiled = x.detach().clone()
    spoiled[1, 2, 3, 0, 5] = float("nan")
    positions, locations = key_positions(spoiled, *parameters, eps=EPS, placement=placement)
    assert positions[1, 0, 11].isnan().all()
    assert positions.isnan().sum() == locations.isnan().sum() == 2


def interpret_clamp():
    """The gradient is zero at both bounds of the clamp, as F.hardtanh's is; also of tensors with gaps in memory."""
    placement = Placement(-1.0, "2023")
    (x, conv_bias, norm_weight, norm_bias, proj), grads = make((1, 3, 3, 1, 16))
    # All offsets are -1/2, exactly, and the grid is -1/2, 1/2, 3/2.
    norm_weight.zero_()
    norm_bias.fill_(8)
    proj.fill_(-(2**-8))
    tensors = [torch.stack((t, t), -1)[..., 0] for t in (x, conv_bias, norm_weight, norm_bias, proj)]
    grads = [grad.mT.contiguous().mT for grad in grads]
    ours = with_gradients(partial(key_positions, eps=EPS, placement=placement), tensors, grads, False)
    exact = with_gradients(partial(reference, placement), tensors, grads, False)
    assert set(ours[0].unique().tolist()) == {-1, 0, 1}
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def interpret_layer():
    """A layer by the kernel and by PyTorch: outputs and gradients of all its parameters, batches of gradients too."""
    from dat.layers import DeformableAttention
    from dat.ops import key_positions as module

    for arguments in (
        {"release": "2023", "offset_range_factor": -1.0, "kernel_size": 3, "stride": 2},
        {"release": "2022", "kernel_size": 3},
    ):
        torch.manual_seed(0)
        layer = DeformableAttention(24, 4, num_groups=2, table_size=(5, 6), **arguments)
        torch.nn.init.normal_(layer.offset_proj.weight)
        torch.nn.init.normal_(layer.offset_conv.bias)
        x, grad = torch.randn(2, 2, 5, 6, 24)
        results = []
        for device in ("cpu", "cuda"):
            module.DEVICE = device
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            assert ("key_positionsBackward" in names_of_graph(out)) == (device == "cpu")
            results.append([out, *torch.autograd.grad(out, [leaf, *layer.parameters()], grad, retain_graph=True)])
            results[-1] += torch.autograd.grad(out, [leaf], torch.stack((grad, -grad)), is_grads_batched=True)
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        module.DEVICE = "cpu"
        for part in (layer.offset_conv, layer.offset_norm, layer.offset_proj):
            seen = []
            hook = part.register_forward_hook(lambda *args, seen=seen: seen.append(1))
            torch.testing.assert_close(layer(x), results[0][0], rtol=1e-4, atol=1e-4)
            assert seen, "a hook was not called"
            hook.remove()


def interpret_refused():
    """Layers that are not those of the kernel, which PyTorch computes, or refuses."""
    from torch import nn

    from dat.layers import DeformableAttention

    def layer(**parts):
        torch.manual_seed(0)
        made = DeformableAttention(24, 4, num_groups=2, kernel_size=3, no_off="no_off" in parts)
        for name, part in parts.items():
            if name != "no_off":
                setattr(made, name, part)
        return made

    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    projection = type(layer().offset_proj)
    x = torch.randn(1, 4, 4, 24)
    assert layer()._kernel_parameters(x)
    for parts in (
        {"no_off": True},
        {"offset_norm": Doubled(12)},
        {"offset_norm": nn.LayerNorm((2, 12))},
        {"offset_norm": nn.LayerNorm(12, bias=False)},
        {"offset_norm": nn.LayerNorm(12, elementwise_affine=False)},
        {"offset_conv": nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)},
        {"offset_proj": projection(12, 2)},
        {"offset_proj": projection(12, 4, bias=False)},
        {"offset_proj": nn.Linear(12, 2, bias=False)},
    ):
        assert not layer(**parts)._kernel_parameters(x), parts
    assert not layer()._kernel_parameters(x[:0])
    assert not layer()._kernel_parameters(x.half())
    assert not layer().double()._kernel_parameters(x.double())
    with torch.compiler.set_stance("force_eager"), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert not layer()._kernel_parameters(torch.empty(1, 4, 4, 24))


def names_of_graph(out):
    """Names of all nodes of an output's autograd graph."""
    nodes, names = [out.grad_fn], set()
    for node in nodes:
        names.add(type(node).__name__)
        nodes += [other for other, _ in node.next_functions if other is not None and other not in nodes]
    return names


def test_interpreted_kernels_equal_the_reference_in_float64():
    done = run(
        "from ops.test_key_positions import *; take_the_cpu(); interpret(); interpret_half(); interpret_clamp(); "
        "interpret_layer(); interpret_refused()",
        TRITON_INTERPRET="1",
    )
    assert done.count("equal") == len(PLACEMENTS) * len(SHAPES)


@pytest.mark.parametrize("width", [64, 128, 512])
def test_kernels_compiled_for_sm_90_fit_its_registers(width, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from dat.ops import key_positions_triton as kernels

    x = torch.empty(1, 7, 7, 1, width)
    for placement in (PLACEMENTS[0], PLACEMENTS[-1]):
        _, _, constants = kernels.arguments(x, EPS, placement)
        for kernel, half in ((kernels.forward_kernel, ["x"]), (kernels.backward_kernel, ["x", "grad_x"])):
            names = kernel.arg_names
            types = dict.fromkeys(names[: names.index("keys")], "*fp32") | dict.fromkeys(half, "*bf16")
            types |= {name: "fp32" for name in names if name.startswith(("eps", "start", "step", "reach"))}
            shared, stack = compile_for_sm_90(kernel, types, constants)
            assert shared <= 16 * 1024
            assert stack == 0
