"""torch.compile, torch.export and AOTInductor see the ops as they are, at sizes that are not known beforehand."""

import os
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.export import Dim

from dat.layers import DeformableAttention, MSDeformAttn
from dat.ops import deform_sample, ms_deform_attn

HEADS, CHANNELS, POINTS = 3, 8, 2
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch.manual_seed(0)


def sampling_points(B, Q):
    return torch.rand(B, Q, HEADS, 2, POINTS, 2), torch.randn(B, Q, HEADS, 2, POINTS)


def attention_points(B, Q, reference_size=2):
    offsets = torch.randn(B, Q, HEADS, 2, POINTS, 2)
    return torch.rand(B, Q, 2, reference_size), offsets, torch.randn(B, Q, HEADS, 2, POINTS)


def layer_inputs(B, Q):
    return torch.randn(B, Q, HEADS * CHANNELS), torch.rand(B, Q, 2, 2)


class Levels(nn.Module):
    """`attend(value [B, S, C], shapes, *points)` on the cells of two feature maps."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, first, second, *points):
        value = torch.cat([m.flatten(2) for m in (first, second)], 2).transpose(1, 2)
        return self.attend(value, (first.shape[2:], second.shape[2:]), *points)


class Attend(nn.Module):
    """An op as `attend` of `Levels`."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, value, shapes, *points):
        return self.op(value.unflatten(-1, (HEADS, -1)), shapes, *points)


class AttendLayer(nn.Module):
    """The layer as `attend` of `Levels`."""

    def __init__(self):
        super().__init__()
        self.layer = MSDeformAttn(HEADS * CHANNELS, num_levels=2, num_heads=HEADS, num_points=POINTS)
        nn.init.normal_(self.layer.sampling_offsets.weight, std=0.3)
        nn.init.normal_(self.layer.attention_weights.weight, std=0.3)

    def forward(self, value, shapes, query, reference):
        return self.layer(query, reference, value, shapes)


MODELS = {
    "deform_sample": (partial(Attend, deform_sample), sampling_points),
    "deform_sample-unweighted": (partial(Attend, deform_sample), lambda B, Q: sampling_points(B, Q)[:1]),
    "ms_deform_attn": (partial(Attend, ms_deform_attn), attention_points),
    "ms_deform_attn-boxes": (partial(Attend, ms_deform_attn), partial(attention_points, reference_size=4)),
    "MSDeformAttn": (AttendLayer, layer_inputs),
}
every_model = pytest.mark.parametrize(("attend", "points"), MODELS.values(), ids=MODELS)


def inputs(points, B, Q, *sizes):
    return *(torch.randn(B, HEADS * CHANNELS, *size) for size in sizes), *points(B, Q)


def with_gradients(function, args):
    leaves = [tensor.detach().requires_grad_() for tensor in args]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


@every_model
def test_compiles_once_for_every_size(attend, points):
    compilations = 0

    def backend(graph, args):
        nonlocal compilations
        compilations += 1

        def compiler(graph, args):
            return make_boxed_func(graph.forward)

        return aot_module_simplified(graph, args, fw_compiler=compiler, bw_compiler=compiler)

    model = Levels(attend())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    # Sizes that happen to be equal in the first call would be taken for one; 0 and 1 torch always compiles apart.
    for sizes in ((5, 11, (6, 7), (9, 10)), (7, 12, (8, 6), (4, 2)), (2, 300, (10, 3), (5, 5)), (3, 3, (2, 2), (2, 2))):
        args = inputs(points, *sizes)
        for ours, eager in zip(with_gradients(compiled, args), with_gradients(model, args), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert compilations == 1


@every_model
def test_no_dimension_marked_dynamic_is_specialised(attend, points):
    model = Levels(attend())
    args = inputs(points, 5, 11, (6, 7), (9, 10))
    for index, tensor in enumerate(args):
        for dim in (0, 2, 3) if index < 2 else (0, 1):
            torch._dynamo.mark_dynamic(tensor, dim)
    # torch raises for a marked dimension that a guard holds to one size.
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*args), model(*args))


@needs_compiler
def test_inductor_compiles_forward_and_backward():
    model = Levels(Attend(ms_deform_attn))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for sizes in ((5, 11, (6, 7), (9, 10)), (7, 12, (8, 6), (4, 2))):
        args = inputs(attention_points, *sizes)
        for ours, eager in zip(with_gradients(compiled, args), with_gradients(model, args), strict=True):
            torch.testing.assert_close(ours, eager)


B, Q = Dim("B"), Dim("Q")
# A map of one row or column is laid out in memory as others are not, and torch.export asks for a decision.
MAPS = tuple({0: B, 2: Dim(f"h{level}", min=2), 3: Dim(f"w{level}", min=2)} for level in range(2))


@every_model
def test_exports_with_dynamic_shapes(attend, points):
    model = Levels(attend())
    args = inputs(points, 5, 11, (6, 7), (9, 10))
    dynamic = *MAPS, ({0: B, 1: Q},) * (len(args) - 2)
    exported = torch.export.export(model, args, dynamic_shapes=dynamic).module()
    for sizes in ((5, 11, (6, 7), (9, 10)), (1, 1, (2, 9), (3, 2)), (2, 300, (10, 3), (5, 5))):
        args = inputs(points, *sizes)
        torch.testing.assert_close(exported(*args), model(*args))


@pytest.mark.parametrize("table_size", [None, (7, 7)])
def test_deformable_attention_exports_with_dynamic_shapes(table_size):
    model = DeformableAttention(16, 4, table_size=table_size)
    dynamic = ({0: B, 1: Dim("H", min=2), 2: Dim("W", min=2)},)
    exported = torch.export.export(model, (torch.randn(5, 6, 7, 16),), dynamic_shapes=dynamic).module()
    for shape in ((5, 6, 7, 16), (1, 9, 2, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), model(x))


@needs_compiler
def test_an_aot_inductor_package_runs(tmp_path):
    """The package calls the op by its name: a process that loads it needs `import dat.ops`, which defines the op."""
    model = Levels(AttendLayer()).eval()
    args = inputs(layer_inputs, 5, 11, (6, 7), (9, 10))
    exported = torch.export.export(model, args, dynamic_shapes=(*MAPS, ({0: B, 1: Q},) * 2))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for sizes in ((5, 11, (6, 7), (9, 10)), (1, 3, (8, 6), (4, 2))):
        args = inputs(layer_inputs, *sizes)
        torch.testing.assert_close(loaded(*args), model(*args))
