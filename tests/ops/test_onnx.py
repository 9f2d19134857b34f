from functools import partial

import onnxruntime
import pytest
import torch
from torch import nn

from dat.layers import DeformableAttention, MSDeformAttn
from dat.ops import deform_sample, ms_deform_attn
from dat.ops.onnx import translation_table

# torch.onnx says so of every dimension that two inputs share.
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name")

HEADS, CHANNELS, POINTS = 2, 4, 3


def export(model, args, dynamic_shapes):
    """A function that runs the exported model in onnxruntime, and the operators in its graph."""
    # Where gradients are on torch.onnx exports an attention with a learned bias twice, with different strides.
    with torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            args,
            opset_version=20,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]

    def run(*tensors):
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run, [node.op_type for node in program.model.graph]


def agree(model, export_args, dynamic_shapes, *other_args):
    run, operators = export(model, export_args, dynamic_shapes)
    for args in (export_args, *other_args):
        with torch.no_grad():
            torch.testing.assert_close(run(*args), model(*args), rtol=0, atol=1e-5)
    return operators


class Op(nn.Module):
    """An op on the levels of two feature maps, whose sizes are known only when it runs."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, first, second, *points):
        maps = first, second
        value = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2).unflatten(-1, (HEADS, -1))
        return self.op(value, [tuple(m.shape[2:]) for m in maps], *points)


def rand(*shape, dtype=torch.float32, low=-0.3, high=1.3):
    return torch.rand(shape, dtype=dtype) * (high - low) + low


def maps(B, *sizes):
    return tuple(torch.randn(B, HEADS * CHANNELS, *size) for size in sizes)


MAPS = {0: "B", 2: "h0", 3: "w0"}, {0: "B", 2: "h1", 3: "w1"}
QUERIES = {0: "B", 1: "Q"}
EXAMPLE = 2, 5, (6, 7), (3, 4)
OTHERS = (1, 9, (9, 3), (1, 1)), (3, 1, (2, 8), (5, 1))


@pytest.mark.parametrize(("weighted", "align_corners"), [(False, True), (True, False)])
def test_deform_sample_becomes_grid_sample_of_any_batch_and_size(weighted, align_corners):
    def args(B, Q, *sizes):
        layout = (B, Q, HEADS, 2, POINTS)
        return *maps(B, *sizes), rand(*layout, 2), *([torch.randn(layout)] if weighted else [])

    torch.manual_seed(0)
    model = Op(partial(deform_sample, align_corners=align_corners))
    dynamic = *MAPS, (QUERIES,) * (1 + weighted)
    operators = agree(model, args(*EXAMPLE), dynamic, *(args(*other) for other in OTHERS))
    assert operators.count("GridSample") == 2


@pytest.mark.parametrize("reference_size", [2, 4])
def test_ms_deform_attn_becomes_grid_sample_of_any_batch_and_size(reference_size):
    def args(B, Q, *sizes):
        layout = (B, Q, HEADS, 2, POINTS)
        return *maps(B, *sizes), rand(B, Q, 2, reference_size), rand(*layout, 2, low=-3, high=3), torch.randn(layout)

    torch.manual_seed(0)
    dynamic = *MAPS, (QUERIES,) * 3
    operators = agree(Op(ms_deform_attn), args(*EXAMPLE), dynamic, *(args(*other) for other in OTHERS))
    assert operators.count("GridSample") == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_values_of_other_dtypes(dtype):
    class Model(nn.Module):
        def forward(self, value, locations, weights, reference, offsets, logits):
            return deform_sample(value, ((3, 4),), locations, weights) + ms_deform_attn(
                value, ((3, 4),), reference, offsets, logits
            )

    torch.manual_seed(0)
    real = torch.promote_types(dtype, torch.float32)
    layout = (2, 5, HEADS, 1, POINTS)
    value, weights = torch.randn(2, 12, HEADS, CHANNELS, dtype=dtype), torch.randn(layout, dtype=dtype)
    reference, offsets = rand(2, 5, 1, 2, dtype=real), rand(*layout, 2, dtype=dtype)
    args = value, rand(*layout, 2, dtype=real), weights, reference, offsets, weights
    run, _ = export(Model(), args, None)
    out = run(*args)
    assert out.dtype == dtype
    tolerance = 2e-3 if dtype == torch.float16 else 1e-12
    torch.testing.assert_close(out, Model()(*args), rtol=tolerance, atol=tolerance)


class Detector(nn.Module):
    """Images of any size to a two-level pyramid, to deformable attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 4, 1)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.query = nn.Parameter(torch.randn(5, 16))
        self.attn = MSDeformAttn(16, num_levels=2, num_heads=4, num_points=3)
        nn.init.normal_(self.attn.sampling_offsets.weight, std=0.3)
        nn.init.normal_(self.attn.attention_weights.weight, std=0.3)

    def forward(self, images):
        first = self.stem(images)
        second = self.down(first)
        value = torch.cat([m.flatten(2).transpose(1, 2) for m in (first, second)], 1)
        query = self.query + value.mean(1, keepdim=True)
        reference = query[:, :, None, :2].sigmoid().expand(-1, -1, 2, -1)
        padding = value[..., 0] > 1
        return self.attn(query, reference, value, [m.shape[2:] for m in (first, second)], padding)


def test_a_detector_runs_on_images_of_any_batch_and_size():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96), torch.randn(1, 3, 80, 56), torch.randn(3, 3, 41, 73)
    dynamic = ({0: "B", 2: "H", 3: "W"},)
    agree(Detector(), images[:1], dynamic, *((other,) for other in images[1:]))


@pytest.mark.parametrize("kwargs", [{}, {"table_size": (7, 7), "stride": 2, "num_groups": 2}])
def test_deformable_attention_runs_on_maps_of_any_batch_and_size(kwargs):
    torch.manual_seed(0)
    dynamic = ({0: "B", 1: "H", 2: "W"},)
    agree(DeformableAttention(16, 4, **kwargs), (torch.randn(2, 6, 7, 16),), dynamic, (torch.randn(1, 9, 5, 16),))


@pytest.mark.parametrize("opset_version", [16, 18, 19])
def test_sampling_below_opset_20_is_refused_at_export(opset_version):
    args = (
        torch.randn(1, 12, HEADS, CHANNELS),
        torch.rand(1, 5, HEADS, 1, POINTS, 2),
        torch.rand(1, 5, HEADS, 1, POINTS),
    )
    with pytest.raises(torch.onnx.OnnxExporterError, match="opset_version must be at least 20"), torch.no_grad():
        torch.onnx.export(
            Sample().eval(),
            args,
            opset_version=opset_version,
            custom_translation_table=translation_table(),
            verbose=False,
        )


class Sample(nn.Module):
    def forward(self, value, locations, weights):
        return deform_sample(value, ((3, 4),), locations, weights)
